"""Skip-gram word vectors with negative sampling (Mikolov et al. 2013), from text.

    loss of a pair = -log σ(u_o · v_c) - Σ_k log σ(-u_k · v_c)

v_c is the input vector of the centre word c, u_o the output vector of a word o near it, u_k those
of K words drawn at random; a drawn word that is o itself counts for nothing, as in word2vec. The
input vectors are the result. Many pairs are computed at once: each row of the tables gets the sum
of its gradients g, as if the pairs of a step had come one after another with the vectors of its
beginning, and Adagrad's step (Duchi et al. 2011) or, with optimizer="sgd", word2vec's:

    sgd       row -= rate · g
    adagrad   h += g²; row -= rate · g / √h

where the rate falls linearly with the words that are done, to 1/10000. For example:

    text = WordText.build(standard_library_text, "text")
    result = train_word_vectors(text, WordVectorSettings(epochs=20))
    result.vectors.nearest("integer")

A run is a function of (text, settings). Ctrl-C and SIGTERM end it after the piece of text at hand
with a checkpoint; resumed, it ends with the same bits as one that was never interrupted.

Legend: V words, d numbers of a vector, P pairs, K negatives, R different words among them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bertkern.data.skip_gram import Pairs, SkipGrams, WordText
from bertkern.models.checkpoint import read_tensors
from bertkern.models.word_vectors import WordVectors

from .checkpoint import write_tensors
from .interruption import Interruption, TrainingInterrupted

OPTIMIZERS = {"adagrad": 0.3, "sgd": 0.025}  # and their learning rates
_LEAST_RATE = 1e-4  # of the learning rate, at the end
_CHECKPOINT_SECONDS = 120.0
_ENOUGH_WORDS = 2_000_000  # read in all epochs together


@dataclass(frozen=True)
class WordVectorSettings:
    """What a run is a function of, besides its text.

    Attributes:
        size: d.
        window: most words on each side of a word that are predicted from it.
        negative: K.
        sample: t: more frequent words are left out at random, with probability 1 - √(t / f).
        epochs: passes through the text.
        optimizer: "adagrad" or "sgd".
        learning_rate: at the beginning; None: 0.3 of Adagrad, 0.025 (word2vec's) of SGD.
        pairs_per_step: P.
        seed: of the first vectors and of all that is drawn.

    Raises:
        ValueError: a value out of range, or another optimizer.
    """

    size: int = 100
    window: int = 2
    negative: int = 5
    sample: float = 1e-3
    epochs: int = 5
    optimizer: str = "adagrad"
    learning_rate: float | None = None
    pairs_per_step: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("size", "window", "negative", "epochs", "pairs_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if not 0 <= self.sample <= 1:
            raise ValueError(f"sample must be in 0..1, not {self.sample}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}"
            )
        if not self.rate > 0:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")

    @property
    def rate(self) -> float:
        """The learning rate at the beginning."""
        return OPTIMIZERS[self.optimizer] if self.learning_rate is None else self.learning_rate


def epochs_for(words: int) -> int:
    """Passes through a text of so many words: more through a small one, 5 to 50."""
    return min(50, max(5, round(_ENOUGH_WORDS / max(words, 1))))


class Gradients(NamedTuple):
    """Of the summed loss of some pairs, for the rows that have one.

    Attributes:
        loss: the sum, float64.
        input_rows, input: int64 [R], and [R, d].
        output_rows, output: the same of the other table.
    """

    loss: Tensor
    input_rows: Tensor
    input: Tensor
    output_rows: Tensor
    output: Tensor


def skip_gram_gradients(input: Tensor, output: Tensor, centres: Tensor, words: Tensor) -> Gradients:
    """The loss of pairs, summed, and its gradients, the same bits with any number of threads.

    Args:
        input, output: float [V, d], the vectors v and u.
        centres: int64 [P].
        words: int64 [P, 1 + K]: the near word, then those drawn at random.
    """
    v = input.index_select(0, centres)  # [P, d]
    u = output.index_select(0, words.reshape(-1)).view(*words.shape, -1)  # [P, 1 + K, d]
    scores = torch.bmm(u, v.unsqueeze(2)).squeeze(2)
    near = torch.zeros_like(scores)
    near[:, 0] = 1.0
    counts = (words != words[:, :1]).to(scores.dtype) + near
    # -log σ(s) = softplus(-s) of the near word, -log σ(-s) = softplus(s) of the others
    loss = (F.softplus(scores - 2 * near * scores) * counts).sum(dtype=torch.float64)
    slopes = (torch.sigmoid(scores) - near) * counts  # dloss/dscores
    # dloss/dv = Σ slope · u, dloss/du = Σ slope · v
    pulls = torch.bmm(slopes.unsqueeze(1), u).squeeze(1)
    pairs = torch.arange(len(centres), device=centres.device)
    owners = centres.unsqueeze(1).expand_as(words)
    return Gradients(
        loss,
        *_sum_by_row(centres, pairs, pulls, torch.ones_like(slopes[:, 0])),
        *_sum_by_row(words.reshape(-1), owners.reshape(-1), input, slopes.reshape(-1)),
    )


def _sum_by_row(
    rows: Tensor, sources: Tensor, table: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """(different rows [R], for each the sum of weight · table[source] over its entries [R, d])."""
    ordered, order = torch.sort(rows, stable=True)
    different, counts = torch.unique_consecutive(ordered, return_counts=True)
    starts = torch.cumsum(counts, 0) - counts
    sums = F.embedding_bag(
        sources[order], table, starts, mode="sum", per_sample_weights=weights[order]
    )
    return different, sums


class SkipGramTables:
    """The vectors of a run, and the sums of Adagrad.

    Args:
        count: V.
        settings: size, optimizer and seed count here.
        device: where they are.
    """

    def __init__(
        self, count: int, settings: WordVectorSettings, device: torch.device | str = "cpu"
    ) -> None:
        generator = torch.Generator().manual_seed(settings.seed)
        first = torch.rand(count, settings.size, generator=generator)
        self.input = ((first - 0.5) / settings.size).to(device)  # as word2vec begins
        self.output = torch.zeros_like(self.input)
        self.squares: dict[str, Tensor] = {}
        if settings.optimizer == "adagrad":
            self.squares = {n: torch.zeros_like(self.input) for n in ("input", "output")}

    def step(self, centres: Tensor, words: Tensor, rate: float) -> Tensor:
        """One update by some pairs; their summed loss before it."""
        found = skip_gram_gradients(self.input, self.output, centres, words)
        self._update("input", found.input_rows, found.input, rate)
        self._update("output", found.output_rows, found.output, rate)
        return found.loss

    def _update(self, name: str, rows: Tensor, gradient: Tensor, rate: float) -> None:
        if name in self.squares:
            squares = self.squares[name].index_select(0, rows).addcmul_(gradient, gradient)
            self.squares[name].index_copy_(0, rows, squares)
            # where all gradients were 0 so far, √h is 0, and the step shall be 0
            gradient = gradient / squares.sqrt().clamp_min(1e-30)
        getattr(self, name).index_add_(0, rows, gradient, alpha=-rate)

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by name, for a checkpoint."""
        squares = {f"squares.{name}": tensor for name, tensor in self.squares.items()}
        return {"input": self.input, "output": self.output, **squares}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave.

        Raises:
            ValueError: other names or shapes.
        """
        own = self.tensors()
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in tensors.items()}:
            raise ValueError(f"tensors {', '.join(tensors)} do not fit this run")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


@dataclass
class _State:
    """Where a run stands: the next chunk, the loss of the epoch so far, those of the others."""

    epoch: int = 0
    chunk: int = 0
    loss: float = 0.0
    pairs: int = 0
    losses: tuple[float, ...] = ()

    @property
    def shown(self) -> float:
        """The mean loss of the epoch's pairs so far, at its beginning that of the one before."""
        if self.pairs:
            return self.loss / self.pairs
        return self.losses[-1] if self.losses else math.nan


@dataclass(frozen=True)
class WordVectorResult:
    """What a run has made.

    Attributes:
        vectors: of the words of the text, by falling frequency.
        losses: of each epoch, the mean over its pairs while it was trained on.
        words_per_second: of the text, read and trained on in this call.
    """

    vectors: WordVectors
    losses: list[float]
    words_per_second: float


def train_word_vectors(
    text: WordText,
    settings: WordVectorSettings | None = None,
    *,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
    progress: bool = True,
    console: Console | None = None,
    on_chunk: Callable[[int], None] | None = None,
) -> WordVectorResult:
    """Learn the vectors of a text's words.

    Args:
        text: numbered words.
        settings: how to train.
        checkpoint: a file for the state of the run, written every two minutes and at Ctrl-C.
        resume: go on from it; text and settings must be those that it was begun with.
        device: where to compute.
        progress: show a progress bar, on `console`.
        on_chunk: called with the number of pieces of text that are done, after each.

    Raises:
        FileNotFoundError: no checkpoint to resume from.
        ValueError: it is damaged, or of another run; or resume without checkpoint; or the text has
            no two words in a sentence.
        FloatingPointError: the loss is not finite.
        TrainingInterrupted: Ctrl-C or SIGTERM; it says how to go on.
    """
    settings = settings or WordVectorSettings()
    path = None if checkpoint is None else Path(checkpoint)
    pairs = SkipGrams(text, settings.window, settings.negative, settings.sample, settings.seed)
    tables = SkipGramTables(len(text.words), settings, device)
    run = {"settings": asdict(settings), "text": text.fingerprint}
    state = _State()
    if resume:
        if path is None:
            raise ValueError("resume=True needs the checkpoint to go on from")
        state = _load(path, tables, run)
    elif path is not None:
        _save(path, tables, run, state)
    chunks, written = pairs.chunks * settings.epochs, time.monotonic()
    begun, first_word = time.monotonic(), _words_done(pairs, state)
    with Interruption() as interruption, _progress(progress, console) as show:
        made = _made(pairs, state.epoch * pairs.chunks + state.chunk, chunks)
        for number, examples in enumerate(made, state.epoch * pairs.chunks + state.chunk + 1):
            _train_on(examples, pairs, tables, settings, state)
            if on_chunk is not None:
                on_chunk(number)
            done = _words_done(pairs, state)
            speed = (done - first_word) / (time.monotonic() - begun)
            show(done, len(text) * settings.epochs, f"loss {state.shown:.3f}  {speed:,.0f} words/s")
            is_over = number == chunks
            is_time = time.monotonic() - written > _CHECKPOINT_SECONDS
            if path is not None and (is_time or interruption.asked) and not is_over:
                _save(path, tables, run, state)
                written = time.monotonic()
            if interruption.asked and not is_over:
                raise TrainingInterrupted(number, chunks, path)
    speed = (_words_done(pairs, state) - first_word) / max(time.monotonic() - begun, 1e-9)
    vectors = WordVectors(text.words, tables.input.cpu().numpy())
    return WordVectorResult(vectors, list(state.losses), speed)


def _made(pairs: SkipGrams, first: int, last: int) -> Iterator[Pairs]:
    """The pairs of chunks first .. last - 1 of all epochs, the next made while one is used."""
    with ThreadPoolExecutor(max_workers=1) as maker:
        coming = None
        for number in range(first, last):
            coming = coming or maker.submit(pairs.pairs, *divmod(number, pairs.chunks))
            examples = coming.result()
            following = number + 1
            coming = (
                maker.submit(pairs.pairs, *divmod(following, pairs.chunks))
                if following < last
                else None
            )
            yield examples


def _train_on(
    examples: Pairs,
    pairs: SkipGrams,
    tables: SkipGramTables,
    settings: WordVectorSettings,
    state: _State,
) -> None:
    """Update the tables by the pairs of a chunk, and go on to the next."""
    device = tables.input.device
    centres = torch.from_numpy(examples.centres).to(device)
    words = torch.from_numpy(examples.words).to(device)
    before, after = pairs.words_before(state.chunk), pairs.words_before(state.chunk + 1)
    text = len(pairs.text)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for first in range(0, len(centres), settings.pairs_per_step):
        last = first + settings.pairs_per_step
        done = before + (after - before) * first / len(centres)
        done = (state.epoch * text + done) / (settings.epochs * text)
        rate = settings.rate * max(_LEAST_RATE, 1 - done)
        loss += tables.step(centres[first:last], words[first:last], rate)
    state.loss += float(loss)
    state.pairs += len(centres)
    state.chunk += 1
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the loss of epoch {state.epoch + 1} is not finite: a smaller learning_rate than "
            f"{settings.rate} is needed"
        )
    if state.chunk == pairs.chunks:
        if not state.pairs and not state.losses:
            raise ValueError(
                "no pairs to learn from: in the text no two words that stay (min_count, sample) "
                "stand in one sentence"
            )
        state.losses = (*state.losses, state.shown)
        state.epoch, state.chunk, state.loss, state.pairs = state.epoch + 1, 0, 0.0, 0


def _words_done(pairs: SkipGrams, state: _State) -> int:
    return state.epoch * len(pairs.text) + pairs.words_before(state.chunk)


def _save(path: Path, tables: SkipGramTables, run: dict[str, Any], state: _State) -> None:
    write_tensors(path, tables.tensors(), {"state": json.dumps({"run": run, **asdict(state)})})


def _load(path: Path, tables: SkipGramTables, run: dict[str, Any]) -> _State:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no checkpoint to resume from")
    try:
        with safe_open(path, framework="pt") as file:
            entries = json.loads((file.metadata() or {})["state"])
        stored = entries.pop("run")
        state = _State(**{**entries, "losses": tuple(entries["losses"])})
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged, or not a checkpoint of word vectors") from error
    settings = stored["settings"]
    other = [f"{k} {settings.get(k)!r}" for k, v in run["settings"].items() if settings.get(k) != v]
    if stored["text"] != run["text"]:
        other.append("another text")
    if other:
        raise ValueError(f"{path} is of another run, with {', '.join(other)}")
    try:
        tables.restore(read_tensors(path))
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    return state


@contextmanager
def _progress(shown: bool, console: Console | None) -> Iterator[Callable[[int, int, str], None]]:
    """A function that shows (words done, of how many, figures)."""
    columns = (
        TextColumn("[bold]word vectors"),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console or get_console(), disable=not shown) as progress:
        task = progress.add_task("", total=None, figures="")
        yield lambda done, total, figures: progress.update(
            task, completed=done, total=total, figures=figures
        )
