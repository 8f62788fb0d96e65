"""Pre-training examples: their statistics over more than 100,000 tokens, and their form."""

import numpy as np
import pytest
import torch

from bertkern.data import MaskingSettings, PretrainingData, train_tokenizer
from bertkern.data.pretraining import IS_NEXT

LENGTH = 60  # 15 % of it is a whole number


def documents_of_numbers(documents=60, sentences=60):
    """Sentence s of document d is "d-s" words, so that a token tells where it comes from."""
    rng = np.random.default_rng(0)
    return [
        [" ".join([f"d{d}", f"s{s}"] * int(rng.integers(1, 12))) for s in range(sentences)]
        for d in range(documents)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [s for d in documents_of_numbers() for s in d]
    return train_tokenizer(texts, 5000, min_frequency=1)


@pytest.fixture(scope="module")
def data(tokenizer):
    return PretrainingData(documents_of_numbers(), tokenizer, MaskingSettings(LENGTH), seed=1)


@pytest.fixture(scope="module")
def epochs(data):
    return [data.epoch(e) for e in range(4)]


def sigmas(observed, expected, count):
    return abs(observed - expected) / np.sqrt(expected * (1 - expected) / count)


def test_masked_tokens(data, epochs):
    tokens = sum(len(e.input_ids) for e in epochs)
    assert tokens > 100_000
    masked = np.concatenate([e.masked for e in epochs])
    before = np.concatenate([e.original_ids for e in epochs])[masked]
    after = np.concatenate([e.input_ids for e in epochs])[masked]
    # each sequence rounds 0.15 · length to a whole number, and all have one prediction at least
    assert masked.mean() == pytest.approx(0.15, abs=0.003)
    special = data.special
    is_mask = after == special.mask
    kept = after == before
    assert sigmas(is_mask.mean(), 0.8, len(after)) < 4
    by_chance = 0.1 / (data.vocab_size - 5)
    assert sigmas(kept.mean(), 0.1 + by_chance, len(after)) < 4
    replaced = after[~is_mask & ~kept]
    assert not np.isin(replaced, special.as_tuple()).any()
    assert len(np.unique(replaced)) > 0.5 * min(data.vocab_size, len(replaced))
    assert not np.isin(before, (special.cls, special.sep)).any()
    for e in epochs:
        assert (e.input_ids[~e.masked] == e.original_ids[~e.masked]).all()


def test_predictions_of_a_sequence(epochs):
    settings = MaskingSettings(LENGTH)
    for e in epochs:
        lengths = np.diff(e.starts)
        counts = np.add.reduceat(e.masked.astype(int), e.starts[:-1])
        expected = np.clip(np.rint(0.15 * lengths), 1, settings.prediction_limit)
        assert (counts == expected).all()
    assert MaskingSettings(128).prediction_limit == 20
    assert MaskingSettings(512).prediction_limit == 77


def test_masks_are_everywhere_alike(data, epochs):
    """The share of masked tokens does not depend on the place in the sequence."""
    ordinary = ~np.isin(epochs[0].original_ids, (data.special.cls, data.special.sep))
    first_half = np.concatenate([np.arange(n) < n / 2 for n in np.diff(epochs[0].starts)])
    rates = [epochs[0].masked[ordinary & half].mean() for half in (first_half, ~first_half)]
    assert abs(rates[0] - rates[1]) < 0.01


def words(tokenizer, ids):
    return tokenizer.decode([int(i) for i in ids]).split()


def test_pairs(data, tokenizer, epochs):
    labels = np.concatenate([e.next_sentence_label for e in epochs])
    assert sigmas((labels == IS_NEXT).mean(), 0.5, len(labels)) < 4
    e = epochs[0]
    for i in range(0, len(e), 7):
        ids = e.original_ids[e.starts[i] : e.starts[i + 1]]
        types = e.token_type_ids[e.starts[i] : e.starts[i + 1]]
        separators = np.flatnonzero(ids == data.special.sep)
        assert len(ids) <= LENGTH
        assert ids[0] == data.special.cls
        assert len(separators) == 2
        assert separators[1] == len(ids) - 1
        assert (types == (np.arange(len(ids)) > separators[0])).all()
        first = words(tokenizer, ids[1 : separators[0]])
        second = words(tokenizer, ids[separators[0] + 1 : -1])
        assert first
        assert second
        documents = [{w for w in part if w.startswith("d")} for part in (first, second)]
        if e.next_sentence_label[i] == IS_NEXT:
            assert len(documents[0] | documents[1]) == 1
            order = [int(w[1:]) for w in first + second if w.startswith("s")]
            assert order == sorted(order)
        elif documents[0] and documents[1]:
            assert not documents[0] & documents[1]


def test_short_sequences(tokenizer):
    lengths = {}
    for probability in (0.0, 0.1):
        settings = MaskingSettings(LENGTH, short_sequence_probability=probability)
        data = PretrainingData(documents_of_numbers(), tokenizer, settings)
        lengths[probability] = np.diff(data.epoch(0).starts)
    # half of the short ones aim below half; some of the others end early with their document
    share = [(lengths[p] < LENGTH / 2).mean() for p in (0.0, 0.1)]
    assert 0.02 < share[1] - share[0] < 0.12


def test_same_epoch_same_examples(data, epochs, tokenizer):
    again = PretrainingData(documents_of_numbers(), tokenizer, MaskingSettings(LENGTH), seed=1)
    for name in ("input_ids", "masked", "starts", "next_sentence_label"):
        assert np.array_equal(getattr(again.epoch(2), name), getattr(epochs[2], name)), name
    other_seed = PretrainingData(documents_of_numbers(), tokenizer, MaskingSettings(LENGTH), seed=2)
    for other in (epochs[3], other_seed.epoch(2)):
        assert not np.array_equal(other.input_ids, epochs[2].input_ids)


def test_packed_batches(data):
    e, batches = data.batches(0, 1000)
    assert sorted(np.concatenate(batches)) == list(range(len(e)))
    for examples in batches[:5]:
        batch = e.pack(examples)
        assert len(batch.input_ids) <= 1000
        assert batch.cu_seqlens.dtype == torch.int32
        lengths = batch.cu_seqlens.diff()
        assert int(batch.cu_seqlens[-1]) == len(batch.input_ids) == len(batch.token_type_ids)
        assert batch.max_seqlen == lengths.max()
        assert torch.equal(batch.position_ids, torch.cat([torch.arange(n) for n in lengths]))
        for b, example in enumerate(examples):
            mine = slice(batch.cu_seqlens[b], batch.cu_seqlens[b + 1])
            its = slice(e.starts[example], e.starts[example + 1])
            assert batch.input_ids[mine].tolist() == e.input_ids[its].tolist()
            places = batch.label_tokens[
                (batch.label_tokens >= mine.start) & (batch.label_tokens < mine.stop)
            ]
            assert (places - mine.start).tolist() == np.flatnonzero(e.masked[its]).tolist()
        restored = batch.input_ids.clone()
        restored[batch.label_tokens] = batch.labels
        assert restored[0] == data.special.cls
    filled = [len(e.pack(examples).input_ids) for examples in batches[:-1]]
    assert min(filled) > 1000 - LENGTH


def test_refusals(tokenizer, data):
    with pytest.raises(ValueError, match=r"1 document\(s\) with two or more sentences"):
        PretrainingData([["d1 s1", "d1 s2"], ["d2"], ["", "d3"]], tokenizer)
    with pytest.raises(ValueError, match="tokens_per_batch = 10 is less than max_length = 60"):
        data.batches(0, 10)
    with pytest.raises(ValueError, match="max_length must be at least 8, not 3"):
        MaskingSettings(max_length=3)
    with pytest.raises(ValueError, match=r"masked_fraction must be in 0..1, not 2"):
        MaskingSettings(masked_fraction=2)
