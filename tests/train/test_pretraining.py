"""The training loop: it learns, resumes bit for bit, survives Ctrl-C, and refuses clearly."""

import json
import os
import signal

import numpy as np
import pytest
import torch
import transformers

from bertkern.data import (
    Corpus,
    MaskingSettings,
    PretrainingData,
    load_tokenizer,
    split_documents,
    train_tokenizer,
)
from bertkern.models import BertConfig, BertForPreTraining, FillMask
from bertkern.train import (
    History,
    PretrainingSettings,
    PretrainingTask,
    TrainingInterrupted,
    evaluate,
    pretrain,
)
from bertkern.train.evaluation import frequency_baselines
from bertkern.train.loop import CHECKPOINT

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
SETTINGS = {
    "steps": 8,
    "tokens_per_batch": 256,
    "evaluate_every": 3,
    "evaluation_tokens": 300,
    "checkpoint_every": 100,
    "masking": MaskingSettings(max_length=32),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These products are too small for threads, which on a busy machine wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(40)]
    frequency = 1 / np.arange(1, 41)
    frequency /= frequency.sum()
    return [
        [" ".join(rng.choice(words, rng.integers(2, 8), p=frequency)) for _ in range(12)]
        for _ in range(24)
    ]


def run(documents, out, **changes):
    arguments = {"config": BertConfig(**SIZES), "vocab_size": 80, "progress": False}
    settings = PretrainingSettings(**{**SETTINGS, **changes.pop("settings", {})})
    return pretrain(documents, out, **{**arguments, "settings": settings, **changes})


@pytest.fixture(scope="module")
def finished(documents, tmp_path_factory):
    return run(documents, tmp_path_factory.mktemp("finished"))


class StopAt:
    """Sends this process a signal in the step, as Ctrl-C does."""

    def __init__(self, step, number=signal.SIGINT):
        self.step, self.number = step, number

    def __call__(self, record):
        if record.step == self.step:
            os.kill(os.getpid(), self.number)


def test_history_and_files(finished):
    history = finished.history
    assert [s.step for s in history.steps] == list(range(1, 9))
    assert [e.step for e in history.evaluations] == [0, 3, 6, 8]
    assert all(np.isfinite(s.loss) for s in history.steps)
    stored = json.loads((finished.out / "history.json").read_text())
    assert History.from_dict(stored) == history
    model, report = transformers.BertForPreTraining.from_pretrained(
        finished.out, output_loading_info=True
    )
    assert not any(report.values())
    assert model.config.vocab_size == finished.tokenizer.get_vocab_size()
    words = transformers.AutoTokenizer.from_pretrained(finished.out)
    assert words("w1 w2")["input_ids"] == finished.tokenizer.encode("w1 w2").ids
    assert not [p for p in finished.out.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [2, 6])
def test_interrupted_and_resumed_is_uninterrupted(documents, finished, tmp_path, step, number):
    """Dropout is on; the run passes from one epoch to the next after the interruption."""
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        TrainingInterrupted, match=rf"after step {step} of 8: .*{CHECKPOINT}.*resume"
    ):
        run(documents, tmp_path, on_step=StopAt(step, number))
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "model.safetensors").exists()
    resumed = pretrain(documents, tmp_path, resume=True, progress=False)
    assert resumed.history == finished.history
    expected = finished.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_an_interruption_is_a_keyboard_interrupt():
    assert issubclass(TrainingInterrupted, KeyboardInterrupt)


def test_resuming_a_finished_run_changes_nothing(documents, finished, tmp_path):
    (tmp_path / CHECKPOINT).write_bytes((finished.out / CHECKPOINT).read_bytes())
    for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((finished.out / name).read_bytes())
    again = pretrain(documents, tmp_path, resume=True, progress=False)
    assert again.history == finished.history
    weights = [(f / "model.safetensors").read_bytes() for f in (tmp_path, finished.out)]
    assert weights[0] == weights[1]


def test_runs_repeat_and_leave_the_callers_random_numbers_alone(documents, finished, tmp_path):
    torch.manual_seed(123)
    expected = torch.rand(1)
    torch.manual_seed(123)
    again = run(documents, tmp_path)
    assert torch.equal(torch.rand(1), expected)
    assert again.history == finished.history
    other = run(documents, tmp_path, overwrite=True, settings={"seed": 1, "steps": 1})
    assert other.history.steps[0] != finished.history.steps[0]


def test_a_finished_run_is_left_as_it_is(documents, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.out.iterdir()}
    again = run(documents, finished.out, resume=True, on_step=StopAt(1))
    assert {path: path.stat().st_mtime_ns for path in finished.out.iterdir()} == before
    assert (again.finished_before, finished.finished_before) == (True, False)
    assert again.history == finished.history
    expected = finished.model.state_dict()
    assert all(v.equal(expected[name]) for name, v in again.model.state_dict().items())


def test_refusals(documents, finished, tmp_path):
    with pytest.raises(FileExistsError, match=r"resume that run \(--resume\)"):
        run(documents, finished.out)
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"model.safetensors exists"):
        run(documents, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        run(documents, tmp_path, resume=True)
    with pytest.raises(ValueError, match="a run with --steps = 8, not 9: repeat"):
        run(documents, finished.out, resume=True, settings={"steps": 9})
    with pytest.raises(ValueError, match="a run with other text: repeat"):
        run(documents[:-1], finished.out, resume=True)
    config = BertConfig(**{**SIZES, "hidden_size": 32})
    with pytest.raises(ValueError, match="--hidden-size = 16, not 32: repeat"):
        run(documents, finished.out, resume=True, config=config)
    with pytest.raises(ValueError, match="max_length = 64 exceeds max_position_embeddings = 32"):
        run(documents, tmp_path, settings={"masking": MaskingSettings(max_length=64)})
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        PretrainingSettings(steps=0)
    with pytest.raises(ValueError, match="tokens_per_batch = 100 is less than a sequence of 128"):
        PretrainingSettings(tokens_per_batch=100)
    for content in (b"", (finished.out / CHECKPOINT).read_bytes()[:1000]):
        (tmp_path / CHECKPOINT).write_bytes(content)
        (tmp_path / "tokenizer.json").write_bytes((finished.out / "tokenizer.json").read_bytes())
        with pytest.raises(ValueError, match="damaged, or not a training checkpoint"):
            run(documents, tmp_path, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(documents, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+ is not finite; a lower learning_rate"):
        run(documents, tmp_path, settings={"learning_rate": 1e30, "max_gradient_norm": 1e30})
    assert not (tmp_path / "model.safetensors").exists()


def test_learning_rate():
    settings = PretrainingSettings(steps=10, learning_rate=1.0, warmup_fraction=0.2)
    rates = [settings.rate(step) for step in range(10)]
    np.testing.assert_allclose(rates, [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert PretrainingSettings(steps=1, warmup_fraction=0.0).rate(0) > 0
    assert PretrainingSettings(steps=2, warmup_fraction=1.0).rate(1) > 0


@pytest.fixture(scope="module")
def held_out(documents):
    train, rest = split_documents(documents, 0.2)
    tokenizer = train_tokenizer([s for d in train for s in d], 80)
    masking = MaskingSettings(max_length=32)
    return [
        PretrainingData(Corpus.from_documents(part, tokenizer), tokenizer, masking)
        for part in (train, rest)
    ]


def examples_of(data):
    """Every example of epoch 0, alone."""
    for batch in data.batches(0, 256):
        for i in range(len(batch)):
            yield batch.part(i, i + 1)


def test_evaluation_is_what_transformers_computes(held_out, tmp_path):
    """Loss and accuracies, recomputed from transformers' logits of each example alone."""
    _, data = held_out
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(vocab_size=data.vocab_size, **SIZES)).train()
    got = evaluate(model, data, 256)
    assert model.training
    model.save_pretrained(tmp_path)
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path).eval()
    losses, right, right_pairs = [], [], []
    for example in examples_of(data):
        with torch.no_grad():
            output = theirs(example.input_ids[None], token_type_ids=example.token_type_ids[None])
        log_p = output.prediction_logits[0, example.label_tokens].log_softmax(1)
        losses += (-log_p[torch.arange(len(log_p)), example.labels]).tolist()
        right += (log_p.argmax(1) == example.labels).tolist()
        guess = output.seq_relationship_logits[0].argmax()
        right_pairs.append(bool(guess == example.next_sentence_label[0]))
    assert got["mlm_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert got["mlm_accuracy"] == pytest.approx(np.mean(right))
    assert got["nsp_accuracy"] == pytest.approx(np.mean(right_pairs))


def test_frequency_baselines(held_out, documents):
    """By their definitions, in plain Python, from the text itself."""
    train, data = held_out
    kept, _ = split_documents(documents, 0.2)
    tokenizer = train_tokenizer([s for d in kept for s in d], 80)
    counts = [1] * train.vocab_size
    for document in kept:
        for sentence in document:
            for token in tokenizer.encode(sentence, add_special_tokens=False).ids:
                counts[token] += 1
    p = np.array(counts) / sum(counts)
    examples = list(examples_of(data))
    targets = np.concatenate([example.labels.numpy() for example in examples])
    pairs = np.array([int(example.next_sentence_label[0]) for example in examples])
    got = frequency_baselines(train, data, 256)
    assert got["mlm_loss"] == pytest.approx(-np.log(p[targets]).mean(), rel=1e-12)
    assert got["mlm_accuracy"] == pytest.approx((targets == p.argmax()).mean())
    assert got["nsp_accuracy"] == pytest.approx(max(pairs.mean(), 1 - pairs.mean()))


def test_it_learns(tmp_path):
    """Text that repeats a word: the held-out loss falls far below the unigram baseline."""
    documents = [[f"v{i % 12} " * 6 for _ in range(12)] for i in range(36)]
    config = BertConfig(
        **{**SIZES, "hidden_size": 32}, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    settings = {"steps": 150, "tokens_per_batch": 512, "learning_rate": 1e-2}
    result = run(documents, tmp_path, config=config, vocab_size=60, settings=settings)
    first, last = (result.history.evaluations[i].figures["mlm_loss"] for i in (0, -1))
    assert first > 0.9 * result.history.baselines["mlm_loss"]
    assert last < 0.2 * result.history.baselines["mlm_loss"]
    (best,) = FillMask(result.model, result.tokenizer)(["v6 v6 v6 [MASK] v6 v6"])[0].masks
    assert best[0].token == "v6"


LONG = {"long_length": 48, "long_fraction": 0.5, "tokens_per_batch": 128}
LONG_SIZES = BertConfig(**{**SIZES, "max_position_embeddings": 48})


def test_short_sequences_then_long_ones(held_out):
    train, rest = held_out
    settings = PretrainingSettings(**{**SETTINGS, **LONG, "steps": 40})
    task = PretrainingTask(LONG_SIZES, train, rest, settings)
    longest, epoch, step = [], 0, 0
    while step < settings.steps:
        lengths = [int(batch.lengths.max()) for batch in task.batches(epoch, 0, step)]
        longest += lengths
        epoch, step = epoch + 1, step + len(lengths)
    assert settings.short_steps == 20
    assert max(longest[:20]) == 32
    assert max(longest[20:40]) == 48


@pytest.mark.parametrize("step", [3, 4, 5])
def test_resumed_around_the_change_of_length(documents, tmp_path, step):
    changes = {"config": LONG_SIZES, "settings": LONG}
    whole = run(documents, tmp_path / "whole", **changes)
    with pytest.raises(TrainingInterrupted):
        run(documents, tmp_path / "parts", on_step=StopAt(step), **changes)
    resumed = pretrain(documents, tmp_path / "parts", resume=True, progress=False)
    assert resumed.history == whole.history
    expected = whole.model.state_dict()
    assert all(v.equal(expected[name]) for name, v in resumed.model.state_dict().items())


def test_a_corpus_on_disk_and_workers_give_the_same_run(documents, finished, tmp_path):
    tokenizer = load_tokenizer(finished.out)
    corpus = Corpus.build(documents, tokenizer, tmp_path / "corpus")
    result = run(corpus, tmp_path / "out", tokenizer=tokenizer, workers=1)
    assert [s.losses for s in result.history.steps] == [s.losses for s in finished.history.steps]
    assert result.history.evaluations == finished.history.evaluations
    with pytest.raises(ValueError, match="a Corpus needs the tokenizer"):
        run(corpus, tmp_path / "other")


def test_the_weights_to_begin_with_are_not_removed(documents, finished):
    before = (finished.out / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds the weights to begin with: choose another folder"):
        run(documents, finished.out, start=finished.out, config=None, overwrite=True)
    assert (finished.out / "model.safetensors").read_bytes() == before


def test_going_on_from_other_weights(documents, finished, tmp_path):
    result = run(documents, tmp_path, start=finished.out, config=None, settings={"steps": 1})
    before = finished.history.evaluations[-1].figures["mlm_loss"]
    assert result.history.evaluations[0].figures["mlm_loss"] == pytest.approx(before, rel=1e-6)
    assert result.tokenizer.get_vocab() == finished.tokenizer.get_vocab()
