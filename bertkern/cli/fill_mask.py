"""bertkern fill-mask: what a pre-trained BERT would put in place of [MASK]."""

from typing import Annotated

import typer
from rich.table import Table

from .console import CommandError, out, pick_device


def fill_mask(
    texts: Annotated[
        list[str], typer.Argument(help="Texts with [MASK] where a word is to be found.")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="Folder with config.json, model.safetensors, tokenizer."
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="Words to show for each place.")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Show what a pre-trained BERT puts in place of \\[MASK].

    Example: bertkern fill-mask "the file is [MASK] for reading" --model demo-output/model
    """
    from bertkern import models
    from bertkern.data import load_tokenizer

    network = models.BertForPreTraining.from_pretrained(model).to(pick_device(device))
    tokenizer = load_tokenizer(model)
    if top > network.config.vocab_size:
        raise CommandError(f"--top {top}: the vocabulary has {network.config.vocab_size} tokens")
    for text in texts:
        print_guesses(text, models.fill_mask(network, tokenizer, text, top))


def print_guesses(text: str, guesses: list[list[tuple[str, float]]]) -> None:
    """Print a text and, for each of its [MASK]s, the words with their probabilities."""
    out.print(text, markup=False, style="bold")
    table = Table(box=None, show_header=False, pad_edge=False)
    for words in guesses:
        table.add_row("  ", *[f"{word} {probability:.0%}" for word, probability in words])
    out.print(table)
