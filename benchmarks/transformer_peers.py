"""The Transformer by other packages, with the weights of ours: transformers' MarianMTModel, torch's
nn.Transformer and CTranslate2.

All compute what ours does: LayerNorms after the sums, no dropout of attention weights or inside the
feed-forward network, one embedding for source, target and prediction. Marian's sinusoids are all
sines, then all cosines, where the paper's alternate; so the hidden dimension is permuted in every
weight that reads or writes it. Its LayerNorms have eps 1e-5, and ours must, too.

Legend: V vocabulary, d hidden size.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertkern.models import Transformer
from bertkern.nn import sinusoidal_positions

from .engines import quiet_transformers

MARIAN_EPS = 1e-5  # of torch's LayerNorm, which Marian leaves as it is
LONGEST = 256  # positions; Marian computes its table slowly


def own_transformer(model: Transformer, dropout: float) -> Transformer:
    """Ours with these weights and this rate, in training mode."""
    copy = Transformer(dataclasses.replace(model.config, dropout=dropout))
    copy.load_state_dict(model.state_dict())
    return copy.train()


Pair = tuple[Tensor, Tensor]  # a weight of the peer's, and what of ours it is to hold


def _linear(peer: Any, weight: Tensor, bias: Tensor) -> Iterator[Pair]:
    yield peer.weight, weight
    yield peer.bias, bias


def _copy(pairs: Iterator[Pair]) -> None:
    with torch.no_grad():
        for there, here in pairs:
            there.copy_(here)


# transformers


def marian_of(model: Transformer, attention: str = "sdpa", dropout: float = 0.0) -> Any:
    """MarianMTModel with the weights of `model`, in training mode.

    Args:
        attention: "eager" or "sdpa".

    Raises:
        ValueError: pre-LN, or another eps than Marian's.
    """
    import transformers

    config = model.config
    if config.prenorm or config.layer_norm_eps != MARIAN_EPS:
        raise ValueError(
            f"Marian is post-LN with layer_norm_eps = {MARIAN_EPS}, not prenorm = "
            f"{config.prenorm}, layer_norm_eps = {config.layer_norm_eps}"
        )
    sizes: dict[str, Any] = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("layers", config.num_layers),
            ("attention_heads", config.num_attention_heads),
            ("ffn_dim", config.intermediate_size),
        )
    }
    described = transformers.MarianConfig(
        **sizes,
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        max_position_embeddings=LONGEST,
        activation_function=config.hidden_act,
        dropout=dropout,
        attention_dropout=0.0,
        scale_embedding=True,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        decoder_start_token_id=config.bos_token_id,
        forced_eos_token_id=None,
    )
    with quiet_transformers():
        marian = transformers.AutoModelForSeq2SeqLM.from_config(
            described, attn_implementation=attention
        )
    _copy(_marian_weights(model, marian))
    return marian.train()


def _marian_weights(model: Transformer, marian: Any) -> Iterator[Pair]:
    """Every weight of Marian and what it is, the hidden dimension in its order."""
    # Marian's column j is ours order[j]: those of the sines, then those of the cosines
    d = model.config.hidden_size
    order = torch.cat((torch.arange(0, d, 2), torch.arange(1, d, 2)))

    def reads(peer: Any, weight: Tensor, bias: Tensor) -> Iterator[Pair]:
        return _linear(peer, weight[:, order], bias)

    def writes(peer: Any, linear: Any) -> Iterator[Pair]:
        return _linear(peer, linear.weight[order], linear.bias[order])

    def attention(peer: Any, weights: Tensor, biases: Tensor, output: Any) -> Iterator[Pair]:
        projections = (peer.q_proj, peer.k_proj, peer.v_proj)
        for projection, w, b in zip(projections, weights.chunk(3), biases.chunk(3), strict=True):
            yield from reads(projection, w, b)
        yield from writes(peer.out_proj, output)

    def norm(peer: Any, ours: Any) -> Iterator[Pair]:
        return _linear(peer, ours.weight[order], ours.bias[order])

    yield marian.model.shared.weight, model.embedding.weight[:, order]
    for theirs, layers in (
        (marian.model.encoder, model.encoder),
        (marian.model.decoder, model.decoder),
    ):
        ours: Any
        for peer, ours in zip(theirs.layers, layers, strict=True):
            own, network = ours.attention, ours.feed_forward
            yield from attention(peer.self_attn, own.qkv.weight, own.qkv.bias, own.output)
            yield from norm(peer.self_attn_layer_norm, ours.attention_norm)
            yield from reads(peer.fc1, network.up.weight, network.up.bias)
            yield from writes(peer.fc2, network.down)
            yield from norm(peer.final_layer_norm, ours.feed_forward_norm)
            if layers is model.decoder:
                cross = ours.cross_attention
                weights = torch.cat((cross.query.weight, cross.kv.weight))
                biases = torch.cat((cross.query.bias, cross.kv.bias))
                yield from attention(peer.encoder_attn, weights, biases, cross.output)
                yield from norm(peer.encoder_attn_layer_norm, ours.cross_attention_norm)


# torch


class TorchTransformer(nn.Module):
    """torch's nn.Transformer with the weights of `model`, and what it leaves to its user:
    embedding, positions and prediction. In training mode."""

    def __init__(self, model: Transformer, dropout: float = 0.0) -> None:
        super().__init__()
        config = model.config
        self.scale = math.sqrt(config.hidden_size)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.transformer = nn.Transformer(
            config.hidden_size,
            config.num_attention_heads,
            config.num_layers,
            config.num_layers,
            config.intermediate_size,
            dropout,
            config.hidden_act,
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
        )
        # a LayerNorm after the last layer is of pre-LN alone
        self.transformer.encoder.norm = self.transformer.decoder.norm = None
        for module in self.transformer.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
            elif isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
                module.dropout.p = 0.0  # of the feed-forward network's inner values
        self.positions: Tensor
        table = sinusoidal_positions(LONGEST, config.hidden_size)
        self.register_buffer("positions", table, persistent=False)
        _copy(self._weights(model))

    def forward(self, source: Tensor, target: Tensor, source_padding: Tensor | None) -> Tensor:
        """Ids [B, S] and [B, T], and a mask [B, S] that is True at padding -> logits [B, T, V]."""
        causal = nn.Transformer.generate_square_subsequent_mask(
            target.shape[1], device=target.device
        )
        y = self.transformer(
            self._embed(source),
            self._embed(target),
            tgt_mask=causal,
            tgt_is_causal=True,
            src_key_padding_mask=source_padding,
            memory_key_padding_mask=source_padding,
        )
        return F.linear(y, self.embedding.weight)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.dropout(self.embedding(ids) * self.scale + self.positions[: ids.shape[1]])

    def _weights(self, model: Transformer) -> Iterator[Pair]:
        def attention(peer: Any, weight: Tensor, bias: Tensor, output: Any) -> Iterator[Pair]:
            yield peer.in_proj_weight, weight
            yield peer.in_proj_bias, bias
            yield from same(peer.out_proj, output)

        def same(peer: Any, ours: Any) -> Iterator[Pair]:
            return _linear(peer, ours.weight, ours.bias)

        yield self.embedding.weight, model.embedding.weight
        stacks = (
            (self.transformer.encoder, model.encoder),
            (self.transformer.decoder, model.decoder),
        )
        for stack, layers in stacks:
            ours: Any
            for peer, ours in zip(stack.layers, layers, strict=True):
                own = ours.attention
                yield from attention(peer.self_attn, own.qkv.weight, own.qkv.bias, own.output)
                yield from same(peer.linear1, ours.feed_forward.up)
                yield from same(peer.linear2, ours.feed_forward.down)
                norms = [ours.attention_norm, ours.feed_forward_norm]
                if layers is model.decoder:
                    cross = ours.cross_attention
                    weight = torch.cat((cross.query.weight, cross.kv.weight))
                    bias = torch.cat((cross.query.bias, cross.kv.bias))
                    yield from attention(peer.multihead_attn, weight, bias, cross.output)
                    norms.insert(1, ours.cross_attention_norm)
                for number, norm in enumerate(norms, 1):
                    yield from same(getattr(peer, f"norm{number}"), norm)


# CTranslate2


def ctranslate2_of(
    model: Transformer, folder: Path, dtype: torch.dtype, device: torch.device
) -> tuple[Any, list[str]]:
    """CTranslate2's Translator with the weights of `model`, and the vocabulary that it speaks.

    Args:
        folder: does not exist yet; the converted weights go there.
    """
    import ctranslate2
    from ctranslate2.converters import transformers as loaders

    config = model.config
    vocabulary = [f"word{i}" for i in range(config.vocab_size)]
    marian = marian_of(model)
    # what its loader of BART, of which Marian is a variant, asks of a config
    marian.config.normalize_before = marian.config.normalize_embedding = False

    class Conversion(ctranslate2.converters.Converter):
        """Of a model in memory."""

        def _load(self) -> Any:
            with torch.no_grad():
                spec = loaders.BartLoader().get_model_spec(marian)
            spec.register_source_vocabulary(vocabulary)
            spec.register_target_vocabulary(vocabulary)
            spec.config.bos_token = vocabulary[config.bos_token_id]
            spec.config.eos_token = vocabulary[config.eos_token_id]
            spec.config.decoder_start_token = vocabulary[config.bos_token_id]
            spec.config.unk_token = vocabulary[config.pad_token_id]  # it wants one; none is needed
            return spec

    Conversion().convert(str(folder))
    translator = ctranslate2.Translator(
        str(folder),
        device=device.type,
        compute_type=str(dtype).removeprefix("torch."),
        intra_threads=torch.get_num_threads(),
        inter_threads=1,
    )
    return translator, vocabulary
