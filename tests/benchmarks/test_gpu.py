"""`make gpu`: its steps, their limits, and that nothing is claimed where there is no GPU."""

import subprocess
import sys

import pytest
from bertkern.benchmarks import gpu


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Steps run in an empty folder, with a limit of a few seconds."""
    monkeypatch.setattr(gpu, "SITE", tmp_path)
    monkeypatch.setitem(gpu.LIMITS, "tests", 3)
    return tmp_path


def run_step(here, code, log=None):
    return gpu.step("tests", [sys.executable, "-c", code], {}, log)


def test_all_steps_fit_into_nine_minutes():
    assert sum(gpu.LIMITS.values()) <= 9 * 60


def test_a_step_shows_its_output_and_keeps_it(here, capfd):
    log = here / "new" / "log.txt"
    assert run_step(here, "print('shown')", log)
    assert "shown" in capfd.readouterr().out
    kept = log.read_text()
    assert kept.startswith("shown\n")
    assert "tests: ok" in kept


def test_a_step_that_fails_says_so(here):
    log = here / "log.txt"
    assert not run_step(here, "import sys; sys.exit(5)", log)
    assert "FAILED with exit code 5" in log.read_text()


def test_a_step_past_its_limit_is_stopped_and_its_output_kept(here, monkeypatch):
    monkeypatch.setitem(gpu.LIMITS, "tests", 1)
    log = here / "log.txt"
    code = "import time; print('before', flush=True); time.sleep(60)"
    assert not run_step(here, code, log)
    assert "before" in log.read_text()
    assert "stopped at its limit of 1 s" in log.read_text()


def test_without_a_gpu_nothing_is_run(monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "step", None)
    assert gpu.main([]) == gpu.NO_GPU
    assert "nothing run" in capsys.readouterr().out


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["benchmarks"])
    assert "allowed are tests, ops, models" in capsys.readouterr().err


def test_the_build_is_kept_until_a_source_changes(here, monkeypatch):
    built = []
    monkeypatch.setattr(gpu, "STAMP", here / "stamp")
    monkeypatch.setattr(gpu, "step", lambda *arguments: built.append(arguments) or True)
    monkeypatch.setattr(gpu, "sources_now", lambda: "first")
    assert gpu.build({})
    assert gpu.build({})
    assert len(built) == 1
    monkeypatch.setattr(gpu, "sources_now", lambda: "second")
    assert gpu.build({})
    assert len(built) == 2


def test_a_failed_build_is_not_kept(here, monkeypatch):
    monkeypatch.setattr(gpu, "STAMP", here / "stamp")
    monkeypatch.setattr(gpu, "step", lambda *arguments: False)
    assert not gpu.build({})
    assert not (here / "stamp").exists()


@pytest.mark.parametrize("well", [True, False])
def test_each_part_has_its_steps_and_one_failure_stops_no_other(here, monkeypatch, well):
    names = []
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/bin/true")
    monkeypatch.setattr(gpu, "step", lambda name, *rest: names.append(name) or well)
    assert gpu.run_parts(gpu.PARTS, here, {}, full=False) is well
    assert names == ["info", "tests", "sanitizer", "ops", "models"]
    names.clear()
    gpu.run_parts(["ops"], here, {}, full=False)
    assert names == ["info", "ops"]


def test_the_sample_for_the_sanitizer_runs_every_op(monkeypatch, capsys):
    """On this machine with the backends that it has: what is not there is named, nothing breaks."""
    code = gpu.SAMPLE.replace('("triton", "cuda")', '("cpu", "cuda")')
    code = code.replace('torch.device("cuda")', 'torch.device("cpu")')
    exec(code.replace("torch.cuda.synchronize()", ""), {})
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(" ran") for line in lines) == 10
    assert sum("not run" in line for line in lines) == 10


def test_the_commit_is_that_of_the_checkout(here, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", here)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(here.parent))
    assert gpu.commit_of_the_checkout() == "unknown"
    (here / "file").write_text("one")
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "file"], [*author, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", str(here), *command], check=True)
    commit = gpu.commit_of_the_checkout()
    assert len(commit) == 12
    (here / "file").write_text("two")
    assert gpu.commit_of_the_checkout() == f"{commit}+changes"
