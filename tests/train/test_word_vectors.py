"""Training of word vectors: loss and gradients by hand, word2vec's update, and real text."""

import math
import os
import pydoc_data.topics
import random
import signal

import numpy as np
import pytest
import torch

from bertkern.data.skip_gram import SkipGrams, WordText
from bertkern.data.text import split_sentences
from bertkern.train import TrainingInterrupted
from bertkern.train.word_picture import draw_words, uncovered
from bertkern.train.word_vectors import (
    SkipGramTables,
    WordVectorSettings,
    epochs_for,
    skip_gram_gradients,
    train_word_vectors,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These products are too small for threads, which on a busy machine wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_hand(v, u, pairs):
    """(summed loss, gradient of v, of u) in plain Python, pair by pair, as the paper writes it."""
    dv, du = [[0.0] * len(row) for row in v], [[0.0] * len(row) for row in u]
    loss = 0.0
    for centre, (near, *drawn) in pairs:
        for word, label in [(near, 1), *((w, 0) for w in drawn if w != near)]:
            score = sum(a * b for a, b in zip(u[word], v[centre], strict=True))
            chance = 1 / (1 + math.exp(-score))
            loss -= math.log(chance if label else 1 - chance)
            for i in range(len(v[centre])):
                dv[centre][i] += (chance - label) * u[word][i]
                du[word][i] += (chance - label) * v[centre][i]
    return loss, dv, du


SAMPLE = [
    (0, [1, 2, 3]),
    (0, [2, 2, 0]),  # one drawn word is the near one
    (4, [1, 1, 1]),  # both are
    (3, [0, 4, 4]),  # one is drawn twice
    (0, [1, 5, 3]),
]


def tables_by_hand(rows=7, size=4):
    rng = random.Random(0)
    return ([[rng.gauss(0, 1) for _ in range(size)] for _ in range(rows)] for _ in range(2))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_loss_and_gradients_are_those_computed_by_hand(dtype, tolerance):
    v, u = tables_by_hand()
    loss, dv, du = by_hand(v, u, SAMPLE)
    found = skip_gram_gradients(
        torch.tensor(v, dtype=dtype),
        torch.tensor(u, dtype=dtype),
        torch.tensor([centre for centre, _ in SAMPLE]),
        torch.tensor([words for _, words in SAMPLE]),
    )
    assert float(found.loss) == pytest.approx(loss, rel=tolerance)
    for rows, gradient, expected in (
        (found.input_rows, found.input, dv),
        (found.output_rows, found.output, du),
    ):
        assert rows.tolist() == sorted(set(rows.tolist()))
        dense = torch.zeros(7, 4, dtype=dtype)
        dense[rows] = gradient
        assert dense.numpy() == pytest.approx(np.array(expected), abs=tolerance * 4)
    assert found.input_rows.tolist() == [0, 3, 4]
    assert found.output_rows.tolist() == [0, 1, 2, 3, 4, 5]


def test_gradients_are_those_of_autograd():
    generator = torch.Generator().manual_seed(0)
    v, u = (torch.randn(50, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    centres = torch.randint(0, 50, (200,), generator=generator)
    words = torch.randint(0, 50, (200, 6), generator=generator)
    found = skip_gram_gradients(v, u, centres, words)
    v, u = v.requires_grad_(), u.requires_grad_()
    scores = (u[words] * v[centres].unsqueeze(1)).sum(2)
    signs = torch.tensor([1.0, -1, -1, -1, -1, -1], dtype=torch.float64)
    losses = -torch.nn.functional.logsigmoid(signs * scores)
    again = words[:, 1:] == words[:, :1]
    loss = losses[:, 0].sum() + losses[:, 1:][~again].sum()
    loss.backward()
    assert float(found.loss) == pytest.approx(float(loss.detach()), rel=1e-12)
    for table, rows, gradient in (
        (v, found.input_rows, found.input),
        (u, found.output_rows, found.output),
    ):
        dense = torch.zeros_like(table).index_copy_(0, rows, gradient)
        assert torch.allclose(dense, table.grad, rtol=1e-10, atol=1e-12)


def word2vec_update(v, u, centre, words, rate):
    """The inner loop of word2vec's program, for a pair: g = (label - σ) · rate, in its order."""
    near, *drawn = words
    error = [0.0] * len(v[centre])
    for word, label in [(near, 1), *((w, 0) for w in drawn if w != near)]:
        score = sum(a * b for a, b in zip(v[centre], u[word], strict=True))
        g = (label - 1 / (1 + math.exp(-score))) * rate
        error = [e + g * x for e, x in zip(error, u[word], strict=True)]
        u[word] = [x + g * y for x, y in zip(u[word], v[centre], strict=True)]
    v[centre] = [x + e for x, e in zip(v[centre], error, strict=True)]


def test_a_step_of_sgd_is_word2vecs_update():
    """Also of several pairs at once, where no two share a row."""
    v, u = tables_by_hand(9)
    pairs = [(0, [1, 2, 3]), (5, [4, 0, 6])]
    settings = WordVectorSettings(size=4, negative=2, optimizer="sgd")
    tables = SkipGramTables(9, settings)
    tables.input.copy_(torch.tensor(v))
    tables.output.copy_(torch.tensor(u))
    tables.step(torch.tensor([0, 5]), torch.tensor([w for _, w in pairs]), 0.025)
    for centre, words in pairs:
        word2vec_update(v, u, centre, words, 0.025)
    assert tables.input.numpy() == pytest.approx(np.array(v), abs=1e-6)
    assert tables.output.numpy() == pytest.approx(np.array(u), abs=1e-6)


def test_steps_of_adagrad_are_torchs():
    settings = WordVectorSettings(size=6, optimizer="adagrad")
    tables = SkipGramTables(20, settings)
    v, u = (t.clone().requires_grad_() for t in (tables.input, tables.output))
    theirs = torch.optim.Adagrad([v, u], lr=0.1, eps=1e-30)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        centres = torch.randint(0, 20, (30,), generator=generator)
        words = torch.randint(0, 20, (30, 4), generator=generator)
        found = skip_gram_gradients(v.detach(), u.detach(), centres, words)
        v.grad = torch.zeros_like(v).index_copy_(0, found.input_rows, found.input)
        u.grad = torch.zeros_like(u).index_copy_(0, found.output_rows, found.output)
        theirs.step()
        tables.step(centres, words, 0.1)
    assert torch.allclose(tables.input, v, atol=1e-6)
    assert torch.allclose(tables.output, u, atol=1e-6)


@pytest.fixture(scope="module")
def topics(tmp_path_factory):
    """Python's help on its language, some 65,000 words, numbered."""
    documents = [split_sentences(topic) for topic in pydoc_data.topics.topics.values()]
    return WordText.build(lambda: documents, tmp_path_factory.mktemp("words") / "text")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A text of some chunks."""
    monkeypatch.setattr("bertkern.data.skip_gram._CHUNK", 200)
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(30)]
    documents = [[" ".join(rng.choice(words, 10)) for _ in range(20)] for _ in range(6)]
    return WordText.build(lambda: documents, tmp_path / "text", min_count=1)


RELATED = [
    ("string", "bytes"),
    ("integer", "float"),
    ("true", "false"),
    ("first", "last"),
    ("list", "tuple"),
    ("dictionary", "mapping"),
    ("returned", "raised"),
    ("sequence", "iterable"),
    ("class", "classes"),
    ("function", "method"),
    ("get", "set"),
    ("statement", "expression"),
]


def test_related_words_of_a_real_text_are_nearer_than_unrelated_ones(topics):
    """A short run."""
    result = train_word_vectors(topics, WordVectorSettings(size=32, epochs=8), progress=False)
    vectors = result.vectors
    assert vectors.words == topics.words
    assert result.losses == sorted(result.losses, reverse=True)
    assert result.losses[-1] < 0.8 * 6 * math.log(2)  # of vectors that know nothing
    assert result.words_per_second > 0
    related = [vectors.similarity(a, b) for a, b in RELATED]
    # every word with the partners of the others
    unrelated = [vectors.similarity(a, d) for a, b in RELATED for _, d in RELATED if d != b]
    wins = np.mean([one > np.quantile(unrelated, 0.75) for one in related])
    assert wins > 0.8
    assert np.mean(related) > np.mean(unrelated) + 0.15


def test_a_mean_loss_is_that_of_the_pairs(small):
    """With a rate that changes nothing, each epoch's loss is the mean by hand."""
    settings = WordVectorSettings(size=4, epochs=2, learning_rate=1e-20, optimizer="sgd", seed=5)
    result = train_word_vectors(small, settings, progress=False)
    examples = SkipGrams(small, 2, 5, 1e-3, seed=5)
    tables = SkipGramTables(len(small.words), settings)
    v, u = tables.input.tolist(), tables.output.tolist()
    for epoch, loss in enumerate(result.losses):
        pairs = [
            pair
            for chunk in range(examples.chunks)
            for found in [examples.pairs(epoch, chunk)]
            for pair in zip(found.centres.tolist(), found.words.tolist(), strict=True)
        ]
        assert loss == pytest.approx(by_hand(v, u, pairs)[0] / len(pairs), rel=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_interrupted_and_resumed_is_uninterrupted(small, tmp_path, optimizer):
    settings = WordVectorSettings(size=8, epochs=3, optimizer=optimizer, sample=0, seed=1)
    path = tmp_path / "checkpoint.safetensors"
    whole = train_word_vectors(small, settings, progress=False)
    chunks = SkipGrams(small).chunks * 3
    assert chunks > 15

    def stop(at):
        return lambda done: os.kill(os.getpid(), signal.SIGINT) if done == at else None

    with pytest.raises(TrainingInterrupted, match=rf"after step 4 of {chunks}: .*checkpoint.safet"):
        train_word_vectors(small, settings, checkpoint=path, progress=False, on_chunk=stop(4))
    more = {"checkpoint": path, "resume": True, "progress": False}
    with pytest.raises(TrainingInterrupted, match="after step 9 of"):
        train_word_vectors(small, settings, **more, on_chunk=stop(9))
    resumed = train_word_vectors(small, settings, **more)
    assert resumed.losses == whole.losses
    assert np.array_equal(resumed.vectors.vectors, whole.vectors.vectors)


def test_runs_differ_by_seed_and_not_by_threads(small):
    settings = {"size": 8, "epochs": 1, "sample": 0}
    one = train_word_vectors(small, WordVectorSettings(**settings), progress=False)
    torch.set_num_threads(2)
    two = train_word_vectors(small, WordVectorSettings(**settings), progress=False)
    torch.set_num_threads(1)
    assert np.array_equal(one.vectors.vectors, two.vectors.vectors)
    other = train_word_vectors(small, WordVectorSettings(**settings, seed=1), progress=False)
    assert not np.array_equal(one.vectors.vectors, other.vectors.vectors)


def test_other_runs_and_damage_are_refused(small, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    settings = WordVectorSettings(size=8, epochs=1)
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        train_word_vectors(small, settings, checkpoint=path, resume=True, progress=False)
    with pytest.raises(ValueError, match="resume=True needs the checkpoint"):
        train_word_vectors(small, settings, resume=True, progress=False)
    train_word_vectors(small, settings, checkpoint=path, progress=False)
    changed = WordVectorSettings(size=9, epochs=1, seed=1)
    with pytest.raises(ValueError, match=r"is of another run, with size 8, seed 0$"):
        train_word_vectors(small, changed, checkpoint=path, resume=True, progress=False)
    text = WordText.build(lambda: [["a b a b"]], tmp_path / "other", min_count=1)
    with pytest.raises(ValueError, match=r"is of another run, with another text$"):
        train_word_vectors(text, settings, checkpoint=path, resume=True, progress=False)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        train_word_vectors(small, settings, checkpoint=path, resume=True, progress=False)


def test_a_text_that_begins_without_pairs_is_learned_from(tmp_path):
    """The first pieces of it hold sentences of one word."""
    sentences = ["alone"] * 40_000 + ["a b c d"] * 100
    text = WordText.build(lambda: [sentences], tmp_path / "text", min_count=1)
    settings = WordVectorSettings(size=4, epochs=2, sample=0)
    result = train_word_vectors(text, settings, progress=False)
    # with nothing learned, a pair costs log 2 for each of its words
    assert 0 < result.losses[1] < result.losses[0] < 6 * math.log(2)


def test_a_text_without_pairs_is_refused(tmp_path):
    text = WordText.build(lambda: [["one", "two", "one"]], tmp_path / "text", min_count=1)
    with pytest.raises(ValueError, match="no two words that stay"):
        train_word_vectors(text, progress=False)


def test_a_run_that_goes_astray_says_so(small):
    settings = WordVectorSettings(size=8, epochs=1, optimizer="sgd", learning_rate=1e38)
    with pytest.raises(FloatingPointError, match=r"epoch 1 is not finite: a smaller learning_rate"):
        train_word_vectors(small, settings, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0}, "size must be 1 or more, not 0"),
        ({"epochs": 0}, "epochs must be 1 or more"),
        ({"sample": -1}, r"sample must be in 0..1, not -1"),
        ({"optimizer": "adam"}, "optimizer must be one of adagrad, sgd, not 'adam'"),
        ({"learning_rate": 0}, "learning_rate must be above 0, not 0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        WordVectorSettings(**changes)


def test_small_texts_are_read_more_often():
    assert [epochs_for(n) for n in (0, 1000, 200_000, 10**6, 10**9)] == [50, 50, 10, 5, 5]


def test_a_picture_of_words(small, tmp_path):
    pytest.importorskip("matplotlib")
    result = train_word_vectors(small, WordVectorSettings(size=8, epochs=1), progress=False)
    draw_words(result.vectors, small.words[:20], tmp_path / "words.png")
    content = (tmp_path / "words.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    draw_words(result.vectors, small.words[:20], tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == content


def test_labels_do_not_cover_one_another():
    points = np.array([[0.0, 0.0], [10.0, 2.0], [0.0, 20.0], [100.0, 1.0], [-3.0, -3.0]])
    assert uncovered(points, [5, 5, 5, 5, 2]) == [0, 2, 3]
