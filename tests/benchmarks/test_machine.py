"""The machine: whose figures these are, and the memory that a call adds."""

import subprocess
from importlib import metadata

import pytest
import torch
from bertkern.benchmarks import machine

CPU = torch.device("cpu")


def test_provenance_says_machine_versions_and_commit(monkeypatch):
    monkeypatch.setattr(machine, "PACKAGES", ("numpy", "no-such-package"))
    facts = machine.provenance(CPU)
    assert all(str(value) for value in facts.values())
    assert facts["torch"] == torch.__version__
    assert facts["numpy"] == metadata.version("numpy")
    assert facts["threads"] == torch.get_num_threads()
    assert facts["date"].endswith("+00:00")
    assert {"device", "system", "commit", "python", "bertkern", "capability"} <= set(facts)
    assert "no-such-package" not in facts


def git(folder, *arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    done = subprocess.run(
        ["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of one commit, where bertkern is said to lie."""
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "one")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    return tmp_path


def test_the_commit_says_whether_files_were_changed(repository):
    commit = git(repository, "rev-parse", "--short=12", "HEAD")
    assert machine.provenance(CPU)["commit"] == commit
    (repository / "file").write_text("two")
    assert machine.provenance(CPU)["commit"] == commit + "+changes"


def test_the_commit_of_another_repository_is_not_ours(repository, monkeypatch):
    """bertkern installed in a virtual environment inside somebody's own repository."""
    installed = repository / ".venv" / "lib" / "site-packages" / "bertkern"
    installed.mkdir(parents=True)
    monkeypatch.setattr(machine, "ROOT", installed)
    assert machine.provenance(CPU)["commit"] == "unknown"


@pytest.mark.parametrize("without", ["repository", "git"])
def test_without_git_the_commit_is_unknown(tmp_path, monkeypatch, without):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    if without == "git":
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.provenance(CPU)["commit"] == "unknown"


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "ops-nvidia-h200-20260102-030405.jsonl"),
        ("AMD EPYC(TM) 9/64", "ops-amd-epyc-tm-9-64-20260102-030405.jsonl"),
        (" ..\\/ a", "ops-a-20260102-030405.jsonl"),
    ],
)
def test_a_file_is_named_for_the_machine_and_the_second(device, name):
    facts = {"device": device, "date": "2026-01-02T03:04:05+00:00"}
    assert machine.file_name("ops", facts) == name


def test_the_memory_that_a_call_adds_is_counted_though_it_is_freed():
    size = 64 * 2**20
    torch.ones(size // 4)  # memory that was freed before does not hide it

    def call():
        return torch.ones(size // 4).sum()

    out, added = machine.added_bytes(call, CPU)
    assert out == size // 4
    if added is None:
        pytest.skip("the system does not let a process reset its peak of memory")
    assert 0.9 * size <= added < 1.5 * size
    _, again = machine.added_bytes(call, CPU)
    assert 0.9 * size <= again < 1.5 * size


def test_a_call_that_needs_no_memory_adds_little():
    x = torch.ones(2**22)
    _, added = machine.added_bytes(lambda: x.add_(1), CPU)
    assert added is None or added < 2**20


def test_a_system_that_counts_no_memory_says_nothing(monkeypatch):
    monkeypatch.setattr(machine, "_reset_resident_peak", lambda: False)
    assert machine.added_bytes(lambda: 3, CPU) == (3, None)


def test_what_a_call_raises_is_raised():
    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        machine.added_bytes(fails, CPU)


def test_a_build_that_stands_elsewhere_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("BERTKERN_COMMIT", "c0ffee123456")
    assert machine.provenance(torch.device("cpu"))["commit"] == "c0ffee123456"
