"""Layers of transformers' BERT family on these ops, for `bertkern.patch`.

    LayerNorm(dropout(dense(x)) + residual)           linear, dropout_add_layer_norm
    the feed-forward half of a layer                  ffn, dropout_add_layer_norm
    act(dense(x)), and LayerNorm(act(dense(x)))       linear with the activation in it, layer_norm
    dropout(LayerNorm(word + position + type))        embedding_layer_norm

Over 500 lines: each program of the family has a class here, and all share one way to be patched,
pickled and refused.

Under autocast a residual sum and its LayerNorm are computed from autocast's dtype, with statistics
in float32, and their output has it. Which modules get these classes: patched_transformers.py.

B batch, S sequence.
"""

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import GELUActivation

from .. import ops
from .patched_torch import (
    MUST_BE_CALLED,
    PatchedLayerNorm,
    add_norm,
    dropout_probability,
    must_be_called,
)
from .transformers_versions import GELU_TANH, has_registry

_LAYER_NORMS = (nn.LayerNorm, PatchedLayerNorm)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def cached(function: _Function) -> _Function:
    """functools.cache, with the function's own signature."""
    return cast(_Function, cache(function))


class Part(nn.Module):
    """What the classes below share. A module's new class is a subclass of one of them and of the
    module's own class, in that order, under the own class's name. What the own class's method reads
    of the module is annotated here, and what it is given is named in its place: see `knows`.

    Attributes:
        WHAT: the part's name in the report.
        ARGUMENTS: those that are known, where the method's signature does not name them.
        CHILDREN: the children whose parameters are read here -> the kinds that they must be of.
        ACTIVATION: the name of the child that is an activation, if there is one.
        OWN, KIND: the module's own class, and which of the classes below.
    """

    WHAT: ClassVar[str]
    ARGUMENTS: ClassVar[set[str]] = set()
    CHILDREN: ClassVar[dict[str, tuple[type, ...]]]
    ACTIVATION: ClassVar[str | None] = None
    OWN: ClassVar[type[nn.Module]]
    KIND: ClassVar[type["Part"]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles and copies by the two classes, of which the subclass is made again."""
        state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))[2:]
        return _blank, (self.OWN, self.KIND), *state

    @classmethod
    def knows(cls, method: str) -> set[str]:
        """The arguments of a method, and the attributes of a module, that are known here. A program
        of transformers that uses another one computes something else."""
        arguments = cls.ARGUMENTS or inspect.signature(getattr(cls, method)).parameters
        bases = [base for base in cls.__mro__ if issubclass(base, Part)]
        return {name for base in bases for name in base.__annotations__} | set(arguments)

    @classmethod
    def names_for(cls, own: type[nn.Module]) -> dict[str, Any]:
        """What the subclass of this class and `own` has besides both."""
        return {}

    def obstacle(self) -> str | None:
        """Why the children must be called one by one now, or None."""
        return self.obstacle_in(self)

    @classmethod
    def obstacle_in(cls, module: nn.Module, class_of: Callable[[Any], type] = type) -> str | None:
        """Why a module, patched or not, must call its children one by one, or None.

        Args:
            module: of a class whose program is this one's.
            class_of: a child -> the class that it has, or is about to get.
        """
        for name, kinds in cls.CHILDREN.items():
            child: Any = module
            for step in name.split("."):
                child = getattr(child, step, None)
            kind = class_of(child)
            if issubclass(kinds[0], Part):
                if not issubclass(kind, kinds):
                    return f"its {name} stays as it is ({kind.__name__})"
            elif kind not in kinds:
                return f"its {name} is a {_full_name(kind)}, not a {_full_name(kinds[0])}"
            if must_be_called(child):
                return f"its {name} {MUST_BE_CALLED}"
            if isinstance(child, nn.Embedding) and (
                child.max_norm is not None or child.scale_grad_by_freq or child.sparse
            ):
                return f"its {name} has max_norm, scale_grad_by_freq or sparse"
        if cls.ACTIVATION is not None:
            activation = getattr(module, cls.ACTIVATION)
            if _activation_name(activation) is None:
                name = getattr(activation, "__name__", type(activation).__name__)
                return f"its activation {name} is not GELU, GELU's tanh form or ReLU"
        return None


class ResidualNorm(Part):
    """LayerNorm(dropout(dense(x)) + residual): the end of both halves of a layer."""

    WHAT = "dropout + residual + LayerNorm"
    CHILDREN: ClassVar = {
        "dense": (nn.Linear,),
        "dropout": (nn.Dropout,),
        "LayerNorm": _LAYER_NORMS,
    }
    dense: nn.Linear
    dropout: nn.Dropout
    LayerNorm: nn.LayerNorm

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """x [B, S, in] and the residual [B, S, hidden] -> [B, S, hidden]."""
        if self.obstacle() is not None:
            return super().forward(hidden_states, input_tensor)
        return self.add_norm(_linear(self.dense, hidden_states), input_tensor)

    def add_norm(self, y: Tensor, residual: Tensor) -> Tensor:
        """LayerNorm(residual + dropout(y))."""
        return add_norm(self.LayerNorm, y, residual, dropout_probability(self.dropout))


class LinearActivation(Part):
    """act(dense(x)): the first half of a feed-forward network."""

    WHAT = "linear + activation"
    CHILDREN: ClassVar = {"dense": (nn.Linear,)}
    ACTIVATION = "intermediate_act_fn"
    dense: nn.Linear
    intermediate_act_fn: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, S, hidden] -> [B, S, intermediate]."""
        if self.obstacle() is not None:
            return super().forward(hidden_states)
        return _linear(self.dense, hidden_states, self.intermediate_act_fn)


class FeedForwardLayer(Part):
    """A layer whose second half is LayerNorm(x + dropout(W2 act(W1 x + b1) + b2))."""

    WHAT = "FFN"
    CHILDREN: ClassVar = {"intermediate": (LinearActivation,), "output": (ResidualNorm,)}
    intermediate: LinearActivation
    output: ResidualNorm

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        """[B, S, hidden] -> [B, S, hidden]."""
        if self.obstacle() or self.intermediate.obstacle() or self.output.obstacle():
            return super().feed_forward_chunk(attention_output)  # type: ignore[misc]
        up, down = self.intermediate.dense, self.output.dense
        y = _ffn(up, down, self.intermediate.intermediate_act_fn, attention_output)
        return self.output.add_norm(y, attention_output)


class HeadTransform(Part):
    """LayerNorm(act(dense(x))): what stands before the projection to the vocabulary."""

    WHAT = "linear + activation"
    CHILDREN: ClassVar = {"dense": (nn.Linear,)}
    ACTIVATION = "transform_act_fn"
    dense: nn.Linear
    transform_act_fn: nn.Module
    LayerNorm: nn.LayerNorm

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        if self.obstacle() is not None:
            return super().forward(hidden_states)
        return self.LayerNorm(_linear(self.dense, hidden_states, self.transform_act_fn))


class RobertaHead(Part):
    """decoder(LayerNorm(gelu(dense(x)))): logits over the vocabulary."""

    WHAT = "linear + activation"
    CHILDREN: ClassVar = {"dense": (nn.Linear,)}
    dense: nn.Linear
    layer_norm: nn.LayerNorm
    decoder: nn.Linear

    def forward(self, features: Tensor, **kwargs: Any) -> Tensor:
        """[..., hidden] -> [..., V]."""
        return self.decoder(self.transform(features))

    def transform(self, features: Tensor) -> Tensor:
        """LayerNorm(gelu(dense(x)))."""
        if self.obstacle() is not None:
            return self.layer_norm(F.gelu(self.dense(features)))
        y = ops.linear(features, self.dense.weight, self.dense.bias, activation="gelu")
        return self.layer_norm(y)


class AlbertFeedForward(Part):
    """A layer whose second half is LayerNorm(x + W2 act(W1 x + b1) + b2)."""

    WHAT = "FFN"
    CHILDREN: ClassVar = {"ffn": (nn.Linear,), "ffn_output": (nn.Linear,)}
    ACTIVATION = "activation"
    ffn: nn.Linear
    ffn_output: nn.Linear
    activation: nn.Module

    def ff_chunk(self, attention_output: Tensor) -> Tensor:
        """[B, S, hidden] -> [B, S, hidden]."""
        if self.obstacle() is not None:
            return super().ff_chunk(attention_output)  # type: ignore[misc]
        return _ffn(self.ffn, self.ffn_output, self.activation, attention_output)


class DistilFeedForward(Part):
    """dropout(W2 act(W1 x + b1) + b2)."""

    WHAT = "FFN"
    CHILDREN: ClassVar = {"lin1": (nn.Linear,), "lin2": (nn.Linear,), "dropout": (nn.Dropout,)}
    ACTIVATION = "activation"
    lin1: nn.Linear
    lin2: nn.Linear
    dropout: nn.Dropout
    activation: nn.Module

    def ff_chunk(self, input: Tensor) -> Tensor:
        """[B, S, hidden] -> [B, S, hidden]."""
        if self.obstacle() is not None:
            return super().ff_chunk(input)  # type: ignore[misc]
        return _ffn(self.lin1, self.lin2, self.activation, input, dropout_probability(self.dropout))


class DistilLayer(Part):
    """LayerNorm(x + attention(x)), then LayerNorm(x + ffn(x))."""

    WHAT = "dropout + residual + LayerNorm"
    CHILDREN: ClassVar = {"sa_layer_norm": _LAYER_NORMS, "output_layer_norm": _LAYER_NORMS}
    attention: nn.Module
    ffn: nn.Module
    sa_layer_norm: nn.LayerNorm
    output_layer_norm: nn.LayerNorm

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """[B, S, hidden] -> [B, S, hidden]."""
        if self.obstacle() is not None:
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
        y, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        return self.add_norms(y, hidden_states)

    def add_norms(self, y: Tensor, residual: Tensor) -> Tensor:
        """What follows the attention, whose output is y."""
        x = add_norm(self.sa_layer_norm, y, residual, 0.0)
        return add_norm(self.output_layer_norm, self.ffn(x), x, 0.0)


class DistilTupleLayer(DistilLayer):
    """As transformers 4 has it: tuples in and out."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """[B, S, hidden] -> the weights if they are asked for, and [B, S, hidden]."""
        if self.obstacle() is not None:
            own: Any = super(DistilLayer, self)
            outputs: tuple[Tensor, ...] = own.forward(x, attn_mask, head_mask, output_attentions)
            return outputs
        y, *weights = self.attention(
            query=x,
            key=x,
            value=x,
            mask=attn_mask,
            head_mask=head_mask,
            output_attentions=output_attentions,
        )
        return *weights, self.add_norms(y, x)


class Embeddings(Part):
    """dropout(LayerNorm(word[ids] + position[positions] + type[types]))."""

    WHAT = "embeddings"
    word_embeddings: nn.Embedding
    position_embeddings: nn.Embedding
    token_type_embeddings: nn.Embedding
    LayerNorm: nn.LayerNorm
    dropout: nn.Dropout
    position_ids: Tensor
    position_embedding_type: str  # of transformers 4

    @classmethod
    def obstacle_in(cls, module: nn.Module, class_of: Callable[[Any], type] = type) -> str | None:
        """As `Part.obstacle_in`; positions must be added."""
        positions = getattr(module, "position_embedding_type", "absolute")
        if positions != "absolute":
            return f"its position_embedding_type is {positions}"
        return super().obstacle_in(module, class_of)

    def embed(self, ids: Tensor, positions: Tensor, types: Tensor | None, table: Tensor) -> Tensor:
        """Ids [B, S]; positions and types that broadcast to them -> [B, S, hidden]."""
        word, norm = self.word_embeddings, self.LayerNorm
        return ops.embedding_layer_norm(
            ids,
            positions,
            types,
            word.weight,
            _without_padding_gradient(self.position_embeddings),
            table,
            norm.weight,
            norm.bias,
            norm.eps,
            dropout_probability(self.dropout),
            padding_idx=word.padding_idx,
        )

    def embed_without_types(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        """As `embed`, with a table of one type that is 0."""
        positions = self.positions(ids) if positions is None else positions
        word = self.word_embeddings.weight
        return self.embed(ids, positions, None, word.new_zeros(1, word.shape[1]))

    def positions(self, ids: Tensor, cached: int = 0) -> Tensor:
        """The positions of ids [B, S] where none are given, after those of the cache."""
        return self.position_ids[:, cached:][:, : ids.shape[1]]


_EMBEDDING_CHILDREN: dict[str, tuple[type, ...]] = {
    "word_embeddings": (nn.Embedding,),
    "position_embeddings": (nn.Embedding,),
    "LayerNorm": _LAYER_NORMS,
    "dropout": (nn.Dropout,),
}


class BertEmbeddings(Embeddings):
    """Positions count from the length of the cache, which has another name from transformers 5.24
    on; without types, type 0."""

    CHILDREN: ClassVar = {**_EMBEDDING_CHILDREN, "token_type_embeddings": (nn.Embedding,)}
    token_type_ids: Tensor

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
        cache_length: int = 0,
    ) -> Tensor:
        """Ids [B, S] -> [B, S, hidden]; inputs_embeds are left to the class's own forward."""
        cached = past_key_values_length or cache_length
        if input_ids is None or inputs_embeds is not None or self.obstacle() is not None:
            given = (input_ids, token_type_ids, position_ids, inputs_embeds)
            past = (cached,) if cached else ()  # ALBERT has none
            return super().forward(*given, *past)
        if position_ids is None:
            position_ids = self.positions(input_ids, cached)
        if token_type_ids is None and hasattr(self, "token_type_ids"):
            buffer = self.token_type_ids.to(position_ids.device)
            buffer = buffer.expand(position_ids.shape[0], -1)
            token_type_ids = torch.gather(buffer, 1, position_ids)
        table = _without_padding_gradient(self.token_type_embeddings)
        return self.embed(input_ids, position_ids, token_type_ids, table)


class RobertaEmbeddings(BertEmbeddings):
    """Positions count from padding_idx + 1; padding stays at padding_idx."""

    padding_idx: int
    create_position_ids_from_input_ids: Callable[..., Tensor]  # a function in transformers 4
    create_position_ids_from_inputs_embeds: Callable[[Tensor], Tensor]

    def positions(self, ids: Tensor, cached: int = 0) -> Tensor:
        """The positions of ids [B, S] where none are given, after those of the cache."""
        name = "create_position_ids_from_input_ids"
        create: Any = getattr(self, name, None) or self.OWN.forward.__globals__[name]
        positions: Tensor = create(ids, self.padding_idx, cached)
        return positions


class DistilEmbeddings(Embeddings):
    """Without types of tokens."""

    CHILDREN: ClassVar = _EMBEDDING_CHILDREN

    def forward(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        input_embeds: Tensor | None = None,
    ) -> Tensor:
        """Ids [B, S] -> [B, S, hidden]; inputs_embeds, which older versions call input_embeds, are
        left to the class's own forward."""
        if input_ids is None or self.obstacle() is not None:
            embeds = input_embeds if inputs_embeds is None else inputs_embeds
            positions = () if position_ids is None else (position_ids,)  # transformers 4 has none
            return super().forward(input_ids, embeds, *positions)
        return self.embed_without_types(input_ids, position_ids)


class GenerationEmbeddings(Embeddings):
    """Without types of tokens, with a cache."""

    CHILDREN: ClassVar = _EMBEDDING_CHILDREN

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
        cache_length: int = 0,
    ) -> Tensor:
        """Ids [B, S] -> [B, S, hidden]; inputs_embeds are left to the class's own forward."""
        cached = past_key_values_length or cache_length
        if input_ids is None or inputs_embeds is not None or self.obstacle() is not None:
            return super().forward(input_ids, position_ids, inputs_embeds, cached)
        if position_ids is None:
            position_ids = self.positions(input_ids, cached)
        return self.embed_without_types(input_ids, position_ids)


@cached
def patched_class(own: type[nn.Module], kind: type[Part]) -> type[Part]:
    """The class of modules of a class `own` that are patched."""
    names = {
        "OWN": own,
        "KIND": kind,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
        **kind.names_for(own),
    }
    return type(own.__name__, (kind, own), names)


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _blank(own: type[nn.Module], kind: type[Part]) -> Part:
    """A module of the patched class without a state, to be filled by pickle."""
    if has_registry():
        importlib.import_module(".transformers", __package__)  # registers the attention's name
    patched = patched_class(own, kind)
    return patched.__new__(patched)


_ACTIVATIONS: dict[Any, str] = {
    GELUActivation: "gelu",
    **dict.fromkeys(GELU_TANH, "gelu_tanh"),
    nn.ReLU: "relu",
    F.gelu: "gelu",
    F.relu: "relu",
    torch.relu: "relu",
}


def _activation_name(activation: Any) -> str | None:
    """The name that the ops know an activation by, or None."""
    if not isinstance(activation, nn.Module):
        return _ACTIVATIONS.get(activation)
    if must_be_called(activation):
        return None
    if type(activation) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}[activation.approximate]
    return _ACTIVATIONS.get(type(activation))


def _linear(dense: nn.Linear, x: Tensor, activation: Any = None) -> Tensor:
    name = None if activation is None else _activation_name(activation)
    return ops.linear(x, dense.weight, dense.bias, activation=name)


def _ffn(up: nn.Linear, down: nn.Linear, activation: Any, x: Tensor, p: float = 0.0) -> Tensor:
    name = _activation_name(activation)
    assert name is not None
    return ops.ffn(x, up.weight, up.bias, down.weight, down.bias, name, p)


def _without_padding_gradient(embedding: nn.Embedding) -> Tensor:
    """The table, from whose row padding_idx no gradient passes, as nn.Embedding has it."""
    weight = embedding.weight
    if embedding.padding_idx is None or not (torch.is_grad_enabled() and weight.requires_grad):
        return weight
    rows = torch.arange(weight.shape[0], device=weight.device)
    return torch.where((rows == embedding.padding_idx)[:, None], weight.detach(), weight)
