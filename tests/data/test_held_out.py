"""Held-out examples: groups stay together, and the share is kept."""

import pytest

from bertkern.data.held_out import hold_out


def test_groups_stay_together():
    groups = [f"text {i % 50}" for i in range(200)]
    train, held_out = hold_out(groups, 0.2, seed=1)
    assert sorted(train + held_out) == list(range(200))
    assert train == sorted(train)
    assert len(held_out) == 40
    assert not {groups[i] for i in train} & {groups[i] for i in held_out}
    assert hold_out(groups, 0.2, seed=1) == (train, held_out)
    assert hold_out(groups, 0.2, seed=2) != (train, held_out)


def test_small_and_refused():
    assert [len(side) for side in hold_out(["a", "b"], 0.01)] == [1, 1]
    assert [len(side) for side in hold_out(["a", "b"], 0.99)] == [1, 1]
    with pytest.raises(ValueError, match=r"3 example\(s\) of 1 text\(s\)"):
        hold_out(["a", "a", "a"])
    with pytest.raises(ValueError, match="held_out must be between 0 and 1, not 1"):
        hold_out(["a", "b"], 1)
