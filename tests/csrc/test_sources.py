"""Rules of the native sources: kernels know no CUDA, `asm` has one room, files stay small."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = [p for p in CSRC.rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")]
BUILT_INS = re.compile(
    r"\b(threadIdx|blockIdx|blockDim|gridDim|__shared__|__syncthreads|__syncwarp|__shfl\w*|__ballot\w*|"
    r"__global__|__device__|__half|__nv_bfloat16|atomic[A-Z]\w*|__ldg|rsqrtf)\b|#include\s*<cu"
)


@pytest.mark.parametrize("path", sorted((CSRC / "cuda").rglob("*.cuh")), ids=lambda p: p.name)
def test_kernels_use_no_cuda_built_in(path):
    found = BUILT_INS.findall(path.read_text())
    assert not found, f"{path.relative_to(CSRC)} uses {found}"


def test_asm_stands_only_in_ptx():
    asm = re.compile(r"\basm\s*(volatile|goto|\()|__asm")
    guilty = [p for p in SOURCES if asm.search(p.read_text()) and p.parent != CSRC / "ptx"]
    assert not guilty


def test_files_are_small():
    assert not [p for p in SOURCES if len(p.read_text().splitlines()) > 500]
