"""bertkern convert: a BERT checkpoint of any age as today's folder, or as an ONNX file."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .console import CommandError, err, need, out


class Dtype(str, Enum):
    """What --dtype takes."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Task(str, Enum):
    """What --task takes: the keys of `bertkern.models.conversion.TASKS`."""

    encoder = "encoder"
    pretraining = "pretraining"
    masked_lm = "masked-lm"
    classification = "classification"
    token_classification = "token-classification"
    qa = "qa"
    multiple_choice = "multiple-choice"


def convert(
    source: Annotated[
        str,
        typer.Argument(help="Folder of a BERT of any age, or its name on the Hugging Face hub."),
    ],
    target: Annotated[Path, typer.Argument(help="New folder, or a file whose name ends in .onnx.")],
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of the weights in a new folder; without it, as they are stored."),
    ] = None,
    task: Annotated[
        Task | None,
        typer.Option(help="What the model is for, where its config.json does not say."),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="Read pytorch_model.bin, which can hold code: only from those whom you trust.",
        ),
    ] = False,
) -> None:
    """Rewrite a BERT as today's folder, or export it to ONNX.

    All tensors are kept, heads too; old names and weights in parts become one model.safetensors,
    and tokenizer files come along. An ONNX file is checked in ONNX Runtime against the model before
    it is called done. Example: bertkern convert my-classifier my-classifier.onnx
    """
    name = None if task is None else task.value
    if target.suffix == ".onnx":
        if dtype is not None:
            raise CommandError("--dtype is for folders; an ONNX file is written in float32")
        for package in ("onnxscript", "onnxruntime"):
            need(package, "onnx", "the export to ONNX")
        from bertkern.models import export_onnx, load_model

        model = load_model(source, name, allow_pickle)
        with err.status("exporting and checking"):
            export_onnx(model, target)
        what = f"{type(model).__name__}, equal in ONNX Runtime"
    else:
        import torch

        from bertkern.models import convert_folder

        of = None if dtype is None else getattr(torch, dtype.value)
        kind = convert_folder(source, target, of, task=name, allow_pickle=allow_pickle)
        what = kind.__name__
    out.print(f"{target}: {what}", markup=False, soft_wrap=True)
