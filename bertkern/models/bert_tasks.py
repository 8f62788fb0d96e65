"""BERT with the heads of the tasks that it is fine-tuned for (Devlin et al. 2018, section 4).

    sequence classification   logits = W dropout(pooled) + b                  [B, C]
    multiple choice           logits = w dropout(pooled) + b, one a choice    [B, choices]
    token classification      logits = W dropout(x_t) + b                     [B, S, C] or [T, C]
    question answering        (start, end) = W x_t + b, each a softmax over its sequence's tokens

The names of parameters and files, and the losses, are those of transformers' models of the same
names. The head's dropout is numbered by sequence or token in the whole batch, as the encoder's is.

Legend: B sequences (or questions of a multiple choice), S padded length, T real tokens, C labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bertkern import ops
from bertkern.nn import Linear, TokenLayout

from .bert import BertTaskOutput, BertWithHead, mean_cross_entropy
from .config import BertConfig
from .initialization import initialize


@dataclass
class BertForQuestionAnsweringOutput:
    """What BertForQuestionAnswering returns.

    Attributes:
        loss: mean of the start's and the end's mean cross-entropy, or None without positions.
        start_logits, end_logits: [B, S] with -inf at padding, or [T] for packed input.
    """

    loss: Tensor | None
    start_logits: Tensor
    end_logits: Tensor


class _WithClassifier(BertWithHead):
    """A dropout and one linear layer on top of the encoder."""

    def __init__(self, config: BertConfig, outputs: int, pooler: bool) -> None:
        super().__init__(config, pooler)
        rate = config.classifier_dropout
        self.dropout = config.hidden_dropout_prob if rate is None else rate
        self.classifier = Linear(config.hidden_size, outputs)
        initialize(self.classifier, config.initializer_range)

    def classify(self, x: Tensor, dropout_rows: Tensor | None) -> Tensor:
        """[N, hidden] -> [N, outputs]; dropout_rows number x's rows in the whole batch."""
        dropout = self.dropout if self.training else 0.0
        return self.classifier(ops.dropout(x, dropout, dropout_rows=dropout_rows))

    def classify_sequences(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Tokens [T, hidden] -> [B, outputs], from the pooled first token of each sequence."""
        pooled = self.bert.pool(x, layout)
        assert pooled is not None
        return self.classify(pooled, layout.sequence_rows())


class BertForSequenceClassification(_WithClassifier):
    """One of C labels, several of them, or numbers, for each sequence.

    `config.problem_type` says which: "single_label_classification" (cross-entropy),
    "multi_label_classification" (binary cross-entropy of each label) or "regression" (squared
    error). None: regression for one label, else single-label for integer labels and multi-label for
    others.

    Args:
        config: sizes and rates, with num_labels = C.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, config.num_labels, pooler=True)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        sequence_offset: int = 0,
    ) -> BertTaskOutput:
        """Logits [B, C], and the loss when labels are given.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen,
                sequence_offset: as BertModel.
            labels: integer [B], -100 where there is none, for single-label classification; numbers
                [B, C] for the others (also [B] for C = 1).

        Raises:
            ValueError, TypeError: as BertModel, or labels that do not fit the problem type.
        """
        x, layout = _tokens(
            self,
            (input_ids, attention_mask, token_type_ids, position_ids),
            cu_seqlens,
            max_seqlen,
            sequence_offset,
        )
        logits = self.classify_sequences(x, layout)
        return BertTaskOutput(None if labels is None else self._loss(logits, labels), logits)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        batch, classes = logits.shape
        labels = labels.to(logits.device)
        problem = self.config.problem_type
        if problem is None:
            several = labels.is_floating_point()
            problem = "multi_label" if several else "single_label"
            problem = "regression" if classes == 1 else f"{problem}_classification"
        if problem == "single_label_classification":
            _check_classes("labels", labels, (batch,))
            return mean_cross_entropy(logits, labels.long())
        if labels.shape != logits.shape and not (classes == 1 and labels.shape == (batch,)):
            raise ValueError(
                f"labels must be [B, num_labels] = {[batch, classes]} for problem_type "
                f"{problem!r}, not {list(labels.shape)}"
            )
        logits = logits if logits.dtype == torch.float64 else logits.float()
        targets = labels.to(logits.dtype).reshape(logits.shape)
        loss = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
        return loss(logits, targets, reduction="sum") / max(logits.numel(), 1)


class BertForTokenClassification(_WithClassifier):
    """One of C labels for each token, as in named-entity recognition.

    Args:
        config: sizes and rates, with num_labels = C.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, config.num_labels, pooler=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        sequence_offset: int = 0,
    ) -> BertTaskOutput:
        """Logits [B, S, C] with zeros at padding, or [T, C], and the loss when labels are given.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen,
                sequence_offset: as BertModel.
            labels: integer, shape of input_ids, -100 where there is none; those at padding do not
                count.

        Raises:
            ValueError, TypeError: as BertModel, or labels of another shape or dtype.
        """
        x, layout = _tokens(
            self,
            (input_ids, attention_mask, token_type_ids, position_ids),
            cu_seqlens,
            max_seqlen,
            sequence_offset,
        )
        logits = self.classify(x, layout.dropout_rows)
        loss = None
        if labels is not None:
            _check_classes("labels", labels, tuple(input_ids.shape))
            loss = mean_cross_entropy(logits, layout.unpad(labels.to(logits.device)).long())
        return BertTaskOutput(loss, layout.pad(logits))


class BertForQuestionAnswering(BertWithHead):
    """The span of a text that answers a question: where it starts and where it ends (SQuAD).

    Args:
        config: sizes and rates, with num_labels = 2: start and end.

    Raises:
        ValueError: another num_labels.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, pooler=False)
        if config.num_labels != 2:
            raise ValueError(
                "num_labels must be 2, start and end, for question answering, not "
                f"{config.num_labels}; a model read from a folder takes num_labels=2"
            )
        self.qa_outputs = Linear(config.hidden_size, 2)
        initialize(self.qa_outputs, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        sequence_offset: int = 0,
    ) -> BertForQuestionAnsweringOutput:
        """Logits of each token, and the loss when both positions are given.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen,
                sequence_offset: as BertModel.
            start_positions, end_positions: integer [B], the first and the last token of the answer:
                the column in a padded batch, the index in its sequence in a packed one. A position
                where the sequence has no token (too large, negative, at padding) does not count.

        Raises:
            ValueError, TypeError: as BertModel; one position without the other, or of another shape
                or dtype.
        """
        if (start_positions is None) != (end_positions is None):
            raise ValueError("start_positions and end_positions belong together: give both or none")
        x, layout = _tokens(
            self,
            (input_ids, attention_mask, token_type_ids, position_ids),
            cu_seqlens,
            max_seqlen,
            sequence_offset,
        )
        logits = self.qa_outputs(x)
        loss = None
        if start_positions is not None and end_positions is not None:
            for name, places in (("start", start_positions), ("end", end_positions)):
                _check_classes(f"{name}_positions", places, (layout.batch_size,))
            places = torch.stack((start_positions, end_positions), dim=1).to(logits.device)
            loss = span_cross_entropy(logits, places, layout)
        start, end = layout.pad(logits, -torch.inf).unbind(-1)
        return BertForQuestionAnsweringOutput(loss, start, end)


class BertForMultipleChoice(_WithClassifier):
    """The right one of several texts, each scored by itself (SWAG).

    Args:
        config: sizes and rates; num_labels does not matter.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, 1, pooler=True)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        num_choices: int | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        sequence_offset: int = 0,
    ) -> BertTaskOutput:
        """Logits [B, choices], and the loss when labels are given.

        Args:
            input_ids: integer [B, choices, S], or packed [T]: the choices of the first question,
                then those of the second, and so on.
            attention_mask, token_type_ids, position_ids: shape of input_ids.
            labels: integer [B], the right choice, -100 where there is none.
            num_choices: how many each question has; needed for packed input.
            cu_seqlens, max_seqlen, sequence_offset: as BertModel; a choice is a sequence.

        Raises:
            ValueError, TypeError: as BertModel, or labels or num_choices that do not fit.
        """
        tensors = (input_ids, attention_mask, token_type_ids, position_ids)
        if cu_seqlens is None:
            if input_ids.dim() != 3 or num_choices not in (None, input_ids.shape[1]):
                raise ValueError(
                    f"input_ids must be [B, {num_choices or 'choices'}, S], or [T] with "
                    f"cu_seqlens and max_seqlen, not {list(input_ids.shape)}"
                )
            num_choices = input_ids.shape[1]
            tensors = tuple(  # type: ignore[assignment]  # as many as there were
                t.flatten(0, 1) if t is not None and t.dim() == 3 else t for t in tensors
            )
        elif num_choices is None:
            raise ValueError("num_choices, how many each question has, is needed for packed input")
        elif num_choices < 1 or (len(cu_seqlens) - 1) % num_choices:
            raise ValueError(
                f"num_choices = {num_choices} does not divide the {len(cu_seqlens) - 1} sequences"
            )
        x, layout = _tokens(self, tensors, cu_seqlens, max_seqlen, sequence_offset)
        scores = self.classify_sequences(x, layout)
        logits = scores.reshape(layout.batch_size // max(num_choices, 1), num_choices)
        loss = None
        if labels is not None:
            _check_classes("labels", labels, (logits.shape[0],))
            loss = mean_cross_entropy(logits, labels.to(logits.device).long())
        return BertTaskOutput(loss, logits)


def span_cross_entropy(logits: Tensor, places: Tensor, layout: TokenLayout) -> Tensor:
    """Mean over k of: mean over sequences of -log softmax_{t of the sequence}(logits[t, k]) at the
    token whose column is places[b, k].

    Padding is no candidate, so packed and padded batches have one loss. A place where the sequence
    has no token does not count; a k without any place that counts adds 0.

    Args:
        logits: [T, K].
        places: integer [B, K].
        layout: of the T tokens.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # Filled with the least finite number, not with -inf: its probability is 0 all the same, and a
    # sequence without tokens has no NaN, whose gradient would be NaN.
    log_p_BSK = layout.by_sequence(logits, torch.finfo(logits.dtype).min).log_softmax(1)
    column_BS = layout.by_sequence(layout.positions, -1)
    hit_BSK = (column_BS[..., None] == places[:, None]) & (column_BS >= 0)[..., None]
    total_K = -log_p_BSK.where(hit_BSK, 0.0).sum((0, 1))
    return (total_K / hit_BSK.sum((0, 1)).clamp(min=1)).mean()


def _tokens(
    model: BertWithHead,
    tensors: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    sequence_offset: int,
) -> tuple[Tensor, TokenLayout]:
    """The encoder's hidden states [T, hidden] and their layout."""
    input_ids, attention_mask, token_type_ids, position_ids = tensors
    layout, _ = model.bert.layout(
        input_ids,
        attention_mask,
        position_ids,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        sequence_offset=sequence_offset,
    )
    return model.bert.encode(layout, input_ids, token_type_ids, position_ids), layout


def _check_classes(name: str, labels: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(labels.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be integer, not {labels.dtype}")
