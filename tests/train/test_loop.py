"""The loop: a step does not depend on its division, a run not on interruptions."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from train.labelled_sentences import SETTINGS, LabelledSentences, model

from bertkern.train import LoopSettings, Processes, TrainingInterrupted, train
from bertkern.train.checkpoint import read_state
from bertkern.train.loop import BEST, CHECKPOINT, WEIGHTS_OF_STEP
from bertkern.train.settings import noam_peak


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These products are too small for threads, which on a busy machine wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(folder=None, task=None, network=None, **changes):
    """(model, history) of a run with SETTINGS but for the changes."""
    keep = {k: changes.pop(k) for k in ("resume", "keep_best", "on_step") if k in changes}
    network = network or model()
    settings = dataclasses.replace(SETTINGS, **changes)
    task = task or LabelledSentences()
    history = train(network, task, settings, folder=folder, progress=False, **keep)
    return network, history


def weights(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.fixture(scope="module")
def whole():
    network, history = run()
    return weights(network), history


def test_it_learns():
    _, history = run(network=model(dropout=0.0), steps=400)
    assert history.evaluations[0].figures["accuracy"] < 0.8
    assert history.evaluations[-1].figures["accuracy"] > 0.95
    assert [e.step for e in history.evaluations] == [0, *range(4, 401, 4)]


@pytest.mark.parametrize("pieces", [2, 5, 9])
def test_accumulating_gradients_changes_nothing_but_rounding(whole, pieces):
    """Dropout is on. Nine pieces are more than a batch's sentences: some pieces are empty."""
    network, history = run(accumulate=pieces)
    for name, value in whole[0].items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-4, atol=2e-5)
    expected = [step.loss for step in whole[1].steps]
    np.testing.assert_allclose([s.loss for s in history.steps], expected, rtol=2e-5)


def test_a_wrong_mean_would_be_seen(whole):
    """What the test above can tell: the mean of the pieces' means is another loss."""
    batch = next(LabelledSentences().batches(0, 0, 0))
    network = model(dropout=0.0)
    loss = network(**batch.part(0, 6).arguments()).loss
    parts = [network(**batch.part(*ends).arguments()).loss for ends in ((0, 4), (4, 6))]
    assert abs(loss - (4 * parts[0] + 2 * parts[1]) / 6) < 1e-6
    assert abs(loss - (parts[0] + parts[1]) / 2) > 1e-4


def test_gradient_checkpointing_changes_nothing(whole):
    network, history = run(gradient_checkpointing=True)
    assert history == whole[1]
    assert all(network.state_dict()[name].equal(value) for name, value in whole[0].items())


def test_bf16_is_near(whole):
    _, history = run(precision="bf16")
    losses = [s.loss for s in history.steps]
    assert losses != [s.loss for s in whole[1].steps]
    np.testing.assert_allclose(losses[:3], [s.loss for s in whole[1].steps[:3]], rtol=0.02)


def test_fp16_scales_its_loss_and_resumes(tmp_path):
    """The scale is part of the state."""
    network, history = run(tmp_path / "whole", precision="fp16")
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "parts", precision="fp16", on_step=stop_at(5))
    resumed, again = run(tmp_path / "parts", precision="fp16", resume=True)
    assert again == history
    expected = network.state_dict()
    assert all(value.equal(expected[name]) for name, value in resumed.state_dict().items())


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, optimizer, step):
    """In the first step, at the end of an epoch (3), with an evaluation (4), in a later epoch."""
    expected, history = run(tmp_path / "whole", optimizer=optimizer)
    with pytest.raises(TrainingInterrupted, match=f"interrupted after step {step} of 12"):
        run(tmp_path / "parts", optimizer=optimizer, on_step=stop_at(step))
    resumed, again = run(tmp_path / "parts", optimizer=optimizer, resume=True, network=model(9))
    assert again == history
    states = resumed.state_dict(), expected.state_dict()
    assert all(states[0][name].equal(states[1][name]) for name in states[1])


def stop_at(step):
    def stop(record):
        if record.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


def test_a_killed_process_loses_only_the_steps_since_its_checkpoint(tmp_path):
    expected, history = run(tmp_path / "whole", checkpoint_every=3)
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from train.test_loop import run\n"
        "die = lambda r: r.step == 8 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "run(Path(sys.argv[2]), checkpoint_every=3, on_step=die)\n"
    )
    tests = str(Path(__file__).resolve().parents[1])
    killed = subprocess.run([sys.executable, "-c", code, tests, str(tmp_path / "parts")])
    assert killed.returncode == -signal.SIGKILL
    assert read_state(tmp_path / "parts" / CHECKPOINT).step == 6
    resumed, again = run(tmp_path / "parts", checkpoint_every=3, resume=True)
    assert again == history
    states = resumed.state_dict(), expected.state_dict()
    assert all(states[0][name].equal(states[1][name]) for name in states[1])


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a file's size as Linux has them")
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    run(tmp_path, steps=4)
    before = (tmp_path / CHECKPOINT).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="not written"):
            run(tmp_path, steps=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def test_patience_and_the_best_weights(tmp_path):
    """The figures are given: the best one is the second, and then two are not better."""
    kept = {}

    class Watching(LabelledSentences):
        def evaluate(self, network, processes):
            kept[self.evaluations] = weights(network)
            return super().evaluate(network, processes)

    task = Watching(figures=[0.1, 0.8, 0.7, 0.8, 0.9])
    network, history = run(tmp_path, task=task, patience=2, keep_best=True)
    assert [e.step for e in history.evaluations] == [0, 4, 8, 12][: len(history.evaluations)]
    assert len(history.evaluations) == 4
    assert all(network.state_dict()[name].equal(kept[1][name]) for name in kept[1])
    assert not any(value.equal(kept[3][name]) for name, value in kept[1].items() if "qkv" in name)
    assert (tmp_path / BEST).is_file()
    early = LabelledSentences(figures=[0.9, 0.8, 0.7])
    _, history = run(task=early, patience=1)
    assert [e.step for e in history.evaluations] == [0, 4]
    assert len(history.steps) == 4


def test_a_long_history_keeps_means(monkeypatch, whole):
    monkeypatch.setattr("bertkern.train.loop.MOST_RECORDS", 4)
    _, history = run()
    assert [r.step for r in history.steps] == [3, 6, 9, 12]
    single = whole[1].steps
    for i, record in enumerate(history.steps):
        three = single[3 * i : 3 * i + 3]
        assert record.tokens == sum(r.tokens for r in three)
        assert record.loss == pytest.approx(np.mean([r.loss for r in three]))
        assert record.learning_rate == three[-1].learning_rate


def test_means_survive_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr("bertkern.train.loop.MOST_RECORDS", 4)
    _, history = run(tmp_path / "whole")
    handler = signal.getsignal(signal.SIGTERM)
    seen = []

    class Stopping(LabelledSentences):
        def losses(self, output):
            seen.append(output)
            if len(seen) == 5:  # between two records
                os.kill(os.getpid(), signal.SIGTERM)
            return super().losses(output)

    with pytest.raises(TrainingInterrupted, match="after step 5"):
        run(tmp_path / "parts", task=Stopping())
    assert signal.getsignal(signal.SIGTERM) is handler
    assert len(read_state(tmp_path / "parts" / CHECKPOINT).since_record) == 2
    _, again = run(tmp_path / "parts", resume=True)
    assert again == history


def test_a_run_draws_none_of_the_callers_random_numbers(whole):
    network = model()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _, history = run(network=network)
    assert torch.equal(torch.rand(3), expected)
    assert history == whole[1]


def test_refusals(tmp_path):
    run(tmp_path, steps=4)
    with pytest.raises(ValueError, match="checkpoint of another run: other settings"):
        run(tmp_path, steps=5, resume=True)
    with pytest.raises(ValueError, match="checkpoint of another run: other data"):
        run(tmp_path, steps=4, resume=True, task=LabelledSentences((3, 3)))
    with pytest.raises(ValueError, match="epoch 0 of the data is empty"):
        run(task=LabelledSentences((), figures=[0.5]))
    with pytest.raises(FloatingPointError, match="loss of step 2 is not finite; a lower"):
        run(learning_rate=1e38, max_gradient_norm=1e38)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged, or not a training checkpoint"):
        run(tmp_path, steps=4, resume=True)
    for changes, message in (
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"optimizer": "sgd"}, r"optimizer must be one of \('adamw', 'lamb'\), not 'sgd'"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"warmup_fraction": 1.5}, r"warmup_fraction must be in 0..1, not 1.5"),
        ({"patience": 0}, "patience must be at least 1, not 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive, not nan"),
        ({"betas": (2.0, 0.9)}, r"betas must be in \[0, 1\)"),
        ({"seed": 2**70}, r"seed must be in 0\.\.2\^63 - 1"),
        ({"optimizer": "lamb", "sharding": "fsdp"}, "'lamb' needs sharding = 'ddp', not 'fsdp'"),
        (
            {"precision": "fp16", "sharding": "fsdp"},
            "'fp16' needs sharding = 'ddp'; 'fsdp' takes fp32",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SETTINGS, **changes)


def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(tmp_path):
    """The loss is finite in that step; the weights would no longer be."""

    class Poisoned(LabelledSentences):
        steps = 0

        def losses(self, output):
            self.steps += 1
            if self.steps == 6:
                output.logits.register_hook(lambda gradient: gradient * float("inf"))
            return super().losses(output)

    with pytest.raises(FloatingPointError, match="gradient of step 6 is not finite"):
        run(tmp_path, task=Poisoned(), checkpoint_every=2)
    assert read_state(tmp_path / CHECKPOINT).step == 4


def test_launchers_send_sigterm_twice(tmp_path):
    def stop(record):
        if record.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted, match="after step 3"):
        run(tmp_path, on_step=stop)
    assert read_state(tmp_path / CHECKPOINT).step == 3


def test_curves_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    network, task = model(), LabelledSentences()
    history = train(network, task, SETTINGS, folder=tmp_path, tensorboard=True, progress=False)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = events.Scalars("train/label_loss")
    assert [e.step for e in losses] == [r.step for r in history.steps]
    np.testing.assert_allclose(
        [e.value for e in losses], [r.loss for r in history.steps], rtol=1e-6
    )
    assert [e.step for e in events.Scalars("held-out/accuracy")] == [0, 4, 8, 12]


def test_history_goes_through_json(whole):
    history = whole[1]
    assert type(history).from_dict(json.loads(history.to_json())) == history
    assert history.curve("accuracy")[0] == [0, 4, 8, 12]


@pytest.mark.parametrize("warmup", [1, 3])
def test_noam_is_the_papers_equation(warmup):
    """Equation 3 of Vaswani et al., where steps count from 1."""
    peak = noam_peak(512, warmup)
    settings = LoopSettings(steps=20, schedule="noam", warmup_steps=warmup, learning_rate=peak)
    for step in range(1, 21):
        rate = 512**-0.5 * min(step**-0.5, step * warmup**-1.5)
        assert settings.rate(step - 1) == pytest.approx(rate, rel=1e-12)


def test_warmup_by_steps_or_by_a_fraction():
    by_steps = LoopSettings(steps=40, warmup_steps=4)
    by_fraction = LoopSettings(steps=40, warmup_fraction=0.1)
    rates = [by_steps.rate(step) for step in range(40)]
    assert rates == [by_fraction.rate(step) for step in range(40)]
    assert rates[3] == max(rates) == 1e-3


def test_gradients_may_go_unclipped():
    """A limit that is never reached is none."""
    _, free = run(max_gradient_norm=None)
    _, far = run(max_gradient_norm=1e9)
    assert free == far
    _, clipped = run(max_gradient_norm=0.01)
    assert free != clipped


def means_of(folder, steps):
    files = [load_file(folder / WEIGHTS_OF_STEP.format(step)) for step in steps]
    return {
        name: (sum(f[name].double() for f in files) / len(files)).to(tensor.dtype)
        for name, tensor in files[0].items()
    }


def test_the_run_ends_with_the_mean_of_its_last_checkpoints(tmp_path, whole):
    """Of steps 6, 9 and 12 here; training itself goes on as without."""
    network, history = run(tmp_path, average=3, checkpoint_every=3)
    names = sorted(path.name for path in tmp_path.glob("weights-*"))
    assert names == sorted(WEIGHTS_OF_STEP.format(step) for step in (6, 9, 12))
    last = load_file(tmp_path / WEIGHTS_OF_STEP.format(12))
    assert all(last[name].equal(value) for name, value in whole[0].items())
    mean = means_of(tmp_path, (6, 9, 12))
    state = network.state_dict()
    assert all(state[name].equal(value) for name, value in mean.items())
    assert history.steps == whole[1].steps
    assert [e.step for e in history.evaluations] == [e.step for e in whole[1].evaluations]
    assert history.evaluations[:-1] == whole[1].evaluations[:-1]
    figures = LabelledSentences().evaluate(network, Processes())
    assert history.evaluations[-1].figures == figures


@pytest.mark.parametrize("step", [5, 10, 12])
def test_the_mean_survives_an_interruption(tmp_path, step):
    """The checkpoint of the interruption is not one of those that count."""
    options = {"average": 3, "checkpoint_every": 3}
    expected, history = run(tmp_path / "whole", **options)
    folder = tmp_path / "parts"
    if step < 12:
        with pytest.raises(TrainingInterrupted):
            run(folder, on_step=stop_at(step), **options)
    else:  # a finished run
        run(folder, **options)
    resumed, again = run(folder, resume=True, network=model(9), **options)
    assert again == history
    states = resumed.state_dict(), expected.state_dict()
    assert all(states[0][name].equal(states[1][name]) for name in states[1])


def test_a_short_run_averages_what_there_is(tmp_path):
    network, _ = run(tmp_path, average=7, checkpoint_every=5)
    mean = means_of(tmp_path, (5, 10, 12))
    state = network.state_dict()
    assert all(state[name].equal(value) for name, value in mean.items())


def test_refusals_of_averages(tmp_path):
    with pytest.raises(ValueError, match="average needs a folder"):
        run(average=2)
    with pytest.raises(ValueError, match=r"average needs a folder .* excludes keep_best"):
        run(tmp_path, average=2, keep_best=True)
    with pytest.raises(ValueError, match="average and patience exclude one another"):
        run(tmp_path, average=2, patience=3)
    with pytest.raises(ValueError, match=r"schedule must be one of \('linear', 'noam'\)"):
        run(schedule="cosine")
    with pytest.raises(ValueError, match="max_gradient_norm must be positive, not 0"):
        run(max_gradient_norm=0)


def test_a_checkpoint_from_before_a_setting_existed_is_resumed(tmp_path, whole):
    """It went as the setting's default goes; another choice is another run."""
    with pytest.raises(TrainingInterrupted):
        run(tmp_path, on_step=stop_at(5))
    path = tmp_path / CHECKPOINT
    with safe_open(path, framework="pt") as file:
        state = json.loads(file.metadata()["state"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in ("schedule", "warmup_steps", "average"):
        del state["run"]["settings"][name]
    save_file(tensors, path, metadata={"state": json.dumps(state)})
    with pytest.raises(ValueError, match="checkpoint of another run: other settings"):
        run(tmp_path, schedule="noam", resume=True)
    network, history = run(tmp_path, resume=True)
    assert history == whole[1]
    assert all(network.state_dict()[name].equal(value) for name, value in whole[0].items())
