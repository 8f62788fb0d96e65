"""Which run may go on from a checkpoint: what differs is named, and what is finished stays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train.labelled_sentences import SETTINGS, LabelledSentences, model

import bertkern
from bertkern.train import Processes, train
from bertkern.train.loop import CHECKPOINT
from bertkern.train.resuming import finished_step, refuse_another_run, seen_by_all


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(model(), LabelledSentences(), SETTINGS, folder=folder, progress=False)
    return folder / CHECKPOINT


def test_only_what_differs_is_named(checkpoint):
    started = {"steps": 12, "betas": (0.9, 0.999), "learning_rate": 5e-3}
    refuse_another_run(checkpoint, {"settings": started, "data": {"sizes": [6, 5, 7]}})
    now = {
        "settings": {**started, "learning_rate": 1e-4, "accumulate": 2, "warmup_fraction": 0.5},
        "config": {"hidden_size": 16, "num_hidden_layers": 1},
        "data": {"sizes": [6]},
    }
    with pytest.raises(ValueError, match="belongs to a run with") as error:
        refuse_another_run(checkpoint, now, {"sizes": "other sentences"})
    text = str(error.value)
    assert text.startswith(
        f"{checkpoint} belongs to a run with --learning-rate = 0.005, not 0.0001"
    )
    for part in (
        "--accumulate = 1, not 2",
        "--warmup = 0.1, not 0.5",
        "--layers = 2, not 1",
        "other sentences: repeat that run's command",
    ):
        assert part in text
    for same in ("steps", "betas", "hidden-size"):
        assert same not in text
    with pytest.raises(ValueError, match="--whole-word = nothing, not true"):
        refuse_another_run(checkpoint, {"settings": {"masking": {"whole_word": True}}})


def test_a_finished_run_is_known_by_its_last_file(checkpoint, tmp_path):
    assert finished_step(checkpoint, tmp_path / "history.json") is None
    (tmp_path / "history.json").write_text("{}")
    assert finished_step(checkpoint, tmp_path / "history.json") == 12


def test_a_file_that_all_miss_is_the_callers_to_judge(tmp_path):
    seen_by_all(tmp_path / "none", Processes())


def main(folder):
    """What each of two processes does: the second one looks into another folder."""
    processes = Processes("cpu")
    own = Path(folder) / ("here" if processes.is_main else "there")
    try:
        seen_by_all(own / "shared", processes)
    except FileNotFoundError as error:
        (Path(folder) / f"{processes.index}.json").write_text(json.dumps(str(error)))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_machines_that_share_no_folder_are_told_so(tmp_path):
    """All processes raise; none waits for the others."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "shared").write_text("x")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", __file__, str(tmp_path)]
    paths = [str(Path(__file__).parents[1]), str(Path(bertkern.__file__).parents[1])]
    path = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads((tmp_path / f"{index}.json").read_text()) for index in (0, 1)]
    for index, folder in enumerate(("here", "there")):
        assert told[index] == (
            f"{tmp_path / folder / 'shared'}: process 1 of 2 does not see this file, which others "
            "do: all machines of a run must share its folder"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
