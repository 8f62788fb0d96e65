"""Peers: what is missing, broken, slow or crashes is absent with a reason and disturbs nothing."""

import logging
import os
import time
import warnings

import pytest
import torch
from bertkern.benchmarks import peers
from bertkern.benchmarks.peers import GROUPS, Peers

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Groups whose modules are files of these texts."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.py").write_text(text)
        groups = {name: (name, f"The {name}") for name in texts}
        monkeypatch.setattr(peers, "GROUPS", groups)
        return list(groups)

    return make


def test_an_unknown_name_is_refused_with_those_allowed():
    with pytest.raises(ValueError, match="eagre,") as caught:
        Peers(["eager", "eagre", "sdap"], CPU)
    assert all(name in str(caught.value) for name in ("eagre", "sdap", "none", *GROUPS))


def test_what_is_in_torch_is_here_and_what_was_not_asked_for_is_not():
    who = Peers(["sdpa", "eager"], CPU)
    assert "eager" in who
    assert "sdpa" in who
    assert "compile" not in who
    assert who.absent == {}
    assert Peers([], CPU).present == []


def test_none_means_all(modules):
    names = modules(here="", there="")
    assert Peers(None, CPU).present == names


def test_a_module_that_is_missing_is_absent_with_its_reason(modules, monkeypatch):
    modules(here="")
    monkeypatch.setitem(peers.GROUPS, "gone", ("no_such_module_anywhere", "Gone"))
    who = Peers(None, CPU)
    assert who.present == ["here"]
    assert who.absent == {
        "gone": "absent: ModuleNotFoundError: No module named 'no_such_module_anywhere'"
    }


def test_what_an_import_raises_is_the_reason(modules):
    modules(
        raises="raise RuntimeError('built for\\nanother CUDA')",
        exits="import sys; sys.exit(3)",
        aborts="import os; os.abort()",
        says="import sys; print('note', file=sys.stderr); print('x' * 1000000)",
        here="",
    )
    who = Peers(None, CPU)
    assert who.present == ["says", "here"]
    assert who.absent["raises"] == "absent: another CUDA"
    assert who.absent["exits"] == "absent: exit code 3"
    assert who.absent["aborts"].startswith("absent: ")
    assert "\n" not in who.absent["aborts"]
    assert len(who.absent["aborts"]) > len("absent: ")


def test_a_module_that_hangs_is_absent_and_leaves_no_process(modules, monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "IMPORT_LIMIT_S", 1.0)
    note = tmp_path / "pid"
    modules(
        hangs=f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)",
        here="",
    )
    start = time.monotonic()
    who = Peers(None, CPU)
    assert time.monotonic() - start < 10
    assert who.present == ["here"]
    assert who.absent == {"hangs": "absent: import hangs took more than 1 s"}
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


@pytest.mark.parametrize("then", ["time.sleep(60)", ""], ids=["hangs", "is there"])
def test_a_module_that_starts_a_process_does_not_make_one_wait_for_that(modules, monkeypatch, then):
    """A child that lives on, as a compiler's server does, holds the pipe of its parent open."""
    monkeypatch.setattr(peers, "IMPORT_LIMIT_S", 1.5)
    modules(starts=f"import subprocess, time; subprocess.Popen(['sleep', '5']); {then}")
    start = time.monotonic()
    who = Peers(None, CPU)
    assert time.monotonic() - start < 4
    assert ("starts" in who) == (not then), who.absent


def test_an_import_sees_the_modules_of_this_process(modules, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path / "deep")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "helper.py").write_text("")
    modules(needs="import helper")
    assert "needs" in Peers(None, CPU)


def test_imports_run_side_by_side(modules):
    modules(**{f"slow{i}": "import time; time.sleep(1)" for i in range(4)})
    start = time.monotonic()
    assert len(Peers(None, CPU).present) == 4
    assert time.monotonic() - start < 3


def test_what_needs_another_device_is_absent_and_not_imported(monkeypatch):
    def refuse(modules):
        assert not any(modules), f"imports {modules}"
        return {"": ""}

    monkeypatch.setattr(peers, "_import_each", refuse)
    who = Peers(peers.GPU_ONLY, CPU)
    assert not who.present
    assert set(who.absent) == set(peers.GPU_ONLY)
    assert all(why.endswith("needs a CUDA GPU") for why in who.absent.values())
    who = Peers(["eager", *peers.CPU_ONLY], CUDA)
    assert who.present == ["eager"]
    assert who.absent == {"openvino": "absent: OpenVINO runs on CPUs"}


def test_quick_leaves_out_what_compiles_unless_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(peers, "_import_each", lambda modules: dict.fromkeys(modules, ""))
    assert set(Peers(None, CPU).present) == set(GROUPS) - set(peers.GPU_ONLY)
    who = Peers(None, CPU, quick=True)
    assert not set(peers.COMPILED) & set(who.present)
    assert all("--quick" in who.absent[name] for name in peers.COMPILED)
    assert Peers(["compile", "flex"], CPU, quick=True).present == ["compile", "flex"]


def test_every_name_is_present_or_absent(monkeypatch):
    monkeypatch.setattr(peers, "_import_each", lambda modules: dict.fromkeys(modules, "no"))
    for device in (CPU, CUDA):
        who = Peers(None, device, quick=True)
        assert set(who.absent) | set(who.present) == set(GROUPS)
        assert not set(who.absent) & set(who.present)
        assert all(why.startswith("absent: ") for why in who.absent.values())


def test_warnings_are_back_afterwards():
    with peers.without_warnings():
        warnings.warn("unheard", stacklevel=1)
        assert not logging.getLogger("peer").isEnabledFor(logging.WARNING)
    assert logging.getLogger("peer").isEnabledFor(logging.WARNING)
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)


def qkv(*shape):
    return [torch.randn(shape, dtype=torch.float64) for _ in range(3)]


def by_loops(q, k, v, seen):
    """softmax over the keys that are seen, one query at a time; [B, S, H, D]."""
    out = torch.empty_like(q)
    for b, s, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        keys = seen[b, s].nonzero()[:, 0]
        weights = torch.softmax(k[b, keys, h] @ q[b, s, h] / q.shape[-1] ** 0.5, 0)
        out[b, s, h] = weights @ v[b, keys, h]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_of_the_plain_peers_is_that_of_the_textbook(causal, padded):
    q, k, v = qkv(2, 5, 3, 8)
    key_seen = torch.arange(5) < torch.tensor([[5], [2]]) if padded else None
    allowed = torch.ones(2, 5, 5, dtype=torch.bool)
    if padded:
        allowed &= key_seen[:, None]
    if causal:
        allowed &= torch.ones(5, 5, dtype=torch.bool).tril()
    mask = None if key_seen is None else key_seen[:, None, None]
    exact = by_loops(q, k, v, allowed)
    torch.testing.assert_close(peers.eager(mask, causal, 0.0)(q, k, v), exact)
    if not (causal and padded):  # torch's takes one of them
        torch.testing.assert_close(peers.sdpa(mask, causal, 0.0)(q, k, v), exact)
        torch.testing.assert_close(peers.sdpa(mask, causal, 0.0, "math")(q, k, v), exact)


def test_attention_with_a_bias():
    q, k, v = qkv(2, 5, 3, 8)
    bias = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5 + bias
    exact = torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1), v)
    torch.testing.assert_close(peers.eager(None, False, 0.0)(q, k, v, bias), exact)
    torch.testing.assert_close(peers.sdpa(None, False, 0.0)(q, k, v, bias), exact)


def test_attention_drops_where_it_is_asked_to():
    q, k, v = qkv(1, 16, 2, 8)
    for make in (peers.eager, peers.sdpa):
        dropped, whole = make(None, False, 0.5)(q, k, v), make(None, False, 0.0)(q, k, v)
        assert (dropped - whole).abs().max() > 0.1


def test_first_takes_the_output_of_what_returns_its_lse_too():
    out, lse = torch.zeros(1), torch.ones(1)
    assert peers.first((out, lse)) is out
    assert peers.first(out) is out
