"""The Transformer (Vaswani et al. 2017): encoder, decoder, one embedding for all.

    source:  x = dropout(√d · E[id] + PE[position]);  x = encoder layer(x) for each
    target:  y = dropout(√d · E[id] + PE[position]);  y = decoder layer(y, x) for each
    logits = y Eᵀ                                     E [V, d] embeds both and predicts

A target begins with bos_token_id and is predicted one token ahead: target_ids = [bos, t₁ … tₙ],
labels = [t₁ … tₙ, eos]. With `prenorm` a LayerNorm follows the last layer of each stack.

Padded input is unpadded once, before the embedding, and padded again only in the output. For
generation the decoder computes a token at a time, over keys and values that it keeps.

Legend: B sequences, S and T padded lengths of source and target, V vocabulary, d hidden size; R
rows of generation, B · beams.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bertkern import ops
from bertkern.nn import (
    DecoderLayer,
    EncoderLayer,
    KeyValueCache,
    LayerNorm,
    SinusoidalPositions,
    SourceKeys,
    TokenLayout,
    packed_layout,
    padded_layout,
)
from bertkern.nn.decoder import SEEDS_PER_DECODER_LAYER
from bertkern.nn.encoder import SEEDS_PER_LAYER
from bertkern.nn.layout import IGNORE_INDEX

from .checkpoint import CONFIG, mismatches, resolve_folder, stored_tensors, write_model
from .generate import Hypothesis, TargetTokens, generate, length_limits
from .next_token import Sampling
from .transformer_config import TransformerConfig


@dataclass
class TransformerOutput:
    """What Transformer returns; what was not asked for is None.

    Attributes:
        loss: mean over the labels that count; 0 where none does.
        logits: [B, T, V] with zeros at padding, or [tokens, V] for packed input.
        encoder_last_hidden_state: [B, S, hidden] with zeros at padding, or packed.
    """

    loss: Tensor | None
    logits: Tensor | None
    encoder_last_hidden_state: Tensor


@dataclass(frozen=True)
class EncodedSource:
    """An encoded batch of sources: hidden [source tokens, d], and whose tokens they are."""

    hidden: Tensor
    layout: TokenLayout


@dataclass
class DecoderState:
    """What generation keeps between two steps.

    Attributes:
        caches: keys and values of the target's tokens, for each layer.
        source_keys: keys and values of the source, for each layer.
        beams: rows of a sequence; row r is beam r % beams of sequence r // beams.
        length: tokens decoded so far.
    """

    caches: list[KeyValueCache]
    source_keys: list[SourceKeys]
    beams: int
    length: int = 0

    def reorder(self, rows: Tensor) -> None:
        """Row r goes on from where row rows[r] is, a row of the same sequence; int64 [R]."""
        for cache in self.caches:
            cache.select(rows)

    def select(self, sequences: Tensor) -> None:
        """Keep only these sequences, in this order; int64 [B']."""
        beam = torch.arange(self.beams, device=sequences.device)
        rows = (sequences[:, None] * self.beams + beam).flatten()
        for cache, keys in zip(self.caches, self.source_keys, strict=True):
            cache.select(rows)
            keys.select(sequences)


class Transformer(nn.Module):
    """The encoder-decoder.

    Args:
        config: sizes and rates.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        sizes = (config.hidden_size, config.num_attention_heads, config.intermediate_size)
        rates = (config.activation, config.dropout, config.attention_dropout)
        last = (config.layer_norm_eps, config.prenorm)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = SinusoidalPositions(config.hidden_size)
        self.encoder = nn.ModuleList(
            EncoderLayer(*sizes, *rates, *last) for _ in range(config.num_layers)
        )
        self.decoder = nn.ModuleList(
            DecoderLayer(*sizes, *rates, *last) for _ in range(config.num_layers)
        )
        self.encoder_norm, self.decoder_norm = (
            LayerNorm(config.hidden_size, config.layer_norm_eps) if config.prenorm else None
            for _ in range(2)
        )
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Matrices uniform as Glorot & Bengio (2010), each of a packed projection by itself; the
        embedding N(0, 1/d), so that √d · E has variance 1; biases 0."""
        for name, parameter in self.named_parameters():
            if name == "embedding.weight":
                parameter.normal_(std=self.config.hidden_size**-0.5)
            elif parameter.dim() == 2:
                packed = 3 if ".qkv." in name else 2 if ".kv." in name else 1
                rows, columns = parameter.shape
                bound = math.sqrt(6.0 / (rows // packed + columns))
                parameter.uniform_(-bound, bound)
            else:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)

    def gradient_checkpointing_enable(self) -> None:
        """In training keep only each layer's input and compute the layer again in the backward
        (Chen et al. 2016). The gradients are the same bits, dropout included."""
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep what the backward needs, as at first."""
        self.gradient_checkpointing = False

    def forward(
        self,
        source_ids: Tensor,
        target_ids: Tensor,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        source_cu_seqlens: Tensor | None = None,
        source_max_seqlen: int | None = None,
        target_cu_seqlens: Tensor | None = None,
        target_max_seqlen: int | None = None,
        sequence_offset: int = 0,
        return_logits: bool = False,
    ) -> TransformerOutput:
        """Loss, or logits, of targets given their sources; padded or packed, both alike.

        Args:
            source_ids, target_ids: integer [B, S] and [B, T], or packed, of all sequences one
                behind the other, with their cu_seqlens and max_seqlen.
            source_mask, target_mask: bool or integer, shapes of the ids, 0 at padding; padded input
                only. A mask on a GPU is waited for once.
            labels: int64, shape of target_ids: the token to predict at each, -100 where there is
                none. Their loss is smoothed by config.label_smoothing in training.
            source_cu_seqlens, target_cu_seqlens: int32 [B + 1] on the device: 0, then the running
                sum of the lengths.
            source_max_seqlen, target_max_seqlen: the longest length, or more.
            sequence_offset: for a part of a batch (on one of several processes, or one of several
                that are accumulated), how many sequences of the batch come before it. With the
                batch's max_seqlens (or padded lengths) and seed, dropout is that of the whole
                batch.
            return_logits: compute logits also when labels are given.

        Raises:
            ValueError: shapes that do not fit together.
            TypeError: an argument of the wrong dtype.
        """
        source_layout = _layout(
            "source", source_ids, source_mask, source_cu_seqlens, source_max_seqlen, sequence_offset
        )
        target_layout = _layout(
            "target", target_ids, target_mask, target_cu_seqlens, target_max_seqlen, sequence_offset
        )
        if source_layout.batch_size != target_layout.batch_size:
            raise ValueError(
                f"{source_layout.batch_size} sources, but {target_layout.batch_size} targets"
            )
        if labels is not None and labels.shape != target_ids.shape:
            raise ValueError(
                f"labels has shape {list(labels.shape)}, target_ids {list(target_ids.shape)}"
            )
        seeds = self._draw_dropout_seeds(source_ids.device)
        source = self._encode(source_ids, source_layout, seeds)
        y = self._decode(target_ids, target_layout, source, source_layout, seeds)
        loss = None
        if labels is not None:
            loss = self._loss(y, target_layout.unpad(labels))
        logits = None
        if labels is None or return_logits:
            logits = target_layout.pad(self.predict(y))
        return TransformerOutput(loss, logits, source_layout.pad(source))

    def predict(self, y: Tensor) -> Tensor:
        """Hidden states of the decoder [..., d] -> logits over the vocabulary [..., V]."""
        return ops.linear(y, self.embedding.weight)

    def encode(
        self,
        source_ids: Tensor,
        source_mask: Tensor | None = None,
        *,
        source_cu_seqlens: Tensor | None = None,
        source_max_seqlen: int | None = None,
        sequence_offset: int = 0,
    ) -> EncodedSource:
        """The encoder alone; arguments and errors as `forward`."""
        layout = _layout(
            "source", source_ids, source_mask, source_cu_seqlens, source_max_seqlen, sequence_offset
        )
        seeds = self._draw_dropout_seeds(source_ids.device)
        return EncodedSource(self._encode(source_ids, layout, seeds), layout)

    def start_decoding(self, source: EncodedSource, beams: int = 1) -> DecoderState:
        """The state before the first token of each of B · beams rows."""
        config = self.config
        rows = source.layout.batch_size * beams
        head_dim = config.hidden_size // config.num_attention_heads
        keys = [
            layer.cross_attention.keys_of(source.hidden, source.layout)
            for layer in self._decoder_layers()
        ]
        caches = [
            KeyValueCache(rows, config.num_attention_heads, head_dim, source.hidden) for _ in keys
        ]
        return DecoderState(caches, keys, beams)

    def decode_step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """One token more of each row, int64 [R] -> logits of the next one, float32 [R, V].

        Without dropout, whatever the mode. The first tokens are bos_token_id.
        """
        position = torch.full_like(tokens, state.length)
        x = self._embed(tokens, position, state.length + 1)
        for layer, cache, keys in zip(
            self._decoder_layers(), state.caches, state.source_keys, strict=True
        ):
            x = layer.decode(x, cache, keys)
        state.length += 1
        if self.decoder_norm is not None:
            x = self.decoder_norm(x)
        return self.predict(x).float()

    @torch.inference_mode()
    def generate(
        self,
        source_ids: Tensor,
        source_mask: Tensor | None = None,
        *,
        source_cu_seqlens: Tensor | None = None,
        source_max_seqlen: int | None = None,
        beam_size: int = 4,
        length_penalty: float = 0.6,
        max_length: int | None = None,
        num: int = 1,
        sampling: Sampling | None = None,
        numbers: Sequence[int] | None = None,
        never: Sequence[int] = (),
    ) -> list[list[Hypothesis]]:
        """Targets of sources, without dropout; the search is `generate.py`'s.

        Args:
            source_ids, source_mask, source_cu_seqlens, source_max_seqlen: as `forward`.
            beam_size: hypotheses that live at once; 1 is greedy.
            length_penalty: alpha of the score log p / ((5 + length) / 6)^alpha; 0 for none.
            max_length: most tokens of a target, its end among them; None: 50 more than its source.
            num: hypotheses of each source, at most beam_size unless sampling.
            sampling: draw targets in place of searching the most probable.
            numbers: [B], of each source in the whole input: what is drawn is a function of it and
                the seed; None: 0, 1, ...
            never: ids that are not produced, besides pad_token_id and bos_token_id.

        Returns:
            For each source at most `num`, best first.

        Raises:
            ValueError, TypeError: as `forward`, or an option out of range.
        """
        config, was_training = self.config, self.training
        tokens = TargetTokens(
            config.bos_token_id,
            config.eos_token_id,
            (config.pad_token_id, config.bos_token_id, *never),
        )
        self.eval()
        try:
            source = self.encode(
                source_ids,
                source_mask,
                source_cu_seqlens=source_cu_seqlens,
                source_max_seqlen=source_max_seqlen,
            )
            return generate(
                self,
                source,
                length_limits(source.layout.cu_seqlens.diff().tolist(), max_length),
                tokens,
                beam_size=beam_size,
                length_penalty=length_penalty,
                num=num,
                sampling=sampling,
                numbers=numbers,
                device=source_ids.device,
            )
        finally:
            self.train(was_training)

    def _decoder_layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.decoder if isinstance(layer, DecoderLayer)]

    def _embed(self, ids: Tensor, positions: Tensor, longest: int) -> Tensor:
        """√d · E[id] + PE[position], [tokens] -> [tokens, d]."""
        words = F.embedding(ids, self.embedding.weight)
        table = self.positions(positions, longest, words.dtype)
        return words * math.sqrt(self.config.hidden_size) + table

    def _encode(self, ids: Tensor, layout: TokenLayout, seeds: Tensor | None) -> Tensor:
        """The encoder's hidden states [source tokens, d]."""
        embedding_seed, layer_seeds = None, None
        if seeds is not None:
            embedding_seed, layer_seeds = seeds[0], seeds[2:]
        x = self._embed(layout.unpad(ids), layout.positions, _columns(layout))
        x = self._drop(x, layout, embedding_seed)
        for i, layer in enumerate(self.encoder):
            x = self._layer(layer, _slice(layer_seeds, i, SEEDS_PER_LAYER), x, layout)
        return x if self.encoder_norm is None else self.encoder_norm(x)

    def _decode(
        self,
        ids: Tensor,
        layout: TokenLayout,
        source: Tensor,
        source_layout: TokenLayout,
        seeds: Tensor | None,
    ) -> Tensor:
        """The decoder's hidden states [target tokens, d]."""
        embedding_seed, layer_seeds = None, None
        if seeds is not None:
            embedding_seed = seeds[1]
            layer_seeds = seeds[2 + SEEDS_PER_LAYER * len(self.encoder) :]
        y = self._embed(layout.unpad(ids), layout.positions, _columns(layout))
        y = self._drop(y, layout, embedding_seed)
        for i, layer in enumerate(self.decoder):
            own = _slice(layer_seeds, i, SEEDS_PER_DECODER_LAYER)
            y = self._layer(layer, own, y, layout, source, source_layout)
        return y if self.decoder_norm is None else self.decoder_norm(y)

    def _drop(self, x: Tensor, layout: TokenLayout, seed: Tensor | None) -> Tensor:
        rate = self.config.dropout if self.training else 0.0
        return ops.dropout(x, rate, seed, dropout_rows=layout.dropout_rows)

    def _layer(self, layer: nn.Module, seeds: Tensor | None, *inputs: Any) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # a layer draws nothing itself: its dropout is a function of the seeds
            return checkpoint(layer, *inputs, seeds, use_reentrant=False, preserve_rng_state=False)
        return layer(*inputs, seeds)

    def _loss(self, y: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over the targets [tokens] that count; the logits are never held."""
        smoothing = self.config.label_smoothing if self.training else 0.0
        total = ops.linear_cross_entropy(
            y, self.embedding.weight, None, targets, IGNORE_INDEX, smoothing, reduction="sum"
        )
        return total / (targets != IGNORE_INDEX).sum().clamp(min=1)

    def _draw_dropout_seeds(self, device: torch.device) -> Tensor | None:
        """One launch draws the seeds of every dropout of a step: embeddings, encoder, decoder."""
        config = self.config
        if not self.training or not (config.dropout or config.attention_dropout):
            return None
        count = 2 + (SEEDS_PER_LAYER + SEEDS_PER_DECODER_LAYER) * config.num_layers
        return torch.randint(2**63 - 1, (count,), device=device)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], dtype: torch.dtype | None = None
    ) -> Transformer:
        """The model that a folder holds, in evaluation mode, on the CPU.

        Args:
            folder: with config.json and model.safetensors (or its parts and their index); or the
                name of such a model on the Hugging Face hub.
            dtype: of all weights; None keeps the stored ones.

        Raises:
            FileNotFoundError: no such folder, or one of the two files is missing.
            ValueError: a damaged file, the config of another model, or tensors that are missing,
                unexpected or of another shape than the config says; all are named.
        """
        folder = resolve_folder(folder)
        if not (folder / CONFIG).is_file():
            unfinished = (folder / "checkpoint.safetensors").is_file()
            hint = ", but the checkpoint of a run that has not ended (--resume)"
            raise FileNotFoundError(f"{folder}: no {CONFIG}{hint if unfinished else ''}")
        config = TransformerConfig.from_json_file(folder / CONFIG)
        path, stored = stored_tensors(folder)
        with torch.device("meta"):
            model = cls(config)
        expected = model.state_dict()
        problems = mismatches(
            [name for name in expected if name not in stored],
            [name for name in stored if name not in expected],
            [
                f"{name} is {list(stored[name].shape)}, not {list(tensor.shape)}"
                for name, tensor in expected.items()
                if name in stored and stored[name].shape != tensor.shape
            ],
        )
        if problems:
            raise ValueError(f"{path} does not fit {cls.__name__}: {'; '.join(problems)}")
        model.load_state_dict(stored, assign=True)
        if dtype is not None:
            model.to(dtype)
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors, each whole or not at all."""
        write_model(folder, self.config, type(self).__name__, self.state_dict())


def _columns(layout: TokenLayout) -> int:
    """More than any position: a padded batch may have its tokens on the right."""
    return layout.max_seqlen if layout.padded_shape is None else layout.padded_shape[1]


def _slice(seeds: Tensor | None, index: int, count: int) -> Tensor | None:
    return None if seeds is None else seeds[index * count :][:count]


def _layout(
    side: str,
    ids: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    sequence_offset: int,
) -> TokenLayout:
    """Check one side of the batch and find its tokens."""
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"{side}_ids must be integer, not {ids.dtype}")
    if (cu_seqlens is None) != (max_seqlen is None):
        raise ValueError(
            f"{side}_cu_seqlens and {side}_max_seqlen belong together: give both (packed) or "
            "neither"
        )
    if cu_seqlens is None:
        if ids.dim() != 2:
            raise ValueError(
                f"{side}_ids must be [B, {'S' if side == 'source' else 'T'}], or packed with "
                f"{side}_cu_seqlens and {side}_max_seqlen, not {list(ids.shape)}"
            )
        shape = (ids.shape[0], ids.shape[1])
        return padded_layout(shape, ids.device, mask, None, sequence_offset)[0]
    assert max_seqlen is not None
    if ids.dim() != 1:
        raise ValueError(
            f"with {side}_cu_seqlens, {side}_ids must be packed [tokens], not {list(ids.shape)}"
        )
    if mask is not None:
        raise ValueError(
            f"{side}_mask is for padded input; packed input has {side}_cu_seqlens instead"
        )
    return packed_layout(ids.shape[0], cu_seqlens, max_seqlen, ids.device, sequence_offset)
