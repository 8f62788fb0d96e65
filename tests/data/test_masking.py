"""Masks: which tokens, what becomes of them, whole words; statistics over 200,000 tokens."""

import numpy as np
import pytest
from scipy import stats

from bertkern.data import MaskingSettings, train_tokenizer
from bertkern.data.masking import Masker
from bertkern.data.packing import cumulative_lengths
from bertkern.data.random_bits import derive
from bertkern.data.tokenizer import SpecialIds

LENGTH = 60
RARE = 1e-5  # of a p-value: numbers are drawn from fixed keys, so a test passes always or never


@pytest.fixture(scope="module")
def tokenizer():
    rng = np.random.default_rng(3)
    letters = np.array(list("abcdefghij"))
    words = ["".join(rng.choice(letters, rng.integers(1, 8))) for _ in range(400)]
    return train_tokenizer([" ".join(words)], 200, min_frequency=1)


def sequences(tokenizer, count, seed=0):
    """(ids, lengths, keys) of [CLS] ... [SEP] ... [SEP] with random ordinary tokens between."""
    rng = np.random.default_rng(seed)
    special = SpecialIds.of(tokenizer)
    ordinary = np.setdiff1d(np.arange(tokenizer.get_vocab_size()), special.as_tuple())
    ids = []
    for _ in range(count):
        a, b = (rng.choice(ordinary, rng.integers(1, LENGTH // 2 - 1)) for _ in range(2))
        ids.append(np.concatenate([[special.cls], a, [special.sep], b, [special.sep]]))
    lengths = np.array([len(i) for i in ids])
    return np.concatenate(ids), lengths, derive(seed, np.arange(count))


@pytest.fixture(scope="module", params=[False, True], ids=["tokens", "whole words"])
def masked(request, tokenizer):
    masker = Masker(tokenizer, MaskingSettings(LENGTH, whole_word=request.param))
    original, lengths, keys = sequences(tokenizer, 8000)
    assert len(original) > 200_000
    after, chosen = masker.mask(original, lengths, keys)
    return masker, original, lengths, keys, after, chosen


def test_what_becomes_of_chosen_tokens(masked):
    masker, original, _, _, after, chosen = masked
    assert (after[~chosen] == original[~chosen]).all()
    before, after = original[chosen], after[chosen]
    special = masker.special
    assert not np.isin(before, (special.cls, special.sep, special.mask, special.pad)).any()
    is_mask, kept = after == special.mask, after == before
    assert stats.binomtest(int(is_mask.sum()), len(after), 0.8).pvalue > RARE
    by_chance = 0.1 / len(masker.ordinary_ids)  # a random token is the old one
    assert stats.binomtest(int(kept.sum()), len(after), 0.1 + by_chance).pvalue > RARE
    replaced = after[~is_mask & ~kept]
    assert not np.isin(replaced, special.as_tuple()).any()
    counts = np.bincount(replaced, minlength=len(masker.ordinary_ids) + 5)[masker.ordinary_ids]
    assert counts.min() > 0
    # a token never replaces itself here: where it was chosen, it cannot be counted
    chances = 1.0 - np.bincount(before, minlength=masker.ordinary_ids.max() + 1)[
        masker.ordinary_ids
    ] / len(before)
    assert stats.chisquare(counts, counts.sum() * chances / chances.sum()).pvalue > RARE


def test_how_many_are_chosen(masked):
    masker, _, lengths, _, _, chosen = masked
    wanted = np.clip(np.rint(0.15 * lengths), 1, masker.settings.prediction_limit)
    counts = np.add.reduceat(chosen, cumulative_lengths(lengths)[:-1], dtype=np.int64)
    if masker.settings.whole_word:  # words that do not fit are passed over
        assert (counts <= wanted).all()
        assert counts.sum() > 0.97 * wanted.sum()
    else:
        assert (counts == wanted).all()
        assert chosen.mean() == pytest.approx(0.15, abs=0.003)


def test_masks_are_everywhere_alike(tokenizer):
    """In sequences of one length, every place is chosen as often as the others."""
    masker = Masker(tokenizer, MaskingSettings(LENGTH))
    special, ordinary, count = masker.special, masker.ordinary_ids, 4000
    row = np.concatenate([[special.cls], np.resize(ordinary, LENGTH - 2), [special.sep]])
    _, chosen = masker.mask(
        np.tile(row, count), np.full(count, LENGTH), derive(1, np.arange(count))
    )
    by_place = chosen.reshape(count, LENGTH).sum(axis=0)
    assert by_place[0] == by_place[-1] == 0
    assert by_place.sum() == 9 * count
    assert stats.chisquare(by_place[1:-1]).pvalue > RARE
    # and neighbours are independent but for the fixed sum: P(both) = 9·8 / (58·57)
    both = int((chosen[:-1] & chosen[1:]).sum())
    pairs = (LENGTH - 3) * count
    assert abs(both - pairs * 72 / (58 * 57)) < 5 * np.sqrt(pairs * 72 / (58 * 57))


def test_a_mask_does_not_depend_on_the_batch(masked):
    masker, original, lengths, keys, after, chosen = masked
    starts = cumulative_lengths(lengths)
    for first, last in ((0, 1), (5, 9), (7000, 7100)):
        part = slice(starts[first], starts[last])
        alone = masker.mask(original[part], lengths[first:last], keys[first:last])
        assert np.array_equal(alone[0], after[part])
        assert np.array_equal(alone[1], chosen[part])
    order = np.random.default_rng(0).permutation(200)
    shuffled = np.concatenate([original[starts[i] : starts[i + 1]] for i in order])
    expected = np.concatenate([after[starts[i] : starts[i + 1]] for i in order])
    assert np.array_equal(masker.mask(shuffled, lengths[order], keys[order])[0], expected)


def words_of(tokens):
    """Lists of places: a piece with ## belongs to the word before it, unless that is special."""
    words = []
    for place, token in enumerate(tokens):
        special_before = place == 0 or tokens[place - 1].startswith("[")
        if token.startswith("##") and not special_before:
            words[-1].append(place)
        else:
            words.append([place])
    return [w for w in words if not tokens[w[0]].startswith("[")]


def test_words_are_masked_as_a_whole(tokenizer):
    masker = Masker(tokenizer, MaskingSettings(LENGTH, whole_word=True))
    original, lengths, keys = sequences(tokenizer, 3000)
    _, chosen = masker.mask(original, lengths, keys)
    starts = cumulative_lengths(lengths)
    longer = 0
    for b in range(3000):
        tokens = [tokenizer.id_to_token(int(i)) for i in original[starts[b] : starts[b + 1]]]
        mine = chosen[starts[b] : starts[b + 1]]
        words = words_of(tokens)
        states = [{bool(mine[place]) for place in word} for word in words]
        assert all(len(state) == 1 for state in states)
        taken = [len(w) for w, state in zip(words, states, strict=True) if True in state]
        longer += sum(size > 1 for size in taken)
        # greedy to the end: no word that is left would have fitted
        left = [len(w) for w, state in zip(words, states, strict=True) if True not in state]
        wanted = max(1, int(np.rint(0.15 * len(tokens))))
        room = min(wanted, masker.settings.prediction_limit) - sum(taken)
        assert room == 0 or not left or min(left) > room
    assert longer > 1000


def test_whole_words_of_byte_level_bpe():
    tokenizer = train_tokenizer(["the cats sat, naïvely (reading) it's 12"], 300, kind="bpe")
    masker = Masker(tokenizer, MaskingSettings(32, whole_word=True, masked_fraction=0.4))
    ids = np.array(tokenizer.encode("reading cats, (naïvely) sat").ids)
    tokens = [tokenizer.id_to_token(int(i)) for i in ids]
    words, places = [], [[]]
    for place, token in enumerate(tokens[1:-1], start=1):
        if token[0] in "Ġ,()":
            places.append([])
        places[-1].append(place)
    words = [word for word in places if word]
    assert max(map(len, words)) > 3
    for key in range(200):
        _, chosen = masker.mask(ids, np.array([len(ids)]), derive(key, 0))
        assert all(len({bool(chosen[place]) for place in word}) == 1 for word in words)


def test_limits():
    assert MaskingSettings(128).prediction_limit == 20
    assert MaskingSettings(512).prediction_limit == 77
    assert MaskingSettings(512, max_predictions=76).prediction_limit == 76


def test_the_limit_holds(tokenizer):
    for whole_word in (False, True):
        settings = MaskingSettings(LENGTH, max_predictions=3, whole_word=whole_word)
        original, lengths, keys = sequences(tokenizer, 200)
        _, chosen = Masker(tokenizer, settings).mask(original, lengths, keys)
        assert np.add.reduceat(chosen, cumulative_lengths(lengths)[:-1], dtype=int).max() == 3


def test_less_than_one_wanted_is_one(tokenizer):
    settings = MaskingSettings(LENGTH, masked_fraction=0.0)
    original, lengths, keys = sequences(tokenizer, 50)
    _, chosen = Masker(tokenizer, settings).mask(original, lengths, keys)
    counts = np.add.reduceat(chosen, cumulative_lengths(lengths)[:-1], dtype=int)
    assert (counts == 1).all()


def test_more_wanted_than_there_is(tokenizer):
    """Everything but [CLS] and [SEP] is chosen, and no more."""
    for whole_word in (False, True):
        settings = MaskingSettings(LENGTH, masked_fraction=1.0, whole_word=whole_word)
        original, lengths, keys = sequences(tokenizer, 50)
        _, chosen = Masker(tokenizer, settings).mask(original, lengths, keys)
        special = SpecialIds.of(tokenizer)
        assert (chosen == ~np.isin(original, (special.cls, special.sep))).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 3}, "max_length must be at least 8 and below 65536, not 3"),
        ({"masked_fraction": 2}, "masked_fraction must be in 0..1, not 2"),
        ({"short_sequence_probability": -1}, "short_sequence_probability must be in 0..1, not -1"),
        ({"max_predictions": 0}, "max_predictions must be at least 1, not 0"),
        ({"duplication": 0}, "duplication must be at least 1, not 0"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        MaskingSettings(**settings)
