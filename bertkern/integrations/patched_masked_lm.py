"""Masked-LM losses of transformers' BERT family on these ops, for `bertkern.patch`.

In training, with labels, the loss is `linear_cross_entropy` of the labelled tokens: their logits
are never held, and the output has none. Which models get these classes: patched_transformers.py.

B batch, S sequence.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.albert import modeling_albert as albert
from transformers.models.bert import modeling_bert as bert

from .. import ops
from ..ops._registration import may_read
from .patched_bert_layers import Part, RobertaHead
from .transformers_versions import MASKED_LM_LOSS

IGNORE_INDEX = -100  # of transformers' masked-LM labels


class MaskedLM(Part):
    """In training with labels: the mean of −log softmax(logits)[label] over the labelled tokens,
    whose logits are never held; otherwise the class's own forward.

    Attributes:
        LABELS: the arguments without which the class's own forward computes no loss.
        PARAMETERS: the names of the parameters of the class's own forward, in their order.
    """

    WHAT = "masked-LM loss"
    ARGUMENTS: ClassVar = {
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "head_mask",
        "inputs_embeds",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "labels",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "kwargs",
    }
    LABELS: ClassVar[tuple[str, ...]] = ("labels",)
    PARAMETERS: ClassVar[tuple[str, ...]]
    base_model: nn.Module
    config: Any

    @classmethod
    def names_for(cls, own: type[nn.Module]) -> dict[str, Any]:
        """As `Part.names_for`: a forward with the signature of the class's own, off which
        transformers' Trainer reads a model's arguments."""

        @wraps(own.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Accelerate keeps a model's forward in a wrapper, beyond `unpatch`.
            chosen = cls.forward if isinstance(self, cls) else own.forward
            return chosen(self, *args, **kwargs)

        return {
            "forward": forward,
            "PARAMETERS": tuple(inspect.signature(own.forward).parameters)[1:],
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The arguments of the class's own forward; with labels, in training, logits are None."""
        arguments = dict(zip(self.PARAMETERS, args, strict=False)) | kwargs
        if self.training and self.asks_for_loss(arguments) and self.obstacle() is None:
            return_dict = arguments.pop("return_dict", None)
            output = self.with_loss(**arguments)
            as_dict = self.config.return_dict if return_dict is None else return_dict
            return output if as_dict else output.to_tuple()
        return super().forward(*args, **kwargs)

    def asks_for_loss(self, arguments: dict[str, Any]) -> bool:
        """Whether the arguments are those of the loss that is computed here."""
        return all(arguments.get(name) is not None for name in self.LABELS)

    def with_loss(self, labels: Tensor, **arguments: Any) -> Any:
        """The output of the class's own forward, with a loss and without logits."""
        outputs = self.base_model(**arguments, return_dict=True)
        return MaskedLMOutput(
            loss=self.masked_lm_loss(outputs[0], labels, self.items(arguments)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def items(self, arguments: dict[str, Any]) -> Any:
        """The number that the sum of the losses is divided by; None for that of the labels."""
        return None

    def masked_lm_loss(self, x: Tensor, labels: Tensor, items: Any = None) -> Tensor:
        """Mean cross-entropy of x [B, S, hidden] over labels [B, S] that are not -100; NaN where
        all are. With items, their sum divided by it.

        The labelled tokens are picked out first, for which a GPU is waited for once. A graph that
        is traced or captured cannot wait: there the head is computed of every token.
        """
        x, labels = x.flatten(0, -2), labels.flatten().to(x.device)
        if may_read(labels) and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            labelled = (labels != IGNORE_INDEX).nonzero()[:, 0]
            x, labels = x.index_select(0, labelled), labels.index_select(0, labelled)
        decoder = self.decoder_of()
        loss = ops.linear_cross_entropy(
            self.transform(x),
            decoder.weight,
            decoder.bias,
            labels,
            IGNORE_INDEX,
            reduction="mean" if items is None else "sum",
        )
        return loss if items is None else loss / torch.as_tensor(items, device=loss.device)

    def decoder_of(self) -> nn.Linear:
        """The projection to the vocabulary."""
        raise NotImplementedError

    def transform(self, x: Tensor) -> Tensor:
        """What the projection to the vocabulary is applied to."""
        raise NotImplementedError


class BertMaskedLM(MaskedLM):
    """With BertOnlyMLMHead."""

    CHILDREN: ClassVar = {
        "cls": (bert.BertOnlyMLMHead, bert.BertPreTrainingHeads),
        "cls.predictions": (bert.BertLMPredictionHead,),
        "cls.predictions.decoder": (nn.Linear,),
    }
    cls: Any

    def decoder_of(self) -> nn.Linear:
        """The projection to the vocabulary."""
        decoder: nn.Linear = self.cls.predictions.decoder
        return decoder

    def transform(self, x: Tensor) -> Tensor:
        """What the projection to the vocabulary is applied to."""
        y: Tensor = self.cls.predictions.transform(x)
        return y


class BertPreTraining(BertMaskedLM):
    """With the next sentence's loss, which is added."""

    LABELS = ("labels", "next_sentence_label")
    ARGUMENTS: ClassVar = {*MaskedLM.ARGUMENTS, "next_sentence_label"}

    def with_loss(self, labels: Tensor, **arguments: Any) -> Any:
        """The output of the class's own forward, with a loss and without logits of tokens."""
        next_sentence_label = arguments.pop("next_sentence_label")
        outputs = self.base_model(**arguments, return_dict=True)
        relationship = self.cls.seq_relationship(outputs[1])
        next_sentence = F.cross_entropy(relationship.view(-1, 2), next_sentence_label.view(-1))
        return bert.BertForPreTrainingOutput(
            loss=self.masked_lm_loss(outputs[0], labels) + next_sentence,
            seq_relationship_logits=relationship,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class RobertaMaskedLM(MaskedLM):
    """With RobertaLMHead."""

    CHILDREN: ClassVar = {"lm_head": (RobertaHead,), "lm_head.decoder": (nn.Linear,)}
    lm_head: RobertaHead

    def decoder_of(self) -> nn.Linear:
        """The projection to the vocabulary."""
        return self.lm_head.decoder

    def transform(self, x: Tensor) -> Tensor:
        """What the projection to the vocabulary is applied to."""
        return self.lm_head.transform(x)


class ElectraMaskedLM(MaskedLM):
    """With ElectraGeneratorPredictions."""

    CHILDREN: ClassVar = {"generator_lm_head": (nn.Linear,)}
    generator_predictions: nn.Module
    generator_lm_head: nn.Linear

    def decoder_of(self) -> nn.Linear:
        """The projection to the vocabulary."""
        return self.generator_lm_head

    def transform(self, x: Tensor) -> Tensor:
        """What the projection to the vocabulary is applied to."""
        return self.generator_predictions(x)


class AlbertMaskedLM(MaskedLM):
    """With AlbertMLMHead."""

    CHILDREN: ClassVar = {
        "predictions": (albert.AlbertMLMHead,),
        "predictions.decoder": (nn.Linear,),
    }
    predictions: Any

    def decoder_of(self) -> nn.Linear:
        """The projection to the vocabulary."""
        decoder: nn.Linear = self.predictions.decoder
        return decoder

    def transform(self, x: Tensor) -> Tensor:
        """What the projection to the vocabulary is applied to."""
        head = self.predictions
        y: Tensor = head.LayerNorm(head.activation(head.dense(x)))
        return y


class ModernMaskedLM(MaskedLM):
    """With ModernBertPredictionHead; the loss may be a share of several batches' mean."""

    CHILDREN: ClassVar = {"decoder": (nn.Linear,)}
    head: nn.Module
    decoder: nn.Linear
    loss_function: Callable[..., Tensor]
    sparse_prediction: bool
    sparse_pred_ignore_index: int

    @classmethod
    def obstacle_in(cls, module: nn.Module, class_of: Callable[[Any], type] = type) -> str | None:
        """As `Part.obstacle_in`; the loss must be the plain one."""
        if module.loss_function is not MASKED_LM_LOSS:
            return "its loss_function is not that of masked-LM models"
        if module.sparse_prediction and module.sparse_pred_ignore_index != IGNORE_INDEX:
            return f"its sparse_pred_ignore_index is not {IGNORE_INDEX}"
        return super().obstacle_in(module, class_of)

    def asks_for_loss(self, arguments: dict[str, Any]) -> bool:
        """Whether the arguments are those of the loss that is computed here."""
        plain = arguments.get("ignore_index", IGNORE_INDEX) == IGNORE_INDEX
        return plain and super().asks_for_loss(arguments)

    def items(self, arguments: dict[str, Any]) -> Any:
        """The number that the sum of the losses is divided by; None for that of the labels."""
        return arguments.get("num_items_in_batch")

    def decoder_of(self) -> nn.Linear:
        """The projection to the vocabulary."""
        return self.decoder

    def transform(self, x: Tensor) -> Tensor:
        """What the projection to the vocabulary is applied to."""
        return self.head(x)


class DistilMaskedLM(MaskedLM):
    """With its head's layers in the model itself."""

    CHILDREN: ClassVar = {"vocab_projector": (nn.Linear,), "mlm_loss_fct": (nn.CrossEntropyLoss,)}
    vocab_transform: nn.Module
    activation: nn.Module
    vocab_layer_norm: nn.Module
    vocab_projector: nn.Linear
    mlm_loss_fct: nn.CrossEntropyLoss

    @classmethod
    def obstacle_in(cls, module: nn.Module, class_of: Callable[[Any], type] = type) -> str | None:
        """As `Part.obstacle_in`; the loss must be the plain one."""
        loss: Any = module.mlm_loss_fct
        plain = (loss.weight, loss.ignore_index, loss.reduction, loss.label_smoothing)
        if plain != (None, IGNORE_INDEX, "mean", 0.0):
            return "its mlm_loss_fct is not the plain one"
        return super().obstacle_in(module, class_of)

    def decoder_of(self) -> nn.Linear:
        """The projection to the vocabulary."""
        return self.vocab_projector

    def transform(self, x: Tensor) -> Tensor:
        """What the projection to the vocabulary is applied to."""
        return self.vocab_layer_norm(self.activation(self.vocab_transform(x)))
