"""The classes that modules of torch.nn get by `bertkern.patch`, against the modules themselves.

B batch 3, L queries 6, S keys 5, E embedding 8, H heads 2. Unpatched float64 is the truth for
float64 to 1e-10; float32 is compared at 2e-5. One file for one source file, hence its length.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bertkern.integrations.patched_torch import (
    PatchedLayerNorm,
    PatchedMultiheadAttention,
    PatchedTransformerDecoderLayer,
    PatchedTransformerEncoder,
    PatchedTransformerEncoderLayer,
    replacement,
)
from bertkern.integrations.patching import patch, unpatch

B, L, S, E, H, FFN = 3, 6, 5, 8, 2, 12
TOLERANCES = {
    torch.float64: {"atol": 1e-10, "rtol": 1e-10},
    torch.float32: {"atol": 2e-5, "rtol": 1e-4},
}
FLOATS = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def pair(make, *sizes, dtype=torch.float64, **options) -> tuple[nn.Module, nn.Module]:
    """The same weights twice, random ones (torch's biases and LayerNorms start as 0 and 1):
    torch's and ours. Not by deepcopy: it makes torch's decoder layer forget an activation that is
    a module."""
    theirs, ours = (make(*sizes, dtype=dtype, **options) for _ in range(2))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    ours.load_state_dict(theirs.state_dict())
    assert not patch(ours).left
    return theirs, ours


def nested_tensor(lengths, dtype=torch.float64):
    sequences = [torch.randn(n, E, dtype=dtype) for n in lengths]
    return torch.nested.nested_tensor(sequences, layout=torch.strided)


class Ops(TorchDispatchMode):
    """The names of the ops that a block calls."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


def ops_of(call, *args) -> set[str]:
    """This package's ops that a call uses, without their namespace, and torch's attention."""
    with Ops() as ops:
        call(*args)
    ours = {name.removeprefix("bertkern::") for name in ops.names if name.startswith("bertkern::")}
    return ours | {name for name in ops.names if "attention" in name and name[:4] == "aten"}


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def results(module, call, inputs):
    """Output, and the gradient of every parameter and input under a random cotangent."""
    for tensor in (*module.parameters(), *inputs):
        tensor.grad = None
    out = call(module)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    out.backward(cotangent)
    grads = {n: p.grad for n, p in module.named_parameters()}
    grads |= {f"input {i}": t.grad for i, t in enumerate(inputs)}
    return {"out": out.detach(), **{n: g.clone() for n, g in grads.items() if g is not None}}


def assert_agree(theirs, ours, call, inputs=()):
    expected, got = results(theirs, call, inputs), results(ours, call, inputs)
    tolerance = TOLERANCES[expected["out"].dtype]
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert value.isfinite().all(), f"torch's {name} is no truth here"
        torch.testing.assert_close(
            got[name], value, **tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@FLOATS
@pytest.mark.parametrize("affine", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
def test_layer_norm_agrees(dtype, affine):
    theirs, ours = pair(nn.LayerNorm, E, eps=1e-3, **affine, dtype=dtype)
    assert type(ours) is PatchedLayerNorm
    for shape in ((E,), (5, E), (2, 3, E), (0, E)):
        x = random(*shape, dtype=dtype)
        assert_agree(theirs, ours, lambda m, x=x: m(x), [x])


def test_layer_norm_takes_nested_tensors_and_refuses_wrong_sizes_as_torch_does():
    theirs, ours = pair(nn.LayerNorm, E)
    nested = nested_tensor([3, 1, 4])
    for a, b in zip(ours(nested).unbind(), theirs(nested).unbind(), strict=True):
        assert torch.equal(a, b)
    _, ours = pair(nn.LayerNorm, E, elementwise_affine=False)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        ours(torch.randn(3, E + 1, dtype=torch.float64))


KEYS = {  # True: ignored
    "right": [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]],
    "left": [[0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]],
    "holes": [[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 1, 1]],
}


def key_mask(kind: str, keys: int = S) -> torch.Tensor:
    return torch.tensor(KEYS[kind]).bool()[:, :keys]


def query_mask(kind: str, batched: bool, dtype=torch.float64):
    """attn_mask of a kind; key 0 stays visible, which no mask of keys of "right" hides."""
    rows = (B if batched else 1) * H
    shape = (L, S) if kind.endswith("2d") else (rows, L, S)
    if kind.startswith("bool"):
        return (torch.rand(shape) < 0.4).index_fill(-1, torch.tensor([0]), False)
    return random(*shape, dtype=dtype)


MASKS = [
    (None, None),
    ("bool 2d", None),
    ("bool 3d", None),
    ("float 2d", None),
    ("float 3d", None),
    (None, "bool"),
    (None, "float"),
    ("bool 2d", "bool"),
    ("float 3d", "float"),
]


@pytest.mark.parametrize("layout", ["batch first", "sequence first", "unbatched"])
@pytest.mark.parametrize(("attn", "padding"), MASKS)
def test_attention_agrees(layout, attn, padding):
    theirs, ours = pair(nn.MultiheadAttention, E, H, batch_first=layout == "batch first")
    assert type(ours) is PatchedMultiheadAttention
    batched = layout != "unbatched"

    def tokens(length):
        if not batched:
            return random(length, E)
        return random(B, length, E) if layout == "batch first" else random(length, B, E)

    query, key, value = tokens(L), tokens(S), tokens(S)
    inputs = [query, key, value]
    attn_mask = None if attn is None else query_mask(attn, batched)
    keys = None
    if padding is not None:
        keys = key_mask("right")[: B if batched else 2]
        keys = keys if batched else keys[1]
        if padding == "float":
            keys = torch.zeros(keys.shape, dtype=torch.float64).masked_fill(keys, -torch.inf)
            keys = (keys + torch.randn(keys.shape)).requires_grad_()
    inputs += [m for m in (attn_mask, keys) if m is not None and m.requires_grad]

    def call(module):
        return module(
            query, key, value, attn_mask=attn_mask, key_padding_mask=keys, need_weights=False
        )[0]

    assert_agree(theirs, ours, call, inputs)
    assert ops_of(call, ours) == {"linear_fwd", "attention_fwd"}


def test_masks_of_two_kinds_agree():
    """torch warns of them and takes them."""
    theirs, ours = pair(nn.MultiheadAttention, E, H, batch_first=True)
    query, key = random(B, L, E), random(B, S, E)
    keys = key_mask("right")
    floats = torch.zeros(keys.shape, dtype=torch.float64).masked_fill(keys, -torch.inf)
    for attn_mask, padding in (
        (query_mask("bool 3d", True), floats),
        (query_mask("bool 2d", True), floats),
        (query_mask("float 2d", True), keys),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_agree(
                theirs,
                ours,
                lambda m, a=attn_mask, k=padding: m(
                    query, key, key, attn_mask=a, key_padding_mask=k, need_weights=False
                )[0],
                [query, key],
            )


@FLOATS
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"kdim": 7}, {"vdim": 9}, {"kdim": 7, "vdim": 9, "bias": False}],
    ids=str,
)
def test_projections_agree(dtype, options):
    """Self-attention (one product), a memory (two) and three tensors; kdim and vdim of their
    own."""
    theirs, ours = pair(nn.MultiheadAttention, E, H, **options, dtype=dtype)
    query = random(L, B, E, dtype=dtype)
    key = random(S, B, options.get("kdim", E), dtype=dtype)
    value = random(S, B, options.get("vdim", E), dtype=dtype)

    def call(module, *tensors):
        return module(*tensors, need_weights=False)[0]

    assert_agree(theirs, ours, lambda m: call(m, query, key, value), [query, key, value])
    if "kdim" not in options and "vdim" not in options:
        assert_agree(theirs, ours, lambda m: call(m, query, query, query), [query])
        assert_agree(theirs, ours, lambda m: call(m, query, key, key), [query, key])
        assert_agree(theirs, ours, lambda m: call(m, query, query, value[:1].expand(L, -1, -1)))


def test_causal_hint():
    """It stands for the mask; beside padding too; with L ≠ S the mask itself is taken."""
    theirs, ours = pair(nn.MultiheadAttention, E, H, batch_first=True)
    x, memory = random(B, S, E), random(B, L, E)
    causal = nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64)

    def call(module, key=x, **options):
        return module(x, key, key, need_weights=False, is_causal=True, **options)[0]

    for keys in (None, key_mask("right")):
        for mask in (causal, causal.bool()):
            options = {"attn_mask": mask, "key_padding_mask": keys}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch: masks of two kinds
                assert_agree(theirs, ours, lambda m, o=options: call(m, **o), [x])
    visible = torch.zeros(S, S, dtype=torch.float64)
    assert_agree(theirs, ours, lambda m: call(m, attn_mask=visible), [x])  # torch believes it too
    keys = key_mask("right")
    torch.testing.assert_close(
        call(ours, attn_mask=visible, key_padding_mask=keys),
        call(ours, attn_mask=causal, key_padding_mask=keys),
    )
    wide = F.pad(causal, (0, L - S), value=-torch.inf)
    assert_agree(theirs, ours, lambda m: call(m, memory, attn_mask=wide), [x, memory])
    for module in (theirs, ours):
        with pytest.raises(RuntimeError, match="Need attn_mask"):
            call(module)


@pytest.mark.parametrize("average", [True, False])
def test_weights_are_torchs_where_they_are_asked_for(average):
    theirs, ours = pair(nn.MultiheadAttention, E, H, batch_first=True)
    x = random(B, S, E)
    options = {"key_padding_mask": key_mask("holes"), "average_attn_weights": average}
    for expected, got in zip(theirs(x, x, x, **options), ours(x, x, x, **options), strict=True):
        assert torch.equal(got, expected)


def test_a_query_without_keys_gives_the_output_bias_in_every_mode():
    _, ours = pair(nn.MultiheadAttention, E, H, batch_first=True)
    x = torch.randn(B, S, E, dtype=torch.float64)
    keys = torch.zeros(B, S).bool().index_fill(0, torch.tensor([1]), True)
    floats = torch.zeros(B, S, dtype=torch.float64).masked_fill(keys, -torch.inf)
    for training in (True, False):
        ours.train(training)
        for padding in (keys, floats):
            with torch.no_grad():
                out = ours(x, x, x, key_padding_mask=padding, need_weights=False)[0]
            torch.testing.assert_close(out[1], ours.out_proj.bias.expand(S, E))
            assert not torch.allclose(out[0], ours.out_proj.bias.expand(S, E))


def test_what_torch_refuses_is_refused_in_its_words():
    theirs, ours = pair(nn.MultiheadAttention, E, H, batch_first=True)
    x, y = torch.randn(B, S, E).double(), torch.randn(B, L, E).double()
    for arguments in (
        {"attn_mask": torch.zeros(S, S + 1).bool()},
        {"attn_mask": torch.zeros(B, S, S).bool()},
        {"key_padding_mask": torch.zeros(B, S + 1).bool()},
        {"key_padding_mask": torch.zeros(B, S, dtype=torch.int64)},
    ):
        errors = []
        for module in (theirs, ours):
            with pytest.raises((RuntimeError, AssertionError)) as error:
                module(x, x, x, need_weights=False, **arguments)
            errors.append(str(error.value))
        assert errors[0] == errors[1]
    for tensors in ((x, x, y), (x, y[:2], y[:2]), (x, x[0], x[0]), (x[..., 1:],) * 3):
        for module in (theirs, ours):
            with pytest.raises((RuntimeError, AssertionError)):
                module(*tensors, need_weights=False)


def silu_squared(x):
    return F.silu(x) ** 2


ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "torch.relu": torch.relu,
    "nn.ReLU": nn.ReLU(),
    "nn.GELU": nn.GELU(),
    "nn.GELU(tanh)": nn.GELU("tanh"),
    "nn.SiLU": nn.SiLU(),
    "function": silu_squared,
}
LAYER = {
    "d_model": E,
    "nhead": H,
    "dim_feedforward": FFN,
    "dropout": 0.0,
    "layer_norm_eps": 1e-3,
}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layers_agree(activation, norm_first):
    options = {**LAYER, "activation": ACTIVATIONS[activation], "norm_first": norm_first}
    x, memory = random(B, L, E), random(B, S, E)
    keys = key_mask("holes")
    theirs, ours = pair(nn.TransformerEncoderLayer, **options, batch_first=True)
    assert type(ours) is PatchedTransformerEncoderLayer
    assert_agree(theirs, ours, lambda m: m(memory, src_key_padding_mask=keys), [memory])
    theirs, ours = pair(nn.TransformerDecoderLayer, **options, batch_first=True)
    assert type(ours) is PatchedTransformerDecoderLayer
    mask = query_mask("float 3d", True)
    assert_agree(
        theirs,
        ours,
        lambda m: m(x, memory, memory_mask=mask),
        [x, memory, mask],
    )
    fused = {"linear_fwd", "attention_fwd", "dropout_add_layer_norm_fwd"}
    fused |= {"layer_norm_fwd"} if norm_first else set()
    fused |= {"ffn_fwd"} if activation not in ("nn.SiLU", "function") else set()
    assert ops_of(ours, x, memory) == fused


@FLOATS
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["batch first", "sequence first", "unbatched"])
def test_layers_agree_in_every_layout(layout, bias, norm_first, dtype):
    options = {"batch_first": layout == "batch first", "norm_first": norm_first, "bias": bias}
    batch = {"batch first": (B,), "sequence first": (), "unbatched": ()}[layout]
    inner = (B,) if layout == "sequence first" else ()
    x, memory = (random(*batch, n, *inner, E, dtype=dtype) for n in (L, S))
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=dtype)
    theirs, ours = pair(nn.TransformerEncoderLayer, **LAYER, **options, dtype=dtype)
    assert_agree(theirs, ours, lambda m: m(x, src_mask=causal), [x])
    assert_agree(theirs, ours, lambda m: m(x, src_mask=causal, is_causal=True), [x])
    theirs, ours = pair(nn.TransformerDecoderLayer, **LAYER, **options, dtype=dtype)
    keys = key_mask("left") if layout != "unbatched" else key_mask("left")[1]
    assert_agree(
        theirs,
        ours,
        lambda m: m(x, memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=keys),
        [x, memory],
    )


def test_layers_pass_every_mask_and_hint_on():
    """A hint beside a mask that hides nothing: torch believes it in training, so it is seen."""
    x, memory = random(B, S, E), random(B, S, E)
    visible = torch.zeros(S, S, dtype=torch.float64)
    keys = key_mask("right")
    theirs, ours = pair(nn.TransformerEncoderLayer, **LAYER, batch_first=True)
    for options in (
        {"src_mask": visible, "is_causal": True},
        {"src_mask": query_mask("bool 2d", True)[:S]},
        {"src_key_padding_mask": keys},
    ):
        assert_agree(theirs, ours, lambda m, o=options: m(x, **o), [x])
    theirs, ours = pair(nn.TransformerDecoderLayer, **LAYER, batch_first=True)
    for options in (
        {"tgt_mask": visible, "tgt_is_causal": True},
        {"memory_mask": visible, "memory_is_causal": True},
        {"tgt_mask": query_mask("bool 2d", True)[:S]},
        {"memory_mask": query_mask("bool 2d", True)[:S]},
        {"tgt_key_padding_mask": keys},
        {"memory_key_padding_mask": keys},
    ):
        assert_agree(theirs, ours, lambda m, o=options: m(x, memory, **o), [x, memory])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "nn.SiLU"])
def test_every_dropout_stands_in_its_place(activation, norm_first):
    """With p = 1 nothing is random: all of a place is dropped, here and in torch."""
    options = {**LAYER, "activation": ACTIVATIONS[activation], "norm_first": norm_first}
    x, memory = random(B, L, E), random(B, S, E)
    for layer_class, dropouts, call in (
        (nn.TransformerEncoderLayer, 3, lambda m: m(x)),
        (nn.TransformerDecoderLayer, 4, lambda m: m(x, memory)),
    ):
        theirs, ours = pair(layer_class, **options, batch_first=True)
        places = [n for n, m in theirs.named_modules() if isinstance(m, nn.Dropout)]
        assert len(places) == dropouts
        undropped = call(theirs)
        for place in places:
            for module in (theirs, ours):
                module.train().get_submodule(place).p = 1.0
            assert_agree(theirs, ours, call, [x])
            assert not torch.allclose(call(theirs), undropped)
            torch.testing.assert_close(call(ours.eval()), undropped, atol=1e-10, rtol=1e-10)
            for module in (theirs, ours):
                module.get_submodule(place).p = 0.0


def test_dropout_of_attention_acts_in_training_only():
    theirs, ours = pair(nn.MultiheadAttention, E, H, dropout=1.0, batch_first=True)
    x = random(B, L, E)

    def call(module):
        return module(x, x, x, need_weights=False)[0]

    torch.testing.assert_close(call(ours), ours.out_proj.bias.expand(B, L, E))
    assert_agree(theirs.eval(), ours.eval(), call, [x])


def test_dropout_is_random_and_keeps_the_mean():
    _, ours = pair(nn.TransformerEncoderLayer, **{**LAYER, "dropout": 0.2}, norm_first=True)
    x = torch.randn(L, B, E, dtype=torch.float64)
    with torch.no_grad():
        assert not torch.equal(ours(x), ours(x))
        torch.manual_seed(1)
        first = ours(x)
        torch.manual_seed(1)
        assert torch.equal(ours(x), first)
        mean = torch.stack([ours(x[:1]) for _ in range(100)]).mean(0)
        torch.testing.assert_close(mean, ours.eval()(x[:1]), atol=0.5, rtol=0)


def encoder(layers=2, norm=True, nested=True, dtype=torch.float64, **options):
    layer = nn.TransformerEncoderLayer(**{**LAYER, **options}, batch_first=True, dtype=dtype)
    last = nn.LayerNorm(E, dtype=dtype) if norm else None
    return nn.TransformerEncoder(layer, layers, last, enable_nested_tensor=nested)


@FLOATS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("kind", KEYS)
def test_encoder_agrees_under_padding(kind, form, training, dtype):
    theirs, ours = (m.train(training) for m in pair(encoder, dtype=dtype))
    assert type(ours) is PatchedTransformerEncoder
    x, keys = random(B, S, E, dtype=dtype), key_mask(kind)
    if form == "float":
        keys = torch.zeros(B, S, dtype=dtype).masked_fill(keys, -torch.inf)
    assert_agree(theirs, ours, lambda m: m(x, src_key_padding_mask=keys), [x])


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_encoder_agrees_in_evaluation(nested, norm, kind):
    """Padding on the right is taken out by torch where nested tensors are enabled, and comes back
    as 0: ours does the same, rows of padding included."""
    theirs, ours = pair(encoder, norm=norm, nested=nested)
    x, keys = torch.randn(B, S, E, dtype=torch.float64), key_mask(kind)
    with torch.no_grad():
        expected, got = (m.eval()(x, src_key_padding_mask=keys) for m in (theirs, ours))
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)
    if nested and not norm and kind == "right":
        assert not got[keys].any()


def test_a_sequence_of_padding_alone_gives_the_same():
    theirs, ours = pair(encoder)
    x, keys = random(B, S, E), key_mask("right")
    keys[1] = True
    assert_agree(theirs, ours, lambda m: m(x, src_key_padding_mask=keys), [x])
    with torch.inference_mode():
        expected, got = (m.eval()(x, src_key_padding_mask=keys) for m in (theirs, ours))
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


def test_layers_of_the_encoder_see_bool_masks_and_the_causal_hint():
    _, ours = pair(encoder)
    seen = []
    ours.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    x = random(B, S, E)
    causal = nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64)
    almost = causal.clone()
    almost[1, 4] = 0.0
    for mask, hint, expected in (
        (None, None, False),
        (causal, None, True),
        (causal.bool(), None, True),
        (causal, False, False),
        (almost, None, False),
        (almost.bool(), None, False),
        (torch.zeros(B * H, S, S), None, False),
    ):
        ours(x, mask=mask, src_key_padding_mask=key_mask("right"), is_causal=hint)
        assert seen[-1]["is_causal"] is expected
        assert seen[-1]["src_key_padding_mask"].dtype == torch.bool


def test_nested_input_of_a_layer():
    """Sequences of any lengths, one of them empty in none; torch takes them in evaluation only."""
    for options in ({}, {"norm_first": True}, {"activation": "gelu"}):
        theirs, ours = pair(nn.TransformerEncoderLayer, **LAYER, **options, batch_first=True)
        nested = nested_tensor([4, 1, 7])
        with torch.no_grad():
            expected, got = (m.eval()(nested) for m in (theirs, ours))
            for a, b in zip(got.unbind(), expected.unbind(), strict=True):
                torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
            assert "attention_fwd" in ops_of(ours, nested)
            for module in (theirs, ours):
                with pytest.raises(AssertionError, match="NestedTensor"):
                    module(nested, src_mask=torch.zeros(7, 7).bool())
                with pytest.raises(AssertionError, match="NestedTensor"):
                    module.train()(nested)
            calls = []
            ours.eval().self_attn.register_forward_hook(lambda *_, c=calls: c.append(1))
            torch.testing.assert_close(
                ours(nested).to_padded_tensor(0.0), expected.to_padded_tensor(0.0)
            )
            assert len(calls) == 1


def transformer(dtype=torch.float64, layers=2, **options):
    sizes = {"num_encoder_layers": layers, "num_decoder_layers": layers, "dim_feedforward": FFN}
    return nn.Transformer(E, H, **sizes, dropout=0.0, batch_first=True, dtype=dtype, **options)


@FLOATS
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_agrees(norm_first, dtype):
    """Translation's call: padding on both sides, causal targets; a loss through an embedding."""

    def make(dtype):
        model = nn.Module()
        model.embedding = nn.Embedding(11, E, dtype=dtype)
        model.transformer = transformer(dtype, norm_first=norm_first)
        return model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors and norm_first
        theirs, ours = pair(make, dtype=dtype)
    source, target = torch.randint(11, (B, S)), torch.randint(11, (B, L))
    keys = key_mask("right")

    def loss(model):
        hidden = model.transformer(
            model.embedding(source),
            model.embedding(target),
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(L, dtype=dtype),
            src_key_padding_mask=keys,
            memory_key_padding_mask=keys,
        )
        logits = hidden @ model.embedding.weight.T  # tied
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    assert_agree(theirs, ours, loss)
    with torch.no_grad():
        expected, got = loss(theirs.eval()), loss(ours.eval())
    torch.testing.assert_close(got, expected, **TOLERANCES[dtype])


def test_a_patched_model_keeps_all_but_its_classes():
    model, other = transformer(), transformer()
    kinds = {name: type(module) for name, module in model.named_modules()}
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    x, y = torch.randn(B, S, E).double(), torch.randn(B, L, E).double()
    before = model(x, y)
    report = patch(model)
    patched = {name for name, module in model.named_modules() if type(module) is not kinds[name]}
    assert len(patched) == 1 + 2 * (1 + 1 + 2) + 2 * (1 + 2 + 3) + 2
    assert {name for names in report.swapped.values() for name in names} == patched
    assert not report.left
    assert all(isinstance(m, kinds[n]) for n, m in model.named_modules())
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert [type(m) for m in other.modules()] == list(kinds.values())
    torch.testing.assert_close(model(x, y), before, atol=1e-10, rtol=1e-10)
    types = [type(m) for m in model.modules()]
    patch(model)  # again: nothing to do
    assert [type(m) for m in model.modules()] == types
    for _ in range(2):  # the second time there is nothing to undo
        unpatch(model)
        assert [type(m) for m in model.modules()] == list(kinds.values())
        assert torch.equal(model(x, y), before)


class OwnLayerNorm(nn.LayerNorm):
    """A LayerNorm of a user's own."""


def test_what_stays_says_why():
    def reason(module):
        return replacement(module, module)

    assert "add_bias_kv" in reason(nn.MultiheadAttention(E, H, add_bias_kv=True))
    assert "add_zero_attn" in reason(nn.MultiheadAttention(E, H, add_zero_attn=True))
    assert "head dim is 257" in reason(nn.MultiheadAttention(257, 1))
    assert "2 dimensions" in reason(nn.LayerNorm((2, E)))
    assert "OwnLayerNorm" in reason(OwnLayerNorm(E))
    wrapped = nn.LayerNorm(E)
    wrapped.forward = lambda x: x
    assert "on the instance" in reason(wrapped)
    layer = nn.TransformerEncoderLayer(**LAYER)
    layer.linear1 = nn.Sequential(nn.Linear(E, FFN))
    assert "its linear1 is not as torch makes it (Sequential)" in reason(layer)
    layer = nn.TransformerDecoderLayer(**LAYER)
    layer.dropout3.register_forward_hook(lambda *_: None)
    assert "dropout3 has hooks, a forward of its own, or" in reason(layer)
    layer = nn.TransformerDecoderLayer(**LAYER)
    layer._sa_block = layer._sa_block
    assert "_sa_block" in reason(layer)
    for module in (nn.Linear(E, E), transformer(), PatchedLayerNorm(E)):
        assert reason(module) is None
    model = nn.Sequential(nn.MultiheadAttention(E, H, add_zero_attn=True), nn.LayerNorm(E))
    report = patch(model)
    assert report.left.keys() == {"0"}
    assert "add_zero_attn=True" in str(report)
    assert type(model[0]) is nn.MultiheadAttention
    assert type(model[1]) is PatchedLayerNorm


@pytest.mark.parametrize("layer_class", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_children_that_change_after_patching_are_called(layer_class):
    """Hooks fire and a child of another kind computes, as in an unpatched layer."""
    x, memory = random(B, L, E), random(B, S, E)
    arguments = (x,) if layer_class is nn.TransformerEncoderLayer else (x, memory)
    calls = []

    def agree_after(change):
        theirs, ours = pair(layer_class, **{**LAYER, "activation": "gelu"}, batch_first=True)
        for module in (theirs, ours):
            change(module)
        calls.clear()
        assert_agree(theirs, ours, lambda m: m(*arguments), [x])

    def count(*_):
        calls.append(1)

    for place in ("linear1", "norm2", "dropout", "self_attn"):
        agree_after(lambda m, place=place: m.get_submodule(place).register_forward_hook(count))
        assert len(calls) == 2, place
    for kind in ("forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        agree_after(lambda m, kind=kind: getattr(m.linear2, f"register_{kind}")(count))
        assert len(calls) == 2, kind
    foreign = nn.Linear(FFN, E, dtype=torch.float64)
    agree_after(lambda m: setattr(m.linear2, "forward", foreign.forward))
    agree_after(lambda m: setattr(m, "linear2", nn.Sequential(m.linear2, nn.Tanh())))
    agree_after(lambda m: setattr(m, "norm1", nn.Identity()))
    agree_after(lambda m: setattr(m, "_ff_block", torch.sin))


def test_hooks_on_an_activation_fire():
    theirs, ours = (
        nn.TransformerEncoderLayer(**{**LAYER, "activation": nn.GELU()}) for _ in range(2)
    )
    ours.load_state_dict(theirs.state_dict())
    patch(ours)
    x = torch.randn(L, B, E)
    ours.activation.register_forward_hook(lambda module, args, out: out * 2)
    theirs.activation.register_forward_hook(lambda module, args, out: out * 2)
    torch.testing.assert_close(ours(x), theirs(x), atol=2e-5, rtol=1e-4)


def test_copies_and_pickles_compute_the_same():
    _, ours = pair(transformer)
    x, y = torch.randn(B, S, E).double(), torch.randn(B, L, E).double()
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    copies = (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
    )
    for twin in copies:
        assert [type(m) for m in twin.modules()] == [type(m) for m in ours.modules()]
        assert torch.equal(twin(x, y), ours(x, y))


def test_parametrizations_and_functional_calls():
    theirs, ours = pair(nn.TransformerEncoderLayer, **LAYER)
    x = random(L, B, E)

    def gradients(module):
        def loss(parameters):
            return torch.func.functional_call(module, parameters, (x,)).square().sum()

        return torch.func.grad(loss)(dict(module.named_parameters()))

    expected, got = gradients(theirs), gradients(ours)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-10, rtol=1e-10)
    for module in (theirs, ours):
        for child, name in ((module.linear1, "weight"), (module.self_attn, "in_proj_weight")):
            nn.utils.parametrizations.weight_norm(child, name)
            with torch.no_grad():
                child.parametrizations[name].original0.mul_(1.5)
    assert_agree(theirs, ours, lambda m: m(x), [x])


@pytest.mark.parametrize("shape", [(0, B, E), (L, 0, E)])
def test_empty_inputs(shape):
    theirs, ours = pair(nn.TransformerEncoderLayer, **LAYER)
    x = random(*shape)
    assert_agree(theirs, ours, lambda m: m(x), [x])


def test_compiled_in_one_graph():
    _, ours = pair(transformer, layers=1, dtype=torch.float32)
    x, y = (torch.randn(B, n, E, requires_grad=True) for n in (S, L))
    options = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(L),
        "tgt_is_causal": True,
        "src_key_padding_mask": key_mask("right"),
    }
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    expected = results(ours, lambda m: m(x, y, **options), [x, y])
    got = results(ours, lambda _: compiled(x, y, **options), [x, y])
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-5)


def test_encoder_compiled_in_evaluation():
    _, ours = pair(encoder, layers=1, dtype=torch.float32)
    x, keys = torch.randn(B, S, E), key_mask("holes")
    compiled = torch.compile(ours.eval(), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected, got = (m(x, src_key_padding_mask=keys) for m in (ours, compiled))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_checkpointing_repeats_the_dropout():
    _, ours = pair(nn.TransformerEncoderLayer, **{**LAYER, "dropout": 0.3})
    x = random(L, B, E)

    def run(call):
        torch.manual_seed(5)
        return results(ours, call, [x])

    expected = run(lambda m: m(x))
    got = run(lambda m: checkpoint(m, x, use_reentrant=False))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-12, rtol=0)


@pytest.mark.parametrize("norm_first", [False, True])
def test_autocast(norm_first):
    """The residual stream of pre-LN keeps float32, as torch's does; post-LN ends in bfloat16."""
    theirs, ours = pair(
        nn.TransformerEncoderLayer, **LAYER, norm_first=norm_first, dtype=torch.float32
    )
    x = random(L, B, E, dtype=torch.float32)
    exact = results(theirs, lambda m: m(x), [x])
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(x)
        assert out.dtype == (torch.float32 if norm_first else torch.bfloat16)
        rough = results(theirs, lambda m: m(x), [x])
        got = results(ours, lambda m: m(x), [x])
    for name, value in exact.items():
        error, theirs_error = ((r[name].float() - value).norm() for r in (got, rough))
        assert error <= 2 * theirs_error + 1e-2 * value.norm(), name
        assert got[name].dtype == (out.dtype if name == "out" else torch.float32)
    for module in (theirs, ours):
        module.dropout1.p = module.dropout2.p = 1.0
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x).float(), theirs(x), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    theirs, ours = pair(transformer, dtype=torch.float32)
    x, y = torch.randn(B, S, E), torch.randn(B, L, E)
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    exact = theirs(x, y, tgt_mask=causal)
    for mask in (causal, causal.to(dtype), causal.bool()):
        out = ours.to(dtype)(x.to(dtype), y.to(dtype), tgt_mask=mask)
        assert out.dtype == dtype
        eps = torch.finfo(dtype).eps
        assert (out.float() - exact).norm() <= 4 * eps * exact.norm()


def test_mask_of_float64_on_float32():
    _, ours = pair(nn.MultiheadAttention, E, H, batch_first=True, dtype=torch.float32)
    x, mask = torch.randn(B, L, E), torch.randn(L, L)
    out, same = (ours(x, x, x, attn_mask=m, need_weights=False)[0] for m in (mask, mask.double()))
    assert torch.equal(out, same)


def test_unpatch_refuses_a_class_that_was_changed_since():
    """It would take the parametrization away, and with it the weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(16, 4, batch_first=True), nn.LayerNorm(16))
    patch(model)
    nn.utils.parametrizations.weight_norm(model[0], "in_proj_weight")
    with pytest.raises(RuntimeError, match="0 became a ParametrizedPatchedMultiheadAttention"):
        unpatch(model)
    assert type(model[1]) is not nn.LayerNorm
    nn.utils.parametrize.remove_parametrizations(model[0], "in_proj_weight")
    unpatch(model)
    assert [type(module) for module in model] == [nn.MultiheadAttention, nn.LayerNorm]
