"""The compile gate: a sample of the kernels compiles without spills, on the instructions it should;
and the reading of machine code that it rests on."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")

HERE = Path(__file__).parent


def load(name):
    """A script of the gate, which is no package."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


sass, gate_cases = load("sass"), load("gate_cases")
gate, machine_code_document = load("gate"), load("machine_code_document")


def test_compile_gate_sample():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "gate.py"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    results = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    faults = {r["name"]: r["faults"] for r in results if r["faults"]}
    assert not faults
    assert run.returncode == 0, run.stderr[-3000:]
    assert {r["kernel"] for r in results} == set(gate_cases.KERNELS)


def test_every_kernel_of_the_package_is_compiled():
    assert set(gate_cases.KERNELS) == set(gate_cases.kernels_of_the_package())
    compiled = {case.kernel for case in gate_cases.cases()}
    assert compiled == set(gate_cases.KERNELS)


def test_every_row_of_the_tuning_table_is_compiled():
    from bertkern.kernels import tuning

    compiled = {case.key for case in gate_cases.cases()}
    for key, _ in tuning.shipped():
        assert (key in compiled) == (key.architecture != "interpreter"), str(key)


def test_case_names_are_their_own():
    names = [case.name for case in gate_cases.cases()]
    assert len(set(names)) == len(names)


def line(address, text):
    return f"        /*{address:04x}*/                   {text} ;    /* 0x0000000800440947 */\n"


# Two loops with products, the second with more other work; a zeroing loop; the padding at the end.
SASS = "".join(
    line(16 * i, text)
    for i, text in enumerate(
        [
            "STG.E.128 desc[UR4][R2.64], R4",
            "@!P0 BRA 0x0",
            "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24",
            "MUFU.EX2 R4, R5",
            "FFMA R1, R2, R3, R4",
            "@P1 BRA 0x20",
            "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24",
            "MUFU.EX2 R4, R5",
            "FFMA R1, R2, R3, R4",
            "ISETP.GE.AND P0, PT, R1, R2, PT",
            "@!P2 BRA 0x60",
            "LDSM.16.M88.4 R4, [R2]",
            "LDS.64 R4, [R2]",
            "STS R4, [R2]",
            "HMMA.1688.F32.TF32 R4, R4, R6, R8",
            "HMMA.16816.F32.BF16 R4, R4, R6, R8",
            "EXIT",
            "BRA 0x110",
        ]
    )
)


def test_loops_are_found_by_their_backward_branches():
    code = sass.instructions(SASS)
    assert len(code) == 18
    assert sass.loops(code) == [(0x0, 0x10), (0x20, 0x50), (0x60, 0xA0)]
    body, is_loop = sass.main_loop(code)
    assert is_loop
    assert [i.name for i in body] == ["HGMMA", "MUFU", "FFMA", "BRA"]


def test_an_outer_loop_is_no_inner_loop():
    code = sass.instructions(
        line(0, "FFMA R1, R2, R3, R4") + line(16, "@P0 BRA 0x10") + line(32, "FADD R1, R2, R3")
        + line(48, "@P1 BRA 0x20") + line(64, "@P0 BRA 0x0")
    )  # fmt: skip
    assert sass.loops(code) == [(32, 48)]


def test_products_outside_loops_are_counted_over_the_whole_kernel():
    code = sass.instructions(
        line(0, "STG.E R2, R4") + line(16, "@P0 BRA 0x0") + line(32, "HMMA.16816.F32 R4, R4, R6")
    )  # fmt: skip
    body, is_loop = sass.main_loop(code)
    assert not is_loop
    assert body == code


def test_multiply_accumulates_and_bytes_of_a_cta():
    code = sass.instructions(SASS)
    # HGMMA: 64 x 128 x 16 by each of two warpgroups; HMMA: 16 x 8 x (8 + 16) by each of 8 warps.
    assert sass.macs(code, 8) == 2 * 2 * 64 * 128 * 16 + 8 * 16 * 8 * 24
    assert sass.shared_bytes(code) == 16 + 8 + 4
    assert sass.mix(code)["tensor"] == 4


def test_clocks_follow_the_rates():
    body = sass.instructions(line(0, "MUFU.EX2 R4, R5") * 16 + line(0, "FFMA R1, R2, R3, R4") * 8)
    clocks = sass.clocks(body, 4, 90)
    assert clocks["MUFU"] == 16 * 128 / 16
    assert clocks["FMA"] == 8 * 128 / 128
    assert clocks["issue"] == 24 * 128 / 128
    assert sass.clocks(body, 4, 80)["FMA"] == 8 * 128 / 64


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "arch", "ctas"),
    [
        (255, 0, 8, 90, 1),  # 256 registers x 256 threads: the whole file
        (128, 0, 8, 90, 2),
        (32, 100 * 1024, 4, 90, 2),
        (32, 100 * 1024, 4, 80, 1),
        (32, 0, 4, 90, 16),
        (16, 0, 1, 90, 32),
    ],
)
def test_occupancy(registers, shared, warps, arch, ctas):
    assert sass.occupancy(registers, shared, warps, arch) == ctas


def a_case(**change):
    cases = gate_cases.cases()
    case = next(c for c in cases if c.kernel == "attention_fwd" and c.expect == ("HGMMA",))
    return case._replace(**change)


GOOD = {
    "stack": 0, "shared": 1024, "matrix": ["HGMMA"], "instructions": {"spill": 0, "fma": 10},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "arch", "word"),
    [
        ({}, 90, None),
        ({"stack": 8}, 90, "spills"),
        ({"instructions": {"spill": 2, "fma": 10}}, 90, "spills"),
        ({"shared": 228 * 1024}, 90, "shared memory"),
        ({"shared": 100 * 1024, "matrix": ["HMMA"]}, 80, "shared memory"),
        ({"matrix": ["HMMA"]}, 90, "products"),
        ({"matrix": []}, 90, "products"),
    ],
)
def test_every_fault_is_found(change, arch, word):
    found = gate.faults(GOOD | change, a_case(arch=arch))
    assert [word in text for text in found] == ([True] if word else [])


def test_fp32_products_stay_off_the_tensor_cores():
    case = a_case(dtype="fp32")
    assert not gate.faults(GOOD | {"matrix": []}, case)
    assert gate.faults(GOOD | {"matrix": ["HMMA"]}, case)


def test_the_document_shows_every_result_and_what_an_older_triton_did_otherwise():
    case = next(c for c in gate_cases.cases() if c.kernel == "attention_fwd" and c.key.limit == 64)
    body = sass.instructions(SASS)
    result = {
        **case.about(), "triton": "9.9.9", "warps": 8, "registers": 222, "stack": 0,
        "shared": 81920, "ctas": 1, "instructions": sass.mix(body), "matrix": ["HGMMA"],
        "is_loop": True, "loop": sass.mix(body), "macs": sass.macs(body, 8),
        "clocks": sass.clocks(body, 8, 90), "faults": [],
    }  # fmt: skip
    old = {"name": result["name"]} | {k: result[k] for k in result if k != "name"}
    other = old | {"matrix": ["HMMA"]}
    again = old | {
        "name": "another",
        "row": "linear/fwd/2/sm80/0",
        "kernel": "linear_fwd",
        "arch": 80,
    }
    text = machine_code_document.document({"9.8.0": [other, again], "9.9.9": [result, again]})
    assert "| 222 |" in text
    assert "## attention_fwd" in text
    assert "## linear_fwd" in text
    assert "1 of 2" in text
    assert "2 with Triton 9.8.0, 2 with Triton 9.9.9" in text
