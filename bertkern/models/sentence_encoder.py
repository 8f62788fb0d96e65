"""Sentence embeddings (Reimers & Gurevych 2019): a BERT, pooling over its tokens, normalisation.

Sentences are sorted by length and computed in batches without padding, so a sentence costs its own
tokens only; the results come back in the order of the input.

Legend: B sentences of a batch, T their tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from bertkern.data.features import TokenSequence
from bertkern.data.tokenizer import load_tokenizer

from .bert import BertModel
from .checkpoint import resolve_folder
from .replay import Outputs, ReplayedForward
from .serving import (
    BATCH_SIZE,
    WINDOW,
    PackedTokens,
    check_stream,
    check_text,
    computed,
    cutting_tokenizer,
    length_limit,
    pack,
    tokenize,
    windows,
)

POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens")
# the class names in modules.json; the paths before them differ between versions
_MODULES = ("Transformer", "Pooling", "Normalize")
_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
}


class Embedding(NamedTuple):
    """The vector of one text of a stream, and whether the text has been cut."""

    vector: NDArray[np.float32]
    truncated: bool


class SentenceEncoder:
    """Turns sentences into vectors with a model in the folder format of sentence-transformers.

    Args:
        model: the encoder.
        tokenizer: its tokenizer, which adds [CLS] and [SEP].
        pooling: one or more of POOLINGS; several are concatenated, in this order.
        max_seq_length: longer sentences are cut to so many tokens, special ones included.
        lowercase: lower-case the text before the tokenizer.
        prompt: put before every text.
    """

    def __init__(
        self,
        model: BertModel,
        tokenizer: Tokenizer,
        pooling: Sequence[str] = ("mean",),
        max_seq_length: int | None = None,
        lowercase: bool = False,
        prompt: str = "",
    ) -> None:
        unknown = [mode for mode in pooling if mode not in POOLINGS]
        if unknown or not pooling:
            raise ValueError(
                f"pooling mode {', '.join(unknown) or 'missing'}; supported: {POOLINGS}"
            )
        positions = model.config.max_position_embeddings
        self.model = model.eval()
        self.max_seq_length = length_limit("max_seq_length", max_seq_length, positions)
        self.tokenizer = cutting_tokenizer(tokenizer, self.max_seq_length)
        self.pooling = tuple(mode for mode in POOLINGS if mode in pooling)
        self.lowercase = lowercase
        self.prompt = prompt
        self._forward = ReplayedForward(model, self._hidden_states, positions)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> SentenceEncoder:
        """Read a folder of sentence-transformers, or a plain BERT folder, which gets mean pooling.

        Args:
            folder: or the name of a model on the Hugging Face hub.
            device: where to compute.
            dtype: of the weights; None keeps the stored one.

        Raises:
            FileNotFoundError: no such folder, or a file is missing.
            ValueError: a damaged file, or a module or pooling that is not supported.
        """
        folder = resolve_folder(folder)
        parts = {"Transformer": folder}
        if (folder / "modules.json").is_file():
            parts = {}
            for module in _read_json(folder / "modules.json", list):
                kind = str(module.get("type", "")).rsplit(".", 1)[-1]
                if kind not in _MODULES:
                    raise ValueError(
                        f"{folder / 'modules.json'}: module {module.get('type')!r}; "
                        f"supported: {_MODULES}"
                    )
                parts[kind] = folder / module.get("path", "")
        body = parts.get("Transformer", folder)
        settings = _optional_json(body / "sentence_bert_config.json")
        pooling = _poolings(parts["Pooling"] / "config.json") if "Pooling" in parts else ["mean"]
        prompts = _optional_json(folder / "config_sentence_transformers.json")
        prompt_name = prompts.get("default_prompt_name")
        return cls(
            BertModel.from_pretrained(body, dtype).to(device),
            load_tokenizer(body),
            pooling,
            settings.get("max_seq_length"),
            bool(settings.get("do_lower_case", False)),
            "" if prompt_name is None else prompts.get("prompts", {}).get(prompt_name, ""),
        )

    @property
    def embedding_size(self) -> int:
        """Length of a sentence's vector."""
        return self.model.config.hidden_size * len(self.pooling)

    @overload
    def encode(
        self,
        sentences: Sequence[str],
        batch_size: int = ...,
        normalize: bool = ...,
        convert_to_tensor: Literal[False] = ...,
    ) -> NDArray[np.float32]: ...

    @overload
    def encode(
        self,
        sentences: Sequence[str],
        batch_size: int = ...,
        normalize: bool = ...,
        *,
        convert_to_tensor: Literal[True],
    ) -> Tensor: ...

    def encode(
        self,
        sentences: Sequence[str],
        batch_size: int = BATCH_SIZE,
        normalize: bool = True,
        convert_to_tensor: bool = False,
    ) -> NDArray[np.float32] | Tensor:
        """The vectors of sentences, in their order.

        Args:
            sentences: any number of texts; an empty text is a sentence without words.
            batch_size: at most so many sentences are computed together (and at most
                TOKENS_PER_BATCH tokens). A sentence's vector does not depend on it.
            normalize: scale each vector to length 1.
            convert_to_tensor: return a tensor on the model's device in place of an array.

        Returns:
            float32 [n, embedding_size].

        Raises:
            TypeError: sentences is one string, or holds something else than strings.
            ValueError: batch_size < 1, or a text is no text (half of a surrogate pair).
        """
        check_stream(sentences, batch_size)
        vectors, _ = self._encode(sentences, 0, batch_size, normalize)
        return vectors if convert_to_tensor else vectors.cpu().numpy()

    def stream(
        self,
        sentences: Iterable[str],
        batch_size: int = BATCH_SIZE,
        normalize: bool = True,
        window: int = WINDOW,
    ) -> Iterator[Embedding]:
        """The vectors of any number of sentences, in their order, in the memory of a window.

        Args:
            sentences: read no further ahead than `window`.
            batch_size, normalize: as `encode`.
            window: sentences that are read, sorted by length and computed before the first of
                their vectors is given; 1 answers each as it comes.

        Raises:
            As encode; what is wrong with a sentence is said when its window is read.
        """
        check_stream(sentences, batch_size, window)
        return self._stream(sentences, batch_size, normalize, window)

    def _stream(
        self, sentences: Iterable[str], batch_size: int, normalize: bool, window: int
    ) -> Iterator[Embedding]:
        for first, texts in windows(sentences, window):
            vectors, truncated = self._encode(texts, first, batch_size, normalize)
            yield from map(Embedding, vectors.cpu().numpy(), truncated)

    @torch.inference_mode()
    def _encode(
        self, sentences: Sequence[str], first: int, batch_size: int, normalize: bool
    ) -> tuple[Tensor, list[bool]]:
        """Vectors [n, embedding_size] on the model's device, and which texts have been cut."""
        for index, sentence in enumerate(sentences, start=first):
            check_text(sentence, index)
        texts = [self.prompt + (s.lower() if self.lowercase else s) for s in sentences]
        sequences, truncated = tokenize(self.tokenizer, texts, first)
        device = self.model.embeddings.word.weight.device
        rows = computed(sequences, lambda batch: self._embed(batch, device), batch_size)
        vectors = torch.stack(rows) if rows else torch.empty(0, self.embedding_size, device=device)
        if normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=1)
        return vectors, truncated

    def _hidden_states(self, batch: PackedTokens) -> Outputs:
        return (self.model(**batch.arguments()).last_hidden_state,)

    def _embed(self, batch: Sequence[TokenSequence], device: torch.device) -> Tensor:
        """B sentences -> float32 [B, embedding_size]."""
        packed = pack(batch, device)
        x = self._forward(packed)[0].float()
        lengths = packed.cu_seqlens.diff().long()
        pooled = []
        for mode in self.pooling:
            if mode == "cls":
                pooled.append(x[packed.cu_seqlens[:-1].long()])
            elif mode == "max":
                pooled.append(torch.segment_reduce(x, "max", lengths=lengths, unsafe=True))
            else:
                total = torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True)
                count = lengths[:, None].float()
                pooled.append(total / (count if mode == "mean" else count.sqrt()))
        return torch.cat(pooled, dim=1)


def _read_json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(content, kind):
        raise ValueError(
            f"{path}: a JSON {kind.__name__} was expected, not {type(content).__name__}"
        )
    return content


def _optional_json(path: Path) -> dict[str, Any]:
    return _read_json(path, dict) if path.is_file() else {}


def _poolings(path: Path) -> list[str]:
    """The pooling modes of a Pooling module's config.json, in the form of any version."""
    config = _read_json(path, dict)
    modes = config.get("pooling_mode")
    if modes is not None:
        return [modes] if isinstance(modes, str) else list(modes)
    asked = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    unknown = [key for key in asked if key not in _POOLING_KEYS]
    if unknown:
        raise ValueError(f"{path}: {', '.join(unknown)}; supported: {', '.join(_POOLING_KEYS)}")
    return [_POOLING_KEYS[key] for key in asked] or ["mean"]
