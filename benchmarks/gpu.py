"""`make gpu`: build, test and time bertkern on the GPU at hand, with the Python at hand.

    python benchmarks/gpu.py [tests] [ops] [models] [--results FOLDER] [--full]

Needs what the checkout and a stock installation of torch (and nvcc, for the CUDA kernels) hold; no
network, no virtual environment. The build goes to build/gpu-site, so nothing is installed into the
environment, and is kept for the next part while the sources stay as they are: the parts can be run
one by one (`make gpu-tests`, `gpu-ops`, `gpu-models`). Each step has a time limit, nine minutes
together; a step that fails does not stop the others, and what was measured before a limit is
written. BERTKERN_COMMIT in the environment names the commit where there is no git. RESULTS gets
tests.txt, sanitizer.txt, and one .jsonl of the ops and one of the models.

Exit codes: 0 all went well · 1 a step failed · 3 no GPU, nothing was run.
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "gpu-site"
STAMP = ROOT / "build" / "gpu-site.sources"
TOOLS = ROOT / "build" / "gpu-tools"
PARTS = ("tests", "ops", "models")
# Seconds: nine minutes together.
LIMITS = {"build": 100, "info": 15, "tests": 105, "sanitizer": 60, "ops": 135, "models": 125}
NO_GPU = 3
# Every op once, forward and backward, by each backend that works here.
SAMPLE = """
import torch
import bertkern
from bertkern.benchmarks.overhead import calls

for backend in ("triton", "cuda"):
    for op, (function, inputs) in calls(torch.device("cuda")).items():
        leaves = [t.detach().requires_grad_() for t in inputs]
        try:
            with bertkern.backend(backend):
                torch.autograd.grad(function(*leaves).sum(), leaves)
        except (NotImplementedError, RuntimeError, ValueError) as reason:
            if not str(reason).startswith(("backend", "BERTKERN")) and backend not in str(reason):
                raise
            print(backend, op, "not run:", str(reason).splitlines()[0])
            continue
        torch.cuda.synchronize()
        print(backend, op, "ran")
"""


def say(text: str) -> None:
    """A line of our own, in order with the output of the steps."""
    print(f"== {text}", flush=True)


def step(
    name: str, command: Sequence[str | Path], environment: dict[str, str], log: Path | None = None
) -> bool:
    """Run one step, its output shown and, with `log`, kept; whether it ended well in time."""
    limit = LIMITS[name]
    say(f"{name}: at most {limit} s")
    start = time.monotonic()
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=SITE,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        process.kill()

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        code = process.wait()
    finally:
        timer.cancel()
        process.kill()
    end = "ok" if code == 0 else f"FAILED with exit code {code}"
    if stopped.is_set():
        end = f"FAILED: stopped at its limit of {limit} s"
    end = f"{name}: {end} ({time.monotonic() - start:.0f} s)"
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join([*lines, f"== {end}\n"]), encoding="utf-8")
    say(end)
    return code == 0 and not stopped.is_set()


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


def sources_now() -> str:
    """Changes when a source file or this Python changes."""
    digest = hashlib.sha256(sys.version.encode())
    for folder in ("bertkern", "kernels", "csrc", "benchmarks", "setup.py", "pyproject.toml"):
        path = ROOT / folder
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in files:
            if file.suffix in (".py", ".pyi", ".toml", ".cpp", ".h", ".cu", ".cuh"):
                digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()


def commit_of_the_checkout() -> str:
    """What result files name; "unknown" where the checkout came without its history."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no")
    return commit + "+changes" if changed else commit


def build(environment: dict[str, str]) -> bool:
    """Compile into build/gpu-site, unless that was done from these sources."""
    sources = sources_now()
    if STAMP.exists() and STAMP.read_text(encoding="utf-8") == sources:
        say("build: there already, from these sources")
        return True
    STAMP.unlink(missing_ok=True)
    shutil.rmtree(SITE, ignore_errors=True)
    SITE.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    command += ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(SITE), str(ROOT)]
    if not step("build", command, environment):
        return False
    STAMP.write_text(sources, encoding="utf-8")
    return True


def run_parts(parts: Sequence[str], results: Path, environment: dict[str, str], full: bool) -> bool:
    """The steps of these parts; whether all went well."""
    python = [sys.executable]
    quick = [] if full else ["--quick"]
    timing = [*python, "-m", "bertkern.benchmarks.run", "--device", "cuda", "--no-report", *quick]
    timing += ["--results", str(results)]
    done = [
        step("info", [*python, "-c", "import bertkern; print(bertkern.info())"], environment),
    ]
    if "tests" in parts:
        pytest = [*python, "-m", "pytest", "-q", "--maxfail=25", "-p", "no:cacheprovider"]
        pytest += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
        pytest += [str(ROOT / "tests" / "ops")]
        done.append(step("tests", pytest, environment, results / "tests.txt"))
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            say("sanitizer: compute-sanitizer is not installed, left out")
        else:
            command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *python]
            uncached = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            done.append(
                step("sanitizer", [*command, "-c", SAMPLE], uncached, results / "sanitizer.txt")
            )
    if "ops" in parts:
        done.append(step("ops", [*timing, "ops"], environment))
    if "models" in parts:
        done.append(step("models", [*timing, "models", "training"], environment))
    say(f"{sum(done)} of {len(done)} steps went well; results in {results}")
    return all(done)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--full", action="store_true", help="every case, with no limit of time")
    options = parser.parse_args(arguments)
    wrong = [part for part in options.parts if part not in PARTS]
    if wrong:
        parser.error(f"PART {' '.join(wrong)}: allowed are {', '.join(PARTS)}")
    if options.full:
        LIMITS.update(ops=24 * 3600, models=24 * 3600)

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
    environment.setdefault("BERTKERN_COMMIT", commit_of_the_checkout())
    lend_pybind11(Path(torch.__file__).parent, environment)
    if not build(environment):
        return 1
    well = run_parts(options.parts or PARTS, options.results.resolve(), environment, options.full)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
