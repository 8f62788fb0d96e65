"""`bertkern.integrations.torch.sdpa()`: who is routed, who is not, and what it computes."""

import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bertkern
from bertkern.integrations.torch import sdpa

OURS = "bertkern::attention_fwd"


class Seen(TorchDispatchMode):
    """The names of the ops that are computed."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def ops_of(call):
    with Seen() as seen:
        call()
    return seen.names


def tensors(*shape, count=3):
    make = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=make) for _ in range(count)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(1)) > 0.3},
        {"attn_mask": torch.linspace(-2, 2, 81).view(9, 9)},
    ],
    ids=["plain", "causal", "scale", "bool mask", "float mask"],
)
def test_computes_what_torch_computes(options):
    results = []
    for routed in (False, True):
        q, k, v = (t.requires_grad_() for t in tensors(2, 3, 9, 16))
        if routed:
            with sdpa():
                out = F.scaled_dot_product_attention(q, k, v, **options)
        else:
            out = F.scaled_dot_product_attention(q, k, v, **options)
        direction = torch.cos(torch.arange(out.numel())).view(out.shape)
        results.append((out, *torch.autograd.grad(out, (q, k, v), direction)))
    for found, wanted in zip(*reversed(results), strict=True):
        torch.testing.assert_close(found, wanted, atol=5e-6, rtol=1e-5)


def test_is_there_after_import_bertkern():
    code = (
        "import bertkern, sys; bertkern.integrations.torch.sdpa(); assert sys.modules['torch'].nn"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_grouped_heads_and_dropout():
    q, k, v = tensors(2, 4, 9, 16)
    k, v = k[:, :2], v[:, :2]
    wanted = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with sdpa():
        found = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        torch.manual_seed(0)
        dropped = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, dropout_p=0.5)
    torch.testing.assert_close(found, wanted, atol=5e-6, rtol=1e-5)
    assert not torch.allclose(dropped, wanted)


def test_routes_inside_and_not_outside():
    q, k, v = tensors(2, 3, 9, 16)

    def call():
        F.scaled_dot_product_attention(q, k, v)

    assert OURS not in ops_of(call)
    with sdpa():
        assert OURS in ops_of(call)
        with sdpa():
            assert OURS in ops_of(call)
        assert OURS in ops_of(call)
    assert OURS not in ops_of(call)
    with pytest.raises(ZeroDivisionError), sdpa():
        raise ZeroDivisionError
    assert OURS not in ops_of(call)
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_other_threads_are_left_alone():
    q, k, v = tensors(2, 3, 9, 16)
    seen = []

    def elsewhere():
        seen.append(ops_of(lambda: F.scaled_dot_product_attention(q, k, v)))

    with sdpa():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert OURS not in seen[0]


def test_torch_modules_are_routed():
    (x,) = tensors(2, 9, 32, count=1)
    padding = torch.arange(9) >= torch.tensor([[9], [5]])
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    for call in (
        lambda: attention(x, x, x, key_padding_mask=padding, need_weights=False)[0],
        lambda: encoder(x, src_key_padding_mask=padding),
    ):
        wanted = call()
        with sdpa():
            assert OURS in ops_of(call)
            found = call()
        torch.testing.assert_close(found[~padding], wanted[~padding], atol=5e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_the_op_does_not_take_is_torchs():
    wide = tensors(1, 1, 4, 300)
    with sdpa():
        assert OURS not in ops_of(lambda: F.scaled_dot_product_attention(*wide))
        lists = [[t[0], t[0, :, :2]] for t in tensors(1, 3, 4, 8)]
        nested = [torch.nested.nested_tensor(one, layout=torch.strided) for one in lists]
        assert F.scaled_dot_product_attention(*nested).is_nested
        q, k, v = tensors(1, 1, 4, 8)
        with pytest.raises(ValueError, match="is_causal=True with an attn_mask"):
            F.scaled_dot_product_attention(q, k, v, torch.ones(4, 4).bool(), is_causal=True)


def test_compiled_inside_is_routed():
    q, k, v = tensors(2, 3, 9, 16)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q * 2, k, v, is_causal=True)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    wanted = bertkern.scaled_dot_product_attention(q * 2, k, v, is_causal=True)
    outside = compiled(q, k, v)
    with sdpa():
        found = compiled(q, k, v)
    assert torch.equal(found, wanted)
    torch.testing.assert_close(outside, wanted, atol=5e-6, rtol=1e-5)
