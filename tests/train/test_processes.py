"""Two processes take the steps that one takes, data-parallel and sharded, dropout included."""

import atexit
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from train.labelled_sentences import SETTINGS, LabelledSentences, model

import bertkern
from bertkern.train import Processes, train
from bertkern.train.checkpoint import save_model
from bertkern.train.processes import divide

TESTS = Path(__file__).resolve().parents[1]
SIZES = (6, 1, 7)  # a batch of one sentence leaves a process with nothing of its own


def torchrun(count, *arguments):
    """Run this file as a program in so many processes; returns the finished process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={count}", __file__, *map(str, arguments)]
    root = Path(bertkern.__file__).parents[1]
    path = os.pathsep.join([str(TESTS), str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def main(*runs):
    """What each process does: runs behind one another, as a program takes seconds to begin."""
    torch.set_num_threads(1)
    atexit.register(note_the_group, Path(runs[0].split(",")[0]))  # runs after those of later
    for run in runs:
        one_run(*run.split(","))


def note_the_group(folder):
    """Write whether this program, all but gone, is in a process group still."""
    rank = os.environ["RANK"]
    (folder / f"group-of-{rank}").write_text(str(torch.distributed.is_initialized()))


def one_run(folder, sharding, accumulate, steps, resume):
    """Train; leave after so many steps, or 0: at the end."""
    processes = Processes("cpu")
    settings = dataclasses.replace(
        SETTINGS, sharding=sharding, accumulate=int(accumulate), steps=12, checkpoint_every=4
    )
    network = model(seed=processes.index)  # all are to start from the first one's weights
    folder = Path(folder)

    def stop(record):
        if record.step == int(steps):
            raise SystemExit(7)

    history = train(
        network,
        LabelledSentences(SIZES),
        settings,
        processes,
        folder=folder,
        resume=resume == "resume",
        progress=False,
        on_step=stop,
    )
    save_model(network, folder, processes)
    gathered = processes.gather([processes.index])
    if processes.is_main:
        (folder / "history.json").write_text(history.to_json())
        (folder / "order.json").write_text(json.dumps(gathered))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("plain")
    network = model(seed=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    history = train(network, LabelledSentences(SIZES), SETTINGS, progress=False)
    torch.set_num_threads(threads)
    network.save_pretrained(folder)
    return history, load_file(folder / "model.safetensors")


KINDS = [("ddp", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 2)]  # sharding, pieces of a step


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The folders of the runs of two processes."""
    folders = {kind: tmp_path_factory.mktemp("pair") for kind in KINDS}
    done = torchrun(2, *(f"{folders[kind]},{kind[0]},{kind[1]},0,start" for kind in KINDS))
    assert done.returncode == 0, done.stderr[-3000:]
    return folders


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(plain, pairs, kind):
    folder = pairs[kind]
    history = json.loads((folder / "history.json").read_text())
    assert json.loads((folder / "order.json").read_text()) == [0, 1]
    losses = [step["losses"]["label"] for step in history["steps"]]
    np.testing.assert_allclose(losses, [step.loss for step in plain[0].steps], rtol=2e-5)
    assert [e["step"] for e in history["evaluations"]] == [0, 4, 8, 12]
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == plain[1].keys()
    for name, value in plain[1].items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=2e-5)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]


def test_a_program_that_ends_has_left_its_group(pairs):
    """Threads of gloo that outlive the interpreter abort one finished run in twelve."""
    for rank in (0, 1):
        assert (pairs[KINDS[0]] / f"group-of-{rank}").read_text() == "False"


def test_a_process_that_dies_ends_the_run_and_it_resumes(pairs, tmp_path):
    """The first one dies in step 6; the checkpoint is of step 4."""
    died = torchrun(2, f"{tmp_path},ddp,1,6,start")
    assert died.returncode != 0
    assert not (tmp_path / "model.safetensors").exists()
    resumed = torchrun(2, f"{tmp_path},ddp,1,0,resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    whole = pairs["ddp", 1]
    histories = [(folder / "history.json").read_text() for folder in (whole, tmp_path)]
    assert histories[0] == histories[1]
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path))
    assert all(first[name].equal(second[name]) for name in first)


def test_one_process_goes_on_where_two_stopped(plain, tmp_path):
    """The checkpoint does not know how many there were."""
    assert torchrun(2, f"{tmp_path},fsdp,1,6,start").returncode != 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one_run(tmp_path, "fsdp", 1, 0, "resume")
    torch.set_num_threads(threads)
    weights = load_file(tmp_path / "model.safetensors")
    for name, value in plain[1].items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=2e-5)


def test_division_by_tokens():
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = rng.integers(1, 50, rng.integers(1, 30))
        parts = int(rng.integers(1, 9))
        bounds = divide(lengths, parts)
        assert bounds[0] == 0
        assert bounds[-1] == len(lengths)
        assert len(bounds) == parts + 1
        assert all(a <= b for a, b in itertools.pairwise(bounds))
        share = lengths.sum() / parts
        for first, last in itertools.pairwise(bounds):
            assert abs(lengths[first:last].sum() - share) <= lengths.max()


def test_a_single_process_stands_alone():
    processes = Processes()
    assert (processes.index, processes.count, processes.is_main) == (0, 1, True)
    assert processes.gather([1, 2]) == [1, 2]
    assert processes.any(True)
    assert not processes.any(False)
    network = model()
    assert processes.wrap(network, "fsdp") is network


if __name__ == "__main__":
    main(*sys.argv[1:])
