"""`make gpu`: build, test and time bertkern on the GPU at hand, with the Python at hand.

Needs what the checkout and a stock installation of torch (and nvcc, for the CUDA kernels) hold; no
network, no virtual environment. The build goes to build/gpu-site, so nothing is installed into the
environment. Each step has a time limit, and tests that fail do not stop the timing: what could be
measured is written.

Exit codes: 0 all went well · 1 a step failed · 3 no GPU, nothing was run.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "gpu-site"
TOOLS = ROOT / "build" / "gpu-tools"
# Seconds: five minutes together.
BUILD_LIMIT, TEST_LIMIT, TIMING_LIMIT = 120, 110, 60
NO_GPU = 3


def say(text: str) -> None:
    """A line of our own, in order with the output of the steps."""
    print(f"== {text}", flush=True)


def step(name: str, command: Sequence[str | Path], limit: int, **options: object) -> bool:
    """Run one step; whether it ended well within its limit."""
    say(f"{name}: {' '.join(map(str, command))}")
    start = time.monotonic()
    try:
        code = subprocess.run(list(map(str, command)), timeout=limit, **options).returncode
        end = "ok" if code == 0 else f"FAILED with exit code {code}"
    except subprocess.TimeoutExpired:
        end = f"FAILED: stopped at its limit of {limit} s"
    say(f"{name}: {end} ({time.monotonic() - start:.0f} s)")
    return end == "ok"


def lend_pybind11(torch_folder: Path, environment: dict[str, str]) -> None:
    """Where pybind11 is not installed, the build takes the headers of it that torch carries."""
    if importlib.util.find_spec("pybind11") is not None:
        return
    package = TOOLS / "pybind11"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(
        f"def get_include():\n    return {str(torch_folder / 'include')!r}\n", encoding="utf-8"
    )
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(TOOLS)])


def build(environment: dict[str, str]) -> bool:
    """Compile into build/gpu-site."""
    shutil.rmtree(SITE, ignore_errors=True)
    SITE.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    command += ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(SITE), str(ROOT)]
    return step("build", command, BUILD_LIMIT, env=environment)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    results = options.results.resolve()

    try:
        import torch
    except ImportError as error:
        say(f"no torch in {sys.executable} ({error}): nothing run")
        return NO_GPU
    if not torch.cuda.is_available():
        say(f"no GPU found by torch {torch.__version__} in {sys.executable}: nothing run")
        return NO_GPU
    say(f"{torch.cuda.get_device_name()} · torch {torch.__version__} · {sys.executable}")

    # The steps run in build/gpu-site: `bertkern` is what was built there, not the checkout's.
    environment = {**os.environ, "PYTHONPATH": str(SITE), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    inside = {"cwd": SITE, "env": environment}
    lend_pybind11(Path(torch.__file__).parent, environment)
    if not build(environment):
        return 1
    python = [sys.executable]
    pytest = [*python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    config = ["--rootdir", ROOT, "-c", ROOT / "pyproject.toml"]
    timing = [*python, "-m", "bertkern.benchmarks.run", "--device", "cuda", "--quick"]
    done = [
        step("info", [*python, "-c", "import bertkern; print(bertkern.info())"], 30, **inside),
        step("tests", [*pytest, *config, ROOT / "tests" / "ops"], TEST_LIMIT, **inside),
        step("timing", [*timing, "--results", results], TIMING_LIMIT, **inside),
    ]
    say(f"{sum(done)} of {len(done)} steps went well; results in {results}")
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
