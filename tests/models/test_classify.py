"""Classify against transformers' text-classification pipeline."""

import itertools

import pytest
import torch
import transformers

from bertkern import ops
from bertkern.data import save_tokenizer, train_tokenizer
from bertkern.models import BertConfig, BertForSequenceClassification, Classify, InputError
from bertkern.ops import _backend

WORDS = [f"w{i}" for i in range(30)]
POSITIONS = 24
PROBLEMS = {
    "single": {"id2label": {0: "bad", 1: "so so", 2: "good"}},
    "multi": {
        "id2label": {0: "x", 1: "y", 2: "z"},
        "problem_type": "multi_label_classification",
    },
    "regression": {"id2label": {0: "stars"}, "problem_type": "regression"},
    "one output": {"id2label": {0: "right"}},
}


def save_model(folder, **entries):
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, 200, min_frequency=1)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        **entries,
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module", params=PROBLEMS)
def folder(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), **PROBLEMS[request.param])


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(1)

    def text(most):
        length = int(torch.randint(1, most, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(30, (length,), generator=generator))

    singles = [text(16) for _ in range(30)]
    pairs = [(text(9), text(9)) for _ in range(30)]
    return [t for both in zip(singles, pairs, strict=True) for t in both] + ["", ("", "w1"), "\0 ☃"]


def pipeline(folder):
    transformers.logging.set_verbosity_error()
    return transformers.pipeline("text-classification", model=str(folder), top_k=None)


def test_agrees_with_the_pipeline(folder, texts):
    found = Classify.from_pretrained(folder)(texts)
    theirs = pipeline(folder)
    for text, ours in zip(texts, found, strict=True):
        given = {"text": text} if isinstance(text, str) else {"text": text[0], "text_pair": text[1]}
        expected = {entry["label"]: entry["score"] for entry in theirs(given)}
        assert ours.scores == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert list(ours.scores) == list(theirs.model.config.id2label.values())
        assert not ours.truncated


def test_labels(tmp_path, texts):
    single = Classify.from_pretrained(save_model(tmp_path / "s", **PROBLEMS["single"]))
    for result in single(texts):
        assert result.labels == (max(result.scores, key=result.scores.get),)
        assert sum(result.scores.values()) == pytest.approx(1, abs=1e-5)
    multi = Classify.from_pretrained(save_model(tmp_path / "m", **PROBLEMS["multi"]))
    results = multi(texts)
    for result in results:
        assert set(result.labels) == {k for k, p in result.scores.items() if p >= 0.5}
        ranks = [result.scores[label] for label in result.labels]
        assert ranks == sorted(ranks, reverse=True)
    assert {len(result.labels) for result in results} > {1}
    regression = Classify.from_pretrained(save_model(tmp_path / "r", **PROBLEMS["regression"]))
    assert {result.labels for result in regression(texts)} == {()}


def test_neighbours_batches_and_windows_do_not_matter(folder, texts):
    """To float32 rounding: on the CPU the products are torch's (docs/numerics.md)."""
    classifier = Classify.from_pretrained(folder)
    whole = classifier(texts)
    for batch_size, window in ((1, 1), (7, 10), (64, 1000)):
        found = list(classifier.stream(iter(texts), batch_size, window))
        for ours, theirs in zip(found, whole, strict=True):
            assert ours.scores == pytest.approx(theirs.scores, rel=1e-4, abs=1e-5)


def test_long_texts_are_cut_as_the_tokenizer_cuts(folder):
    classifier = Classify.from_pretrained(folder)
    long = [" ".join(WORDS), ("w1 w2", " ".join(WORDS)), (" ".join(WORDS), " ".join(WORDS[::-1]))]
    theirs = pipeline(folder)
    for text, ours in zip(long, classifier(long), strict=True):
        assert ours.truncated
        first, second = (text, None) if isinstance(text, str) else text
        expected = theirs(
            {"text": first, "text_pair": second}, truncation=True, max_length=POSITIONS
        )
        scores = {entry["label"]: entry["score"] for entry in expected}
        assert ours.scores == pytest.approx(scores, rel=1e-4, abs=1e-6)


def test_reads_no_further_than_its_window(folder):
    read = itertools.count(1)
    stream = Classify.from_pretrained(folder).stream((f"w{i % 30}" for i in read), window=8)
    for _ in range(3):
        next(stream)
    assert next(read) == 9


def test_wrong_arguments(folder):
    classifier = Classify.from_pretrained(folder)
    with pytest.raises(TypeError, match="not one string"):
        classifier("w1")
    with pytest.raises(TypeError, match="input 1: texts must be strings, not NoneType"):
        classifier(["w1", ("w2", None)])
    with pytest.raises(InputError, match=r"input 1: .*surrogate"):
        classifier(["w1", "\ud800"])
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        classifier(["w1"], batch_size=0)
    with pytest.raises(ValueError, match=rf"max_length must be in 3..{POSITIONS}"):
        Classify(classifier.model, classifier.tokenizer, max_length=POSITIONS + 1)


def test_bit_for_bit_where_the_products_are_this_librarys(tmp_path):
    """For the longest text, which is the first of its batch: in the interpreter's matrix product
    (numpy) a row's bits depend on its place in the tile. On a GPU they do not."""
    if (reason := _backend.unusable("triton", "cpu")) is not None:
        pytest.skip(reason)
    classifier = Classify.from_pretrained(save_model(tmp_path, **PROBLEMS["single"]))
    texts = ["w1 w2", ("w3 w4", "w5 w6 w7"), "w8"]
    with ops.backend("triton"):
        assert classifier(texts[1:2])[0] == classifier(texts)[1]
