"""The training loop: it learns, resumes bit for bit, survives Ctrl-C, and refuses clearly."""

import json
import os
import signal

import numpy as np
import pytest
import torch
import transformers

from bertkern.data import MaskingSettings, PretrainingData, split_documents, train_tokenizer
from bertkern.data.pretraining import Epoch
from bertkern.models import BertConfig, BertForPreTraining, fill_mask
from bertkern.train import (
    History,
    PretrainingSettings,
    TrainingInterrupted,
    evaluate,
    pretrain_from_text,
    steps_in,
)
from bertkern.train.evaluation import unigram_loss
from bertkern.train.pretraining import CHECKPOINT, make_optimizer

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
    return pretrain_from_text(documents, out, **{**arguments, "settings": settings, **changes})


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
    assert [e.step for e in history.held_out] == [0, 3, 6, 8]
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
    resumed = pretrain_from_text(documents, tmp_path, resume=True, progress=False)
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
    again = pretrain_from_text(documents, tmp_path, resume=True, progress=False)
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


def test_refusals(documents, finished, tmp_path):
    with pytest.raises(FileExistsError, match="resume that run, choose another folder"):
        run(documents, finished.out)
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"model.safetensors exists"):
        run(documents, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        run(documents, tmp_path, resume=True)
    with pytest.raises(ValueError, match="other settings: steps = 8, not 9"):
        run(documents, finished.out, resume=True, settings={"steps": 9})
    with pytest.raises(ValueError, match="checkpoint of another run: other data"):
        run(documents[:-1], finished.out, resume=True)
    with pytest.raises(ValueError, match="max_length = 64 exceeds max_position_embeddings = 32"):
        run(documents, tmp_path, settings={"masking": MaskingSettings(max_length=64)})
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        PretrainingSettings(steps=0)
    with pytest.raises(ValueError, match="tokens_per_batch = 100 is less than max_length = 128"):
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


def test_no_decay_on_biases_and_layer_norms():
    model = BertForPreTraining(BertConfig(vocab_size=50, **SIZES))
    decayed, plain = make_optimizer(model, PretrainingSettings()).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert all("norm" in names[id(p)] or "bias" in names[id(p)] for p in plain["params"])
    assert all(names[id(p)].endswith("weight") for p in decayed["params"])
    assert not any("norm" in names[id(p)] for p in decayed["params"])
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert decayed["betas"] == (0.9, 0.999)
    assert decayed["eps"] == 1e-6


@pytest.fixture(scope="module")
def held_out(documents):
    train, rest = split_documents(documents, 0.2)
    tokenizer = train_tokenizer([s for d in train for s in d], 80)
    masking = MaskingSettings(max_length=32)
    return PretrainingData(train, tokenizer, masking), PretrainingData(rest, tokenizer, masking)


def test_evaluation_is_what_transformers_computes(held_out, tmp_path):
    """Loss and accuracies, recomputed from transformers' logits of one padded batch per example."""
    _, data = held_out
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(vocab_size=data.vocab_size, **SIZES)).train()
    got = evaluate(model, data, 256)
    assert model.training
    model.save_pretrained(tmp_path)
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path).eval()
    examples: Epoch = data.epoch(0)
    losses, right, right_pairs = [], [], []
    for e in range(len(examples)):
        part = slice(examples.starts[e], examples.starts[e + 1])
        places = np.flatnonzero(examples.masked[part])
        with torch.no_grad():
            output = theirs(
                torch.from_numpy(examples.input_ids[part])[None],
                token_type_ids=torch.from_numpy(examples.token_type_ids[part])[None],
            )
        targets = torch.from_numpy(examples.original_ids[part][places])
        log_p = output.prediction_logits[0, places].log_softmax(1)
        losses += (-log_p[torch.arange(len(targets)), targets]).tolist()
        right += (log_p.argmax(1) == targets).tolist()
        label = examples.next_sentence_label[e]
        right_pairs.append(output.seq_relationship_logits[0].argmax() == label)
    assert got.predictions == len(losses)
    assert got.pairs == len(examples)
    assert got.mlm_loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert got.mlm_accuracy == pytest.approx(np.mean(right))
    assert got.nsp_accuracy == pytest.approx(np.mean(right_pairs))


def test_unigram_baseline(held_out):
    """By its definition, in plain Python."""
    train, data = held_out
    counts = [1] * train.vocab_size
    for document in train.documents:
        for sentence in document:
            for token in sentence:
                counts[token] += 1
    examples = data.epoch(0)
    p = np.array(counts) / sum(counts)
    expected = -np.log(p[examples.original_ids[examples.masked]]).mean()
    assert unigram_loss(train, data, 256) == pytest.approx(expected, rel=1e-12)


def test_it_learns(tmp_path):
    """Text that repeats a word: the held-out loss falls far below the unigram baseline."""
    documents = [[f"v{i % 12} " * 6 for _ in range(12)] for i in range(36)]
    config = BertConfig(
        **{**SIZES, "hidden_size": 32}, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    settings = {"steps": 150, "tokens_per_batch": 512, "learning_rate": 1e-2}
    result = run(documents, tmp_path, config=config, vocab_size=60, settings=settings)
    first, last = result.history.held_out[0], result.history.held_out[-1]
    assert first.mlm_loss > 0.9 * result.history.unigram_loss
    assert last.mlm_loss < 0.2 * result.history.unigram_loss
    (best,) = fill_mask(result.model, result.tokenizer, "v6 v6 v6 [MASK] v6 v6")
    assert best[0][0] == "v6"
    assert len(best) == 5
    assert best == sorted(best, key=lambda entry: -entry[1])
    with pytest.raises(ValueError, match=r"no \[MASK\]"):
        fill_mask(result.model, result.tokenizer, "v3")


def test_steps_in():
    settings = PretrainingSettings(**SETTINGS)
    config = BertConfig(vocab_size=50, **SIZES)
    few, many = steps_in(0.0, config, settings), steps_in(60.0, config, settings)
    assert few == 1
    assert many > 60
