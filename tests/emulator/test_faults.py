"""What the machine must find, it finds under every seed, with the places; what is right passes."""

import pytest
import torch
from emulator import emulated, faults
from emulator.faults import Case

SEEDS = range(20)
ONE_WARP = {"threads": 32}

if (reason := emulated.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)

RACE = "a race on them with thread"
COPY = "a race on them with a copy of thread"
BOTH = ("first", "second")
TWO_TILES = {"shared_bytes": 8192}
FOUR_BLOCKS = {"threads": 32, "blocks": 4}
IN_TURN = {**FOUR_BLOCKS, "resident_blocks": 1}
CASES = [
    Case("write_then_read", 1, RACE, BOTH),
    Case("write_then_read", 2, RACE, BOTH),
    Case("write_then_read", 3, RACE, BOTH),
    Case("read_then_write", 1, RACE, BOTH),
    Case("write_twice", 1, RACE, BOTH),
    Case("neighbouring_bytes", 1, "writes 1 byte to shared memory [+] 8 of 4096"),
    *(Case("lanes", fault, RACE, BOTH) for fault in (1, 2, 3, 4)),
    Case("barriers_in_turn", 1, RACE),
    Case("named_barriers", 1, "wait for ever.*named_barrier_sync 1.*named_barrier_sync 2"),
    Case("named_barriers", 2, f"{RACE}|for the second time"),
    Case("named_barrier_arguments", 1, "named barrier 16 of 128 threads.*ids are 1 to 15"),
    Case("named_barrier_arguments", 2, "of 40 threads.*whole warps"),
    Case("named_barrier_arguments", 3, "of (96|128) threads .*where others wait for (128|96)"),
    Case(
        "everybody_waits",
        1,
        "threads 0-95 of block 0 wait at block_barrier, .*threads 96-127 of block 0 have ended",
        ("first",),
    ),
    Case(
        "everybody_waits",
        2,
        "threads 0-69, 71-127 of block 0 wait at.*thread 70 of block 0 has ended",
        ("first",),
    ),
    Case("together", 1, "a warp has parted: .* is at (shuffle_xor|vote_any)", how=ONE_WARP),
    Case("together", 2, "wait for ever.*0-4, 6-31 .*shuffle_xor.*thread 5 .*ended", how=ONE_WARP),
    Case("together", 3, "thread 5 of block 0 waits at block_barrier", how=ONE_WARP),
    Case("together", 4, "a warp has parted: .*load_matrix of another kind", how=ONE_WARP),
    Case("together", 5, "a warp has parted: .*mma_16x8x16 of another kind", how=ONE_WARP),
    Case("shuffle_arguments", 1, "shuffle_xor with the mask 32", how=ONE_WARP),
    Case("shuffle_arguments", 2, "shuffle_xor with the mask 0", how=ONE_WARP),
    Case("shuffle_arguments", 3, "shuffle_index from lane 32", how=ONE_WARP),
    *(Case("own_copy", fault, COPY, BOTH) for fault in (1, 2, 3)),
    Case("stages", 1, COPY, BOTH, TWO_TILES),
    *(Case("stages", fault, "a race on them with", BOTH, TWO_TILES) for fault in (2, 3)),
    Case("last_copy", 1, "ends while a copy is under way", ("first",)),
    Case("copy_twice", 1, f"copies 16 bytes to shared memory.*{COPY}"),
    Case("copy_source", 1, f"writes 4 bytes to x .*{COPY}.*reads there", BOTH),
    Case("copy_of_nothing", 1, "0 bytes behind the end of x .*out of bounds"),
    Case("copy_of_nothing", 2, "copies 16 bytes from null .*out of bounds"),
    Case("bounds", 1, "reads 4 bytes of shared memory [+] 4096 of 4096 .*out of bounds"),
    Case("bounds", 2, "writes 4 bytes to shared memory [+] 4096 of 4096 .*out of bounds"),
    Case("bounds", 3, "writes 4 bytes to shared memory - 4 .*out of bounds"),
    Case("bounds", 4, "reads 4 bytes of .* 0 bytes behind the end of x .*out of bounds"),
    Case("bounds", 5, "writes 4 bytes to .* 4 bytes before y .*out of bounds"),
    Case("bounds", 6, "reads 16 bytes of .* 16 bytes behind the end of x .*out of bounds"),
    Case("bounds", 7, "reads 16 bytes of .* 0 bytes behind the end of x .*out of bounds"),
    Case("bounds", 8, "writes 16 bytes to shared memory [+] 0 .*out of bounds"),
    Case("bounds", 9, "copies 16 bytes to shared memory [+] 4096 .*out of bounds"),
    Case("bounds", 10, "reads 4 bytes of null .*out of bounds"),
    Case("bounds", 11, "far from every tensor .*out of bounds"),
    Case("bounds", 12, "out of bounds"),
    Case("matrix_bounds", 1, "thread 31 .*shared memory [+] 4096 .*out of bounds", how=ONE_WARP),
    Case("alignment", 1, "reads 16 bytes of shared memory [+] 56 .*not aligned", how=ONE_WARP),
    Case("alignment", 2, "shared memory [+] 2 .*not aligned to 4 bytes", how=ONE_WARP),
    Case("alignment", 3, "y [+] 1 .*not aligned to 4 bytes", how=ONE_WARP),
    Case("alignment", 4, "writes 16 bytes to y [+] 8 .*not aligned to 16 bytes", how=ONE_WARP),
    Case("alignment", 5, "copies 16 bytes to shared memory [+] 8 .*not aligned", how=ONE_WARP),
    Case("alignment", 6, "copies 16 bytes from x [+] 4 .*not aligned", how=ONE_WARP),
    Case("alignment", 7, "shared memory [+] 8 .*Words4.*not aligned to 16 bytes", how=ONE_WARP),
    Case("alignment", 8, "shared memory [+] 8 .*Words4.*not aligned to 16 bytes", how=ONE_WARP),
    Case("unwritten", 1, "shared memory [+] 0 .*nobody has written", how=FOUR_BLOCKS),
    Case("unwritten", 2, "reads 4 bytes of y .*nobody has written", how=FOUR_BLOCKS),
    Case("unwritten", 3, "shared memory [+] 20 .*nobody has written", how=FOUR_BLOCKS),
    Case("unwritten", 4, "16 bytes of shared memory [+] 496 .*nobody has", how=FOUR_BLOCKS),
    Case("unwritten", 5, "1 byte of shared memory [+] 600 .*nobody has", how=IN_TURN),
    Case("blocks", 1, RACE, BOTH, {**FOUR_BLOCKS, "y_is_written": True}),
    Case("blocks", 2, f"{RACE} 0 of block", ("first",), FOUR_BLOCKS),
    Case("blocks", 3, RACE, how=FOUR_BLOCKS),
    Case("locals", 1, "a local variable of another thread", how={"threads": 64}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fault_is_found(case):
    case.check_found(SEEDS)


RIGHT = {case.kernel: case.how for case in CASES}


@pytest.mark.parametrize("kernel", RIGHT)
def test_without_the_fault_it_passes(kernel):
    faults.check_right(kernel, SEEDS, **RIGHT[kernel])


def test_results_of_what_is_right():
    """Not only no error: the values that the barriers and copies hand over."""
    x, y = faults.run("write_then_read")
    assert torch.equal(y, x[:128].roll(-40))
    x, y = faults.run("stages", shared_bytes=8192)
    t = torch.arange(128)
    assert torch.equal(y, 4 * x[(4 * t + 129) % 512])
    x, y = faults.run("own_copy")
    assert torch.equal(y, x[::4])
    _, y = faults.run("copy_of_nothing")
    assert torch.equal(y, torch.zeros(128))


def test_bytes_between_rows_are_no_memory():
    matrix = torch.arange(512.0).view(4, 128)[:, :100]
    _, y = faults.run("rows", x=matrix, **ONE_WARP)
    assert y[0] == 128 + 99
    with pytest.raises(RuntimeError, match=r"reads 4 bytes of .*out of bounds"):
        faults.run("rows", 1, x=matrix, **ONE_WARP)


def test_shared_memory_of_another_block():
    said = []
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match="out of bounds") as raised:
            faults.run("bounds", 12, seed=seed, blocks=2)
        said.append(str(raised.value))
    assert any("of shared memory of another block" in text for text in said)


def test_a_seed_is_an_order():
    """The same error again with the same seed; others come to other threads first."""
    said = []
    for seed in (*SEEDS, *SEEDS):
        with pytest.raises(RuntimeError) as raised:
            faults.run("write_then_read", 1, seed=seed)
        said.append(str(raised.value))
    assert said[: len(SEEDS)] == said[len(SEEDS) :]
    assert len(set(said)) > 5


def test_order_of_threads_and_arrival_of_copies_vary():
    """Without the search for races, a missing barrier or wait shows in what comes out."""
    winners = {
        float(faults.run("write_twice", 1, seed=seed, find_races=False)[1][0]) for seed in SEEDS
    }
    assert winners == {1.0, 2.0}
    early = torch.stack(
        [
            faults.run("own_copy", 1, seed=seed, find_races=False)[1] == torch.arange(0.0, 512, 4)
            for seed in SEEDS
        ]
    )[:, 1:]
    assert 0.02 < early.float().mean() < 0.98


@pytest.mark.parametrize("resident_blocks", [1, 2, 3, 7])
def test_more_blocks_than_are_resident(resident_blocks):
    for seed in SEEDS:
        x, y = faults.run("blocks", seed=seed, resident_blocks=resident_blocks, **FOUR_BLOCKS)
        assert torch.equal(y, x[:32].repeat(4))


def test_blocks_are_found_to_race_also_when_they_do_not_overlap_in_time():
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=RACE):
            faults.run("blocks", 2, seed=seed, resident_blocks=1, **FOUR_BLOCKS)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"blocks": 0}, "a grid of 0 blocks"),
        ({"threads": 48}, "blocks of 48 threads"),
        ({"threads": 1056}, "blocks of 1056 threads"),
        ({"shared_bytes": 232449}, "232449 bytes of shared memory; at most 232448"),
    ],
)
def test_launches_that_no_device_takes(shape, says):
    with pytest.raises(ValueError, match=says):
        faults.run("write_twice", **shape)


def test_after_an_error_the_machine_works():
    with pytest.raises(RuntimeError):
        faults.run("everybody_waits", 1)
    x, y = faults.run("write_then_read")
    assert torch.equal(y, x[:128].roll(-40))
