"""Reading and writing models in Hugging Face's format: `config.json` and `model.safetensors`.

The names of transformers' tensors are the file's; this library's parameters are those tensors
renamed, except that the query, key and value projections of a layer are one packed parameter here
(rows of q, then k, then v) and that the masked-LM decoder, which is the word embedding, is stored
once. Files of every age are read: see `stored_tensors` and `current_names`.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bertkern.data.files import replacing, write_text
from bertkern.data.hub import answered_in_time

from .config import BertConfig
from .initialization import initialize_parameter

Model = TypeVar("Model", bound="PretrainedModel")

WEIGHTS, PICKLE, CONFIG = "model.safetensors", "pytorch_model.bin", "config.json"
OLD_CONFIG = "bert_config.json"  # its name before there was a library to call it config.json

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
    ("masked_lm.transform.", "cls.predictions.transform.dense."),
    ("masked_lm.norm.", "cls.predictions.transform.LayerNorm."),
    ("masked_lm.bias", "cls.predictions.bias"),
    ("next_sentence.", "cls.seq_relationship."),
)
# Prefixes of what stands on top of the encoder: files may have it where a model has not, and
# `new_head` makes it where a model has it and the file has not.
HEADS = ("pooler.", "cls.predictions.", "cls.seq_relationship.", "classifier.", "qa_outputs.")
_BUFFERS = (
    "embeddings.position_ids",
    "embeddings.token_type_ids",
)  # constants that old versions stored
_DECODER = "cls.predictions.decoder."
_WORD = "embeddings.word_embeddings.weight"
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
        cls: type[Model],
        folder: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        *,
        new_head: bool = False,
        allow_pickle: bool = False,
        **config_changes: Any,
    ) -> Model:
        """The model that a folder holds, in evaluation mode, on the CPU.

        Args:
            folder: with config.json and model.safetensors (or its parts and their index); or the
                name of a model on the Hugging Face hub.
            dtype: of all weights; None keeps the stored ones.
            new_head: tensors of the head and of the pooler that the file has not, or has in another
                shape, are drawn from torch's generator as for training from the start. The encoder
                always comes from the file.
            allow_pickle: read pytorch_model.bin where there is no model.safetensors. A pickle can
                hold code; torch reads it with weights_only=True, which runs none that is known to
                harm.
            config_changes: entries of the config to replace, as num_labels=3.

        Raises:
            FileNotFoundError: no such folder, or one of the two files is missing.
            ValueError: a damaged file, a config that is not supported, or tensors that are missing,
                unexpected or of another shape than the config says; all are named.
        """
        folder = resolve_folder(folder, allow_pickle)
        config = read_config(folder).with_changes(**config_changes)
        weights, stored = stored_tensors(folder, allow_pickle)
        stored = {n.removeprefix("bert."): t for n, t in current_names(stored).items()}
        with torch.device("meta"):
            model = cls._for_tensors(config, stored)
        parameters = assemble(model, stored, weights, new_head)
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
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.state_dict().items():
            names = file_names(name)
            tensors.update(zip(names, parameter.chunk(len(names)), strict=True))
        write_model(folder, self.config, type(self).__name__, tensors)


class Config(Protocol):
    """What is written as config.json."""

    def to_dict(self) -> dict[str, Any]:
        """Its entries."""


def write_model(
    folder: str | os.PathLike[str],
    config: Config,
    architecture: str,
    tensors: dict[str, Tensor],
) -> None:
    """Write config.json and model.safetensors, each whole or not at all.

    Args:
        architecture: the class of transformers (and of this library) that the tensors are for.
        tensors: by their names in the file.
    """
    folder = Path(folder)
    stored = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }
    with replacing(folder / WEIGHTS) as temporary:
        save_file(stored, temporary, metadata={"format": "pt"})
    entries = config.to_dict()
    entries.pop("torch_dtype", None)  # the older name of dtype
    entries["architectures"] = [architecture]
    entries["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_text(folder / CONFIG, json.dumps(entries, indent=2, sort_keys=True) + "\n")


def resolve_folder(folder: str | os.PathLike[str], allow_pickle: bool = False) -> Path:
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
    patterns = ["*.json", "*.txt", WEIGHTS, "model-*.safetensors", "*/config.json"]
    if allow_pickle:
        patterns += [PICKLE, "pytorch_model-*.bin"]
    try:
        with answered_in_time():
            return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many types; the user reads one line
        raise FileNotFoundError(f"{name}: no such folder, and {_hub_reason(error)}") from error


def _hub_reason(error: Exception) -> str:
    """Why the hub gave no model, in a few words."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return "the Hugging Face hub gives that model only to those whom its owner lets in"
    if "RepositoryNotFoundError" in kinds:  # also what the hub answers for private ones
        return "no public model of that name on the Hugging Face hub"
    answer = getattr(error.__cause__, "response", None)  # which the client takes for none at all
    if "LocalEntryNotFoundError" in kinds and answer is not None:
        return f"the Hugging Face hub answers with an error ({answer.status_code})"
    unreached = ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError")
    if kinds & {*unreached, "ConnectionError"}:
        return "the Hugging Face hub is not reached"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"not available from the Hugging Face hub ({reason[:120]})"


def read_config(folder: Path) -> BertConfig:
    """The configuration of a folder, from config.json or, as it was once called, bert_config.json.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: as `BertConfig.from_json_file`.
    """
    for name in (CONFIG, OLD_CONFIG):
        if (folder / name).is_file():
            return BertConfig.from_json_file(folder / name)
    raise FileNotFoundError(f"{folder}: no {CONFIG}")


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


def stored_tensors(folder: Path, allow_pickle: bool = False) -> tuple[Path, dict[str, Tensor]]:
    """The file that holds a folder's weights, or the index of its parts, and all its tensors.

    Raises:
        FileNotFoundError: no weights, a part is missing, or there is only a pickle, which was not
            allowed.
        ValueError: a damaged file or index.
    """
    for name in (WEIGHTS, PICKLE) if allow_pickle else (WEIGHTS,):
        read = read_tensors if name == WEIGHTS else _read_pickle
        if (folder / name).is_file():
            return folder / name, read(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            tensors: dict[str, Tensor] = {}
            for part in _parts(index):
                tensors.update(read(part))
            return index, tensors
    message = f"{folder}: no {WEIGHTS}"
    if pickles := sorted(p.name for p in folder.glob("*.bin")):
        message += f", only {', '.join(pickles)}"
        if not allow_pickle:
            message += (
                ": a pickle can run code when it is read and is refused; where you trust it, allow "
                "it by name (allow_pickle=True, bertkern convert --allow-pickle)"
            )
    raise FileNotFoundError(message)


def _parts(index: Path) -> list[Path]:
    """The files that an index names, in the order of their names."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        # a part is a file beside its index: no path leads elsewhere
        parts = [index.parent / Path(name).name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: damaged, or not an index of weights ({error!r})") from error
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise FileNotFoundError(f"{index}: parts are missing: {', '.join(missing)}")
    return parts


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """Every tensor of a torch.save file, by torch's reader of weights alone."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(f"{path}: damaged, or not a file of weights ({reason})") from error
    if not isinstance(stored, dict) or not all(isinstance(t, Tensor) for t in stored.values()):
        raise ValueError(f"{path}: a table of tensors was expected, not {type(stored).__name__}")
    # clone: tensors of a pickle may share memory
    return {str(name): tensor.clone() for name, tensor in stored.items()}


def current_names(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors by today's names, without constants and duplicates.

    Old names: gamma and beta of LayerNorm, as in TensorFlow; "module." before all names, as
    torch's DataParallel saves them.
    """
    if stored and all(name.startswith("module.") for name in stored):
        stored = {name.removeprefix("module."): tensor for name, tensor in stored.items()}
    tensors = {}
    for name, tensor in stored.items():
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        if name.removeprefix("bert.") not in _BUFFERS:
            tensors[name] = tensor
    decoder_bias = tensors.pop(f"{_DECODER}bias", None)
    if decoder_bias is not None:
        tensors.setdefault("cls.predictions.bias", decoder_bias)
    decoder = tensors.get(f"{_DECODER}weight")
    word = tensors.get(f"bert.{_WORD}", tensors.get(_WORD))
    if decoder is not None and word is not None and torch.equal(decoder, word):
        del tensors[f"{_DECODER}weight"]
    return tensors


def assemble(
    model: PretrainedModel, stored: dict[str, Tensor], path: Path, new_head: bool = False
) -> dict[str, Tensor]:
    """The model's parameters from the file's tensors; every disagreement is reported."""
    stored = dict(stored)
    decoder = stored.pop(f"{_DECODER}weight", None)  # only where it is not the word embedding
    parameters, missing, misshapen, needed = {}, [], [], set()
    for name, parameter in model.state_dict().items():
        names = [n.removeprefix("bert.") for n in file_names(name)]
        needed.update(names)
        shape = (parameter.shape[0] // len(names), *parameter.shape[1:])
        absent = [n for n in names if n not in stored]
        wrong = [n for n in names if n in stored and tuple(stored[n].shape) != shape]
        if new_head and (absent or wrong) and names[0].startswith(HEADS):
            dtype = stored[_WORD].dtype if _WORD in stored else None
            parameters[name] = torch.empty(parameter.shape, dtype=dtype)
            initialize_parameter(name, parameters[name], model.config.initializer_range)
        elif not absent and not wrong:
            parts = [stored[n] for n in names]
            parameters[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            missing += absent
            misshapen += [f"{n} is {list(stored[n].shape)}, not {list(shape)}" for n in wrong]
    foreign_heads = tuple(h for h in HEADS if not any(n.startswith(h) for n in needed))
    unexpected = [n for n in stored if n not in needed and not n.startswith(foreign_heads)]
    problems = mismatches(missing, unexpected, misshapen)
    if decoder is not None and "cls.predictions." not in foreign_heads:
        problems.append("cls.predictions.decoder.weight is not the word embedding (untied)")
    if problems:
        hint = ""
        of_head = [n.startswith(HEADS) for n in missing + misshapen]
        if not new_head and of_head and all(of_head):
            hint = " (new_head=True draws the tensors of head and pooler anew)"
        made = model.config.extra.get("architectures")
        what = f", it is of a {made[0]}" if made and made[0] != type(model).__name__ else ""
        raise ValueError(
            f"{path} does not fit {type(model).__name__}{what}: {'; '.join(problems)}{hint}"
        )
    return parameters


def mismatches(missing: list[str], unexpected: list[str], misshapen: list[str]) -> list[str]:
    """How a file's tensors differ from a model's, for a message."""
    return [
        f"{what}: {', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''}"
        for what, names in (
            ("missing tensors", missing),
            ("unexpected tensors", unexpected),
            ("tensors whose shape is not the config's", misshapen),
        )
        if names
    ]
