"""Random programs: the machine finds a race exactly where one is.

What is a race is computed here in the plainest way: a full vector clock for every thread, every
access kept, every pair compared (Lamport 1978; Fidge 1988, Mattern 1989).
"""

import random

import pytest
import torch
from emulator import emulated, faults

if (reason := emulated.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)

THREADS, SHARED_BYTES, STEPS = 96, 256, 12
# As in kernels/arguments.h.
NOTHING, READ_WORD, WRITE_WORD, READ_BYTE, WRITE_BYTE, COPY, WAIT, WAIT_BUT_ONE = range(8)
NONE, BLOCK, WARPS, FIRST_WARP, TWO_WARPS, HAND_OVER = range(6)
WIDTH = {READ_WORD: 4, WRITE_WORD: 4, READ_BYTE: 1, WRITE_BYTE: 1, COPY: 16}


class Oracle:
    """Component 2 t is of thread t's own accesses, 2 t + 1 of its copies, in groups."""

    def __init__(self):
        self.clocks = [[0] * (2 * THREADS) for _ in range(THREADS)]
        for thread, clock in enumerate(self.clocks):
            clock[2 * thread] = 1
        self.groups = [0] * THREADS
        self.accesses = []  # (bytes, writes, component, time)

    def races(self, thread, act, byte):
        """Whether the access that act is would race."""
        component, writes = 2 * thread, act in (WRITE_WORD, WRITE_BYTE, COPY)
        touched = set(range(byte, byte + WIDTH.get(act, 0)))
        return any(
            (writes or other_writes)
            and touched & others
            and other != component
            and self.clocks[thread][other] < at
            for others, other_writes, other, at in self.accesses
        )

    def act(self, thread, act, byte):
        if act in (WAIT, WAIT_BUT_ONE):
            waited = self.groups[thread] - (act == WAIT_BUT_ONE)
            own = self.clocks[thread]
            own[2 * thread + 1] = max(own[2 * thread + 1], waited)
        if act not in WIDTH:
            return
        writes = act in (WRITE_WORD, WRITE_BYTE, COPY)
        component, time = 2 * thread, self.clocks[thread][2 * thread]
        if act == COPY:
            self.groups[thread] += 1
            component, time = 2 * thread + 1, self.groups[thread]
        touched = set(range(byte, byte + WIDTH[act]))
        self.accesses.append((touched, writes, component, time))

    def synchronise(self, sync):
        warps = [range(w, w + 32) for w in range(0, THREADS, 32)]
        if sync == BLOCK:
            self._tell(range(THREADS), range(THREADS))
        elif sync == WARPS:
            for warp in warps:
                self._tell(warp, warp)
        elif sync == FIRST_WARP:
            self._tell(warps[0], warps[0])
        elif sync == TWO_WARPS:
            self._tell(range(64), range(64))
        elif sync == HAND_OVER:
            self._tell(range(64), warps[1])

    def _tell(self, tell, learn):
        """Threads of `learn` learn what those of `tell` know."""
        together = [max(column) for column in zip(*(self.clocks[t] for t in tell), strict=True)]
        for t in tell:
            self.clocks[t] = list(self.clocks[t])
            self.clocks[t][2 * t] += 1
        for t in learn:
            own = self.clocks[t][2 * t]
            self.clocks[t] = [max(*pair) for pair in zip(self.clocks[t], together, strict=True)]
            self.clocks[t][2 * t] = own


def draw(dice):
    """(acts [steps][threads] of (act, byte), syncs [steps], whether something races).

    An access that would race is mostly left out, so that the rest is tried as far as it goes.
    """
    oracle, racy = Oracle(), False
    busy, cells = dice.choice((4, 16, 48)), dice.choice((1, 3, 16))
    faults_allowed = dice.choice((0, 0, 1))
    acts, syncs, handed_over = [], [], False
    for _ in range(STEPS):
        step = [(NOTHING, 0)] * THREADS
        for thread in sorted(dice.sample(range(THREADS), busy)):
            act = dice.choice((*WIDTH, READ_WORD, READ_WORD, WAIT, WAIT, WAIT_BUT_ONE))
            width = WIDTH.get(act, 1)
            byte = dice.randrange(cells * 16 // width) * width
            if oracle.races(thread, act, byte):
                if not faults_allowed or dice.random() < 0.95:
                    continue
                faults_allowed, racy = 0, True
            oracle.act(thread, act, byte)
            step[thread] = (act, byte)
        acts.append(step)
        sync = dice.choice((NONE, BLOCK, BLOCK, WARPS, FIRST_WARP, TWO_WARPS, HAND_OVER))
        if handed_over and sync == HAND_OVER:  # would come to one barrier twice
            sync = BLOCK
        handed_over = sync == HAND_OVER or (handed_over and sync not in (BLOCK, TWO_WARPS))
        oracle.synchronise(sync)
        syncs.append(sync)
    return acts, syncs, racy


def machine_finds_a_race(acts, syncs, seed):
    codes = torch.tensor([[act + 16 * byte for act, byte in step] for step in acts])
    tensors = {
        "acts": codes.int(),
        "syncs": torch.tensor(syncs).int(),
        "source": torch.ones(4),
        "sink": torch.zeros(THREADS),
    }
    machine = faults.module()
    machine.configure(seed)
    machine.clear_memory()
    try:
        machine.program(*(faults.register(*item) for item in tensors.items()), len(syncs))
    except RuntimeError as error:
        if "a race on them" not in str(error):
            raise
        return True
    return False


@pytest.mark.parametrize("part", range(10))
def test_races_are_found_exactly(part):
    found = {True: 0, False: 0}
    for number in range(40):
        acts, syncs, expected = draw(random.Random(f"{part} {number}"))
        assert machine_finds_a_race(acts, syncs, number) == expected, number
        found[expected] += 1
    assert min(found.values()) > 3, "programs with and without races"


# What is done in turn by (thread, act, byte), None for a barrier of warp 0; whether it is a race.
IN_TURN = {
    "a write that part of another one followed": (
        [(0, WRITE_WORD, 0), None, (1, WRITE_BYTE, 0), (40, READ_BYTE, 2)],
        True,
    ),
    "a write that all of another one followed": (
        [(0, WRITE_WORD, 0), None, (1, WRITE_WORD, 0), None, (2, READ_BYTE, 2)],
        False,
    ),
    "a read behind which its thread read elsewhere": (
        [(0, READ_WORD, 0), (0, READ_WORD, 4), (40, WRITE_WORD, 0)],
        True,
    ),
    "a read before a barrier, another behind it": (
        [(0, READ_WORD, 0), None, (0, READ_WORD, 0), (1, WRITE_WORD, 0)],
        True,
    ),
    "many reads of one word": ([*((t, READ_WORD, 0) for t in range(40)), (7, WRITE_BYTE, 3)], True),
    "many reads, then a barrier of those who read": (
        [*((t, READ_WORD, 0) for t in range(32)), None, (7, WRITE_BYTE, 3)],
        False,
    ),
}


@pytest.mark.parametrize(("acts", "expected"), IN_TURN.values(), ids=IN_TURN.keys())
def test_one_after_the_other(acts, expected):
    steps = [[(NOTHING, 0)] * THREADS for _ in acts]
    for step, act in zip(steps, acts, strict=True):
        if act is not None:
            thread, what, byte = act
            step[thread] = (what, byte)
    syncs = [FIRST_WARP if act is None else NONE for act in acts]
    for seed in range(20):
        assert machine_finds_a_race(steps, syncs, seed) == expected
