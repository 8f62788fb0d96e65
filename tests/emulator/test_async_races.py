"""Random programs with mbarriers, the copy engine and fences: a race is found exactly where one is.

As in test_races.py, what is a race is computed in the plainest way, by full vector clocks. Here an
access of a thread has two times for others: when it is seen by what threads do themselves, and,
once the thread has done a fence, by what the engine does for them.
"""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from emulator import emulated, faults

if (reason := emulated.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)

THREADS, SHARED_BYTES, STEPS, BARRIERS = 64, 512, 14, 6
# As in kernels/arguments.h.
NOTHING, READ_WORD, WRITE_WORD, READ_BYTE, WRITE_BYTE = range(5)
COPY, COPY_WAIT, FENCE, LOAD, STORE, STORE_WAIT = range(5, 11)
NONE, BLOCK, WARP, ARRIVE, WAIT = range(5)
WIDTH = {READ_WORD: 4, WRITE_WORD: 4, READ_BYTE: 1, WRITE_BYTE: 1, COPY: 16, LOAD: 16, STORE: 16}
WRITES = (WRITE_WORD, WRITE_BYTE, COPY, LOAD)
BY_ENGINE = (LOAD, STORE)

# Components of a clock: of each thread its own accesses, its copies (cp.async) in groups, how far
# the engine sees both, its stores in groups; then the phases of each barrier that are over.
OWN, COPIES, OWN_FENCED, COPIES_FENCED, STORES = (THREADS * i for i in range(5))
PHASES = 5 * THREADS
COMPONENTS = PHASES + BARRIERS


@dataclass(frozen=True)
class Access:
    """Bytes, and the time of a component from which on a thread, or the engine, sees it."""

    first: int
    end: int
    writes: bool
    time: int
    component: int
    component_of_engine: int


class Oracle:
    def __init__(self):
        self.clocks = np.zeros((THREADS, COMPONENTS), int)
        self.clocks[range(THREADS), range(THREADS)] = 1
        self.gathered = np.zeros((BARRIERS, COMPONENTS), int)
        self.phases = [0] * BARRIERS
        self.copies, self.stores = [0] * THREADS, [0] * THREADS
        self.accesses = []

    def races(self, thread, act, byte):
        """Whether the access that act is would race."""
        if act not in WIDTH:
            return False
        clock, writes, by_engine = self.clocks[thread], act in WRITES, act in BY_ENGINE
        first, end = byte, byte + WIDTH[act]
        return any(
            other.first < end
            and first < other.end
            and (writes or other.writes)
            and clock[other.component_of_engine if by_engine else other.component] < other.time
            for other in self.accesses
        )

    def act(self, thread, act, byte, barrier):
        clock = self.clocks[thread]
        if act == COPY_WAIT:
            clock[COPIES + thread] = self.copies[thread]
        elif act == STORE_WAIT:
            clock[STORES + thread] = self.stores[thread]
        elif act == FENCE:
            clock[OWN_FENCED + thread] = clock[OWN + thread]
            clock[COPIES_FENCED + thread] = clock[COPIES + thread]
            clock[OWN + thread] += 1
        if act not in WIDTH:
            return
        if act == COPY:
            self.copies[thread] += 1
            when = (self.copies[thread], COPIES + thread, COPIES_FENCED + thread)
        elif act == STORE:
            self.stores[thread] += 1
            when = (self.stores[thread], STORES + thread, STORES + thread)
        elif act == LOAD:
            when = (self.phases[barrier] + 1, PHASES + barrier, PHASES + barrier)
        else:
            when = (clock[OWN + thread], OWN + thread, OWN_FENCED + thread)
        self.accesses.append(Access(byte, byte + WIDTH[act], act in WRITES, *when))

    def agree(self, threads):
        """A barrier of some threads."""
        self.clocks[threads] = self.clocks[threads].max(axis=0)
        self.clocks[threads, threads] += 1

    def arrive(self, thread, barrier):
        self.gathered[barrier] = np.maximum(self.gathered[barrier], self.clocks[thread])
        self.clocks[thread, OWN + thread] += 1

    def end_phase(self, barrier):
        self.phases[barrier] += 1
        self.gathered[barrier, PHASES + barrier] = self.phases[barrier]

    def wait(self, thread, barrier):
        self.clocks[thread] = np.maximum(self.clocks[thread], self.gathered[barrier])


@dataclass
class Program:
    acts: list  # [steps][threads] of (act, byte, barrier)
    syncs: list  # [steps][threads] of (sync, barrier, parity)
    arrivals: list
    parities: list
    racy: bool


class Barriers:
    """Who will arrive at each barrier's phase under way, of two at most."""

    def __init__(self, dice):
        self.dice = dice
        self.arrivals = [dice.choice((1, 2, 6)) for _ in range(BARRIERS)]
        self.missing = [self._some(b) for b in range(BARRIERS)]
        self.seen = [False] * BARRIERS  # that the first phase is over
        self.reused = [False] * BARRIERS

    def _some(self, barrier):
        return set(self.dice.sample(range(THREADS), self.arrivals[barrier]))

    def one_of_each(self):
        """A thread that has not arrived, of each barrier where one has not."""
        return [self.dice.choice(sorted(missing)) for missing in self.missing if missing]

    def reuse(self):
        """Behind a barrier of the block all know that a phase is over, and nobody waits for it."""
        for barrier in range(BARRIERS):
            if self.seen[barrier] and not self.reused[barrier] and self.dice.random() < 0.5:
                self.reused[barrier] = True
                self.missing[barrier] = self._some(barrier)


def draw_syncs(dice, oracle, barriers):
    """One step's; the oracle has seen them."""
    if dice.random() < 0.3:
        oracle.agree(np.arange(THREADS))
        barriers.reuse()
        return [(BLOCK, 0, 0)] * THREADS
    step = [(NONE, 0, 0)] * THREADS
    for warp in range(0, THREADS, 32):
        if dice.random() < 0.15:
            oracle.agree(np.arange(warp, warp + 32))
            step[warp : warp + 32] = [(WARP, 0, 0)] * 32
    for barrier in range(BARRIERS):
        if dice.random() < 0.4:
            arrive(step, oracle, barriers, barrier)
    for thread in dice.sample(range(THREADS), 16):
        barrier = dice.randrange(BARRIERS)
        if step[thread][0] == NONE and not barriers.missing[barrier]:
            oracle.wait(thread, barrier)
            barriers.seen[barrier] = True
            step[thread] = (WAIT, barrier, (oracle.phases[barrier] - 1) % 2)
    return step


def arrive(step, oracle, barriers, barrier):
    """Those who do nothing else in a step arrive, if they have not."""
    missing = barriers.missing[barrier]
    came = {thread for thread in missing if step[thread][0] == NONE}
    for thread in came:
        oracle.arrive(thread, barrier)
        step[thread] = (ARRIVE, barrier, 0)
    missing -= came
    if came and not missing:
        oracle.end_phase(barrier)


def draw_act(dice, thread, barriers, cells):
    """(act, byte, barrier)."""
    expecting = [b for b in range(BARRIERS) if thread in barriers.missing[b]]
    others = (READ_WORD, READ_BYTE, COPY_WAIT, FENCE, FENCE, STORE_WAIT)
    act = dice.choice((LOAD, LOAD, *WIDTH) if expecting else (*WIDTH, *others))
    width = 128 if act == STORE else WIDTH.get(act, 1)
    byte = dice.randrange(max(1, cells * 16 // width)) * width
    if act == LOAD and not expecting:
        return NOTHING, 0, 0
    return act, byte, dice.choice(expecting) if act == LOAD else 0


def draw(dice):
    """A program; an access that would race is mostly left out."""
    oracle, barriers, racy = Oracle(), Barriers(dice), False
    busy, cells = dice.choice((4, 16, 40)), dice.choice((1, 4, 32))
    faults_allowed = dice.choice((0, 0, 1))
    acts, syncs = [], []
    for _ in range(STEPS):
        step = [(NOTHING, 0, 0)] * THREADS
        if dice.random() < 0.25:  # nearly all fence
            step = [(FENCE, 0, 0) if dice.random() < 0.97 else what for what in step]
        else:
            for thread in sorted({*dice.sample(range(THREADS), busy), *barriers.one_of_each()}):
                step[thread] = draw_act(dice, thread, barriers, cells)
        for thread, (act, byte, barrier) in enumerate(step):
            if oracle.races(thread, act, byte):
                if not faults_allowed or dice.random() < 0.95:
                    step[thread] = (NOTHING, 0, 0)
                    continue
                faults_allowed, racy = 0, True
            oracle.act(thread, act, byte, barrier)
        acts.append(step)
        syncs.append(draw_syncs(dice, oracle, barriers))
    for barrier in range(BARRIERS):
        acts.append([(NOTHING, 0, 0)] * THREADS)
        syncs.append([(NONE, 0, 0)] * THREADS)
        arrive(syncs[-1], oracle, barriers, barrier)
    parities = [(phase - 1) % 2 for phase in oracle.phases]
    return Program(acts, syncs, barriers.arrivals, parities, racy)


def machine_finds_a_race(program, seed):
    acts, syncs = torch.tensor(program.acts), torch.tensor(program.syncs)
    tensors = {
        "acts": (acts * torch.tensor([1, 1 << 4, 1 << 16])).sum(-1).int(),
        "syncs": (syncs * torch.tensor([1, 1 << 4, 1 << 8])).sum(-1).int(),
        "arrivals": torch.tensor(program.arrivals).int(),
        "parities": torch.tensor(program.parities).int(),
        "source": torch.ones(4),
        "sink": torch.zeros(THREADS),
        "stored": torch.zeros(len(acts) * THREADS, 8).half(),
    }
    machine = faults.module()
    machine.configure(seed)
    machine.clear_memory()
    try:
        machine.async_program(*(faults.register(*item) for item in tensors.items()), len(acts))
    except RuntimeError as error:
        if "a race on them" not in str(error):
            raise
        return True
    return False


@pytest.mark.parametrize("part", range(8))
def test_races_are_found_exactly(part):
    found = {True: 0, False: 0}
    for number in range(30):
        program = draw(random.Random(f"{part} {number}"))
        assert machine_finds_a_race(program, number) == program.racy, number
        found[program.racy] += 1
    assert min(found.values()) > 3, "programs with and without races"
