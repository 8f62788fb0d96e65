"""The emulated headers of ptx/ have what csrc/ptx has, and take its probes as they are."""

import re
import subprocess

import pytest
from emulator import build, emulated

if (reason := emulated.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)

PTX = build.CSRC / "ptx"
HEADERS = sorted(path.name for path in PTX.glob("*.cuh"))
FUNCTION = re.compile(r"BERTKERN_DEVICE\s+(?:static\s+)?[\w:*&]+\s*\*?\s+(\w+)\(")
# Parts of the functions of their header, for the compiler and the assembler alone.
INNER = {"hold", "multiply"}


def test_headers_are_the_same():
    assert sorted(path.name for path in (build.HERE / "ptx").glob("*.cuh")) == HEADERS
    assert len(HEADERS) > 10


@pytest.mark.parametrize("header", HEADERS)
def test_every_function_is_emulated(header):
    functions = set(FUNCTION.findall((PTX / header).read_text())) - INNER
    assert functions
    assert not functions - set(FUNCTION.findall((build.HERE / "ptx" / header).read_text()))


# What the probes use besides csrc/ptx.
BUILT_INS = """
#pragma once
#include <cstring>
#include "ptx/memory.cuh"
inline uint32_t __float_as_uint(float x) { uint32_t y; memcpy(&y, &x, sizeof(y)); return y; }
inline float __uint_as_float(uint32_t x) { float y; memcpy(&y, &x, sizeof(y)); return y; }
namespace bertkern::ptx {
inline bool operator==(half a, half b) { return a.bits == b.bits; }
inline bool operator==(bfloat16 a, bfloat16 b) { return a.bits == b.bits; }
}
"""


def compile_probes(text, folder):
    """Compiles tests/csrc/ptx_probes.cu, or a text like it, for the emulator."""
    (folder / "built_ins.h").write_text(BUILT_INS)
    (folder / "probes.cu").write_text(text)
    return subprocess.run(
        [
            *(build.compiler(), *build.COMMON, *build.kernel_flags(), "-fsyntax-only", "-x", "c++"),
            *(f"-I{build.HERE}", f"-I{build.CSRC}", "-include", folder / "built_ins.h"),
            folder / "probes.cu",
        ],
        capture_output=True,
        text=True,
    )


PROBES = (build.ROOT / "tests" / "csrc" / "ptx_probes.cu").read_text()


def test_probes_compile(tmp_path):
    done = compile_probes(PROBES, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("legal", "illegal", "says"),
    [
        ("wgmma_wait<0>(d)", "wgmma_wait<8>(d)", "0 to 7"),
        ("lower_registers<24>", "lower_registers<20>", "multiples of 8"),
        ("raise_registers<240>", "raise_registers<260>", "multiples of 8"),
        ("bulk_wait<0>", "bulk_wait<-1>", "a number of groups"),
        ("bulk_wait_read<0>", "bulk_wait_read<-1>", "a number of groups"),
        ("load_cluster<float>(", "load_cluster<double>(", "b16, b32 or v4.b32"),
        ("probe_products<32, ptx::half>", "probe_products<48, ptx::half>", "N is one of"),
        (
            "<5>(BERTKERN_GRID_CONSTANT CopyArguments<5>",
            "<6>(BERTKERN_GRID_CONSTANT CopyArguments<6>",
            "2 to 5 dimensions",
        ),
    ],
)
def test_the_illegal_does_not_compile(legal, illegal, says, tmp_path):
    """As in csrc/ptx: what an instruction cannot do is said where it is written."""
    assert legal in PROBES
    done = compile_probes(PROBES.replace(legal, illegal), tmp_path)
    assert done.returncode != 0
    assert says in done.stderr
