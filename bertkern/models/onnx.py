"""A model as an ONNX file, which ONNX Runtime and others run without torch.

The file computes the model on a padded batch, any number of sequences of any length up to the
model's positions, in float32:

    inputs    input_ids, attention_mask, token_type_ids      int64 [B, S], or [B, choices, S]
    outputs   those of the model under its own names, padding as the model gives it

What is exported is the model's formula in plain torch, with the model's own parameters: a graph of
standard operators has no place for unpadding or for this library's kernels.

Legend: B sequences, S padded length, H heads, D head dim.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertkern.data.files import replacing
from bertkern.nn import EncoderLayer, LayerNorm, Linear

from .bert import BertForMaskedLM, BertForPreTraining, BertModel, MaskedLMHead
from .bert_tasks import (
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from .checkpoint import PretrainedModel

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OPSET = 18
LARGEST = 2**31 - 1  # bytes of one protobuf message
TOLERANCE = 2e-5  # of the largest value: float32 rounding through all layers, and no wrong formula
_ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
_EXAMPLES = ((2, 7), (3, 12), (1, 1))  # (B, S) of the export and of the check


def export_onnx(model: PretrainedModel, path: str | os.PathLike[str]) -> Path:
    """Write a model to `path`, once ONNX Runtime computes from it what the model computes.

    Args:
        model: any BERT of this library; its mode and its dtype do not matter.
        path: the file, written whole or not at all.

    Returns:
        The path.

    Raises:
        ImportError: onnxscript or onnxruntime is not installed.
        TypeError: a model that has no ONNX form.
        ValueError: larger than one ONNX file can be.
        RuntimeError: ONNX Runtime's results are not the model's; nothing was written.
    """
    if type(model) not in _OUTPUTS:
        allowed = ", ".join(c.__name__ for c in _OUTPUTS)
        raise TypeError(f"model must be one of {allowed}, not {type(model).__name__}")
    _need_packages()
    if (size := 4 * sum(p.numel() for p in model.parameters())) > LARGEST:
        raise ValueError(f"the model has {size} bytes in float32; an ONNX file holds {LARGEST}")
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        model = copy.deepcopy(model).float().cpu()
    path = Path(path)
    was_training = model.training
    model.eval()
    try:
        with replacing(path) as temporary:
            _export(PaddedModel(model), temporary)
            _check(model, temporary)
    finally:
        model.train(was_training)
    return path


class PaddedModel(nn.Module):
    """A model on a padded batch in plain torch, without dropout.

    Args:
        model: whose parameters are used.
    """

    def __init__(self, model: PretrainedModel) -> None:
        super().__init__()
        self.model = model
        self.output_names, self.outputs = _OUTPUTS[type(model)]
        if isinstance(model, BertModel) and model.pooler is None:
            self.output_names = self.output_names[:1]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, ...]:
        """What the model's forward returns, one tensor for each of `output_names`."""
        shape = input_ids.shape
        ids, mask, types = (
            t.reshape(-1, shape[-1]) for t in (input_ids, attention_mask, token_type_ids)
        )
        kept = mask != 0
        model = self.model
        bert = model if isinstance(model, BertModel) else model.bert
        assert isinstance(bert, BertModel)
        x = _encode(bert, ids, kept, types)
        return self.outputs(model, x, kept, shape)[: len(self.output_names)]


def _encode(bert: BertModel, ids: Tensor, kept: Tensor, types: Tensor) -> Tensor:
    """[B, S] -> [B, S, hidden]; what stands at padding is not defined."""
    tables = bert.embeddings
    position = torch.arange(ids.shape[1], device=ids.device)
    x = tables.word(ids) + tables.position(position) + tables.token_type(types)
    x = _norm(tables.norm, x)
    # The least finite number, not -inf: a sequence of nothing but padding must not become NaN.
    bias = torch.where(kept, 0.0, torch.finfo(x.dtype).min)[:, None, None]
    for layer in bert.layers:
        assert isinstance(layer, EncoderLayer)
        x = _norm(layer.attention_norm, x + _attend(layer, x, bias))
        ffn = layer.feed_forward
        y = F.linear(_ACTIVATIONS[ffn.activation](ffn.up(x)), ffn.down.weight, ffn.down.bias)
        x = _norm(layer.feed_forward_norm, x + y)
    return x


def _attend(layer: EncoderLayer, x: Tensor, bias: Tensor) -> Tensor:
    attention = layer.attention
    head_dim = x.shape[-1] // attention.num_heads
    qkv = _linear(attention.qkv, x).unflatten(-1, (3, attention.num_heads, head_dim))
    q_BHSD, k_BHSD, v_BHSD = (t.transpose(1, 2) for t in qkv.unbind(2))
    scores = q_BHSD @ k_BHSD.transpose(2, 3) * head_dim**-0.5 + bias
    out_BSHD = (scores.softmax(-1) @ v_BHSD).transpose(1, 2)
    return _linear(attention.output, out_BSHD.flatten(2))


def _linear(layer: Linear, x: Tensor) -> Tensor:
    return _ACTIVATIONS[layer.activation](F.linear(x, layer.weight, layer.bias))


def _norm(norm: LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def _pool(bert: BertModel, x: Tensor, kept: Tensor) -> Tensor:
    """tanh(dense(first real token)), [B, hidden]; of a zero for a sequence without tokens."""
    assert isinstance(bert.pooler, Linear)
    index = torch.arange(kept.shape[1], device=x.device)
    first = torch.where(kept, index, kept.shape[1]).amin(1, keepdim=True)
    first_token = torch.where((index == first)[..., None], x, 0.0).sum(1)
    return torch.tanh(_linear(bert.pooler, first_token))


def _at_padding(x: Tensor, kept: Tensor, value: float) -> Tensor:
    return torch.where(kept[..., None], x, value)


def _vocabulary(head: MaskedLMHead, bert: BertModel, x: Tensor, kept: Tensor) -> Tensor:
    h = _norm(head.norm, _linear(head.transform, x))
    return _at_padding(F.linear(h, bert.embeddings.word.weight, head.bias), kept, 0.0)


def _of_encoder(model: Any, x: Tensor, kept: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    hidden = _at_padding(x, kept, 0.0)
    return (hidden,) if model.pooler is None else (hidden, _pool(model, x, kept))


def _of_pretraining(model: Any, x: Tensor, kept: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    pooled = _pool(model.bert, x, kept)
    return (
        _vocabulary(model.masked_lm, model.bert, x, kept),
        _linear(model.next_sentence, pooled),
    )


def _of_masked_lm(model: Any, x: Tensor, kept: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    return (_vocabulary(model.masked_lm, model.bert, x, kept),)


def _of_sequences(model: Any, x: Tensor, kept: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    return (_linear(model.classifier, _pool(model.bert, x, kept)),)


def _of_choices(model: Any, x: Tensor, kept: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    return (_linear(model.classifier, _pool(model.bert, x, kept)).reshape(shape[:2]),)


def _of_tokens(model: Any, x: Tensor, kept: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    return (_at_padding(_linear(model.classifier, x), kept, 0.0),)


def _of_spans(model: Any, x: Tensor, kept: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    return _at_padding(_linear(model.qa_outputs, x), kept, -torch.inf).unbind(-1)


_OUTPUTS: dict[type, tuple[tuple[str, ...], Callable[..., tuple[Tensor, ...]]]] = {
    BertModel: (("last_hidden_state", "pooler_output"), _of_encoder),
    BertForPreTraining: (("prediction_logits", "seq_relationship_logits"), _of_pretraining),
    BertForMaskedLM: (("logits",), _of_masked_lm),
    BertForSequenceClassification: (("logits",), _of_sequences),
    BertForTokenClassification: (("logits",), _of_tokens),
    BertForQuestionAnswering: (("start_logits", "end_logits"), _of_spans),
    BertForMultipleChoice: (("logits",), _of_choices),
}


def _example(model: PretrainedModel, batch: int, seqlen: int) -> tuple[Tensor, ...]:
    """ids, mask, types; every second sequence has half its length as padding, at its right."""
    shape = (batch, 2, seqlen) if isinstance(model, BertForMultipleChoice) else (batch, seqlen)
    generator = torch.Generator().manual_seed(seqlen)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    types = torch.randint(model.config.type_vocab_size, shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.int64)
    mask.reshape(-1, seqlen)[1::2, (seqlen + 1) // 2 :] = 0
    return ids, mask, types


def _export(padded: PaddedModel, path: Path) -> None:
    model = padded.model
    batch = torch.export.Dim("batch", min=1)
    length = torch.export.Dim("sequence", min=1, max=model.config.max_position_embeddings)
    dims = {0: batch, 1: length}
    if isinstance(model, BertForMultipleChoice):
        dims = {0: batch, 1: torch.export.Dim("choices", min=1), 2: length}
    longest = model.config.max_position_embeddings
    example = _example(model, _EXAMPLES[0][0], min(_EXAMPLES[0][1], longest))
    with _quiet():
        program = torch.onnx.export(
            padded,
            example,
            input_names=INPUTS,
            output_names=padded.output_names,
            dynamic_shapes=(dims,) * len(INPUTS),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(path)


def _check(model: PretrainedModel, path: Path) -> None:
    """Run the file on batches of several shapes, and compare with the model."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for batch, seqlen in _EXAMPLES:
        example = _example(model, batch, min(seqlen, model.config.max_position_embeddings))
        feed = {name: x.numpy() for name, x in zip(INPUTS, example, strict=True)}
        with torch.inference_mode():
            expected = model(*example)
        for name, got in zip(names, session.run(names, feed), strict=True):
            truth = getattr(expected, name)
            finite = truth.isfinite()
            error = (torch.from_numpy(got) - truth)[finite].abs().max().item()
            largest = truth[finite].abs().max().item()
            same_infinities = torch.equal(torch.from_numpy(got).isfinite(), finite)
            if not same_infinities or not error <= TOLERANCE * max(largest, 1.0):
                raise RuntimeError(
                    f"ONNX Runtime's {name} of a batch {list(example[0].shape)} differs from the "
                    f"model's by {error:.1e}, where the largest value is {largest:.1e}"
                )


def _need_packages() -> None:
    import importlib

    for package in ("onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"the export to ONNX needs {package} ({error}): pip install 'bertkern[onnx]'"
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own log, which speaks of torch's insides."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
