"""attention_decode's Triton kernels against the definition, and bit for bit against themselves."""

import pytest
import torch
from bertkern.kernels import tuning
from bertkern.kernels.attention_decode import attention_decode
from bertkern.kernels.device import architecture
from plain_attention_decode import CASES, Case, Inputs, check

from bertkern.reference.tolerance import hold_in_most_draws

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def run(inputs, **changes):
    """(out, lse) of the launcher; `changes` replace its arguments."""
    case = inputs.case
    arguments = dict(
        q=inputs.q,
        k_cache=inputs.k,
        v_cache=inputs.v,
        cache_lengths=inputs.lengths,
        bias=inputs.bias,
        window_left=-1 if case.window is None else case.window[0],
        softcap=case.softcap,
        scale=case.head_dim**-0.5 if case.scale is None else case.scale,
    )
    return attention_decode(**(arguments | changes))


def keys_of_a_split(case, device):
    kind = "vector" if case.group == 1 else "group"
    return tuning.attention_decode(
        kind, case.head_dim, 4, architecture(torch.empty(0, device=device))
    ).keys


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_against_the_definition(device, case, dtype):
    if dtype == torch.bfloat16 and case.group > 1 and device == "cpu":
        pytest.skip("the Triton interpreter multiplies bfloat16 wrongly in tl.dot")

    def check_draw(draw):
        inputs = Inputs(case, dtype, device, seed=len(case.why) + 1000 * draw)
        check(inputs, *run(inputs))

    hold_in_most_draws(check_draw)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("window", [None, (50, 0)])
def test_a_sequence_does_not_feel_batch_or_room(device, group, window):
    """The same bits alone, in a batch, in a larger cache, and in one that holds it to the key."""
    keys = keys_of_a_split(Case("", (1,), group=group), device)
    lengths = (3, keys, 2 * keys + 5, 0, keys - 1)
    case = Case("", lengths, room=3 * keys, group=group, window=window, bias="bhs")
    inputs = Inputs(case, torch.float32, device)
    out, lse = run(inputs)
    for b, length in enumerate(lengths):
        for room in (length, length + 1, length + keys, inputs.k.shape[1]):
            only = slice(b, b + 1)
            alone = run(
                inputs,
                q=inputs.q[only],
                k_cache=inputs.k[only, :room],
                v_cache=inputs.v[only, :room],
                cache_lengths=inputs.lengths[only],
                bias=inputs.bias[only, ..., :room],
            )
            assert torch.equal(out[only], alone[0]), (b, room)
            assert torch.equal(lse[only], alone[1]), (b, room)


def test_lengths_beyond_the_cache_are_held_to_it(device):
    """Nothing is read outside the tensors, whatever stands in cache_lengths."""
    inputs = Inputs(Case("", (40, 40, 40)), torch.float32, device)
    lengths = torch.tensor([1000, -5, 40], dtype=torch.int32, device=device)
    out, lse = run(inputs, cache_lengths=lengths)
    full, full_lse = run(inputs)
    assert torch.equal(out[[0, 2]], full[[0, 2]])
    assert torch.equal(lse[[0, 2]], full_lse[[0, 2]])
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("where", ["k", "v", "q"])
def test_nan_inside_a_sequence_stays_in_it_and_propagates(device, group, where):
    inputs = Inputs(Case("", (50, 70, 70), group=group), torch.float32, device)
    if where == "q":
        inputs.q[1] = torch.nan
    else:
        getattr(inputs, where)[1, 45] = torch.nan
    out, lse = run(inputs)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()
    if where != "v":
        assert lse[1].isnan().all()


def test_every_repeat_gives_the_same_bits(device):
    inputs = Inputs(Case("", (97, 33, 5), group=2), torch.float32, device)
    first = run(inputs)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(inputs), strict=True))
