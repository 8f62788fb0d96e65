"""Translation: what it learns, what it is measured by, and that nothing changes a run."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import bertkern
from bertkern.data import Pair, TranslationData
from bertkern.data.tokenizer import SpecialIds, train_tokenizer
from bertkern.models import Transformer, TransformerConfig, Translate, WordVectors
from bertkern.train import (
    TrainingInterrupted,
    TranslationSettings,
    TranslationTask,
    noam_peak,
    train_translation,
    translation,
)
from bertkern.train.translation_scores import bleu_interval, translation_scores

TINY = TransformerConfig(
    hidden_size=16, num_layers=1, num_attention_heads=2, intermediate_size=32, dropout=0.1
)
SETTINGS = TranslationSettings(
    steps=8,
    learning_rate=0.01,
    warmup_steps=3,
    tokens_per_batch=220,
    evaluate_every=4,
    checkpoint_every=2,
    average=2,
    evaluation_pairs=5,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These products are too small for threads, which on a busy machine wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def letters(count, seed, reverse=False):
    """Pairs of random letters, two to six, and the same copied or reversed."""
    random = np.random.default_rng(seed)
    pairs = []
    for number in range(count):
        word = random.choice(list("abcdefgh"), size=random.integers(2, 7)).tolist()
        answer = word[::-1] if reverse else word
        pairs.append(Pair(" ".join(word), " ".join(answer), f"pair {number}"))
    return pairs


VOCAB_SIZE = 269  # five special tokens, 256 bytes, and the eight letters with a space before them
STEPS_TO_LEARN = {False: 240, True: 360}  # copying, reversing
TRAIN, HELD_OUT = letters(60, 1), letters(12, 2)


def run(out, **changes):
    """The result of a short run with SETTINGS but for the changes."""
    keep = {k: changes.pop(k) for k in ("resume", "overwrite", "on_step") if k in changes}
    arguments = {"config": TINY, "vocab_size": VOCAB_SIZE, **changes.pop("arguments", {})}
    settings = changes.pop("settings", SETTINGS)
    if changes:
        settings = dataclasses.replace(SETTINGS, **changes)
    return train_translation(
        TRAIN, HELD_OUT, out, settings=settings, progress=False, **arguments, **keep
    )


def stop_at(step):
    def stop(record):
        if record.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("reverse", [False, True], ids=["copy", "reverse"])
def test_copying_and_reversing_is_learned(tmp_path, reverse):
    """More than 99 % of held-out sequences exactly; none of them was trained on."""
    train = letters(8000, 3, reverse)
    known = {pair.source for pair in train}
    test = [pair for pair in letters(900, 4, reverse) if pair.source not in known][:400]
    assert len(test) == 400
    steps = STEPS_TO_LEARN[reverse]
    settings = TranslationSettings(
        steps=steps,
        learning_rate=5e-3,
        schedule="linear",
        warmup_steps=steps // 5,
        tokens_per_batch=800,
        evaluate_every=steps,
        checkpoint_every=20,
        average=2,
        evaluation_pairs=20,
    )
    config = TransformerConfig(
        hidden_size=64,
        num_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        dropout=0.0,
        label_smoothing=0.0,
        prenorm=True,
    )
    result = train_translation(
        train, test, tmp_path, config=config, vocab_size=290, settings=settings, progress=False
    )
    translated = Translate(result.model, result.tokenizer)([p.source for p in test], beam_size=1)
    right = [t.text == pair.target for t, pair in zip(translated, test, strict=True)]
    assert np.mean(right) > 0.99


def test_the_folder_is_what_translate_reads(whole):
    assert {path.name for path in whole.out.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("history.json", "curves.png", "checkpoint.safetensors"),
    }
    texts = [pair.source for pair in HELD_OUT]
    read = Translate.from_pretrained(whole.out)(texts)
    assert read == Translate(whole.model, whole.tokenizer)(texts)
    assert json.loads((whole.out / "history.json").read_text()) == whole.history.to_dict()
    config, special = whole.model.config, SpecialIds.of(whole.tokenizer)
    assert config.vocab_size == whole.tokenizer.get_vocab_size() == VOCAB_SIZE
    assert (config.bos_token_id, config.eos_token_id) == (special.cls, special.sep)


def test_the_vocabulary_is_of_the_training_pairs_alone(whole):
    texts = [text for pair in TRAIN for text in (pair.source, pair.target)]
    alone = train_tokenizer(texts, VOCAB_SIZE, lowercase=False, kind="bpe")
    assert whole.tokenizer.to_str() == alone.to_str()


def test_the_model_is_the_mean_of_the_last_checkpoints(tmp_path, whole, monkeypatch):
    """Whose files stand until the model does: a run that dies between is resumed as any other."""

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(translation, "save_model", die)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    files = [load_file(tmp_path / f"weights-{step}.safetensors") for step in (6, 8)]
    state = whole.model.state_dict()
    for name, value in state.items():
        mean = sum(f[name].double() for f in files) / 2
        assert value.equal(mean.float()), name
    resumed = run(tmp_path, resume=True)
    assert all(value.equal(state[name]) for name, value in resumed.model.state_dict().items())
    assert not resumed.finished_before
    assert resumed.history == whole.history
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in whole.out.iterdir()}


def test_a_finished_run_is_left_as_it_is(whole):
    before = {path: path.stat().st_mtime_ns for path in whole.out.iterdir()}
    again = run(whole.out, resume=True)
    assert again.finished_before
    assert again.history == whole.history
    state = whole.model.state_dict()
    assert all(value.equal(state[name]) for name, value in again.model.state_dict().items())
    assert {path: path.stat().st_mtime_ns for path in whole.out.iterdir()} == before


def test_the_first_losses_are_plain_torchs(tmp_path, whole):
    """Adam, Noam's rate, label smoothing, no clipping: written out once more."""
    settings = dataclasses.replace(SETTINGS, average=1)
    config = TINY.with_changes(dropout=0.0)
    found = run(tmp_path, settings=settings, arguments={"config": config}).history
    data = TranslationData(TRAIN, whole.tokenizer, 256, 0)
    torch.manual_seed(0)
    model = Transformer(config.with_changes(vocab_size=VOCAB_SIZE)).eval()
    adam = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9)
    epochs = (batch for epoch in range(9) for batch in data.batches(epoch, 220))
    for record, batch in zip(found.steps, epochs, strict=False):
        arguments = batch.part(0, len(batch)).arguments()
        labels = arguments.pop("labels")
        loss = F.cross_entropy(model(**arguments).logits, labels, label_smoothing=0.1)
        assert record.losses["translation"] == pytest.approx(loss.item(), rel=2e-5)
        adam.zero_grad()
        loss.backward()
        t = record.step
        rate = 0.01 * min(t / 3, math.sqrt(3 / t))
        assert record.learning_rate == pytest.approx(rate)
        adam.param_groups[0]["lr"] = rate
        adam.step()


def test_figures_by_hand(whole):
    """Cross-entropy without smoothing, accuracy, BLEU and chrF; and those of the baselines."""
    data = TranslationData(HELD_OUT, whole.tokenizer)
    losses, right = [], []
    for number in range(len(data)):
        arguments = (
            next(TranslationData([HELD_OUT[number]], whole.tokenizer).batches(0, 1))
            .part(0, 1)
            .arguments()
        )
        labels = arguments.pop("labels")
        with torch.no_grad():
            logits = whole.model(**arguments).logits
        losses += F.cross_entropy(logits, labels, reduction="none").tolist()
        right += (logits.argmax(1) == labels).tolist()
    figures = whole.history.evaluations[-1].figures
    assert figures["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert figures["accuracy"] == pytest.approx(np.mean(right))
    task = TranslationTask(whole.model.config, data, data, SETTINGS)
    judged = task.judged
    assert len(judged) == len(set(judged) & set(HELD_OUT)) == 5
    assert judged != HELD_OUT[:5]  # they are drawn: files often begin with one kind of text
    greedy = Translate(whole.model, whole.tokenizer)([p.source for p in judged], beam_size=1)
    references = [pair.target for pair in judged]
    scores = translation_scores([t.text for t in greedy], references)
    assert {name: figures[name] for name in scores} == scores
    baselines = whole.history.baselines
    copied = translation_scores([pair.source for pair in judged], references)
    assert copied == {"bleu": pytest.approx(100), "chrf": pytest.approx(100)}  # they are copies
    assert {name: baselines[name] for name in copied} == copied

    train = TranslationData(TRAIN, whole.tokenizer)
    counts = np.ones(VOCAB_SIZE)
    for batch in train.batches(0, 10**9):
        np.add.at(counts, batch.part(0, len(batch)).arguments()["labels"].numpy(), 1)
    log_p = np.log(counts / counts.sum())
    held_out = next(data.batches(0, 10**9)).part(0, len(data)).arguments()["labels"].numpy()
    assert baselines["loss"] == pytest.approx(-log_p[held_out].mean())
    assert baselines["accuracy"] == pytest.approx((held_out == counts.argmax()).mean())


@pytest.mark.parametrize("step", [1, 4, 7])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, whole, step):
    """Between checkpoints, at an evaluation, and between the two that are averaged."""
    with pytest.raises(TrainingInterrupted, match=f"interrupted after step {step} of 8"):
        run(tmp_path, on_step=stop_at(step))
    resumed = run(tmp_path, resume=True, settings=None)
    assert resumed.history == whole.history
    expected = whole.model.state_dict()
    assert all(value.equal(expected[name]) for name, value in resumed.model.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [{"accumulate": 3}, {"gradient_checkpointing": True}],
    ids=["accumulate", "checkpointing"],
)
def test_a_step_does_not_depend_on_how_it_is_computed(tmp_path, whole, changes):
    result = run(tmp_path, **changes)
    expected = [record.loss for record in whole.history.steps]
    np.testing.assert_allclose([r.loss for r in result.history.steps], expected, rtol=2e-4)


def test_word_vectors_start_the_embedding(tmp_path, whole, monkeypatch):
    """Tokens that are words of the vectors begin as these."""
    begun = []
    monkeypatch.setattr(
        "bertkern.train.translation.train",
        lambda model, *_, **__: begun.append(model.embedding.weight.detach().clone()) or 1 / 0,
    )
    vectors = WordVectors(["a", "b"], np.eye(2, 16, dtype=np.float32))
    for options in ({}, {"start_vectors": vectors}):
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, arguments=options)
    plain, started = begun
    ids = [whole.tokenizer.token_to_id(f"Ġ{letter}") for letter in "ab"]
    a, b = F.normalize(started[ids], dim=1)
    assert a @ b == pytest.approx(0, abs=1e-6)
    a, b = F.normalize(plain[ids], dim=1)
    assert abs(a @ b) > 1e-3
    assert started.std().item() == pytest.approx(plain.std().item(), rel=0.05)


def test_scores_are_sacrebleus():
    """And the interval is that of its own resampling, to the error of a thousand samples."""
    sacrebleu = pytest.importorskip("sacrebleu")
    random = np.random.default_rng(0)
    references = [" ".join(random.choice(list("abcdefg"), size=12)) for _ in range(60)]
    found = [" ".join(w if random.random() < 0.8 else "x" for w in r.split()) for r in references]
    scores = translation_scores(found, references)
    metric = sacrebleu.metrics.BLEU()
    assert scores["bleu"] == metric.corpus_score(found, [references]).score
    low, high = bleu_interval(found, references)
    estimate = metric.corpus_score(found, [references], n_bootstrap=1000)
    assert low < scores["bleu"] < high
    assert (high - low) / 2 == pytest.approx(estimate._ci, rel=0.15)
    assert translation_scores(references, references)["bleu"] == pytest.approx(100)


def test_refusals(tmp_path, whole):
    with pytest.raises(ValueError, match="train_pairs is empty"):
        train_translation([], HELD_OUT, tmp_path)
    with pytest.raises(ValueError, match="held_out is empty"):
        train_translation(TRAIN, [], tmp_path)
    with pytest.raises(ValueError, match="no pair of train_pairs has at most max_length = 2"):
        run(tmp_path, max_length=2)
    strangers = WordVectors(["elephant"], np.ones((1, 16), dtype=np.float32))
    with pytest.raises(ValueError, match=r"start_vectors: none of their 1 words is a token"):
        run(tmp_path, arguments={"start_vectors": strangers})
    with pytest.raises(FileExistsError, match=r"checkpoint\.safetensors exists: resume that run"):
        run(whole.out)
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        run(tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"a run with --learning-rate = 0\.01, not 0\.02: repeat"):
        run(whole.out, resume=True, learning_rate=0.02)
    with pytest.raises(ValueError, match=r"a run with --hidden-size = 16, not 32: repeat"):
        run(whole.out, resume=True, arguments={"config": TINY.with_changes(hidden_size=32)})
    with pytest.raises(ValueError, match="a run with other training pairs: repeat"):
        train_translation(TRAIN[1:], HELD_OUT, whole.out, resume=True, progress=False)
    with pytest.raises(ValueError, match="a run with other held-out pairs: repeat"):
        train_translation(TRAIN, HELD_OUT[1:], whole.out, resume=True, progress=False)
    other = train_tokenizer(["another text"], VOCAB_SIZE, lowercase=False, kind="bpe")
    with pytest.raises(ValueError, match="a run with another tokenizer"):
        run(whole.out, resume=True, arguments={"tokenizer": other})
    with pytest.raises(ValueError, match="evaluation_pairs must be at least 1, not 0"):
        TranslationSettings(evaluation_pairs=0)


def test_defaults_are_the_papers():
    settings = TranslationSettings()
    for step in (1, 100, 4000, 90_000):
        rate = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
        assert settings.rate(step - 1) == pytest.approx(rate)
    assert (settings.betas, settings.eps, settings.weight_decay) == ((0.9, 0.98), 1e-9, 0.0)
    assert settings.max_gradient_norm is None
    assert settings.average == 5
    assert noam_peak(512, 4000) == pytest.approx(6.9877e-4, rel=1e-4)


def torchrun(folder, sharding):
    """Run this file as a program in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    tests, root = Path(__file__).resolve().parents[1], Path(bertkern.__file__).parents[1]
    path = os.pathsep.join([str(tests), str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command += [__file__, str(folder), sharding]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_equal_one(tmp_path, whole, sharding):
    """Losses and held-out figures, dropout included; and translations come in their pairs' order:
    there, sources are taken for the translations, which they are."""
    pytest.importorskip("accelerate")
    done = torchrun(tmp_path, sharding)
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((tmp_path / "history.json").read_text())
    expected = whole.history.to_dict()
    for found, record in zip(history["steps"], expected["steps"], strict=True):
        assert found["losses"]["translation"] == pytest.approx(
            record["losses"]["translation"], rel=2e-4
        )
    assert history["baselines"] == expected["baselines"]
    for found, evaluation in zip(history["evaluations"], expected["evaluations"], strict=True):
        figures = {**evaluation["figures"], "bleu": 100, "chrf": 100}
        assert found["figures"] == pytest.approx(figures, rel=1e-3)
    model = Transformer.from_pretrained(tmp_path).state_dict()
    for name, value in whole.model.state_dict().items():
        counts = torch.ones(len(value), dtype=torch.bool)
        # the bias of keys adds one number to all scores of a row: its gradient is 0 but for
        # rounding, which Adam brings to the size of its rate
        if name.endswith("qkv.bias"):
            counts[16:32] = False
        elif name.endswith("kv.bias"):
            counts[:16] = False
        torch.testing.assert_close(model[name][counts], value[counts], rtol=1e-3, atol=2e-4)


class Copies(Translate):
    """Translates, but gives the sources."""

    def __call__(self, texts, **options):
        found = super().__call__(texts, **options)
        return [dataclasses.replace(f, text=text) for f, text in zip(found, texts, strict=True)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    translation.Translate = Copies
    run(Path(sys.argv[1]), sharding=sys.argv[2])
    os._exit(0)  # gloo's threads abort an interpreter that ends in order, one time in ten
