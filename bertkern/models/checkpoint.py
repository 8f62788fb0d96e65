"""Reading and writing models in Hugging Face's format: `config.json` and `model.safetensors`.

The names of transformers' tensors are the file's; this library's parameters are those tensors
renamed, except that the query, key and value projections of a layer are one packed parameter here
(rows of q, then k, then v) and that the masked-LM decoder, which is the word embedding, is stored
once.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bertkern.data.files import replacing, write_text

from .config import BertConfig

Model = TypeVar("Model", bound="PretrainedModel")

WEIGHTS, CONFIG = "model.safetensors", "config.json"

# (here, in the file), applied in turn to a parameter's name; {} is query, key, value.
_RENAMES = (
    ("embeddings.word.", "embeddings.word_embeddings."),
    ("embeddings.position.", "embeddings.position_embeddings."),
    ("embeddings.token_type.", "embeddings.token_type_embeddings."),
    ("embeddings.norm.", "embeddings.LayerNorm."),
    ("layers.", "encoder.layer."),
    (".attention.output.", ".attention.output.dense."),
    (".attention.qkv.", ".attention.self.{}."),
    (".attention_norm.", ".attention.output.LayerNorm."),
    (".feed_forward.up.", ".intermediate.dense."),
    (".feed_forward.down.", ".output.dense."),
    (".feed_forward_norm.", ".output.LayerNorm."),
    ("pooler.", "pooler.dense."),
    ("transform.", "cls.predictions.transform.dense."),
    ("transform_norm.", "cls.predictions.transform.LayerNorm."),
    ("vocab_bias", "cls.predictions.bias"),
    ("next_sentence.", "cls.seq_relationship."),
)
_HEADS = ("cls.", "classifier.", "qa_outputs.")  # prefixes of the task heads of BERT checkpoints
_BUFFERS = (
    "embeddings.position_ids",
    "embeddings.token_type_ids",
)  # constants that old versions stored
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def file_names(name: str) -> tuple[str, ...]:
    """The file's tensors that make up parameter `name`: one, or three for a packed projection."""
    for here, there in _RENAMES:
        name = name.replace(here, there)
    return (
        tuple(name.format(part) for part in ("query", "key", "value")) if "{}" in name else (name,)
    )


class PretrainedModel(nn.Module):
    """A model with a `config` that `from_pretrained` reads and `save_pretrained` writes."""

    config: BertConfig

    @classmethod
    def from_pretrained(
        cls: type[Model], folder: str | os.PathLike[str], dtype: torch.dtype | None = None
    ) -> Model:
        """The model that a folder holds, in evaluation mode, on the CPU.

        Args:
            folder: with config.json and model.safetensors; or the name of a model on the Hugging
                Face hub.
            dtype: of all weights; None keeps the stored ones.

        Raises:
            FileNotFoundError: no such folder, or one of the two files is missing.
            ValueError: a damaged file, a config that is not supported, or tensors that are missing,
                unexpected or of another shape than the config says; all are named.
        """
        folder = resolve_folder(folder)
        config = BertConfig.from_json_file(_existing(folder, CONFIG))
        weights = _existing(folder, WEIGHTS)
        stored = _canonical(read_tensors(weights))
        with torch.device("meta"):
            model = cls._for_tensors(config, stored)
        parameters = _assemble(model, stored, weights)
        model.load_state_dict(parameters, assign=True)
        if dtype is not None:
            model.to(dtype)
        return model.eval()

    @classmethod
    def _for_tensors(cls: type[Model], config: BertConfig, stored: dict[str, Tensor]) -> Model:
        """The model to fill from these tensors."""
        return cls(config)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors for transformers, each whole or not at all."""
        folder = Path(folder)
        tensors = {}
        for name, parameter in self.state_dict().items():
            names = file_names(name)
            for file_name, part in zip(names, parameter.chunk(len(names)), strict=True):
                tensors[file_name] = (
                    part.detach().cpu().clone(memory_format=torch.contiguous_format)
                )
        with replacing(folder / WEIGHTS) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        entries = self.config.to_dict()
        entries.pop("torch_dtype", None)  # the older name of dtype
        entries["architectures"] = [type(self).__name__]
        entries["dtype"] = str(next(self.parameters()).dtype).removeprefix("torch.")
        write_text(folder / CONFIG, json.dumps(entries, indent=2, sort_keys=True) + "\n")


def resolve_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder itself, or the local copy of the hub's model of that name, fetched if need be.

    Raises:
        FileNotFoundError: neither a folder nor a model that the hub gives.
    """
    path = Path(folder)
    if path.is_dir():
        return path
    name = os.fspath(folder)
    if path.exists() or not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"{name}: no such folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"{name}: no such folder, and to fetch a model of that name from the Hugging Face hub, "
            "`pip install huggingface_hub` is needed"
        ) from error
    patterns = ["*.json", "*.txt", WEIGHTS, "*/config.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (
        Exception
    ) as error:  # the hub's client raises many types; offline or unknown, the user reads one
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"{name}: no such folder, and not available from the Hugging Face hub ({reason})"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # clone: out of the memory-mapped file, aligned for vector loads
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged, or not a safetensors file ({error})") from error


def _existing(folder: Path, name: str) -> Path:
    if (folder / name).is_file():
        return folder / name
    message = f"{folder}: no {name}"
    if name == WEIGHTS and (pickles := sorted(p.name for p in folder.glob("*.bin"))):
        message += (
            f", only {', '.join(pickles)}: a pickle runs code when it is read and is refused; "
            "convert it (load it where you trust it, then save with safe_serialization)"
        )
    elif name == WEIGHTS and (folder / f"{WEIGHTS}.index.json").is_file():
        message += ", only its parts: join them into one file"
    raise FileNotFoundError(message)


def _canonical(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors by today's names, without "bert.", constants and duplicates."""
    tensors = {}
    for name, tensor in stored.items():
        name = name.removeprefix("bert.")
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        tensors[name] = tensor
    for name in _BUFFERS:
        tensors.pop(name, None)
    decoder_bias = tensors.pop("cls.predictions.decoder.bias", None)
    if decoder_bias is not None:
        tensors.setdefault("cls.predictions.bias", decoder_bias)
    return tensors


def _assemble(model: nn.Module, stored: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The model's parameters from the file's tensors; every disagreement is reported."""
    stored = dict(stored)
    decoder = stored.pop("cls.predictions.decoder.weight", None)
    word = stored.get("embeddings.word_embeddings.weight")
    parameters, missing, misshapen, needed = {}, [], [], set()
    for name, parameter in model.state_dict().items():
        names = [n.removeprefix("bert.") for n in file_names(name)]
        needed.update(names)
        absent = [n for n in names if n not in stored]
        missing += absent
        if absent:
            continue
        shape = (parameter.shape[0] // len(names), *parameter.shape[1:])
        wrong = [n for n in names if tuple(stored[n].shape) != shape]
        misshapen += [f"{n} is {list(stored[n].shape)}, not {list(shape)}" for n in wrong]
        if not wrong:
            parts = [stored[n] for n in names]
            parameters[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    foreign_heads = tuple(h for h in _HEADS if not any(n.startswith(h) for n in needed))
    unexpected = [n for n in stored if n not in needed and not n.startswith(foreign_heads)]
    problems = [
        f"{what}: {', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''}"
        for what, names in (
            ("missing tensors", missing),
            ("unexpected tensors", unexpected),
            ("tensors whose shape is not the config's", misshapen),
        )
        if names
    ]
    if "cls." in foreign_heads:
        decoder = None
    if decoder is not None and word is not None and not torch.equal(decoder, word):
        problems.append("cls.predictions.decoder.weight is not the word embedding (untied)")
    if problems:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}")
    return parameters
