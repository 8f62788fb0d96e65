"""The harness: what is wrong is not timed, what cannot run disturbs nobody, and what is timed is
timed fairly.

Over 500 lines: what counts, near misses, layouts and timing are tested on one case of two lines.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from bertkern.benchmarks import harness
from bertkern.benchmarks.attention_cases import normal
from bertkern.benchmarks.harness import Case, Outcome, Peer, run_case

CPU = torch.device("cpu")
SHORT = 0.05  # seconds of a call that is one sample: not so short as to be repeated, not slow
BOTH = ("forward", "forward+backward")


def twice(x):
    return x + x


def double_case(**peers):
    """y = 2 x of a small matrix, by the peers that are given as functions or whole."""
    return Case(
        op="double",
        shape={"N": 4, "C": 8},
        dtype=torch.float32,
        inputs=normal((4, 8)),
        plain=twice,
        peers={name: p if isinstance(p, Peer) else Peer(p) for name, p in peers.items()},
        flops={"forward": 32.0, "forward+backward": 64.0},
        bytes={"forward": 256.0, "forward+backward": 512.0},
        items=4.0,
        unit="tokens",
    )


@pytest.fixture
def rows_of(ceilings, monkeypatch):
    """The rows of a case by peer and direction; memory is counted elsewhere, it takes 50 ms."""
    monkeypatch.setattr(harness, "added_bytes", lambda call, device: (call(), None))

    def rows(case, samples=3):
        found = run_case(case, CPU, samples, 60.0, ceilings, {"device": "test"})
        return {(row.peer, row.direction): row for row in found}

    return rows


def is_right(row):
    return row.correct and not row.error and row.median_s > 0


def is_wrong(row):
    return not row.correct and row.error.startswith("wrong: ") and row.median_s is None


# what counts


def test_a_right_peer_is_timed(rows_of):
    row = rows_of(double_case(bertkern=lambda x: 2 * x), 5)["bertkern", "forward"]
    assert is_right(row)
    assert 0 < row.p20_s <= row.median_s <= row.p80_s
    assert (row.samples, row.suite, row.cache, row.dtype) == (5, "ops", "warm", "float32")
    assert (row.items, row.unit, row.provenance) == (4.0, "tokens", {"device": "test"})
    assert row.max_error == 0


def test_a_row_has_the_memory_that_a_call_added(ceilings):
    def large(x):
        return twice(x) + 0 * torch.ones(2**22).sum()  # 16 MB

    case = double_case(small=twice, large=large)
    case.passes = ("forward",)
    rows = {row.peer: row for row in run_case(case, CPU, 1, 1.0, ceilings, {})}
    if rows["small"].peak_bytes is None:
        pytest.skip("the system does not let a process reset its peak of memory")
    assert rows["small"].peak_bytes < 2**21
    assert 2**23 < rows["large"].peak_bytes < 2**25


def test_a_row_has_its_floor(rows_of):
    rows = rows_of(double_case(bertkern=twice))
    for direction, bytes_ in (("forward", 256.0), ("forward+backward", 512.0)):
        row = rows["bertkern", direction]
        assert row.bytes == bytes_
        assert row.floor_s == pytest.approx(bytes_ / 1e9)
        assert row.of_floor == pytest.approx(row.floor_s / row.median_s)


@pytest.mark.parametrize(
    "peer",
    [
        lambda x: 2.001 * x,
        lambda x: twice(x) * math.nan,
        lambda x: torch.where(x == x.max(), torch.nan, twice(x)),
        lambda x: twice(x) / 0.0,
        lambda x: twice(x).index_fill(0, torch.tensor([3]), 0.0),
        lambda x: twice(x)[:3],
        lambda x: twice(x)[:, :1],
        lambda x: twice(x).T,
        lambda x: twice(x).bfloat16(),
        lambda x: twice(x.bfloat16()).float(),
        lambda x: x.zero_(),
    ],
    ids=[
        *("scaled", "NaN", "one NaN", "infinite", "no last row", "short", "narrow", "transposed"),
        *("output in bfloat16", "computed in bfloat16", "zeros, also in its input"),
    ],
)
def test_a_wrong_output_is_wrong_and_not_timed(rows_of, peer):
    case = double_case(bertkern=twice, other=peer, last=twice)
    case.passes = ("forward",)
    rows = rows_of(case)
    assert is_wrong(rows["other", "forward"]), rows["other", "forward"].error
    assert is_right(rows["bertkern", "forward"])
    assert is_right(rows["last", "forward"])


@pytest.mark.parametrize(
    "peer",
    [
        lambda x: x + x.detach(),
        lambda x: twice(x) + (x - x.detach()),
        lambda x: twice(x).detach() + 0 * x,
    ],
    ids=["half", "one and a half", "none"],
)
def test_a_wrong_gradient_is_wrong(rows_of, peer):
    rows = rows_of(double_case(bertkern=twice, other=peer))
    assert is_right(rows["other", "forward"])
    assert is_wrong(rows["other", "forward+backward"])
    assert rows["other", "forward+backward"].error.startswith("wrong: gradient 1")
    assert is_right(rows["bertkern", "forward+backward"])


def test_one_wrong_gradient_of_many_is_named(rows_of):
    case = double_case(bertkern=lambda x, y: x * y.detach() + y * 0)
    case.inputs, case.plain = normal((4, 8), (4, 8)), lambda x, y: x * y
    row = rows_of(case)["bertkern", "forward+backward"]
    assert row.error.startswith("wrong: gradient 2")


def test_the_gradient_is_of_an_output_that_is_not_constant():
    dout = harness.output_gradient(torch.zeros(3, 5))
    assert dout.shape == (3, 5)
    assert len(dout.unique()) == 15


@pytest.mark.parametrize(
    "problem",
    [
        *(NotImplementedError("no kernel"), RuntimeError("no kernel\nat line 5"), KeyError("k")),
        *(
            ImportError("no kernel"),
            OSError("no kernel"),
            AssertionError("no kernel"),
            ValueError(),
        ),
        *(torch.cuda.OutOfMemoryError("no memory"), RecursionError("\n\n deep\n")),
    ],
    ids=lambda problem: type(problem).__name__,
)
def test_a_peer_that_cannot_run_says_why_and_disturbs_nobody(rows_of, problem):
    def refuse(x):
        raise problem

    rows = rows_of(double_case(bertkern=twice, other=refuse, last=twice))
    for direction in BOTH:
        row = rows["other", direction]
        assert row.error.startswith("not run: ")
        assert len(row.error) > len("not run: ")
        assert "\n" not in row.error
        assert row.median_s is None
        assert not row.correct
        assert is_right(rows["bertkern", direction])
        assert is_right(rows["last", direction])


def test_a_peer_that_fails_when_it_is_timed_disturbs_nobody(rows_of):
    def fails_at(number):
        calls = itertools.count(1)

        def peer(x):
            if next(calls) == number:
                raise RuntimeError("out of memory")
            return twice(x)

        return peer

    for number in range(1, 8):
        case = double_case(bertkern=twice, other=fails_at(number))
        case.passes = ("forward",)
        rows = rows_of(case)
        assert is_right(rows["bertkern", "forward"])
        assert rows["other", "forward"].error == "not run: out of memory"
        assert rows["other", "forward"].median_s is None


def test_a_peer_that_writes_to_its_input_disturbs_nobody(rows_of):
    case = double_case(first=twice, other=lambda x: x.mul_(2), last=twice)
    case.passes = ("forward",)
    rows = rows_of(case)
    assert is_right(rows["first", "forward"])
    assert is_right(rows["last", "forward"])


def test_a_peer_that_writes_to_the_gradient_of_the_output_disturbs_nobody(rows_of):
    class Writer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return twice(x)

        @staticmethod
        def backward(ctx, dy):
            return dy.mul_(2)

    rows = rows_of(double_case(first=twice, other=Writer.apply, last=twice))
    assert is_right(rows["first", "forward+backward"])
    assert is_right(rows["last", "forward+backward"])


def test_an_interrupt_is_not_a_peers_problem(rows_of):
    def interrupted(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rows_of(double_case(bertkern=interrupted))


def test_a_pass_that_a_peer_has_not_is_not_run(rows_of):
    rows = rows_of(double_case(bertkern=twice, other=Peer(twice, passes=("forward",))))
    assert is_right(rows["other", "forward"])
    assert rows["other", "forward+backward"].error == "not run: other has no forward+backward here"
    assert rows["other", "forward+backward"].median_s is None


# near misses


@pytest.fixture
def near_misses():
    """A case whose peer misses the rule nearly in the draws that are given; the draws it had."""

    def make(missed, factor=3.0, name="bertkern", compute=twice):
        drawn = []
        inputs = normal((4, 8))

        def drawing(draw):
            drawn.append(draw)
            return inputs(draw)

        firsts = {float(inputs(draw)[0].float()[0, 0]) for draw in missed}

        def peer(x):
            y = compute(x)
            if float(x.detach()[0, 0]) in firsts:
                exact = y.detach()
                rounding = ((exact + 0.3) - 0.3 - exact).abs().max()  # the rule allows twice that
                y.view(-1)[exact.abs().argmin()] += factor * rounding
            return y

        case = double_case(**{name: peer})
        case.inputs, case.passes = drawing, ("forward",)
        return case, drawn

    return make


@pytest.mark.parametrize(
    ("missed", "right", "draws"),
    [
        ((), True, [0]),
        ((0,), True, [0, 1, 2, 3, 4]),
        ((0, 3), True, [0, 1, 2, 3, 4]),
        ((0, 1, 2), False, [0, 1, 2]),
        ((0, 2, 4), False, [0, 1, 2, 3, 4]),
    ],
)
def test_a_near_miss_is_drawn_again(rows_of, near_misses, missed, right, draws):
    case, drawn = near_misses(missed)
    row = rows_of(case)["bertkern", "forward"]
    assert (is_right if right else is_wrong)(row)
    assert drawn == draws


def test_another_packages_near_misses_are_timed_with_a_note(rows_of, near_misses):
    case, _ = near_misses(range(5), name="other")
    row = rows_of(case)["other", "forward"]
    assert is_right(row)
    assert row.note.startswith("near the tolerance's bound: output")
    case, _ = near_misses(range(5), factor=9.0, name="other")
    assert is_wrong(rows_of(case)["other", "forward"])


def test_a_near_miss_of_the_output_does_not_hide_a_wrong_gradient(rows_of, near_misses):
    def wrong_gradient(x):
        return twice(x) + (x - x.detach())

    case, _ = near_misses(range(5), name="other", compute=wrong_gradient)
    case.passes = BOTH
    assert is_wrong(rows_of(case)["other", "forward+backward"])


def test_a_great_miss_is_not_drawn_again(rows_of, near_misses):
    case, drawn = near_misses((0,), factor=9.0)
    assert is_wrong(rows_of(case)["bertkern", "forward"])
    assert drawn == [0]


# layouts, parts, and what is checked in place of what


def test_enter_and_leave_bring_tensors_into_a_peers_layout_outside_the_measured_time(rows_of):
    log = []

    def run(x):
        assert x.shape == (8, 4)
        log.append("run")
        return twice(x)

    def turn(x):
        log.append("turn")
        return x.T

    case = double_case(bertkern=Peer(run, enter=turn, leave=turn))
    outcomes = harness.check(case, CPU)
    before = log.count("turn")
    for direction in BOTH:
        outcome = outcomes["bertkern", direction]
        assert not outcome.error
        harness.time_outcomes({"bertkern": outcome}, CPU, 2, 1.0)
        assert len(outcome.seconds["warm"]) == 2
    assert log.count("turn") == before
    assert log[-1] == "run"


def test_a_peer_in_another_layout_can_be_wrong(rows_of):
    def turn(x):
        return x.T

    def scaled_rows(x):  # [8, 4]: a factor for each column of the case
        return twice(x) * torch.linspace(1, 1.1, 8)[:, None]

    rows = rows_of(double_case(bertkern=Peer(scaled_rows, enter=turn, leave=turn)))
    assert is_wrong(rows["bertkern", "forward"])
    assert is_wrong(rows["bertkern", "forward+backward"])


def test_checked_is_checked_and_run_is_timed(rows_of):
    timed = []

    def drops(x):
        timed.append(1)
        return torch.nn.functional.dropout(twice(x), 0.5)

    rows = rows_of(double_case(bertkern=Peer(drops, checked=twice)))
    assert is_right(rows["bertkern", "forward"])
    assert rows["bertkern", "forward"].note == "checked with dropout off"
    assert len(timed) > 3
    rows = rows_of(double_case(bertkern=Peer(twice, checked=lambda x: 2.1 * x)))
    assert is_wrong(rows["bertkern", "forward"])


def test_a_note_is_added_to_what_was_checked():
    outcome = Outcome(call=lambda: None, note="checked with dropout off")
    harness.time_outcomes({"bertkern": outcome}, CPU, 1, 1.0, ("warm", "graph"))  # a CPU has none
    assert "no CUDA graph: " in outcome.note
    assert "checked with dropout off" in outcome.note
    assert list(outcome.seconds) == ["warm"]


def part_case(peer, seen):
    """Softmax over keys of one head, of which the exact result is computed of the first only."""

    def plain(x):
        seen.append(tuple(x.shape))
        return torch.softmax(x, -1)

    case = double_case(bertkern=peer)
    case.inputs, case.plain = normal((2, 3, 4, 5)), plain
    case.part, case.out_like = lambda t: t[:1, :, :1], 0
    return case


def test_only_the_part_is_computed_exactly(rows_of):
    seen, got = [], []

    def peer(x):
        got.append(tuple(x.shape))
        return torch.softmax(x, -1)

    rows = rows_of(part_case(peer, seen))
    assert all(is_right(row) for row in rows.values())
    assert set(seen) == {(1, 3, 1, 5)}
    assert set(got) == {(2, 3, 4, 5)}


def test_an_error_in_the_part_is_found(rows_of):
    def peer(x):
        y = torch.softmax(x, -1)
        return torch.cat([y[:, :2], y[:, 2:] * 1.01], 1)

    rows = rows_of(part_case(peer, []))
    assert all(is_wrong(row) for row in rows.values())


def test_plain_ops_set_the_tolerance(rows_of):
    """What is right in bfloat16 is wrong in float32."""

    def rounded(x):
        return torch.softmax(x.bfloat16().float(), -1).bfloat16().to(x.dtype)

    case = double_case(bertkern=rounded)
    case.plain = lambda x: torch.softmax(x, -1)
    assert is_wrong(rows_of(case)["bertkern", "forward"])
    case.dtype = torch.bfloat16
    case.passes = ("forward",)
    assert is_right(rows_of(case)["bertkern", "forward"])


def test_the_truth_is_in_fp64(rows_of):
    """Plain torch in float32 is not exact itself."""
    case = double_case(bertkern=lambda x: torch.softmax(x, -1))
    case.plain = lambda x: torch.softmax(x, -1)
    for row in rows_of(case).values():
        assert is_right(row)
        assert 0 < row.max_error < 1e-6


def test_only_gradients_have_the_tolerance_of_gradients(rows_of, monkeypatch):
    asked = []

    class Noting(harness.Bound):
        def __init__(self, exact, same_dtype, dtype, *, grad):
            super().__init__(exact, same_dtype, dtype, grad=grad)
            asked.append((grad, exact.dtype, same_dtype.dtype, dtype))

    monkeypatch.setattr(harness, "Bound", Noting)
    rows_of(double_case(bertkern=twice))
    output = (False, torch.float64, torch.float32, torch.float32)
    assert asked == [output, output, (True, torch.float64, torch.float32, torch.float32)]


# timing


@pytest.fixture
def clock(monkeypatch):
    """A clock that only advances where it is told to."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(harness.time, "perf_counter", lambda: Clock.now)
    monkeypatch.setattr(harness._CpuTimer, "settle", lambda self: None)
    return Clock


def takes(clock, seconds, log=None, name=""):
    def call():
        clock.now += seconds
        if log is not None:
            log.append(name)

    return call


def test_samples_are_interleaved_in_another_order_every_time(clock):
    log = []
    calls = {name: takes(clock, SHORT, log, name) for name in "abc"}
    harness.measure(calls, CPU, 20)
    turns = "".join(log)[-20 * 3 * 2 :]  # each sample after a call without timing
    rounds = [turns[i : i + 6] for i in range(0, len(turns), 6)]
    assert all(sorted(one) == list("aabbcc") for one in rounds)
    assert all(one[0] == one[1] and one[2] == one[3] for one in rounds)
    assert len(set(rounds)) > 3
    followers = {one[i : i + 3 : 2] for one in rounds for i in (0, 2)}
    assert followers == {"ab", "ba", "ac", "ca", "bc", "cb"}  # nobody always follows the same


def test_a_turn_begins_when_the_threads_of_the_one_before_sleep(monkeypatch):
    """Somebody spins for 30 ms."""
    start = harness.time.perf_counter()

    def worked():
        now = harness.time.perf_counter()
        return min(now, start + 0.03)

    monkeypatch.setattr(harness.time, "process_time", worked)
    harness._CpuTimer().settle()
    assert harness.time.perf_counter() - start >= 0.03


def test_a_thread_that_never_sleeps_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(harness, "MOST_SETTLING_SECONDS", 0.02)
    monkeypatch.setattr(harness.time, "process_time", harness.time.perf_counter)
    start = harness.time.perf_counter()
    harness._CpuTimer().settle()
    assert 0.02 <= harness.time.perf_counter() - start < 1.0


def test_a_sample_is_many_calls_of_what_is_short(clock):
    log = []
    calls = {"short": takes(clock, 1e-5, log, "s"), "long": takes(clock, SHORT, log, "l")}
    times = harness.measure(calls, CPU, 6)
    assert times["short"] == pytest.approx([1e-5] * 6)
    assert times["long"] == pytest.approx([SHORT] * 6)
    assert log.count("s") == pytest.approx(6 * harness.SAMPLE_SECONDS / 1e-5, abs=16)
    assert log.count("l") == 6 * 2 + 1  # one to see how long it takes, one before each sample


def test_the_first_call_of_what_is_short_does_not_count(clock):
    calls = itertools.count()

    def slow_at_first():
        clock.now += 1e-3 if next(calls) == 0 else 1e-6

    assert harness.measure({"a": slow_at_first}, CPU, 2)["a"] == pytest.approx([1e-6] * 2)
    assert next(calls) > 2000


def test_a_call_that_the_clock_cannot_see_is_measured(clock):
    assert harness.measure({"a": takes(clock, 0.0)}, CPU, 1) == {"a": [0.0]}


@pytest.mark.parametrize(
    ("budget", "rounds"),
    [(0.0, harness.LEAST_ROUNDS), (19.5 * SHORT, 5), (1000 * SHORT, 9)],
)
def test_the_budget_ends_the_samples_but_not_before_the_least(clock, budget, rounds):
    calls = {"a": takes(clock, SHORT), "b": takes(clock, SHORT)}
    times = harness.measure(calls, CPU, 9, budget)
    assert [len(t) for t in times.values()] == [rounds] * 2


def test_the_first_timing_of_what_is_slow_is_its_first_sample(clock):
    log = []
    calls = {"slow": takes(clock, 10.0, log, "s"), "fast": takes(clock, SHORT, log, "f")}
    times = harness.measure(calls, CPU, 5)
    assert times["slow"] == pytest.approx([10.0] * 5)
    assert times["fast"] == pytest.approx([SHORT] * 5)
    assert log.count("s") == 5
    log.clear()
    times = harness.measure(calls, CPU, 5, 0.0)
    assert min(map(len, times.values())) == harness.LEAST_ROUNDS
    assert log.count("s") == len(times["slow"]) <= harness.LEAST_ROUNDS + 1


def test_fewer_samples_than_the_least_are_as_asked(clock):
    assert len(harness.measure({"a": takes(clock, 1.0)}, CPU, 1, 0.0)["a"]) == 1


def test_a_row_has_the_median_and_the_quantiles(ceilings):
    outcome = Outcome(call=lambda: None, peak_bytes=7, max_error=0.5, note="noted")
    outcome.seconds = {"warm": [float(i) for i in (4, 3, 0, 1, 2)], "cold": [9.0]}
    common = {f.name: None for f in dataclasses.fields(harness.Row)}
    for name in ("peer", "cache", "median_s", "p20_s", "p80_s", "samples", "floor_s", "peak_bytes"):
        del common[name]
    for name in ("max_error", "correct", "note", "error"):
        del common[name]
    common |= {"bytes": 2e9, "flops": 1e9, "dtype": "float32"}
    warm, cold = harness.rows_of({"a": outcome}, ceilings, common)
    assert (warm.p20_s, warm.median_s, warm.p80_s, warm.samples) == (1.0, 2.0, 4.0, 5)
    assert (cold.median_s, cold.samples, cold.cache) == (9.0, 1, "cold")
    assert (warm.peak_bytes, warm.max_error, warm.note) == (7, 0.5, "noted")
    assert warm.floor_s == cold.floor_s == pytest.approx(2.0)
