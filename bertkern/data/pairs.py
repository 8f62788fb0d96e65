"""Which sentence pairs an epoch has, and in which order (Devlin et al. 2018, appendix A).

    pair    sentences of a document are gathered until they fill the length; A is a random number
            of them. With probability 1/2, B is the rest (label 0); else it is text from a random
            sentence of another document on (label 1), and the rest is used again
    cut     what exceeds the length goes token by token from the longer of A and B, from its front
            or its back by chance

A pair is planned, not copied: where A and B lie in the corpus. The pairs of a document are a
function of (seed, epoch, copy, document); documents come in a random order, their pairs are
shuffled within windows of some million tokens, and all that is a function of (seed, epoch). So
memory is bounded, and any process can make any window.

Legend: D documents, W documents of a window (copies counted), E pairs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .corpus import Corpus
from .masking import MaskingSettings
from .packing import Ids
from .random_bits import Bits, below, derive, heads, uniform

IS_NEXT, IS_RANDOM = 0, 1

# tokens a_start .. a_start + a_size - 1 of the corpus and those of B, the label, the pair's key
PAIR = np.dtype(
    [(name, "i8") for name in ("a_start", "a_size", "b_start", "b_size", "label")] + [("key", "u8")]
)
Pairs = NDArray[Any]  # of PAIR

WINDOW_TOKENS = 1 << 22
_SPECIAL_TOKENS = 3  # [CLS] A [SEP] B [SEP]
# What is drawn below a seed, and below a pair's key; `masking` goes on with 8.
_ORDER, _CONTENT = 0, 1
_IS_SHORT, _LENGTH, _SPLIT, _LABEL, _DOCUMENT, _SENTENCE, _CUT_A, _CUT_B = range(8)


def lengths_of(pairs: Pairs) -> Ids:
    """Tokens of each pair, special ones included, [E]."""
    return pairs["a_size"] + pairs["b_size"] + _SPECIAL_TOKENS


class EpochPlan:
    """The pairs of an epoch, window by window.

    Args:
        corpus: of two documents or more.
        settings: how pairs are made.
        seed: of everything random here.
        epoch: which one, from 0 on.
        window_tokens: of the documents whose pairs are shuffled together.
    """

    def __init__(
        self,
        corpus: Corpus,
        settings: MaskingSettings,
        seed: int,
        epoch: int,
        window_tokens: int = WINDOW_TOKENS,
    ) -> None:
        self._corpus = corpus
        self._settings = settings
        entries = np.arange(corpus.documents * settings.duplication)
        order_key = derive(derive(seed, _ORDER), epoch)
        self._order = np.argsort(derive(order_key, entries), kind="stable")
        self._shuffle_key = derive(order_key, len(entries))
        self._content_key = derive(derive(seed, _CONTENT), 0 if settings.static_masks else epoch)
        sizes = corpus.tokens_of_documents()[self._order % corpus.documents]
        window = np.cumsum(sizes) // window_tokens
        bounds = np.flatnonzero(np.diff(window)) + 1
        self._bounds = [0, *bounds.tolist(), len(entries)]

    def __len__(self) -> int:
        """How many windows there are."""
        return len(self._bounds) - 1

    def window(self, number: int) -> Pairs:
        """The pairs of a window, shuffled."""
        entries = self._order[self._bounds[number] : self._bounds[number + 1]]
        copies, documents = np.divmod(entries, self._corpus.documents)
        keys = derive(derive(self._content_key, copies), documents)
        pairs = self._pairs(documents, keys)
        return pairs[np.argsort(derive(self._shuffle_key, pairs["key"]), kind="stable")]

    def _pairs(self, documents: Ids, keys: Bits) -> Pairs:
        """The pairs of documents [W] with their keys: the first of each, then the second..."""
        corpus, room = self._corpus, self._settings.max_length - _SPECIAL_TOKENS
        starts = corpus.sentence_starts
        place = corpus.chosen[documents]
        first, stop = corpus.document_starts[place], corpus.document_starts[place + 1]
        made = []
        number = 0
        while len(first):
            key = derive(keys, number)
            is_short = uniform(derive(key, _IS_SHORT)) < self._settings.short_sequence_probability
            target = np.where(is_short, 2 + below(derive(key, _LENGTH), room - 1), room)
            # two sentences at least, so that both labels are possible
            end = np.searchsorted(starts, starts[first] + target)
            end = np.minimum(np.maximum(end, first + 2), stop)
            split = first + 1 + below(derive(key, _SPLIT), end - first - 1)
            is_random = uniform(derive(key, _LABEL)) >= 0.5
            other, other_end = self._elsewhere(
                documents, target - (starts[split] - starts[first]), key
            )
            pairs = np.empty(len(first), dtype=PAIR)
            pairs["a_start"], pairs["a_size"] = starts[first], starts[split] - starts[first]
            pairs["b_start"] = starts[np.where(is_random, other, split)]
            pairs["b_size"] = starts[np.where(is_random, other_end, end)] - pairs["b_start"]
            pairs["label"] = np.where(is_random, IS_RANDOM, IS_NEXT)
            pairs["key"] = key
            _truncate(pairs, room)
            made.append(pairs)
            first = np.where(is_random, split, end)
            more = first < stop - 1
            documents, keys, first, stop = documents[more], keys[more], first[more], stop[more]
            number += 1
        return np.concatenate(made)

    def _elsewhere(self, documents: Ids, tokens: Ids, key: Bits) -> tuple[Ids, Ids]:
        """Sentences first .. last - 1 with so many tokens or more, from another document each.

        They begin at a random sentence and end with their document at the latest.
        """
        corpus = self._corpus
        other = below(derive(key, _DOCUMENT), corpus.documents - 1)
        other = corpus.chosen[other + (other >= documents)]
        first, stop = corpus.document_starts[other], corpus.document_starts[other + 1]
        first = first + below(derive(key, _SENTENCE), stop - first)
        starts = corpus.sentence_starts
        last = np.searchsorted(starts, starts[first] + np.maximum(tokens, 1))
        return first, np.minimum(last, stop)


def _truncate(pairs: Pairs, room: int) -> None:
    """Cut A and B to `room` tokens together."""
    a, b = pairs["a_size"], pairs["b_size"]
    excess = np.maximum(a + b - room, 0)
    # the longer loses tokens until both are equal, then they lose in turn
    cut_a = np.minimum(np.maximum(a - b, 0), excess)
    cut_b = np.minimum(np.maximum(b - a, 0), excess)
    rest = excess - cut_a - cut_b
    cut_a, cut_b = cut_a + rest // 2, cut_b + (rest + 1) // 2
    for name, cut, purpose in (("a", cut_a, _CUT_A), ("b", cut_b, _CUT_B)):
        pairs[f"{name}_start"] += heads(derive(pairs["key"], purpose), cut)
        pairs[f"{name}_size"] -= cut


def windows(
    corpus: Corpus,
    settings: MaskingSettings,
    seed: int,
    epoch: int,
    workers: int = 0,
    window_tokens: int = WINDOW_TOKENS,
) -> Iterator[Pairs]:
    """The windows of an epoch in order; with workers, other processes make them ahead.

    Where a worker dies, this process makes the rest, after a warning: a signal to all processes of
    a run, as schedulers send, must leave it able to save. Closed early, it waits for the window
    that is being made, so that no process and no thread outlives it.
    """
    arguments = corpus, settings, seed, epoch, window_tokens
    plan = EpochPlan(*arguments)
    count = len(plan)
    if not workers:
        yield from map(plan.window, range(count))
        return
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(
        min(workers, count),
        multiprocessing.get_context(method),
        initializer=_start_worker,
        initargs=arguments,
    )
    ahead: deque[Future[Pairs]] = deque()
    submitted = 0
    is_broken = False
    try:
        for number in range(count):
            made = None
            try:
                while not is_broken and submitted < count and len(ahead) <= workers:
                    ahead.append(pool.submit(_make_window, submitted))
                    submitted += 1
                made = None if is_broken else ahead.popleft().result()
            except BrokenProcessPool:
                is_broken = True
                warnings.warn(
                    "a process that makes training data died (killed, or out of memory?), the log "
                    "above may say why; the training process makes the data itself from here on. A "
                    "script that uses workers needs `if __name__ == '__main__':`",
                    RuntimeWarning,
                    stacklevel=2,
                )
            yield plan.window(number) if made is None else made
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_plan: EpochPlan  # of a worker process


def _start_worker(*arguments: Any) -> None:
    global _plan
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the training process's to handle
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()
    _plan = EpochPlan(*arguments)


def _follow(parent: int) -> None:
    """End this process when its parent has ended, even if that was killed."""
    wait([parent])
    os._exit(1)


def _make_window(number: int) -> Pairs:
    return _plan.window(number)
