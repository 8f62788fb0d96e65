"""What `bertkern data inspect` prints: pre-training examples in colours, and their statistics.

shown/original   [MASK]/word was masked, other/word became a random token, word/word was chosen
                 and stays; everything else is as in the text
"""

import io
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer, decoders

from bertkern.data import PretrainingData
from bertkern.data.packing import Ids
from bertkern.data.pairs import IS_NEXT

_MASKED, _RANDOM, _KEPT = "bold red", "bold yellow", "bold green"
_SEGMENTS = ("", "cyan")  # A, B
_SPECIAL = "dim"
_PAGE_WIDTH = 120
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Pre-training examples</title>
<style>{stylesheet} body {{ background: {background}; color: {foreground}; margin: 2rem }}</style>
<pre style="font-family: Menlo, Consolas, monospace; white-space: pre-wrap">{code}</pre></html>
"""


@dataclass
class Example:
    """One sequence: ids as shown and before masking, token types, places predicted, the label."""

    shown: Ids
    original: Ids
    types: Ids
    chosen: Ids
    label: int


class ExamplesView:
    """Examples of an epoch, to be printed and measured.

    Args:
        data: what makes them.
        tokenizer: what names their ids.
        tokens_per_batch: tokens that are made at once.
    """

    def __init__(self, data: PretrainingData, tokenizer: Tokenizer, tokens_per_batch: int) -> None:
        self._data, self._tokenizer = data, tokenizer
        self._tokens_per_batch = tokens_per_batch
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self.examples: list[Example] = []

    def read(self, epoch: int, count: int) -> None:
        """Make the first `count` examples of an epoch, or all if there are fewer."""
        self.examples = []
        for batch in self._data.batches(epoch, self._tokens_per_batch):
            part = batch.part(0, min(len(batch), count - len(self.examples)))
            original = part.input_ids.clone()
            original[part.label_tokens] = part.labels
            places, bounds = part.label_tokens.numpy(), part.cu_seqlens.tolist()
            for i, (first, last) in enumerate(pairwise(bounds)):
                mine = places[(places >= first) & (places < last)]
                self.examples.append(
                    Example(
                        part.input_ids[first:last].numpy(),
                        original[first:last].numpy(),
                        part.token_type_ids[first:last].numpy(),
                        mine - first,
                        int(part.next_sentence_label[i]),
                    )
                )
            if len(self.examples) == count:
                return

    def print_examples(self, console: Console, count: int) -> None:
        """Print the first examples, under a line that tells the colours."""
        if count:
            legend = Text("A", _SEGMENTS[0]).append(" B", _SEGMENTS[1])
            legend.append("  [MASK]/word", _MASKED).append(" masked")
            legend.append("  other/word", _RANDOM).append(" replaced by a random token")
            legend.append("  word/word", _KEPT).append(" predicted, but kept")
            console.print(legend, "")
        for number, example in enumerate(self.examples[:count], start=1):
            relation = "B is next" if example.label == IS_NEXT else "B is random"
            head = f"{number}: {len(example.shown)} tokens, {len(example.chosen)} predicted, "
            console.print(Text(head + relation, "bold"))
            console.print(self._text(example), "")

    def _text(self, example: Example) -> Text:
        special = self._data.special
        text = Text()
        chosen = set(example.chosen.tolist())
        for place, (shown, was) in enumerate(
            zip(example.shown.tolist(), example.original.tolist(), strict=True)
        ):
            word, opens = self._word(was)
            if place and opens:
                text.append(" ")
            if place not in chosen:
                is_special = was in special.as_tuple()
                text.append(word, _SPECIAL if is_special else _SEGMENTS[example.types[place]])
                continue
            style = _MASKED if shown == special.mask else _KEPT if shown == was else _RANDOM
            text.append(f"{self._word(shown)[0]}/{word}", style)
        return text

    def _word(self, token_id: int) -> tuple[str, bool]:
        """A token's text and whether there is a space before it."""
        token = self._tokenizer.id_to_token(token_id) or ""
        if self._byte_level and token_id not in self._data.special.as_tuple():
            return self._tokenizer.decode([token_id]).lstrip(" "), token.startswith("Ġ")
        return token.removeprefix("##"), not token.startswith("##")

    def statistics(self) -> list[tuple[str, str, str]]:
        """(what, measured, expected) over the examples that were read."""
        settings, examples = self._data.settings, self.examples
        lengths = np.array([len(e.shown) for e in examples])
        predictions = np.array([len(e.chosen) for e in examples])
        shown = np.concatenate([e.shown[e.chosen] for e in examples])
        was = np.concatenate([e.original[e.chosen] for e in examples])
        masked, kept = shown == self._data.special.mask, shown == was
        is_next = np.array([e.label == IS_NEXT for e in examples])

        def share(part: np.ndarray) -> str:
            return f"{part.mean():.2%}" if len(part) else "none"

        return [
            ("examples", f"{len(examples):,}", ""),
            ("tokens", f"{lengths.sum():,}", ""),
            ("tokens of an example", f"{lengths.mean():.1f}", f"at most {settings.max_length}"),
            ("B is next", share(is_next), "50%"),
            (
                "predicted tokens",
                f"{predictions.sum() / lengths.sum():.2%}",
                f"{settings.masked_fraction:.0%}",
            ),
            (
                "of an example, at most",
                str(predictions.max()),
                f"at most {settings.prediction_limit}",
            ),
            ("of them [MASK]", share(masked), "80%"),
            ("random", share(~masked & ~kept), "10%"),
            ("kept", share(kept), "10%"),
        ]

    def print_statistics(self, console: Console) -> None:
        """Print them as a table."""
        table = Table("", "measured", "expected", box=None, pad_edge=False)
        for row in self.statistics():
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)

    def page(self, count: int) -> str:
        """The examples and statistics as an HTML page."""
        console = Console(
            record=True, file=io.StringIO(), width=_PAGE_WIDTH, highlight=False, force_terminal=True
        )
        self.print_examples(console, count)
        self.print_statistics(console)
        return console.export_html(code_format=_PAGE)
