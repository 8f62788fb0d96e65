"""The cases of the ops, attention's among them: every peer is right at small sizes, a wrong op is
found out, and what a row is said to cost is what it costs."""

import sys
import types

import pytest
import torch
from bertkern.benchmarks import attention_cases, harness, op_cases, peers
from bertkern.benchmarks.attention_cases import attention, attention_varlen, mixed_lengths
from bertkern.benchmarks.harness import bound, output_gradient, run_case
from torch.utils.flop_counter import FlopCounterMode

import bertkern

CPU = torch.device("cpu")
F32 = torch.float32

SMALL = {
    "attention": lambda who: attention(2, 24, F32, who),
    "attention of one head": lambda who: attention(1, 9, F32, who, heads=1, head_dim=32),
    "attention, causal": lambda who: attention(2, 24, F32, who, causal=True),
    "attention, padded": lambda who: attention(3, 24, F32, who, padded=True),
    "attention, bias": lambda who: attention(2, 24, F32, who, bias=True),
    "attention, dropout": lambda who: attention(2, 24, F32, who, dropout_p=0.1),
    "attention, padded, dropout": lambda who: attention(
        3, 24, F32, who, padded=True, dropout_p=0.1
    ),
    "attention, in bfloat16": lambda who: attention(2, 24, torch.bfloat16, who),
    "varlen": lambda who: attention_varlen([5, 17, 1], F32, who),
    "varlen, dropout": lambda who: attention_varlen([5, 17, 1], F32, who, 0.1),
    "layer_norm": lambda who: op_cases.layer_norm(9, 32, F32, who),
    "dropout_add_layer_norm": lambda who: op_cases.dropout_add_layer_norm(9, 32, F32, who, 0.1),
    "add_layer_norm": lambda who: op_cases.dropout_add_layer_norm(9, 32, F32, who, 0.0),
    "embedding_layer_norm": lambda who: op_cases.embedding_layer_norm(2, 16, F32, who),
    "linear": lambda who: op_cases.linear(9, 16, 24, F32, who, None),
    "linear+gelu": lambda who: op_cases.linear(9, 16, 24, F32, who, "gelu"),
    "ffn": lambda who: op_cases.ffn(9, F32, who),
    "ffn, dropout": lambda who: op_cases.ffn(9, F32, who, 0.1),
    "linear_cross_entropy": lambda who: op_cases.linear_cross_entropy(9, F32, who),
}


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    """BERT's sizes, smaller."""
    monkeypatch.setattr(op_cases, "HIDDEN", 32)
    monkeypatch.setattr(op_cases, "FFN_HIDDEN", 64)
    monkeypatch.setattr(op_cases, "VOCABULARY", 101)
    monkeypatch.setattr(op_cases, "POSITIONS", 20)
    monkeypatch.setattr(attention_cases, "HIDDEN", 128)
    monkeypatch.setattr(harness, "added_bytes", lambda call, device: (call(), None))


@pytest.fixture
def rows_of(who, ceilings):
    def rows(make, *names):
        return run_case(make(who(*names)), CPU, 1, 0.0, ceilings, {})

    return rows


@pytest.mark.parametrize("name", SMALL)
def test_every_peer_is_right(rows_of, name):
    rows = rows_of(SMALL[name], "eager", "sdpa")
    for row in rows:
        assert row.correct, f"{row.peer} {row.direction}: {row.error}"
        assert row.median_s > 0
        drops = "dropout" in row.shape
        assert row.note == ("checked with dropout off" if drops else "")
    assert {"bertkern"} < {row.peer for row in rows}
    assert any("eager" in row.peer for row in rows)
    assert any("sdpa" in row.peer for row in rows) == ("attention" in name or "varlen" in name)


@pytest.mark.parametrize("name", SMALL)
def test_a_wrong_op_is_wrong(rows_of, monkeypatch, name):
    """By a thousandth, in the op or in its gradients alone."""
    case_op = SMALL[name](peers.Peers([], CPU)).op.split("+")[0]
    op = getattr(bertkern, case_op)
    off = 1.03 if "bfloat16" in name else 1.001
    monkeypatch.setattr(bertkern, case_op, lambda *a, **k: op(*a, **k) * off)
    assert {row.error[:6] for row in rows_of(SMALL[name])} == {"wrong:"}

    def gradient_off(*a, **k):
        out = op(*a, **k)
        return out.detach() + (out - out.detach()) * off

    monkeypatch.setattr(bertkern, case_op, gradient_off)
    forward, backward = rows_of(SMALL[name])
    assert forward.correct
    assert backward.error.startswith("wrong: gradient")


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("attention, causal", "causal", False),
        ("attention, padded", "key_lengths", None),
        ("attention, bias", "bias", None),
    ],
)
def test_an_op_that_forgets_an_option_is_wrong(rows_of, monkeypatch, name, option, value):
    op = bertkern.attention
    monkeypatch.setattr(bertkern, "attention", lambda *a, **k: op(*a, **{**k, option: value}))
    (forward, _) = rows_of(SMALL[name])
    assert forward.error.startswith("wrong: output")


def test_dropout_is_timed_with_dropout(who, monkeypatch):
    seen = []
    op = bertkern.attention

    def noted(*a, dropout_p, **k):
        seen.append(dropout_p)
        return op(*a, dropout_p=dropout_p, **k)

    monkeypatch.setattr(bertkern, "attention", noted)
    peer = attention(2, 8, F32, who(), dropout_p=0.1).peers["bertkern"]
    q = torch.randn(2, 8, 2, 64)
    peer.run(q, q, q)
    peer.checked(q, q, q)
    assert seen == [0.1, 0.0]


# peers that are here but are not what they were


@pytest.mark.parametrize(
    ("group", "module", "make"),
    [
        ("flash-attn", "flash_attn", SMALL["attention"]),
        ("flash-attn-3", "flash_attn_interface", SMALL["attention"]),
        ("flash-attn-4", "flash_attn.cute", SMALL["attention"]),
        ("xformers", "xformers.ops", SMALL["attention"]),
        ("transformer-engine", "transformer_engine.pytorch", SMALL["attention"]),
        ("flash-attn", "flash_attn", SMALL["varlen"]),
        ("liger", "liger_kernel.transformers.functional", SMALL["layer_norm"]),
        ("transformer-engine", "transformer_engine.pytorch", SMALL["layer_norm"]),
        ("liger", "liger_kernel.transformers.functional", SMALL["linear_cross_entropy"]),
    ],
    ids=[
        *("flash-attn", "flash-attn-3", "flash-attn-4", "xformers", "te", "flash-attn varlen"),
        *("liger norm", "te norm", "liger loss"),
    ],
)
def test_a_peer_without_its_function_is_not_run(rows_of, monkeypatch, group, module, make):
    parts = module.split(".")
    whole = None
    for end in range(1, len(parts) + 1):
        made = types.ModuleType(".".join(parts[:end]))
        monkeypatch.setitem(sys.modules, made.__name__, made)
        if whole is not None:
            setattr(whole, parts[end - 1], made)
        whole = made
    rows = rows_of(make, group)
    assert {row.peer for row in rows if row.correct} == {"bertkern"}
    assert {row.error[:8] for row in rows if not row.correct} == {"not run:"}


@pytest.mark.parametrize("off", [1.0, 1.001])
def test_flash_attention_is_called_as_it_wants_to_be(rows_of, monkeypatch, off):
    """A stand-in with FlashAttention 2's signatures."""

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        return peers.sdpa(None, causal, dropout_p)(q, k, v) * off

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0
    ):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
        lengths = cu_seqlens_k.diff().tolist()
        parts = zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
        return torch.cat([flash_attn_func(*(t[None] for t in part))[0] for part in parts]) * off

    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    for name in ("attention", "attention, causal", "attention, dropout", "varlen"):
        rows = [r for r in rows_of(SMALL[name], "flash-attn") if r.peer == "FlashAttention 2"]
        assert [row.correct for row in rows] == [off == 1.0] * 2, f"{name}: {rows[0].error}"


# what a row costs


def counted(case):
    """FLOPs of the products of the plain ops: forward, and forward and backward."""
    leaves = [t.float() for t in case.inputs(0)]
    dout = output_gradient(case.plain(*leaves))
    found = {}
    for direction in ("forward", "forward+backward"):
        call = bound(case.plain, leaves, direction, dout)
        with FlopCounterMode(display=False) as counter:
            call()
        found[direction] = counter.get_total_flops()
    return found


@pytest.mark.parametrize(
    "name", ["linear", "linear+gelu", "ffn", "ffn, dropout", "linear_cross_entropy"]
)
def test_flops_are_those_of_the_products(who, name):
    case = SMALL[name](who())
    assert case.flops == counted(case)


@pytest.mark.parametrize(
    "name", ["attention", "attention of one head", "attention, bias", "varlen", "varlen, dropout"]
)
def test_flops_of_attention_are_those_of_its_products_and_of_the_scores_again(who, name):
    case = SMALL[name](who())
    plain = counted(case)
    assert case.flops["forward"] == plain["forward"]
    assert case.flops["forward+backward"] == plain["forward+backward"] + plain["forward"] / 2


def test_flops_of_what_is_not_seen_do_not_count(who):
    whole = attention(3, 24, F32, who()).flops
    assert attention(3, 24, F32, who(), causal=True).flops == {k: v / 2 for k, v in whole.items()}
    lengths = mixed_lengths(3, 24)
    share = sum(n * n for n in lengths) / (3 * 24 * 24)
    padded = attention(3, 24, F32, who(), padded=True)
    assert padded.flops == pytest.approx({k: v * share for k, v in whole.items()})
    assert padded.items == sum(lengths)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_bytes_by_hand(who, dtype):
    size = 4 if dtype == F32 else 2
    case = attention(3, 24, dtype, who())
    tensor = 3 * 24 * 128 * size
    assert case.bytes == {"forward": 4 * tensor, "forward+backward": 12 * tensor}
    case = op_cases.layer_norm(9, 32, dtype, who())
    assert case.bytes == {"forward": 2 * 9 * 32 * size, "forward+backward": 5 * 9 * 32 * size}
    case = op_cases.linear(9, 16, 24, dtype, who(), None)
    x, w, y = 9 * 16 * size, 16 * 24 * size, 9 * 24 * size
    # backward: dy, w -> dx and dy, x -> dw, with dy read once
    assert case.bytes == {"forward": x + w + y, "forward+backward": 3 * x + 3 * w + 2 * y}


@pytest.mark.parametrize("name", [name for name in SMALL if "padded" not in name])
def test_no_pass_moves_more_than_its_tensors(who, name):
    """Leaves in and output out; backward: leaves, output and its gradient in, gradients out. With
    more it would be no floor."""
    case = SMALL[name](who())
    leaves = [t.to(case.dtype) for t in case.inputs(0)]
    size = leaves[0].element_size()
    ins = size * sum(t.numel() for t in leaves)
    out = size * case.plain(*leaves).numel()
    assert case.bytes["forward"] <= ins + out
    assert case.bytes["forward+backward"] <= ins + out + 2 * ins + 2 * out


def test_the_embeddings_move_the_rows_that_are_looked_up_and_a_dense_gradient(who):
    case = SMALL["embedding_layer_norm"](who())
    row_bytes = 2 * 16 * 32 * 4
    words, positions = 101 * 32 * 4, (20 + 2) * 32 * 4
    assert case.bytes["forward"] == 2 * row_bytes
    # backward: the rows again, the output's gradient, and the gradients of the tables
    assert case.bytes["forward+backward"] <= 2 * row_bytes + 2 * row_bytes + words + positions


# the table


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_the_table(who, quick, dtype):
    cases = list(op_cases.cases(who("eager", "sdpa"), dtype, quick))
    names = [case.name for case in cases]
    assert not {name for name in names if names.count(name) > 1}
    for case in cases:
        assert case.dtype == dtype
        assert set(case.passes) <= set(case.flops) == set(case.bytes)
        assert all(case.flops[p] > 0 and case.bytes[p] > 0 for p in case.passes)
        assert case.items > 0
        assert case.unit
        assert case.name.startswith(f"{case.op}[")
        assert not case.curve or case.curve in case.shape
        assert "bertkern" in case.peers
    ops = {case.op for case in cases}
    assert {"attention", "attention_varlen", "layer_norm", "dropout_add_layer_norm"} < ops
    assert {"embedding_layer_norm", "linear+gelu", "ffn", "linear_cross_entropy"} < ops


def test_eager_attention_makes_no_scores_that_are_too_large(who):
    small, large = (
        attention(1, seqlen, F32, who("eager"), heads=heads)
        for seqlen, heads in ((1024, 1), (32768, 2))
    )
    assert "torch eager" in small.peers
    assert "torch eager" not in large.peers


def test_of_a_long_sequence_one_head_is_checked(who):
    case = attention(2, 4096, F32, who())
    q = torch.zeros(2, 4096, 2, 64)
    assert case.part(q).shape == (1, 4096, 1, 64)
    assert case.out_like == 0
    assert attention(2, 2048, F32, who()).part(q) is q


def test_the_same_draw_is_the_same_numbers():
    make = attention_cases.normal((3, 4), (4,))
    for a, b in zip(make(1), make(1), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.float64
    assert not torch.equal(make(0)[0], make(1)[0])
    x, w = op_cases.scaled((200, 100), (100, 100))(0)
    assert (x @ w.T).std() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(("count", "longest"), [(2, 100), (8, 512), (64, 512), (5, 1), (1, 512)])
def test_mixed_lengths(count, longest):
    lengths = mixed_lengths(count, longest)
    assert lengths == mixed_lengths(count, longest)
    assert len(lengths) == count
    assert min(lengths) >= 1
    assert max(lengths) == longest
    if count > 1 and longest > 1:
        assert sum(lengths) / count == pytest.approx(0.6 * longest, rel=0.01)
    if count == 8:
        assert lengths != sorted(lengths)
