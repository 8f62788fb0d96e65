"""Rows of the Hugging Face hub's datasets, and how long its answers are waited for.

hub:NAME[:CONFIG][:SPLIT]   streamed (needs datasets); split `train`
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from .parquet import missing_package
from .tables import Row

HUB = "hub:"
ANSWER = 30  # seconds; to list the files of the largest repositories takes the hub some
_AT_ONCE = 64  # rows; enough that what is set and put back for them costs nothing
_TRIES = 2  # of a lost connection: an interruption of most of a minute is survived
_STATUS = re.compile(r"\d{3} Client Error")  # a line before what happened, of huggingface_hub


def hub_rows(place: str) -> Iterator[Row]:
    """The rows of a dataset of the hub.

    Raises:
        ConnectionError: the hub is not reached or stops answering, or does not have the dataset,
            its config or its split. The rows until then have been given.
        ModuleNotFoundError: datasets is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise missing_package("datasets", place) from error
    name, config, split = (*place.removeprefix(HUB).split(":"), "", "")[:3]
    number = 0
    stream: Iterator[Any] | None = None
    while True:
        rows: list[Any] = []
        failure: Exception | None = None
        try:
            with _limited_patience(datasets.config):
                if stream is None:
                    options = {"split": split or "train", "streaming": True}
                    stream = iter(datasets.load_dataset(name, config or None, **options))
                for fields in islice(stream, _AT_ONCE):
                    rows.append(fields)  # those before an error stay
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # those of the HTTP client below datasets have no common base
            failure = error
        for fields in rows:
            number += 1
            yield Row(f"{place}: row {number}", dict(fields))
        if failure is not None:
            answered = getattr(failure, "response", None) is not None or isinstance(
                failure, (ValueError, datasets.exceptions.DatasetNotFoundError)
            )
            hint = "" if answered else "; without a network, give files"
            raise ConnectionError(
                f"{place}: cannot be read after {number} rows ({_reason(failure)}){hint}"
            ) from failure
        if len(rows) < _AT_ONCE:
            return


def _reason(error: Exception) -> str:
    """The line of an error's text that tells what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and _STATUS.match(lines[0]):
        return lines[1]
    return lines[0] if lines else type(error).__name__


@contextmanager
def _limited_patience(config: Any) -> Iterator[None]:
    """Within it a connection that is lost while rows are read is given up after `_TRIES` tries.

    Each is six requests over 23 seconds, besides what waits for an answer. With the twenty tries of
    datasets a user waited for ten minutes to half an hour.
    """
    limits = ("STREAMING_READ_MAX_RETRIES", "STREAMING_OPEN_MAX_RETRIES")
    before = {name: getattr(config, name) for name in limits if hasattr(config, name)}
    try:
        for name, tries in before.items():
            setattr(config, name, min(tries, _TRIES))
        with answered_in_time():
            yield
    finally:
        for name, tries in before.items():
            setattr(config, name, tries)


@contextmanager
def answered_in_time() -> Iterator[None]:
    """Within it huggingface_hub waits no longer than `ANSWER` seconds for each answer.

    For what a model is and which files it has it would wait for ever. Where HF_HUB_DOWNLOAD_TIMEOUT
    or HF_HUB_ETAG_TIMEOUT ask for more, they have it.
    """
    from huggingface_hub import constants, get_session

    client: Any = get_session()
    hooks = getattr(client, "event_hooks", None)
    if hooks is None:  # requests' session, before huggingface_hub 1.0
        yield
        return
    longest = max(ANSWER, constants.HF_HUB_DOWNLOAD_TIMEOUT, constants.HF_HUB_ETAG_TIMEOUT)

    def limit(request: Any) -> None:
        times = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            step: longest if time is None else min(time, longest) for step, time in times.items()
        }

    client.event_hooks = {**hooks, "request": [*hooks.get("request", ()), limit]}
    try:
        yield
    finally:
        client.event_hooks = hooks
