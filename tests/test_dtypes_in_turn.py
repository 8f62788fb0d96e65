"""Of a marked grid `make test` leaves out dtypes, never a case on a backend."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GRID = "tests/ops/test_attention_options.py::test_options"


def collected(dtypes):
    """(backend, case, dtype) of the grid's items."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", GRID],
        cwd=ROOT,
        env={**os.environ, "BERTKERN_DTYPES": dtypes},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"\[(\w+?)-(.+)-(fp32|fp16|bf16)\]$", done.stdout, re.M)


def test_every_case_runs_on_every_backend_and_in_every_dtype():
    every, taken = collected("all"), collected("")
    assert set(taken) < set(every)
    assert len({cell[:2] for cell in every}) == len(taken) == len({cell[:2] for cell in taken})
    assert {cell[1:] for cell in taken} == {cell[1:] for cell in every}
    # "cuda" and "cuda_sm90" take 16 bits, the interpreter multiplies bfloat16 wrongly.
    for backend, dtypes in {
        "cuda": {"fp16", "bf16"},
        "cuda_sm90": {"fp16", "bf16"},
        "triton": {"fp32", "fp16"},
        "cpu": {"fp32", "fp16", "bf16"},
        "reference": {"fp32", "fp16", "bf16"},
    }.items():
        assert {dtype for name, _, dtype in taken if name == backend} == dtypes, backend
