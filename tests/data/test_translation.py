"""Batches of sentence pairs: every pair once, packed as the Transformer takes them."""

from itertools import chain

import numpy as np
import pytest
import torch

from bertkern.data.parallel_text import Pair
from bertkern.data.tokenizer import train_tokenizer
from bertkern.data.translation import TranslationData
from bertkern.models.transformer import Transformer
from bertkern.models.transformer_config import TransformerConfig

CLS, SEP = 2, 3


@pytest.fixture(scope="module")
def pairs():
    """70 pairs of 1 to 12 and 1 to 9 words of two letters."""
    rng = np.random.default_rng(0)

    def text(most):
        return " ".join(
            "".join(rng.choice(list("abcdef"), 2)) for _ in range(rng.integers(1, most))
        )

    return [Pair(text(13), text(10), f"line {i}") for i in range(70)]


@pytest.fixture(scope="module")
def tokenizer(pairs):
    texts = [text for pair in pairs for text in (pair.source, pair.target)]
    return train_tokenizer(texts, 300, kind="bpe", lowercase=False)


@pytest.fixture(scope="module")
def data(pairs, tokenizer):
    return TranslationData(pairs, tokenizer, seed=5)


def pieces(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_a_part_holds_its_pairs(data, pairs, tokenizer):
    for batch in data.batches(0, 120):
        for first, last in ((0, len(batch)), (0, 1), (1, len(batch))):
            part = batch.part(first, last)
            arguments = part.arguments()
            chosen = [pairs[i] for i in batch.examples[first:last]]
            sources = [[*pieces(tokenizer, pair.source), SEP] for pair in chosen]
            targets = [pieces(tokenizer, pair.target) for pair in chosen]
            assert arguments.pop("source_ids").tolist() == list(chain(*sources))
            assert arguments.pop("target_ids").tolist() == list(
                chain(*([CLS, *t] for t in targets))
            )
            assert arguments.pop("labels").tolist() == list(chain(*([*t, SEP] for t in targets)))
            for side, ids in (("source", sources), ("target", [[CLS, *t] for t in targets])):
                cu_seqlens = arguments.pop(f"{side}_cu_seqlens")
                assert cu_seqlens.dtype == torch.int32
                assert cu_seqlens.tolist() == [0, *np.cumsum([len(i) for i in ids])]
            # of the whole batch, of which dropout is a function
            assert arguments.pop("source_max_seqlen") == batch.source_lengths.max()
            assert arguments.pop("target_max_seqlen") == batch.target_lengths.max()
            assert arguments.pop("sequence_offset") == first
            assert not arguments
            assert part.targets == sum(len(t) + 1 for t in targets)
            assert part.tokens == part.targets + sum(map(len, sources))
            assert part.sequences == last - first


def test_an_epoch_has_every_pair_once_within_the_budget(data):
    batches = list(data.batches(0, 120))
    assert sorted(chain(*(b.examples.tolist() for b in batches))) == list(range(70))
    for batch in batches:
        assert batch.lengths.tolist() == data.lengths[batch.examples].tolist()
        assert batch.lengths.sum() <= 120
    assert np.mean([b.lengths.sum() for b in batches]) > 90
    assert [len(b) for b in data.batches(0, 2)] == [1] * 70  # none fits: each is one by itself
    with pytest.raises(ValueError, match="tokens_per_batch must be at least 1, not 0"):
        next(data.batches(0, 0))


def test_pairs_of_like_length_come_together(data):
    spread = [b.lengths.std() for b in data.batches(0, 120)]
    assert np.mean(spread) < 0.6 * data.lengths.std()
    longest = [b.lengths.max() for b in data.batches(0, 120)]
    assert longest != sorted(longest)  # but not from short to long


def test_the_order_is_of_seed_and_epoch_and_goes_on_anywhere(data, pairs, tokenizer):
    def order(epoch, start=0, of=data):
        return [b.examples.tolist() for b in of.batches(epoch, 120, start)]

    again = TranslationData(pairs, tokenizer, seed=5)
    assert order(0) == order(0, of=again)
    assert order(0) != order(1)
    assert order(0) != order(0, of=TranslationData(pairs, tokenizer, seed=6))
    assert {tuple(sorted(b)) for b in order(0)} != {tuple(sorted(b)) for b in order(1)}
    for start in (1, 5, len(order(1))):
        assert order(1, start) == order(1)[start:]


def test_long_pairs_are_left_out_and_counted(pairs, tokenizer):
    lengths = [
        (len(pieces(tokenizer, p.source)) + 1, len(pieces(tokenizer, p.target)) + 1) for p in pairs
    ]
    most = 10
    kept = [pair for pair, both in zip(pairs, lengths, strict=True) if max(both) <= most]
    data = TranslationData(pairs, tokenizer, max_length=most)
    assert 0 < len(kept) < len(pairs)
    assert (data.pairs, len(data), data.left_out) == (kept, len(kept), len(pairs) - len(kept))
    assert max(data.source_lengths.max(), data.target_lengths.max()) == most
    none = TranslationData([], tokenizer)
    assert (len(none), none.left_out, list(none.batches(0, 100))) == (0, 0, [])
    with pytest.raises(ValueError, match="max_length must be at least 2, not 1"):
        TranslationData(pairs, tokenizer, max_length=1)
    with pytest.raises(ValueError, match="seed must be at least 0, not -1"):
        TranslationData(pairs, tokenizer, seed=-1)


def test_the_fingerprint_is_of_the_ids(data, pairs, tokenizer):
    assert TranslationData(pairs, tokenizer, seed=9).fingerprint == data.fingerprint
    other = [Pair(pairs[0].target, pairs[0].source, ""), *pairs[1:]]
    assert TranslationData(other, tokenizer).fingerprint != data.fingerprint
    larger = train_tokenizer(["aa bb cc dd"], 280, kind="bpe", lowercase=False, min_frequency=1)
    assert TranslationData(pairs, larger).fingerprint != data.fingerprint


def test_parts_have_the_loss_of_the_batch_dropout_included(data, tokenizer):
    """Two processes that share a batch compute what one would."""
    config = TransformerConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        dropout=0.3,
    )
    torch.manual_seed(0)
    model = Transformer(config).train()
    batch = next(data.batches(0, 120))
    middle = len(batch) // 2

    def total(first, last):
        part = batch.part(first, last)
        torch.manual_seed(1)  # the same dropout seeds
        return model(**part.arguments()).loss.item() * part.targets

    whole = total(0, len(batch))
    assert middle > 0
    assert total(0, middle) + total(middle, len(batch)) == pytest.approx(whole, rel=1e-5)
