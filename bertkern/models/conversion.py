"""BERT checkpoints of every age as today's: which model a folder holds, and its files rewritten.

A checkpoint's tensors all stay, heads included; only their names, their files and, if asked, their
dtype change. What is written is what `save_pretrained` here and in transformers writes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .bert import BertForMaskedLM, BertForPreTraining, BertModel
from .bert_tasks import (
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from .checkpoint import (
    HEADS,
    PretrainedModel,
    assemble,
    current_names,
    read_config,
    resolve_folder,
    stored_tensors,
    write_model,
)
from .config import BertConfig

TASKS: dict[str, type[PretrainedModel]] = {
    "encoder": BertModel,
    "pretraining": BertForPreTraining,
    "masked-lm": BertForMaskedLM,
    "classification": BertForSequenceClassification,
    "token-classification": BertForTokenClassification,
    "qa": BertForQuestionAnswering,
    "multiple-choice": BertForMultipleChoice,
}
# What stands beside the weights: tokenizers of every form, and sentence-transformers' settings.
_BESIDE = (
    "tokenizer.json",
    "vocab.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)


def model_class(
    config: BertConfig, names: Iterable[str], task: str | None = None
) -> type[PretrainedModel]:
    """The class that a checkpoint is for.

    Args:
        config: its "architectures" decides where it names a class of this library.
        names: of the checkpoint's tensors, which decide where the config says nothing.
        task: a key of TASKS, which decides before all; None where there is no need.

    Raises:
        ValueError: an unknown task or architecture, or a head that several classes have.
    """
    allowed = ", ".join(TASKS)
    if task is not None:
        if task not in TASKS:
            raise ValueError(f"task must be one of {allowed}, not {task!r}")
        return TASKS[task]
    architectures = config.extra.get("architectures") or []
    known = {c.__name__: c for c in TASKS.values()}
    for architecture in architectures:
        if architecture in known:
            return known[architecture]
    if architectures:
        raise ValueError(
            f"the config's architecture is {architectures[0]!r}; known are {', '.join(known)}; or "
            f"name a task: {allowed}"
        )
    heads = {head for head in HEADS for name in names if name.startswith(head)}
    if "qa_outputs." in heads:
        return BertForQuestionAnswering
    if "classifier." in heads:
        raise ValueError(
            "the config names no architecture, and classifier.weight may be that of several: name "
            "the task, classification, token-classification or multiple-choice"
        )
    if "cls.predictions." in heads:
        return BertForPreTraining if "cls.seq_relationship." in heads else BertForMaskedLM
    return BertModel


def load_model(
    source: str | os.PathLike[str], task: str | None = None, allow_pickle: bool = False
) -> PretrainedModel:
    """The model that a folder holds, of the class that it is for.

    Args:
        source: a folder, or the name of a model on the Hugging Face hub.
        task: as `model_class`.
        allow_pickle: as `PretrainedModel.from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: as `PretrainedModel.from_pretrained` and `model_class`.
    """
    folder = resolve_folder(source, allow_pickle)
    config = read_config(folder)
    names: Iterable[str] = ()
    if task is None and not config.extra.get("architectures"):
        names = current_names(stored_tensors(folder, allow_pickle)[1])
    kind = model_class(config, names, task)
    return kind.from_pretrained(folder, allow_pickle=allow_pickle)


def convert_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    task: str | None = None,
    allow_pickle: bool = False,
) -> type[PretrainedModel]:
    """Write a BERT checkpoint of any age as today's: config.json, model.safetensors, tokenizer.

    Args:
        source: a folder, or the name of a model on the Hugging Face hub.
        target: the new folder, written whole or not at all.
        dtype: of the weights; None keeps the stored ones.
        task: as `model_class`.
        allow_pickle: as `PretrainedModel.from_pretrained`.

    Returns:
        The class that reads the new folder.

    Raises:
        FileExistsError: target is there and not empty.
        FileNotFoundError, ValueError: as `PretrainedModel.from_pretrained` and `model_class`.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists; name a new folder")
    folder = resolve_folder(source, allow_pickle)
    config = read_config(folder)
    weights, stored = stored_tensors(folder, allow_pickle)
    tensors = _today(stored)
    kind = model_class(config, tensors, task)
    with torch.device("meta"):
        bare = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
        model = kind._for_tensors(config, bare)
    assemble(model, bare, weights)  # says what is wrong with them
    if dtype is not None:
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        write_model(temporary, config, kind.__name__, tensors)
        for path in _beside(folder):
            copy = temporary / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return kind


def _today(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """By today's names: those of the encoder begin with "bert." where there is a head."""
    tensors = {n.removeprefix("bert."): t for n, t in current_names(stored).items()}
    heads = tuple(head for head in HEADS if head != "pooler.")
    if not any(name.startswith(heads) for name in tensors):
        return tensors
    return {n if n.startswith(heads) else f"bert.{n}": t for n, t in tensors.items()}


def _beside(folder: Path) -> list[Path]:
    """The files beside the weights, and those of the modules that sentence-transformers adds."""
    files = [folder / name for name in _BESIDE if (folder / name).is_file()]
    modules = folder / "modules.json"
    if modules.is_file():
        try:
            paths = [Path(m["path"]) for m in json.loads(modules.read_text(encoding="utf-8"))]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{modules}: damaged, or not a list of modules ({error!r})") from error
        for path in paths:
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{modules}: the path {str(path)!r} leads out of the folder")
            if path.parts:
                files += sorted(p for p in (folder / path).glob("*") if p.is_file())
    return files
