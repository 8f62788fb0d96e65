"""Skip-gram pairs: words and counts, the mapped text, and pairs against a loop over the text."""

import math
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest

from bertkern.data import random_bits, skip_gram
from bertkern.data.skip_gram import META, SkipGrams, WordText, count_words, words_of


def test_words_by_the_rule():
    text = (
        "Don't panic: naïve Cafe\u0301s, __init__ and l\u2019eau of 1984 (x_1); 'quoted' ÜBER 3.5!"
    )
    expected = [
        "don't",
        "panic",
        "naïve",
        "cafés",
        "init",
        "and",
        "l'eau",
        "of",
        "1984",
        "x",
        "1",
        "quoted",
        "über",
        "3",
        "5",
    ]
    assert words_of(text) == expected


def test_marks_that_letters_are_written_with_belong_to_words():
    assert words_of("हिन्दी में, العَرَبِيَّة") == ["हिन्दी", "में", "العَرَبِيَّة"]


def test_words_are_counted_and_rare_ones_left_out():
    documents = [["b a b.", "c a"], ["B d"]]
    found = count_words(documents, min_count=2)
    assert list(found.counts.items()) == [("b", 3), ("a", 2)]
    assert (found.total, found.pruned) == (7, 0)
    with pytest.raises(ValueError, match="min_count must be 1 or more, not 0"):
        count_words(documents, min_count=0)


def test_a_full_memory_forgets_the_rarest_words_and_says_so():
    documents = [[" ".join(f"rare{i}" for i in range(50)) + " the the the"], ["the of of of"]]
    found = count_words(documents, counted_at_most=10)
    assert found.counts == {"the": 4, "of": 3}
    assert (found.pruned, found.pruned_up_to) == (50, 1)


@pytest.fixture
def documents():
    rng = np.random.default_rng(0)
    words = np.array([f"w{i}" for i in range(60)])
    share = 1 / np.arange(1, 61)
    share /= share.sum()
    return [
        [" ".join(rng.choice(words, rng.integers(1, 12), p=share)) for _ in range(9)]
        for _ in range(30)
    ]


@pytest.fixture
def text(documents, tmp_path):
    return WordText.build(lambda: documents, tmp_path / "text", min_count=3)


def test_a_text_is_its_words_by_number(documents, text):
    counts = Counter(word for d in documents for s in d for word in s.split())
    known = {word for word, count in counts.items() if count >= 3}
    sentences = [[w for w in s.split() if w in known] for d in documents for s in d]
    starts = text.sentence_starts
    stored = [[text.words[i] for i in text.ids[a:b]] for a, b in pairwise(starts)]
    assert stored == [s for s in sentences if s]
    assert text.words == sorted(known, key=lambda w: (-counts[w], w))
    assert text.counts.tolist() == [counts[w] for w in text.words]
    assert text.total == sum(counts.values())
    assert len(text) == text.counts.sum()
    again = WordText.open(text.folder)
    assert again.words == text.words
    assert again.fingerprint == text.fingerprint


def test_long_sentences_are_cut(tmp_path):
    text = WordText.build(lambda: [["a b " * 1200]], tmp_path / "text")
    assert np.diff(text.sentence_starts).tolist() == [1000, 1000, 400]


def brute_force(text, window, negative, sample, seed, epoch):
    """Pairs as a loop over the text makes them, place by place."""

    def bits(*numbers):
        key = np.uint64(seed)
        for number in numbers:
            key = random_bits.derive(key, number)[0]
        return key

    def chance(*numbers):
        return float(random_bits.uniform(np.array([bits(*numbers)]))[0])

    total = int(text.counts.sum())
    weights = [int(count) ** 0.75 for count in text.counts]
    pairs = []
    for start, end in zip(text.sentence_starts, text.sentence_starts[1:], strict=False):
        stays = []
        for place in range(start, end):
            share = int(text.counts[text.ids[place]]) / total
            if not sample or chance(epoch, 0, place) < math.sqrt(sample / share):
                stays.append(place)
        for i, place in enumerate(stays):
            reach = 1 + int(chance(epoch, 1, place) * window)
            for offset in range(-reach, reach + 1):
                if offset == 0 or not 0 <= i + offset < len(stays):
                    continue
                slot = offset + window if offset < 0 else offset + window - 1
                words = [int(text.ids[stays[i + offset]])]
                for k in range(negative):
                    goal = chance(epoch, 2, place, slot * negative + k) * math.fsum(weights)
                    word = 0
                    while goal >= weights[word]:
                        goal -= weights[word]
                        word += 1
                    words.append(word)
                pairs.append((int(text.ids[place]), words))
    return pairs


@pytest.mark.parametrize(
    ("window", "negative", "sample", "epoch"), [(2, 5, 0.02, 0), (3, 2, 0.0, 4), (1, 1, 0.001, 1)]
)
def test_pairs_are_those_of_a_loop_whatever_the_chunks(
    text, monkeypatch, window, negative, sample, epoch
):
    expected = brute_force(text, window, negative, sample, 7, epoch)
    assert len(expected) > 50
    for size in (1 << 13, 100):
        monkeypatch.setattr(skip_gram, "_CHUNK", size)
        examples = SkipGrams(text, window, negative, sample, seed=7)
        assert (examples.chunks > 5) == (size == 100)
        found = [examples.pairs(epoch, chunk) for chunk in reversed(range(examples.chunks))][::-1]
        assert list(chain.from_iterable(p.centres.tolist() for p in found)) == [
            centre for centre, _ in expected
        ]
        assert list(chain.from_iterable(p.words.tolist() for p in found)) == [
            words for _, words in expected
        ]
        assert examples.words_before(0) == 0
        assert examples.words_before(examples.chunks) == len(text)


def test_draws_follow_their_distributions(tmp_path):
    """Frequent words stay with √(t/f), negatives have ∝ count^0.75, to four standard deviations."""
    sentence = " ".join(["a"] * 6 + ["b"] * 3 + ["c"])
    text = WordText.build(lambda: [[sentence] * 800], tmp_path / "text")
    examples = SkipGrams(text, negative=4, sample=0.2, seed=3)
    assert examples.stay == pytest.approx([math.sqrt(0.2 / 0.6), math.sqrt(0.2 / 0.3), 1.0])
    drawn = [examples.pairs(0, chunk).words[:, 1:] for chunk in range(examples.chunks)]
    found = np.bincount(np.concatenate(drawn).ravel(), minlength=3)
    weights = np.array([6, 3, 1]) ** 0.75
    expected = weights / weights.sum()
    error = np.sqrt(expected * (1 - expected) / found.sum())
    assert np.all(np.abs(found / found.sum() - expected) < 4 * error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window must be 1 or more, not 0"),
        ({"negative": 0}, "negative must be 1 or more, not 0"),
        ({"sample": 1.5}, r"sample must be in 0..1, not 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(text, changes, message):
    with pytest.raises(ValueError, match=message):
        SkipGrams(text, **changes)


def test_a_text_without_frequent_words_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"0 word\(s\) occur 5 times .* 4 of the text"):
        WordText.build(lambda: [["one two three four"]], tmp_path / "text")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_source_leaves_the_old_text(documents, text):
    def failing():
        yield from documents[:5]
        raise KeyboardInterrupt

    calls = iter([lambda: documents, failing])
    with pytest.raises(KeyboardInterrupt):
        WordText.build(lambda: next(calls)(), text.folder, min_count=3)
    assert WordText.open(text.folder).fingerprint == text.fingerprint
    assert [p.name for p in text.folder.parent.iterdir()] == ["text"]


def test_other_folders_are_not_replaced(documents, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match=r"mine exists, and is not the text of a run"):
        WordText.build(lambda: documents, tmp_path / "mine")


def test_damage_is_named(text):
    with (text.folder / "ids.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"meta.json: damaged \(ids.bin: \d+ bytes, not \d+"):
        WordText.open(text.folder)
    (text.folder / META).write_text("{}")
    with pytest.raises(ValueError, match=r"meta.json: damaged"):
        WordText.open(text.folder)
    (text.folder / META).unlink()
    with pytest.raises(FileNotFoundError, match=r"no meta.json"):
        WordText.open(text.folder)
