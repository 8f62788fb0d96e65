"""Ways through machine code: which instructions a turn of the main loop passes, and how often."""

import pytest

from csrc import code_paths, fabricated_code, loop_trips

Paths, code_of = code_paths.Paths, fabricated_code.code_of


# A loop [0x10, 0x90] with a mask that most turns jump over, a copy behind a branch, an inner loop,
# and a block out of line, at the end, that comes back into the middle of it.
LOOP = code_of(
    "MOV R1, R2",  # 0x00
    "@P0 BRA 0x30",  # 0x10
    "LDGSTS.E.BYPASS.128 [R1], [R2.64]",  # 0x20
    "@!P1 BRA 0x60",  # 0x30
    "FSEL R1, R2, R3, P0",  # 0x40
    "FSEL R1, R2, R3, P0",  # 0x50
    "BRA.DIV UR4, 0xc0",  # 0x60
    "HMMA.16816.F32 R4, R4, R6, R8",  # 0x70
    "BRA P2, 0x80",  # 0x80
    "@P3 BRA 0x10",  # 0x90
    "EXIT",  # 0xa0
    "NOP",  # 0xb0
    "MOV R1, R2",  # 0xc0
    "BRA 0x70",  # 0xd0
    "BRA 0xe0",  # 0xe0
)


def of(*names):
    return lambda i: i.name in names


def test_the_way_round_a_loop_passes_what_is_wanted_and_little_else():
    turn, is_loop, size = Paths(LOOP).turn(of("HMMA", "LDGSTS"))
    assert [i.address for i in turn] == [0x10, 0x20, 0x30, 0x60, 0x70, 0x80, 0x90]
    assert is_loop
    assert size == 11
    turn, *_ = Paths(LOOP).turn(of("HMMA"))
    assert "LDGSTS" not in {i.name for i in turn}
    turn, *_ = Paths(LOOP).turn(of("HMMA", "FSEL"))
    assert [i.name for i in turn].count("FSEL") == 2


def test_a_way_avoids_what_is_shunned_before_all_else():
    turn, *_ = Paths(LOOP).turn(of("HMMA", "LDGSTS", "FSEL"), of("FSEL"))
    assert {"LDGSTS", "HMMA"} <= {i.name for i in turn}
    assert "FSEL" not in {i.name for i in turn}
    turn, *_ = Paths(LOOP).turn(of("HMMA"), of("HMMA"))  # there is no other way
    assert "HMMA" in {i.name for i in turn}


def test_how_much_of_what_is_wanted_makes_a_main_loop():
    peeled = code_of(
        "FFMA R1, R2, R3, R4", "FFMA R1, R2, R3, R4", "FFMA R1, R2, R3, R4", "@P0 BRA 0x20", "EXIT"
    )
    assert not Paths(peeled).turn(of("FFMA"))[1]
    assert Paths(peeled).turn(of("FFMA"), least=1 / 4)[1]


def test_the_smallest_loop_with_most_that_is_wanted_is_the_main_one():
    paths = Paths(
        code_of(
            "FADD R1, R2, R3",  # 0x00: the outer loop's head
            "FFMA R1, R2, R3, R4",  # 0x10
            "@P0 BRA 0x10",  # 0x20
            "MUFU.EX2 R1, R2",  # 0x30
            "@P0 BRA 0x30",  # 0x40
            "@P1 BRA 0x0",  # 0x50
            "EXIT",
        )
    )
    assert [i.name for i in paths.turn(of("FFMA"))[0]] == ["FFMA", "BRA"]
    assert [i.name for i in paths.turn(of("MUFU"))[0]] == ["MUFU", "BRA"]
    turn, is_loop, _ = paths.turn(of("FFMA", "MUFU"))
    assert is_loop
    assert [i.name for i in turn] == ["FADD", "FFMA", "BRA", "MUFU", "BRA", "BRA"]


def test_what_stands_outside_loops_is_counted_from_start_to_end():
    turn, is_loop, size = Paths(
        code_of("@P0 EXIT", "LDG.E.128 R4, [R2]", "FADD R1, R2, R3", "@P1 BRA 0x20", "EXIT")
    ).turn(lambda i: i.mnemonic == "LDG.E.128")
    assert not is_loop
    assert [i.name for i in turn] == ["EXIT", "LDG", "FADD", "BRA", "EXIT"]
    assert size == 5


def test_a_jump_that_cannot_be_followed_is_an_error():
    with pytest.raises(ValueError, match="not followed"):
        Paths(code_of("BRX R2 -0x10", "EXIT"))


# A loop over tiles [0x00, 0xd0]; in it one of three turns by a counter in a vector register, in
# which is one of four by a uniform register, and one whose turns depend on memory.
NEST = code_of(
    "LDG.E R1, [R2.64]",  # 0x00: the tile
    "IMAD.MOV.U32 R4, RZ, RZ, RZ",  # 0x10
    "UMOV UR4, 0x8",  # 0x20: three turns
    "HMMA.16816.F32 R8, R4, R6, R8",  # 0x30: four turns of each
    "UIADD3 UR4, UR4, 0x8, URZ",  # 0x40
    "UISETP.GE.AND UP0, UPT, UR4, 0x28, UPT",  # 0x50
    "@!UP0 BRA 0x30",  # 0x60
    "VIADD R4, R4, 0x10",  # 0x70
    "ISETP.GE.U32.AND P2, PT, R4.reuse, 0x30, PT",  # 0x80
    "@!P2 BRA 0x20",  # 0x90
    "LDS R5, [R1]",  # 0xa0
    "ISETP.NE.AND P3, PT, R5, RZ, PT",  # 0xb0
    "@P3 BRA 0xa0",  # 0xc0
    "@P4 BRA 0x0",  # 0xd0
    "EXIT",  # 0xe0
)


def test_loops_inside_a_turn_count_as_often_as_their_constants_say():
    paths = Paths(NEST)
    assert sorted(paths.trips.values(), key=str) == [3, 4, None, None]
    turn, is_loop, size = paths.turn(of("HMMA", "LDG"))
    names = [i.name for i in turn]
    assert (names.count("LDG"), names.count("HMMA"), names.count("VIADD")) == (1, 12, 3)
    assert names.count("LDS") == 1
    assert is_loop
    assert size == 14


def test_a_loop_may_be_left_by_a_call_that_is_a_jump():
    # So does ptxas for sm_80: a call to the instruction after the branch back.
    paths = Paths(
        code_of(
            "MOV R4, 0xa",  # 0x00
            "HMMA.16816.F32 R8, R4, R6, R8",  # 0x10
            "IADD3 R4, R4, -0x5, RZ",  # 0x20
            "ISETP.LT.AND P1, PT, R4, RZ, PT",  # 0x30
            "@P1 CALL.REL.NOINC 0x60",  # 0x40
            "BRA 0x10",  # 0x50
            "EXIT",  # 0x60
        )
    )
    assert list(paths.trips.values()) == [3]
    turn, is_loop, _ = paths.turn(of("HMMA"))
    assert [i.name for i in turn].count("HMMA") == 3
    assert not is_loop


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("IMAD.MOV.U32 R1, RZ, RZ, 0x20", 32),
        ("IMAD.SHL.U32 R1, R2.reuse, 0x4, RZ", 28),
        ("IMAD R1, R2, R2, 0x1", 50),
        ("IADD3 R1, R2, -0x8, RZ", (1 << 32) - 1),
        ("VIADD R1, R2, 0x1", 8),
        ("CS2R R1, SRZ", 0),
        ("MOV R1, c[0x0][0x28]", None),
        ("IADD3 R1, R3, 0x1, RZ", None),
        ("LEA R1, R2, 0x1, 0x1", None),
        # A move of the integer 8: the halves 0 and 8 · 2^-24.
        ("HFMA2.MMA R1, -RZ, RZ, 0, 4.76837158203125e-07", 8),
    ],
)
def test_what_instructions_compute_with_constants(text, value):
    (instruction,) = code_of(text)

    def value_of(operand):
        known = loop_trips.constant(operand)
        return {"R2": 7}.get(operand) if known is None else known

    assert loop_trips.computed(instruction, value_of) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("ISETP.GE.AND P0, PT, R2, -0x1, PT", True),
        ("ISETP.GE.U32.AND P0, PT, R2, -0x1, PT", False),
        ("ISETP.NE.AND P0, PT, R2, 0x7, PT", False),
        ("ISETP.LT.AND P0, PT, R2, 0x8, PT", True),
        ("ISETP.LT.AND P0, PT, R2, 0x8, P1", None),
        ("ISETP.LT.OR P0, PT, R2, 0x8, PT", None),
        ("@P1 ISETP.LT.AND P0, PT, R2, 0x8, PT", None),
        ("ISETP.LT.AND P0, PT, R3, 0x8, PT", None),
    ],
)
def test_what_comparisons_of_constants_are(text, value):
    (instruction,) = code_of(text)

    def value_of(operand):
        known = loop_trips.constant(operand)
        return {"R2": 7}.get(operand) if known is None else known

    assert loop_trips.compared(instruction, value_of) is value
