"""bertkern pretrain: a BERT from text files, with masked words and next sentences."""

from pathlib import Path
from typing import Annotated

import typer

from .console import CommandError, out, pick_device, writable_folder


def pretrain(
    files: Annotated[
        list[Path],
        typer.Argument(help="UTF-8 text files; empty lines separate documents (four at least)."),
    ],
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the model, its tokenizer and curves.")
    ],
    config: Annotated[
        Path | None,
        typer.Option(help="A config.json with the sizes, in place of the five options below."),
    ] = None,
    hidden_size: Annotated[int, typer.Option(min=1, help="Columns of the hidden states.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Encoder layers.")] = 4,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads; divide hidden-size.")] = 4,
    ffn_size: Annotated[
        int | None, typer.Option(help="Hidden columns of the feed-forward network (4 x hidden).")
    ] = None,
    vocab_size: Annotated[
        int, typer.Option(min=6, help="Size of the WordPiece vocabulary that is learned.")
    ] = 8192,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens of a sequence.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Updates of the weights.")] = 1000,
    batch_tokens: Annotated[int, typer.Option(help="Most tokens of a batch.")] = 4096,
    learning_rate: Annotated[
        float, typer.Option(help="Its peak; warm-up and decay around.")
    ] = 1e-3,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 200,
    evaluate_every: Annotated[
        int, typer.Option(min=1, help="Steps between looks at the held-out text.")
    ] = 100,
    held_out: Annotated[float, typer.Option(help="Share of the documents not trained on.")] = 0.05,
    bfloat16: Annotated[bool, typer.Option(help="Compute matrix products in bfloat16.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights, data and dropout.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint in --out, same settings.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew although --out holds a checkpoint.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Pre-train a BERT from text files: masked words and next sentences.

    Ctrl-C writes a checkpoint; the same command with --resume goes on from there and ends with the
    same weights as a run that was never interrupted.

    Example: bertkern pretrain notes.txt book.txt --out my-bert --steps 2000
    """
    from bertkern.data import MaskingSettings, read_documents
    from bertkern.models import BertConfig
    from bertkern.train import PretrainingSettings, pretrain_from_text

    if resume and overwrite:
        raise CommandError("--resume and --overwrite exclude one another")
    documents = read_documents(files)
    sizes = (
        BertConfig.from_json_file(config)
        if config is not None
        else BertConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=ffn_size or 4 * hidden_size,
            max_position_embeddings=max(512, max_length),
        )
    )
    settings = PretrainingSettings(
        steps=steps,
        tokens_per_batch=batch_tokens,
        learning_rate=learning_rate,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        bfloat16=bfloat16,
        seed=seed,
        masking=MaskingSettings(max_length=max_length),
    )
    chosen = pick_device(device)
    writable_folder(folder)
    result = pretrain_from_text(
        documents,
        folder,
        config=sizes,
        vocab_size=sizes.vocab_size,
        settings=settings,
        held_out=held_out,
        device=chosen,
        resume=resume,
        overwrite=overwrite,
        console=out,
    )
    last = result.history.held_out[-1]
    out.print(
        f"held-out masked-word loss {last.mlm_loss:.3f} nats (unigram baseline "
        f"{result.history.unigram_loss:.3f}), next-sentence accuracy {last.nsp_accuracy:.0%}"
    )
    out.print(f"model, tokenizer and history in {folder}", markup=False, soft_wrap=True)
