"""Varlen batches on Hopper: the longest sequences are taken first, which changes no bit.

B sequences, H heads, D head dim; lengths are (queries, keys) of each sequence.
"""

import re
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from emulator import emulated

import bertkern
from bertkern.ops import _cuda_attention

if (reason := emulated.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)

HEADS, DIM = 2, 32
FAR = 1 << 44  # from any memory


def draw(lengths, heads=HEADS, dim=DIM):
    """(q, k, v, cu_seqlens_q, cu_seqlens_k); both are one tensor where lengths are the same."""
    queries, keys = zip(*lengths, strict=True)
    cu_q, cu_k = (
        torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        for n in (queries, keys)
    )
    q = torch.randn(int(cu_q[-1]), heads, dim, dtype=torch.float16)
    k, v = torch.randn(2, int(cu_k[-1]), heads, dim, dtype=torch.float16)
    return q, k, v, cu_q, cu_q if queries == keys else cu_k


def attention(q, k, v, cu_q, cu_k, **options):
    longest = [max(1, int(cu.diff().max())) for cu in (cu_q, cu_k)]
    return bertkern.attention_varlen(q, k, v, cu_q, cu_k, *longest, **options)


def with_gradients(q, k, v, *rest, **options):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attention(*leaves, *rest, **options)
    return out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)


@contextmanager
def orders():
    """The scratch of the calls inside, in which the kernels have left their orders."""
    made, make = [], _cuda_attention._order

    def keep(*arguments):
        made.append(make(*arguments))
        return made[-1]

    with mock.patch.object(_cuda_attention, "_order", keep):
        yield made


def longest_first(cu):
    return cu.diff().argsort(descending=True, stable=True).int()


@pytest.mark.parametrize("batch", [2, 127, 128, 129, 300])
def test_the_order_is_by_length_and_then_by_number(batch):
    lengths = torch.randint(0, 5, (batch,))
    tensors = draw([(n, n) for n in lengths.tolist()], heads=1, dim=8)
    for seed in range(3):
        emulator = emulated.emulated(seed, 1 + seed, capability=90)
        with emulator, bertkern.backend("cuda"), torch.no_grad(), orders() as made:
            attention(*tensors)
        assert torch.equal(made[0], longest_first(tensors[3]))


def test_each_direction_has_its_own():
    tensors = draw([(5, 9), (7, 2), (1, 130), (7, 3), (0, 4)], dim=8)
    with emulated.emulated(0, capability=90), bertkern.backend("cuda"), orders() as made:
        with_gradients(*tensors)
    forward, backward = made
    by_queries, by_keys = map(longest_first, tensors[3:])
    assert not torch.equal(by_queries, by_keys)
    assert torch.equal(forward, by_keys)
    assert torch.equal(backward, torch.stack([by_queries, by_keys]))


class _WithoutMemory:
    """bertkern._C, whose functions get an address for `name` at which there is nothing."""

    def __init__(self, under, name):
        self._under, self._name = under, name

    def __getattr__(self, function):
        call = getattr(self._under, function)

        def elsewhere(*arguments):
            names = emulated.argument_names(getattr(emulated.module(), function))
            at = names.index(self._name)
            self.start = arguments[at]
            return call(*arguments[:at], self.start + FAR, *arguments[at + 1 :])

        return elsewhere if function.endswith(("_fwd", "_bwd")) else call


SHORT = [(40, 70), (90, 20), (3, 128), (20, 64)]
LONG = [(131, 140), (150, 131), (1, 135), (140, 160), (139, 160)]


@pytest.mark.parametrize(
    ("launch", "writes", "by", "lengths"),
    [
        ("cuda_attention_fwd", "out", 1, SHORT),
        ("cuda_attention_bwd", "dk", 0, SHORT),  # all in one launch
        ("cuda_attention_bwd", "dq", 1, LONG),  # attention_bwd_queries
        ("cuda_attention_bwd", "dk", 0, LONG),  # attention_bwd_keys
    ],
    ids=["fwd", "bwd_short", "bwd_queries", "bwd_keys"],
)
def test_the_longest_is_taken_first(launch, writes, by, lengths):
    """Of one multiprocessor, which takes blocks one after the other, the first write to a tensor
    that is not there is the machine's fault to report."""
    q, k, v, cu_q, cu_k = draw(lengths)
    with emulated.emulated(0, 1, capability=90), bertkern.backend("cuda"):
        leaves = [t.requires_grad_() for t in (q, k, v)]
        out = attention(*leaves, cu_q, cu_k)
        there = _WithoutMemory(_cuda_attention._C, writes)
        forward = launch == "cuda_attention_fwd"
        call = (lambda: attention(q, k, v, cu_q, cu_k)) if forward else out.sum().backward
        patch = mock.patch.object(_cuda_attention, "_C", there)
        with patch, pytest.raises(RuntimeError) as fault:
            call()
    (address,) = re.findall(r"address (0x\w+)", str(fault.value))
    row = (int(address, 16) - FAR - there.start) // (HEADS * DIM * 2)
    cu = cu_k if writes == "dk" else cu_q
    sequence = int(torch.searchsorted(cu, row, right=True)) - 1
    walked = [pair[by] for pair in lengths]
    assert sequence == walked.index(max(walked))


@pytest.mark.parametrize("options", [{}, {"causal": True, "dropout_p": 0.3}], ids=["plain", "drop"])
def test_the_order_changes_no_bit(options):
    """A sequence alone is put in no order."""
    seed = torch.tensor([3])
    tensors = draw([(20, 20), (150, 150), (0, 0), (70, 70), (150, 150), (1, 1)])
    q, k, v, cu, _ = tensors
    for number, blocks in enumerate((1, 2, 5)):
        with emulated.emulated(number, blocks, capability=90), bertkern.backend("cuda"):
            together = with_gradients(*tensors, dropout_seed=seed, **options)
            for b, (first, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
                if first == end:
                    continue
                own = [t[first:end] for t in (q, k, v)]
                lengths = torch.tensor([0, end - first], dtype=torch.int32)
                alone = with_gradients(
                    *own, lengths, lengths, dropout_seed=seed, sequence_offset=b, **options
                )
                for whole, part in zip(together, alone, strict=True):
                    assert torch.equal(whole[first:end], part)
