"""A sample of the kernels compiles for sm_80 and sm_90: no spills, the expected instructions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")


def test_compile_gate_sample():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    gate = Path(__file__).with_name("gate.py")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", gate],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    results = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    faults = {
        f"{r['kernel']} sm_{r['arch']} {r['dtype']} {r['shape']}": r["faults"] for r in results
    }
    assert not any(faults.values()), {k: v for k, v in faults.items() if v}
    assert run.returncode == 0, run.stderr[-3000:]
    assert results
