"""Batches of examples: every one once, packed, with the labels of their own."""

from itertools import chain

import numpy as np
import pytest
import tokenizers
import torch

from bertkern.data.features import Features, TokenSequence, kept_of_pair


@pytest.fixture
def features():
    """17 examples of 2 sequences; a token is its sequence's number, a token label its place."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 12, 34)
    total = int(lengths.sum())
    return Features.of(
        (TokenSequence([r] * n, [r % 2] * n) for r, n in enumerate(lengths)),
        choices=2,
        example_labels={"labels": np.arange(17)},
        token_labels={"marks": np.arange(total)},
    )


def test_parts_hold_their_examples(features):
    (batch,) = features.batches(0, 100, seed=3)
    assert sorted(batch.examples) == list(range(17))
    assert not np.array_equal(batch.examples, np.arange(17))
    assert batch.lengths.sum() == len(features.input_ids)
    for first, last in ((0, 17), (0, 5), (5, 6), (6, 17)):
        part = batch.part(first, last)
        arguments = part.arguments()
        chosen = batch.examples[first:last]
        rows = [r for e in chosen for r in (2 * e, 2 * e + 1)]
        lengths = np.diff(features.starts)[rows]
        expected = np.repeat(rows, lengths)
        assert arguments["input_ids"].tolist() == expected.tolist()
        assert arguments["token_type_ids"].tolist() == (expected % 2).tolist()
        assert arguments["cu_seqlens"].dtype == torch.int32
        assert arguments["cu_seqlens"].tolist() == [0, *np.cumsum(lengths)]
        assert arguments["position_ids"].tolist() == [p for n in lengths for p in range(n)]
        assert arguments["labels"].tolist() == chosen.tolist()
        assert features.input_ids[arguments["marks"]].tolist() == expected.tolist()
        assert arguments["max_seqlen"] == np.diff(features.starts).max()  # of the whole batch
        assert arguments["sequence_offset"] == 2 * first
        assert arguments["num_choices"] == 2
        assert (part.tokens, part.sequences) == (lengths.sum(), last - first)


def test_an_epoch_has_every_example_once_in_an_order_of_its_own(features):
    def order(epoch, seed=1, **options):
        return [b.examples.tolist() for b in features.batches(epoch, 4, seed, **options)]

    assert [len(examples) for examples in order(0)] == [4, 4, 4, 4, 1]
    assert sorted(list(chain(*order(0)))) == list(range(17))
    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != order(0, seed=2)
    assert order(1, start=2) == order(1)[2:]
    assert list(chain(*order(0, shuffle=False))) == list(range(17))
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        next(features.batches(0, 0, 1))


def test_evaluation_takes_short_examples_first_within_the_budget(features):
    batches = list(features.evaluation_batches(20))
    lengths = np.concatenate([batch.lengths for batch in batches])
    assert sorted(np.concatenate([b.examples for b in batches])) == list(range(17))
    assert (np.diff(lengths) >= 0).all()
    assert all(b.lengths.sum() <= 20 or len(b) == 1 for b in batches)


def test_truncation_is_that_of_tokenizers():
    """`longest_first` of the engine, for all lengths of two texts."""
    words = [f"w{i}" for i in range(20)]
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])}
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for room in range(8, 13):
        engine.enable_truncation(room, strategy="longest_first")
        for a in range(1, 16):
            for b in range(1, 16):
                encoding = engine.encode(" ".join(words[:a]), " ".join(words[:b]))
                kept = [encoding.sequence_ids.count(side) for side in (0, 1)]
                assert kept == list(kept_of_pair(a, b, room)), (a, b, room)
