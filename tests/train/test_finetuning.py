"""Fine-tuning: every task learns, as transformers does; the best weights, resuming, files."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from train.task_data import KINDS, make, save_start

import bertkern
from bertkern.data.answer_spans import best_answers
from bertkern.data.classification import ClassificationData
from bertkern.data.features import FeatureBatch
from bertkern.train import History, Processes, TrainingInterrupted
from bertkern.train.curves import smooth
from bertkern.train.finetuning import finetune
from bertkern.train.finetuning_tasks import TASKS, FinetuningSettings

QUICK = {"epochs": 2, "batch_size": 16, "learning_rate": 3e-3}
THEIRS = {
    "classification": transformers.BertForSequenceClassification,
    "regression": transformers.BertForSequenceClassification,
    "multiple-choice": transformers.BertForMultipleChoice,
    "token-classification": transformers.BertForTokenClassification,
    "qa": transformers.BertForQuestionAnswering,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These products are too small for threads, which on a busy machine wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def start_without_dropout(tmp_path_factory):
    return save_start(tmp_path_factory.mktemp("plain"), dropout=0.0)


def run(kind, start, out, count=64, **others):
    settings = FinetuningSettings(**{**QUICK, **others.pop("settings", {})})
    train_data, held_out = make(kind, count, 0), make(kind, 40, 1)
    return finetune(train_data, held_out, start, out, settings=settings, progress=False, **others)


def padded(part):
    """The arguments of transformers' models for a packed part."""
    arguments = part.arguments()
    bounds = arguments["cu_seqlens"].tolist()
    pieces = list(pairwise(bounds))
    choices = arguments.get("num_choices")

    def pad(values, filler):
        rows = [values[a:b] for a, b in pieces]
        rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)
        return rows if choices is None else rows.reshape(-1, choices, rows.shape[1])

    ids = arguments["input_ids"]
    result = {
        "input_ids": pad(ids, 0),
        "token_type_ids": pad(arguments["token_type_ids"], 0),
        "attention_mask": pad(torch.ones_like(ids), 0),
    }
    for name in ("labels", "start_positions", "end_positions"):
        if name in arguments:
            values = arguments[name]
            result[name] = pad(values, -100) if len(values) == len(ids) else values
    return result


def their_loss(kind, model, batch):
    """transformers takes padding for a possible answer, so windows are given to it one by one."""
    if kind != "qa":
        return model(**padded(batch.part(0, len(batch)))).loss
    parts = [padded(batch.part(e, e + 1)) for e in range(len(batch))]
    return torch.stack([model(**part).loss for part in parts]).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_those_of_transformers(kind, start_without_dropout, tmp_path):
    """Same first weights, batches, optimizer and rates: the same losses, step by step."""
    data, settings = make(kind, 48, 0), FinetuningSettings(**QUICK)
    task = TASKS[type(data)]
    torch.manual_seed(settings.seed)
    ours = task.model_class.from_pretrained(
        start_without_dropout, new_head=True, **task.config_changes(data)
    )
    ours.save_pretrained(tmp_path / "first")
    theirs, report = THEIRS[kind].from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not report["missing_keys"]
    result = run(kind, start_without_dropout, tmp_path / "out", count=48)
    loop = settings.loop(len(data))
    named = list(theirs.named_parameters())
    groups = [
        {"params": [p for _, p in named if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for _, p in named if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, eps=1e-6)
    losses = []
    for epoch in range(settings.epochs):
        for batch in data.features.batches(epoch, settings.batch_size, settings.seed):
            for group in optimizer.param_groups:
                group["lr"] = loop.rate(len(losses))
            loss = their_loss(kind, theirs.train(), batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
    assert len(losses) == loop.steps >= 6
    np.testing.assert_allclose([s.loss for s in result.history.steps], losses, rtol=2e-4)


def their_logits(kind, folder, data):
    """Each example's logits from transformers, read from the folder."""
    model = THEIRS[kind].from_pretrained(folder).eval()
    logits = []
    for example in range(len(data)):
        part = FeatureBatch(data.features, np.array([example])).part(0, 1)
        arguments = {k: v for k, v in padded(part).items() if "label" not in k}
        with torch.no_grad():
            output = model(**{k: v for k, v in arguments.items() if not k.endswith("positions")})
        names = ("start_logits", "end_logits") if kind == "qa" else ("logits",)
        logits.append([getattr(output, name)[0].numpy() for name in names])
    return model.config, logits


LEARN = {"epochs": 8, "batch_size": 16, "learning_rate": 6e-3, "evaluate_every": 30}
LEARNT = {"classification": 0.95, "regression": 0.9, "multiple-choice": 0.95}
LEARNT |= {"token-classification": 0.95, "qa": 80}


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_writes_what_transformers_predicts(kind, start, tmp_path):
    test = make(kind, 30, 2)
    result = run(kind, start, tmp_path, count=128, settings=LEARN, test=test)
    metric = result.task.metric
    assert result.figures[metric] > LEARNT[kind]
    assert result.test_figures[metric] > 0.9 * LEARNT[kind]
    baseline = result.history.baselines.get(metric)
    assert baseline is None or result.figures[metric] > 1.2 * baseline
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored["held_out"] == result.figures
    assert stored["test"] == result.test_figures
    best = result.history.best(metric, True)
    assert stored["best_step"] == best.step
    assert result.figures == pytest.approx(best.figures, rel=1e-5)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert History.from_dict(json.loads((tmp_path / "history.json").read_text())) == result.history

    config, logits = their_logits(kind, tmp_path, test)
    files = {path.name: path for path in (tmp_path / "test").iterdir()}
    if kind in ("classification", "regression"):
        lines = files["predictions.tsv"].read_text("utf-8").splitlines()
        assert lines[0] == "index\tprediction"
        found = dict(line.split("\t") for line in lines[1:])
        assert list(found) == test.examples.ids
        if kind == "regression":
            expected = [float(own[0][0]) for own in logits]
            np.testing.assert_allclose([float(v) for v in found.values()], expected, atol=1e-4)
        else:
            names = [config.id2label[int(own[0].argmax())] for own in logits]
            assert list(found.values()) == names
            assert set(names) == {"no", "yes"}
    elif kind == "multiple-choice":
        rows = list(csv.reader(files["predictions.csv"].open()))
        assert rows[0] == ["", "pred"]
        assert [row[0] for row in rows[1:]] == test.examples.ids
        assert [int(row[1]) for row in rows[1:]] == [int(own[0].argmax()) for own in logits]
    elif kind == "token-classification":
        text = files["predictions.conll"].read_text("utf-8")
        sentences = [block.splitlines() for block in text.split("\n\n") if block.strip()]
        rows = [line.split(" ") for block in sentences for line in block]
        assert [row[0] for row in rows] == [w for s in test.examples.sentences for w in s]
        assert [row[1] for row in rows] == [t for s in test.examples.tags for t in s]
        labels = test.features.token_labels["labels"]
        numbers = np.concatenate([own[0].argmax(1) for own in logits])[labels != -100]
        assert [row[2] for row in rows] == [config.id2label[int(n)] for n in numbers]
    else:
        predictions = json.loads(files["predictions.json"].read_text("utf-8"))
        odds = json.loads(files["null_odds.json"].read_text("utf-8"))
        for question, numbers in zip(test.questions, test.windows_of(), strict=True):
            answers = best_answers(
                question.context,
                [test.windows[n] for n in numbers],
                [logits[n][0] for n in numbers],
                [logits[n][1] for n in numbers],
            )
            assert odds[question.id] == pytest.approx(answers.null_difference, abs=1e-3)
            text = "" if answers.null_difference > 0 else answers.spans[0].text
            assert predictions[question.id] == text
        assert len(predictions) == 30
        assert any(predictions.values())
        assert not all(predictions.values())


class StopAt:
    """Sends this process a signal in the step, as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def __call__(self, record):
        if record.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_interrupted_and_resumed_is_uninterrupted(start, tmp_path):
    whole = run("multiple-choice", start, tmp_path / "whole")
    with pytest.raises(TrainingInterrupted, match="after step 5 of 8"):
        run("multiple-choice", start, tmp_path / "parts", on_step=StopAt(5))
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    resumed = run("multiple-choice", start, tmp_path / "parts", resume=True)
    assert resumed.history == whole.history
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    files = [sorted(p.relative_to(f) for p in f.rglob("*")) for f in (whole.out, resumed.out)]
    assert files[0] == files[1]
    before = {p: p.stat().st_mtime_ns for p in whole.out.rglob("*")}
    again = run("multiple-choice", start, whole.out, resume=True, on_step=StopAt(1))
    assert again.finished_before
    assert {p: p.stat().st_mtime_ns for p in whole.out.rglob("*")} == before
    assert not resumed.finished_before
    for name in ("history", "figures", "intervals", "test_figures"):
        assert getattr(again, name) == getattr(whole, name), name
    assert sorted(again.files) == sorted(whole.files)
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    for settings, what in (
        ({"learning_rate": 1e-4}, "--learning-rate = 0.003, not 0.0001: repeat"),
        ({"batch_size": 8}, "another number of steps .*--batch-size = 16, not 8: repeat"),
    ):
        with pytest.raises(ValueError, match=f"belongs to a run with .*{what}"):
            run("multiple-choice", start, tmp_path / "parts", resume=True, settings=settings)
    with pytest.raises(ValueError, match="other training examples"):
        run("multiple-choice", start, tmp_path / "parts", count=62, resume=True)


def main(start, out):
    """What each process does."""
    torch.set_num_threads(1)
    for sharding in ("ddp", "fsdp"):
        settings = {"sharding": sharding}
        folder = Path(out) / sharding
        run("qa", start, folder, count=48, test=make("qa", 10, 2), settings=settings)


def test_two_processes_make_what_one_makes(start, tmp_path):
    """Dropout is on; losses, figures and predictions, each process computing its share.

    Each has all weights, then a part of them.
    """
    run("qa", start, tmp_path / "one", count=48, test=make("qa", 10, 2))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", __file__, str(start), str(tmp_path / "two")]
    paths = [str(Path(__file__).parents[1]), str(Path(bertkern.__file__).parents[1])]
    path = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    for sharding in ("ddp", "fsdp"):
        names = ("one", f"two/{sharding}")
        one, two = (
            History.from_dict(json.loads((tmp_path / name / "history.json").read_text()))
            for name in names
        )
        expected = [step.loss for step in one.steps]
        np.testing.assert_allclose([step.loss for step in two.steps], expected, rtol=1e-4)
        for a, b in zip(one.evaluations, two.evaluations, strict=True):
            assert b.figures == pytest.approx(a.figures, rel=1e-3)
        for part in ("held_out", "test"):
            odds = [
                json.loads((tmp_path / name / part / "null_odds.json").read_text())
                for name in names
            ]
            assert odds[1] == pytest.approx(odds[0], abs=1e-3)
        files = [
            sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*"))
            for name in names
        ]
        assert files[0] == files[1]


def test_early_stopping_ends_with_the_best_weights(start, tmp_path):
    """At a rate that destroys the model, the first evaluation is the best one."""
    settings = {"epochs": 50, "learning_rate": 2.0, "evaluate_every": 1, "patience": 3}
    settings |= {"metric": "loss"}
    result = run("classification", start, tmp_path, settings=settings)
    steps = [e.step for e in result.history.evaluations]
    best = result.history.best("loss", False)
    assert steps == list(range(best.step + 4))
    assert len(steps) < 20
    assert result.figures == pytest.approx(best.figures, rel=1e-5)
    assert result.history.evaluations[-1].figures["loss"] > best.figures["loss"]
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert (stored["best_step"], stored["steps"]) == (best.step, steps[-1])
    assert stored["planned_steps"] == 200


def test_evaluation_does_not_depend_on_its_batches(start, tmp_path):
    result = run("qa", start, tmp_path, settings={"epochs": 1})
    task, processes = result.task, Processes()
    whole, loss = task.outputs(result.model, task.held_out, processes)
    task.settings = FinetuningSettings(evaluation_tokens=1)
    single, other = task.outputs(result.model, task.held_out, processes)
    assert loss == pytest.approx(other, rel=1e-5)
    for name, values in whole.items():
        np.testing.assert_allclose(values, single[name], atol=1e-4)


def test_refusals(start, tmp_path):
    data, other = make("classification", 8, 0), make("multiple-choice", 8, 0)
    with pytest.raises(ValueError, match="must be of one kind, one of ClassificationData"):
        finetune(data, other, start, tmp_path)
    with pytest.raises(ValueError, match="metric must be one of accuracy, f1, mcc, loss, not 'f2'"):
        run("classification", start, tmp_path, settings={"metric": "f2"})
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        FinetuningSettings(batch_size=0)
    with pytest.raises(ValueError, match=r"warmup_fraction must be in 0..1, not 2"):
        FinetuningSettings(warmup_fraction=2)
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        run("classification", start, tmp_path, resume=True)
    unlabelled = dataclasses.replace(data.examples, labels=None, label_names=None)
    unlabelled = ClassificationData(unlabelled, data.tokenizer)
    with pytest.raises(ValueError, match="held_out must be labelled examples, one or more"):
        finetune(data, unlabelled, start, tmp_path)
    renamed = dataclasses.replace(data.examples, label_names=["yes", "no"])
    renamed = ClassificationData(renamed, data.tokenizer)
    with pytest.raises(ValueError, match=r"held_out has the labels \['yes', 'no'\], train_data"):
        finetune(data, renamed, start, tmp_path)
    texts = dataclasses.replace(data.examples.subset([0, 1]), texts=["cat " * 50] * 2)
    long = ClassificationData(texts, data.tokenizer, max_length=40)
    with pytest.raises(ValueError, match=r"a sequence of 40 tokens exceeds .* = 32 .* max_length"):
        finetune(long, data, start, tmp_path)
    assert not any(tmp_path.iterdir())
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"model.safetensors exists"):
        finetune(data, data, start, tmp_path)


def test_a_head_of_other_labels_is_replaced(start, tmp_path):
    """From a model that was fine-tuned for two classes to one for tags, and back."""
    run("classification", start, tmp_path / "two", settings={"epochs": 1})
    tags = run("token-classification", tmp_path / "two", tmp_path / "tags", settings={"epochs": 1})
    assert tags.model.config.id2label == {0: "O", 1: "B-ANIMAL", 2: "B-PER", 3: "I-PER"}
    back = run("regression", tmp_path / "tags", tmp_path / "back", settings={"epochs": 1})
    assert back.model.config.problem_type == "regression"
    assert back.model.config.num_labels == 1


def test_settings_of_the_loop():
    loop = FinetuningSettings(epochs=3, batch_size=32, seed=5).loop(100)
    assert (loop.steps, loop.evaluate_every, loop.checkpoint_every) == (12, 4, 4)
    assert (loop.learning_rate, loop.seed, loop.patience) == (3e-5, 5, None)
    assert FinetuningSettings(evaluate_every=7).loop(100).evaluate_every == 7


def test_smoothing_keeps_a_constant_and_the_mean():
    np.testing.assert_allclose(smooth(np.full(100, 3.0)), 3.0)
    values = np.arange(100.0)
    np.testing.assert_allclose(smooth(values)[10:90], values[10:90])
    assert smooth(np.array([1.0, 5.0])).tolist() == [1.0, 5.0]


if __name__ == "__main__":
    main(*sys.argv[1:])
