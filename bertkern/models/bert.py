"""BERT (Devlin et al. 2018): the encoder, and the heads of its pre-training.

    x = embeddings(ids);  x = layer(x) for each layer;  pooled = tanh(W x_first + b)
    masked-LM logits = LayerNorm(gelu(W x + b)) E_wordᵀ + b_vocab    E_word: the word embedding
    next-sentence logits = W pooled + b                              0: B follows A, 1: B is random

Padded input is unpadded once, before the embedding, and padded again only in the output. The heads
of the tasks that a pre-trained BERT is fine-tuned for are in `bert_tasks.py`.

Legend: B sequences, S padded length, T real tokens, V vocabulary, P tokens that carry a label.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bertkern import ops
from bertkern.nn import (
    BertEmbeddings,
    EncoderLayer,
    LayerNorm,
    Linear,
    TokenLayout,
    packed_layout,
    padded_layout,
)
from bertkern.nn.encoder import SEEDS_PER_LAYER
from bertkern.nn.layout import IGNORE_INDEX

from .checkpoint import PretrainedModel
from .config import BertConfig
from .initialization import initialize

Labelled = tuple[Tensor, Tensor]  # tokens [P] in 0..T-1, and their labels [P]


@dataclass
class BertModelOutput:
    """What BertModel returns.

    Attributes:
        last_hidden_state: [B, S, hidden] with zeros at padding, or [T, hidden] for packed input.
        pooler_output: [B, hidden], or None for a model without pooler.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None


@dataclass
class BertForPreTrainingOutput:
    """What BertForPreTraining returns; what was not asked for is None.

    Attributes:
        loss: the sum of the two losses below, of those whose labels were given.
        masked_lm_loss: mean cross-entropy over the tokens that carry a label; 0 where none does.
        next_sentence_loss: mean cross-entropy over the sequences.
        prediction_logits: [B, S, V] with zeros at padding, or [T, V] for packed input.
        seq_relationship_logits: [B, 2].
    """

    loss: Tensor | None
    masked_lm_loss: Tensor | None
    next_sentence_loss: Tensor | None
    prediction_logits: Tensor | None
    seq_relationship_logits: Tensor


@dataclass
class BertTaskOutput:
    """What a model with one head returns; what was not asked for is None.

    Attributes:
        loss: mean over the labels that count; 0 where none does.
        logits: what the head gives; its shape is said by the model.
    """

    loss: Tensor | None
    logits: Tensor | None


class BertModel(PretrainedModel):
    """The encoder with its embeddings and pooler.

    Args:
        config: sizes and rates.
        pooler: whether there is the dense layer that makes pooler_output.
    """

    def __init__(self, config: BertConfig, pooler: bool = True) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embeddings = BertEmbeddings(
            config.vocab_size,
            config.max_position_embeddings,
            config.type_vocab_size,
            config.hidden_size,
            config.layer_norm_eps,
            config.hidden_dropout_prob,
            config.pad_token_id,
        )
        self.layers = nn.ModuleList(
            EncoderLayer(
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                config.activation,
                config.hidden_dropout_prob,
                config.attention_probs_dropout_prob,
                config.layer_norm_eps,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.pooler = Linear(config.hidden_size, config.hidden_size) if pooler else None
        initialize(self, config.initializer_range)

    @classmethod
    def _for_tensors(cls, config: BertConfig, stored: dict[str, Tensor]) -> BertModel:
        # an encoder that was saved without pooler, as from masked-LM training, stays without
        return cls(config, pooler=any(name.startswith("pooler.") for name in stored))

    def gradient_checkpointing_enable(self) -> None:
        """In training keep only each layer's input and compute the layer again in the backward
        (Chen et al. 2016). The gradients are the same bits, dropout included."""
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep what the backward needs, as at first."""
        self.gradient_checkpointing = False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        sequence_offset: int = 0,
    ) -> BertModelOutput:
        """Encode a padded or a packed batch.

        Args:
            input_ids: integer [B, S], or [T] with cu_seqlens and max_seqlen.
            attention_mask: bool or integer [B, S], 0 at padding, which may stand anywhere; padded
                input only.
            token_type_ids: integer, shape of input_ids; None means type 0.
            position_ids: integer, shape of input_ids; for padded input also [S] or [1, S]. None:
                the column in the padded batch, or the index in its sequence for packed input.
            cu_seqlens: int32 [B + 1] on the device: 0, then the running sum of the lengths.
            max_seqlen: the longest length, or more.
            sequence_offset: for a part of a batch (on one of several processes, or one of several
                that are accumulated), how many sequences of the batch come before it. With the
                batch's max_seqlen (or padded length) and seed, dropout is that of the whole batch.

        Raises:
            ValueError: shapes that do not fit together, or a sequence longer than
                max_position_embeddings.
            TypeError: an argument of the wrong dtype.
        """
        layout, _ = self.layout(
            input_ids,
            attention_mask,
            position_ids,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            sequence_offset=sequence_offset,
        )
        x = self.encode(layout, input_ids, token_type_ids, position_ids)
        return BertModelOutput(layout.pad(x), self.pool(x, layout))

    def layout(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        label_tokens: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        sequence_offset: int = 0,
    ) -> tuple[TokenLayout, Labelled | None]:
        """Check the batch and find its tokens, and those that carry masked-LM labels."""
        if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise TypeError(f"input_ids must be integer, not {input_ids.dtype}")
        if (cu_seqlens is None) != (max_seqlen is None):
            raise ValueError(
                "cu_seqlens and max_seqlen belong together: give both (packed) or neither"
            )
        if label_tokens is not None and (labels is None or cu_seqlens is None):
            raise ValueError("label_tokens needs packed input and labels")
        if cu_seqlens is not None:
            assert max_seqlen is not None
            if input_ids.dim() != 1:
                raise ValueError(
                    f"with cu_seqlens, input_ids must be packed [T], not {list(input_ids.shape)}"
                )
            if attention_mask is not None:
                raise ValueError(
                    "attention_mask is for padded input; packed input has cu_seqlens instead"
                )
            layout = packed_layout(
                input_ids.shape[0], cu_seqlens, max_seqlen, input_ids.device, sequence_offset
            )
            labelled = None if labels is None else _packed_labels(input_ids, labels, label_tokens)
        else:
            if input_ids.dim() != 2:
                raise ValueError(
                    f"input_ids must be [B, S], or [T] with cu_seqlens and max_seqlen, not "
                    f"{list(input_ids.shape)}"
                )
            shape = (input_ids.shape[0], input_ids.shape[1])
            layout, labelled = padded_layout(
                shape, input_ids.device, attention_mask, labels, sequence_offset
            )
        longest = input_ids.shape[1] if cu_seqlens is None else layout.max_seqlen
        if position_ids is None and longest > self.config.max_position_embeddings:
            raise ValueError(
                f"a sequence of {longest} tokens is longer than max_position_embeddings = "
                f"{self.config.max_position_embeddings}"
            )
        return layout, labelled

    def encode(
        self,
        layout: TokenLayout,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The tokens' hidden states [T, hidden], without padding."""
        shape = input_ids.shape
        if (
            position_ids is not None
            and len(shape) == 2
            and position_ids.shape in (shape[1:], (1, shape[1]))
        ):
            position_ids = position_ids.expand(shape)
        for name, ids in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
            if ids is not None and ids.shape != shape:
                raise ValueError(f"{name} has shape {list(ids.shape)}, input_ids {list(shape)}")
        seeds = self._draw_dropout_seeds(input_ids.device)
        x = self.embeddings(
            layout.unpad(input_ids),
            layout.positions if position_ids is None else layout.unpad(position_ids),
            None if token_type_ids is None else layout.unpad(token_type_ids),
            layout,
            None if seeds is None else seeds[0],
        )
        for i, layer in enumerate(self.layers):
            start = 1 + i * SEEDS_PER_LAYER
            arguments = (x, layout, None if seeds is None else seeds[start:][:SEEDS_PER_LAYER])
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                # a layer draws nothing itself: its dropout is a function of the seeds
                x = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(*arguments)
        return x

    def pool(self, x: Tensor, layout: TokenLayout) -> Tensor | None:
        """tanh(dense(first token)) of each sequence, [B, hidden]."""
        return None if self.pooler is None else torch.tanh(self.pooler(layout.first_tokens(x)))

    def _draw_dropout_seeds(self, device: torch.device) -> Tensor | None:
        """One launch draws the seeds of every dropout of a step."""
        config = self.config
        if not self.training or not (
            config.hidden_dropout_prob or config.attention_probs_dropout_prob
        ):
            return None
        return torch.randint(2**63 - 1, (1 + SEEDS_PER_LAYER * len(self.layers),), device=device)


class BertWithHead(PretrainedModel):
    """What every model with a head on top of the encoder has.

    Args:
        config: sizes and rates.
        pooler: whether the encoder has the dense layer on its first token.
    """

    def __init__(self, config: BertConfig, pooler: bool) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config, pooler)

    def gradient_checkpointing_enable(self) -> None:
        """As `BertModel.gradient_checkpointing_enable`."""
        self.bert.gradient_checkpointing_enable()

    def gradient_checkpointing_disable(self) -> None:
        """As `BertModel.gradient_checkpointing_disable`."""
        self.bert.gradient_checkpointing_disable()


class MaskedLMHead(nn.Module):
    """logits = LayerNorm(gelu(W x + b)) E_wordᵀ + b_vocab, with the encoder's word embedding.

    Args:
        config: sizes.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = Linear(config.hidden_size, config.hidden_size, config.activation)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        initialize(self, config.initializer_range)

    def forward(self, x: Tensor, word: Tensor) -> Tensor:
        """Hidden states [..., hidden], word embedding [V, hidden] -> logits [..., V]."""
        return ops.linear(self.norm(self.transform(x)), word, self.bias)

    def loss(self, x: Tensor, word: Tensor, labelled: Labelled) -> Tensor:
        """Mean cross-entropy over the labelled tokens of x [T, hidden]; 0 where there are none.

        Their logits are never held.
        """
        tokens, targets = labelled
        h = self.norm(self.transform(x.index_select(0, tokens)))
        total = ops.linear_cross_entropy(h, word, self.bias, targets, IGNORE_INDEX, reduction="sum")
        return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


class BertForMaskedLM(BertWithHead):
    """BERT, without pooler, with the masked-LM head (tied to the word embedding).

    Args:
        config: sizes and rates.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, pooler=False)
        self.masked_lm = MaskedLMHead(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        label_tokens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        sequence_offset: int = 0,
        return_logits: bool = False,
    ) -> BertTaskOutput:
        """Loss, or logits [B, S, V] with zeros at padding ([T, V] for packed input).

        The arguments are those of `BertForPreTraining`, but for the next sentence.
        """
        layout, labelled = self.bert.layout(
            input_ids,
            attention_mask,
            position_ids,
            labels,
            label_tokens,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            sequence_offset=sequence_offset,
        )
        x = self.bert.encode(layout, input_ids, token_type_ids, position_ids)
        word = self.bert.embeddings.word.weight
        return BertTaskOutput(
            None if labelled is None else self.masked_lm.loss(x, word, labelled),
            layout.pad(self.predict(x)) if labels is None or return_logits else None,
        )

    def predict(self, x: Tensor) -> Tensor:
        """Hidden states [..., hidden] -> logits over the vocabulary [..., V]."""
        return self.masked_lm(x, self.bert.embeddings.word.weight)


class BertForPreTraining(BertWithHead):
    """BERT with the masked-LM head (tied to the word embedding) and the next-sentence head.

    Args:
        config: sizes and rates.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, pooler=True)
        self.masked_lm = MaskedLMHead(config)
        self.next_sentence = Linear(config.hidden_size, 2)
        initialize(self.next_sentence, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        *,
        label_tokens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        sequence_offset: int = 0,
        return_logits: bool = False,
    ) -> BertForPreTrainingOutput:
        """Losses, or logits.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen,
                sequence_offset: as BertModel.
            labels: int64, shape of input_ids: the vocabulary id to predict, -100 where there is
                none. The vocabulary is predicted at labelled tokens only.
            next_sentence_label: int64 [B], 0: the second text follows the first, 1: it is random.
            label_tokens: int64 [P], packed input only: the tokens that `labels`, then [P], are
                for. With it a GPU is never waited for; without it, finding the labels on a GPU
                waits once.
            return_logits: compute prediction_logits also when labels are given.
        """
        layout, labelled = self.bert.layout(
            input_ids,
            attention_mask,
            position_ids,
            labels,
            label_tokens,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            sequence_offset=sequence_offset,
        )
        x = self.bert.encode(layout, input_ids, token_type_ids, position_ids)
        pooled = self.bert.pool(x, layout)
        assert pooled is not None
        relationship = self.next_sentence(pooled)

        masked_lm_loss = next_sentence_loss = logits = None
        if labelled is not None:
            masked_lm_loss = self.masked_lm.loss(x, self.bert.embeddings.word.weight, labelled)
        if labels is None or return_logits:
            logits = layout.pad(self.predict(x))
        if next_sentence_label is not None:
            if next_sentence_label.shape != (layout.batch_size,):
                raise ValueError(
                    f"next_sentence_label must be [B] = [{layout.batch_size}], not "
                    f"{list(next_sentence_label.shape)}"
                )
            next_sentence_loss = mean_cross_entropy(relationship, next_sentence_label)
        losses = [loss for loss in (masked_lm_loss, next_sentence_loss) if loss is not None]
        return BertForPreTrainingOutput(
            sum(losses[1:], losses[0]) if losses else None,
            masked_lm_loss,
            next_sentence_loss,
            logits,
            relationship,
        )

    def predict(self, x: Tensor) -> Tensor:
        """Hidden states [..., hidden] -> logits over the vocabulary [..., V]."""
        return self.masked_lm(x, self.bert.embeddings.word.weight)


def _packed_labels(input_ids: Tensor, labels: Tensor, label_tokens: Tensor | None) -> Labelled:
    if label_tokens is not None:
        if label_tokens.shape != labels.shape or labels.dim() != 1:
            raise ValueError(
                f"labels and label_tokens must both be [P], not {list(labels.shape)} and "
                f"{list(label_tokens.shape)}"
            )
        return label_tokens, labels
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels has shape {list(labels.shape)}, input_ids {list(input_ids.shape)}"
        )
    tokens = (labels != IGNORE_INDEX).nonzero()[:, 0]
    return tokens.to(input_ids.device), labels[tokens].to(input_ids.device)


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(logits [N, C])[target] over the targets [N] that are not -100.

    0 where all are. In float32, or float64 for float64 logits.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)
