"""Classes that `bertkern.patch` gives to modules of torch.nn: their parameters, these ops.

    nn.LayerNorm                  layer_norm
    nn.MultiheadAttention         linear, attention, linear; torch's own where weights are asked for
    nn.TransformerEncoderLayer    attention, ffn, and dropout_add_layer_norm at each residual sum
    nn.TransformerDecoderLayer    the same, with attention to the memory between them
    nn.TransformerEncoder         masks reach the layers as bool; nested tensors reach them unpadded

Each is a subclass of the class it stands in for, without state of its own: to set a module's
`__class__` is all there is to do, and to set it back undoes it. nn.TransformerDecoder and
nn.Transformer compute nothing themselves and stay as they are.

What differs from torch: a query whose keys are all masked gets attention 0, in training and in
evaluation (torch gives NaN in its fast path for evaluation; where weights are asked for torch
computes, and gives NaN). Under `torch.autocast` a post-LN layer adds and normalises in autocast's
dtype, statistics in float32; the residual stream of a pre-LN layer keeps its own dtype, as in
torch. Dropout's masks come from this package's generator.

The file is past 500 lines because it repeats torch's long signatures, one argument a line.

B batch, L queries, S keys, T tokens of all sequences without padding, E embedding, H heads, D head
dim.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from .. import ops
from ..ops.attention import MAX_HEAD_DIM

# A LayerNorm, the function that stands before or after it, and the dropout of what that gives.
Sublayer = tuple[nn.LayerNorm, Callable[[Tensor], Tensor], nn.Dropout]


class PatchedLayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension, computed by `bertkern.layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., columns] -> [..., columns]."""
        if input.is_nested or input.shape[-1:] != self.normalized_shape:
            return super().forward(input)
        return ops.layer_norm(input, self.weight, self.bias, self.eps)


class PatchedMultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention whose weights are never held: softmax(q kᵀ / √D + masks) v."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The arguments of nn.MultiheadAttention, with its meanings.

        With need_weights=True, nested tensors, or shapes and dtypes that torch refuses, torch's own
        forward computes, or says what is wrong. `is_causal` is a hint that attn_mask, which must be
        given, is the causal mask; where L = S it is believed, also beside a key_padding_mask.
        """
        if (
            need_weights
            or (is_causal and attn_mask is None)
            or not self._takes(query, key, value, key_padding_mask, attn_mask)
        ):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        q, k, v = self._project(query, key, value)
        q_BLHD, k_BSHD, v_BSHD = (self._batch_first(t, query.dim()) for t in (q, k, v))
        causal = is_causal and q_BLHD.shape[1] == k_BSHD.shape[1]
        out_BLE = ops.attention(
            q_BLHD,
            k_BSHD,
            v_BSHD,
            causal=causal,
            dropout_p=self.dropout if self.training else 0.0,
            **self._masks(key_padding_mask, None if causal else attn_mask, q_BLHD),
        ).flatten(2)
        if query.dim() == 2:
            out = out_BLE[0]
        else:
            out = out_BLE if self.batch_first else out_BLE.transpose(0, 1)
        return ops.linear(out, self.out_proj.weight, self.out_proj.bias), None

    def attend_unpadded(self, x_TE: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Self-attention of sequences that lie end to end, [T, E] -> [T, E], without dropout."""
        q, k, v = self._project(x_TE, x_TE, x_TE)
        out_THD = ops.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return ops.linear(out_THD.flatten(1), self.out_proj.weight, self.out_proj.bias)

    def _takes(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> bool:
        """Whether the tensors are plain ones of the shapes that torch's documentation allows."""
        inputs = (query, key, value)
        if any(t.is_nested for t in inputs) or any(t.dim() != query.dim() for t in inputs):
            return False
        if query.dim() not in (2, 3) or key.shape[:-1] != value.shape[:-1]:
            return False
        if (query.shape[-1], key.shape[-1], value.shape[-1]) != (
            self.embed_dim,
            self.kdim,
            self.vdim,
        ):
            return False
        batch, queries = self._sizes(query)
        key_batch, keys = self._sizes(key)
        padding_shape = (keys,) if query.dim() == 2 else (batch, keys)
        mask_shapes = ((queries, keys), (batch * self.num_heads, queries, keys))
        return (
            batch == key_batch
            and (key_padding_mask is None or key_padding_mask.shape == padding_shape)
            and (attn_mask is None or attn_mask.shape in mask_shapes)
            and all(
                mask is None or mask.dtype == torch.bool or mask.is_floating_point()
                for mask in (key_padding_mask, attn_mask)
            )
        )

    def _sizes(self, x: Tensor) -> tuple[int, int]:
        """Batch and length of an input, batched or not."""
        if x.dim() == 2:
            return 1, x.shape[0]
        return (x.shape[0], x.shape[1]) if self.batch_first else (x.shape[1], x.shape[0])

    def _batch_first(self, x: Tensor, dim: int) -> Tensor:
        """[L, H, D] (dim 2), [L, B, H, D] or [B, L, H, D] as a view [B, L, H, D]."""
        if dim == 2:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k, v [..., H, D]; inputs that are one tensor share one product."""
        E, heads = self.embed_dim, (self.num_heads, self.head_dim)
        w, b = self.in_proj_weight, self.in_proj_bias
        if w is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if b is None else b.chunk(3)
            inputs = (query, key, value)
            return tuple(
                ops.linear(x, w_, b_).unflatten(-1, heads)
                for x, w_, b_ in zip(inputs, weights, biases, strict=True)
            )

        def product(x: Tensor, start: int, end: int) -> tuple[Tensor, ...]:
            rows = slice(start * E, end * E)
            y = ops.linear(x, w[rows], None if b is None else b[rows])
            return y.unflatten(-1, (end - start, *heads)).unbind(-3)

        if query is key and key is value:
            return product(query, 0, 3)
        if key is value:
            return *product(query, 0, 1), *product(key, 1, 3)
        return *product(query, 0, 1), *product(key, 1, 2), *product(value, 2, 3)

    def _masks(
        self, key_padding_mask: Tensor | None, attn_mask: Tensor | None, q_BLHD: Tensor
    ) -> dict[str, Any]:
        """Torch's masks, True for what is ignored, as the arguments of `ops.attention`."""
        batch, _, heads, _ = q_BLHD.shape
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (batch, heads))
        if key_padding_mask is None or key_padding_mask.dtype == torch.bool:
            keep = None if key_padding_mask is None else ~key_padding_mask.view(batch, -1)
            return {"key_padding_mask": keep, "bias": _as_bias(attn_mask, q_BLHD)}
        padding_B11S = key_padding_mask.view(batch, 1, 1, -1)
        if attn_mask is None:
            bias = padding_B11S
        elif attn_mask.dtype == torch.bool:
            bias = torch.where(attn_mask, -torch.inf, padding_B11S)
        else:
            bias = attn_mask + padding_B11S
        return {"bias": _as_bias(bias, q_BLHD)}


class PatchedTransformerEncoderLayer(nn.TransformerEncoderLayer):
    """nn.TransformerEncoderLayer by fused sublayers."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The arguments of nn.TransformerEncoderLayer, with its meanings.

        A nested tensor in evaluation is computed without padding, as in torch's fast path. A layer
        with a child of another kind, or with hooks on one that is fused, is computed by torch's
        forward, which calls its children one by one.
        """
        if _obstacle(self) is not None:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if src.is_nested:
            if self._takes_nested(src, src_mask, src_key_padding_mask):
                return self._nested(src)
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)

        def attend(x: Tensor) -> Tensor:
            return _attend(self.self_attn, x, x, src_mask, src_key_padding_mask, is_causal)

        return self._apply_sublayers(src, attend)

    def _apply_sublayers(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        return _apply(
            x,
            [
                (self.norm1, attend, self.dropout1),
                (self.norm2, lambda h: _feed_forward(self, h), self.dropout2),
            ],
            self.norm_first,
        )

    def _takes_nested(self, src: Tensor, *masks: Tensor | None) -> bool:
        return (
            src.layout == torch.strided
            and src.dim() == 3
            and all(mask is None for mask in masks)
            and type(self.self_attn) is PatchedMultiheadAttention
            and not must_be_called(self.self_attn)
            and self.self_attn.in_proj_weight is not None
            and not self.training
            and not torch.is_grad_enabled()
        )

    def _nested(self, src: Tensor) -> Tensor:
        """The layer on a nested tensor of sequences [L_b, E]."""
        sequences = src.unbind()
        lengths = [sequence.shape[0] for sequence in sequences]
        cu_seqlens = torch.tensor(
            [0, *accumulate(lengths)], dtype=torch.int32, device=sequences[0].device
        )
        attention = cast(PatchedMultiheadAttention, self.self_attn)

        def attend(x: Tensor) -> Tensor:
            return attention.attend_unpadded(x, cu_seqlens, max(lengths))

        y_TE = self._apply_sublayers(torch.cat(sequences), attend)
        return torch.nested.as_nested_tensor(list(y_TE.split(lengths)), layout=torch.strided)


class PatchedTransformerDecoderLayer(nn.TransformerDecoderLayer):
    """nn.TransformerDecoderLayer by fused sublayers."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The arguments of nn.TransformerDecoderLayer, with its meanings.

        A layer with a child of another kind, or with hooks on one that is fused, is computed by
        torch's forward, which calls its children one by one.
        """
        if _obstacle(self) is not None:
            return super().forward(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )

        def attend_self(x: Tensor) -> Tensor:
            return _attend(self.self_attn, x, x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)

        def attend_memory(x: Tensor) -> Tensor:
            masks = (memory_mask, memory_key_padding_mask, memory_is_causal)
            return _attend(self.multihead_attn, x, memory, *masks)

        return _apply(
            tgt,
            [
                (self.norm1, attend_self, self.dropout1),
                (self.norm2, attend_memory, self.dropout2),
                (self.norm3, lambda h: _feed_forward(self, h), self.dropout3),
            ],
            self.norm_first,
        )


class PatchedTransformerEncoder(nn.TransformerEncoder):
    """nn.TransformerEncoder that leaves bool masks bool: torch's own makes them float, and a
    mask of keys is cheaper than a bias."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """The arguments of nn.TransformerEncoder, with its meanings.

        In evaluation torch's forward may take the padding out (enable_nested_tensor); it then does
        so here too, and rows of padding come out as 0 (before the last norm) as they do there.
        """
        may_unpad = (
            src_key_padding_mask is not None
            and mask is None
            and getattr(self, "use_nested_tensor", False)
            and not self.layers[0].training
        )
        if src.is_nested or may_unpad:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        causal = _is_causal(mask) if is_causal is None else is_causal
        output = src
        for layer in self.layers:
            output = layer(
                output,
                src_mask=mask,
                src_key_padding_mask=src_key_padding_mask,
                is_causal=causal,
            )
        return output if self.norm is None else self.norm(output)


_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: PatchedLayerNorm,
    nn.MultiheadAttention: PatchedMultiheadAttention,
    nn.TransformerEncoderLayer: PatchedTransformerEncoderLayer,
    nn.TransformerDecoderLayer: PatchedTransformerDecoderLayer,
    nn.TransformerEncoder: PatchedTransformerEncoder,
}


def replacement(module: nn.Module, model: nn.Module) -> type | str | None:
    """What `bertkern.patch` does with a module of torch.nn.

    Args:
        module: a module of the model, patched or not.
        model: the model that is patched.

    Returns:
        The class that takes the module's place; or why the module stays as it is; or None, where
        it is none of these classes or is patched already.
    """
    if type(module) in _REPLACEMENTS.values():
        return None
    base = next((kind for kind in _REPLACEMENTS if isinstance(module, kind)), None)
    if base is None:
        return None
    if type(module) is not base:
        return f"{type(module).__name__} is a class of its own, derived from {base.__name__}"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return f"it normalises over {len(module.normalized_shape)} dimensions, not the last alone"
    if isinstance(module, nn.MultiheadAttention):
        if module.bias_k is not None or module.bias_v is not None:
            return "add_bias_kv=True adds a key that is a parameter"
        if module.add_zero_attn:
            return "add_zero_attn=True adds a key of zeros"
        if module.head_dim > MAX_HEAD_DIM:
            return f"its head dim is {module.head_dim}; at most {MAX_HEAD_DIM} are supported"
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return _obstacle(module) or _REPLACEMENTS[base]
    return _REPLACEMENTS[base]


_FUSED = (nn.Linear, nn.Dropout, nn.LayerNorm, PatchedLayerNorm)
_CALLED = ("self_attn", "multihead_attn", "activation")
_BLOCKS = ("_sa_block", "_mha_block", "_ff_block")


def _obstacle(layer: nn.Module) -> str | None:
    """Why a layer's children must be called one by one, or None: what is fused calls no child."""
    for name in _BLOCKS:
        if name in layer.__dict__:
            return f"its {name} was replaced on the instance"
    for name, child in layer.named_children():
        if name in _CALLED:
            continue
        if type(child) not in _FUSED:
            return f"its {name} is not as torch makes it ({type(child).__name__})"
        if must_be_called(child):
            return f"its {name} {MUST_BE_CALLED}"
    return None


MUST_BE_CALLED = "has hooks, a forward of its own, or a weight that is no plain tensor"
_PLAIN = (nn.Parameter, Tensor, type(None))


def must_be_called(module: nn.Module) -> bool:
    """Whether something happens when the module is called that its parameters do not tell, or they
    are tensors that compute in their own way, as torchao's quantized weights do."""
    parameters = module._parameters
    weight = parameters["weight"] if "weight" in parameters else None  # noqa: SIM401  # no get in a ScriptModule's
    return (
        "forward" in module.__dict__
        or bool(
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        )
        or _has_any_global_hook()
        or (type(weight) not in _PLAIN and _computes_itself(weight))
    )


def _computes_itself(weight: Any) -> bool:
    """Whether a weight is a wrapper with operators of its own; not one that FSDP2 sharded, which is
    whole and plain in the forward."""
    if torch.distributed.is_available():
        from torch.distributed.tensor import DTensor

        if isinstance(weight, DTensor):
            return False
    return hasattr(weight, "__tensor_flatten__")


def _apply(x: Tensor, sublayers: Sequence[Sublayer], norm_first: bool) -> Tensor:
    """Each sublayer in turn, post-LN or pre-LN:

    x = LayerNorm(x + dropout(f(x)))        (Vaswani et al. 2017)
    x = x + dropout(f(LayerNorm(x)))        (Xiong et al. 2020)
    """
    if not norm_first:
        for norm, function, dropout in sublayers:
            x = add_norm(norm, function(x), x, dropout_probability(dropout))
        return x
    normed = _norm(sublayers[0][0], x)
    for i, (_, function, dropout) in enumerate(sublayers):
        y, p = function(normed), dropout_probability(dropout)
        if i + 1 == len(sublayers):
            return x + ops.dropout(y, p)
        next_norm = sublayers[i + 1][0]
        if y.dtype == x.dtype:
            normed, x = add_norm(next_norm, y, x, p, prenorm=True)
        else:  # autocast: the fused sum would round the residual stream in every sublayer
            x = x + ops.dropout(y, p)
            normed = _norm(next_norm, x)
    return x


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)


def add_norm(norm: nn.LayerNorm, y: Tensor, x: Tensor, p: float, prenorm: bool = False) -> Any:
    """LayerNorm(x + dropout(y)); with prenorm also the sum."""
    return ops.dropout_add_layer_norm(y, x, norm.weight, norm.bias, p, norm.eps, prenorm)


def dropout_probability(dropout: nn.Dropout) -> float:
    """What a dropout module drops now."""
    return dropout.p if dropout.training else 0.0


def _attend(
    attention: nn.Module,
    x: Tensor,
    memory: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    return attention(
        x,
        memory,
        memory,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        need_weights=False,
        is_causal=is_causal,
    )[0]


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    """dropout(act(x W1ᵀ + b1)) W2ᵀ + b2; the dropout after it belongs to the residual sum."""
    up, down, p = layer.linear1, layer.linear2, dropout_probability(layer.dropout)
    activation = _activation_name(layer.activation)
    if activation is None:
        h = ops.dropout(layer.activation(ops.linear(x, up.weight, up.bias)), p)
    elif p:
        h = ops.linear(x, up.weight, up.bias, activation=activation, dropout_p=p)
    else:
        return ops.ffn(x, up.weight, up.bias, down.weight, down.bias, activation)
    return ops.linear(h, down.weight, down.bias)


def _activation_name(function: Callable[[Tensor], Tensor]) -> str | None:
    """The name that the ops know the function by, or None."""
    if function is F.relu or function is torch.relu:
        return "relu"
    if function is F.gelu:
        return "gelu"
    if isinstance(function, nn.Module) and not must_be_called(function):
        if type(function) is nn.ReLU:
            return "relu"
        if type(function) is nn.GELU:
            return {"none": "gelu", "tanh": "gelu_tanh"}.get(function.approximate)
    return None


def _as_bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask of torch's (True: ignored; float: added) as the bias that `ops.attention` takes."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        return ~mask
    return mask if mask.dtype in (like.dtype, torch.float32) else mask.to(like.dtype)


def _is_causal(mask: Tensor | None) -> bool:
    """Whether a mask is the causal one, bool or float. Reads it on the host, as torch does."""
    if mask is None or mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    above = torch.ones_like(mask, dtype=torch.bool).triu(1)
    if mask.dtype != torch.bool:
        above = torch.zeros_like(mask).masked_fill(above, -torch.inf)
    return torch.equal(mask, above)
