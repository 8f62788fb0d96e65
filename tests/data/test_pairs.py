"""Sentence pairs: against a plain loop, their statistics, and the same from any process."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from data.numbered_documents import numbered_documents
from scipy import stats

from bertkern.data import Corpus, MaskingSettings, train_tokenizer
from bertkern.data.pairs import IS_NEXT, IS_RANDOM, EpochPlan, _truncate, lengths_of, windows
from bertkern.data.random_bits import derive

LENGTH = 60
ROOM = LENGTH - 3
RARE = 1e-5
DOCUMENTS = [*numbered_documents(), *numbered_documents(20, 3)]


@pytest.fixture(scope="module")
def corpus():
    tokenizer = train_tokenizer([s for d in DOCUMENTS for s in d], 2000, min_frequency=1)
    return Corpus.from_documents(DOCUMENTS, tokenizer)


@pytest.fixture(scope="module")
def pairs(corpus):
    settings = MaskingSettings(LENGTH)
    return np.concatenate([epoch_pairs(corpus, settings, epoch) for epoch in range(20)])


def epoch_pairs(corpus, settings, epoch=0, seed=1, **options):
    return np.concatenate(list(windows(corpus, settings, seed, epoch, **options)))


def draw(key, purpose):
    return (int(derive(key, purpose)[0]) >> 11) / 2**53


def plain_pairs(corpus, index, key, probability):
    """One document's pairs as a loop over sentences, before they are cut: (A, B, label) sentences.

    Draws are numbered as in `pairs`; the rest is written after Devlin et al., not after it.
    """
    lengths = [[len(s) for s in corpus.document(d)] for d in range(corpus.documents)]
    mine, first, number = lengths[index], 0, 0
    found = []
    while first < len(mine) - 1:
        pair_key = derive(key, number)[0]
        number += 1
        target = ROOM
        if draw(pair_key, 0) < probability:
            target = 2 + int(draw(pair_key, 1) * (ROOM - 1))
        end, total = first, 0
        while end < len(mine) and (total < target or end - first < 2):
            total += mine[end]
            end += 1
        split = first + 1 + int(draw(pair_key, 2) * (end - first - 1))
        a = [(index, s) for s in range(first, split)]
        if draw(pair_key, 3) < 0.5:
            b, label, first = [(index, s) for s in range(split, end)], IS_NEXT, end
        else:
            other = int(draw(pair_key, 4) * (len(lengths) - 1))
            other += other >= index
            s = int(draw(pair_key, 5) * len(lengths[other]))
            wanted = target - sum(mine[place] for _, place in a)
            b, total = [], 0
            while s < len(lengths[other]) and (total < wanted or not b):
                b.append((other, s))
                total += lengths[other][s]
                s += 1
            label, first = IS_RANDOM, split
        found.append((a, b, label, int(pair_key)))
    return found


def test_a_plain_loop_plans_the_same_pairs(corpus):
    seed, epoch = 1, 3
    planned = {int(p["key"]): p for p in epoch_pairs(corpus, MaskingSettings(LENGTH), epoch, seed)}
    content = derive(derive(derive(seed, 1), epoch), 0)
    starts = corpus.sentence_starts
    expected = 0
    for index in range(corpus.documents):
        for a, b, label, key in plain_pairs(corpus, index, derive(content, index)[0], 0.1):
            pair = planned[key]
            expected += 1
            assert pair["label"] == label
            spans = [
                (
                    int(starts[corpus.document_starts[part[0][0]] + part[0][1]]),
                    int(starts[corpus.document_starts[part[-1][0]] + part[-1][1] + 1]),
                )
                for part in (a, b)
            ]
            sizes = [last - first for first, last in spans]
            while sum(sizes) > ROOM:  # token by token from the longer
                sizes[0 if sizes[0] > sizes[1] else 1] -= 1
            assert [int(pair["a_size"]), int(pair["b_size"])] == sizes
            for name, (first, last) in zip("ab", spans, strict=True):
                assert first <= pair[f"{name}_start"]
                assert pair[f"{name}_start"] + pair[f"{name}_size"] <= last
    assert expected == len(planned)


def test_half_of_the_pairs_are_next(pairs):
    assert lengths_of(pairs).sum() > 1_000_000
    is_next = int((pairs["label"] == IS_NEXT).sum())
    assert stats.binomtest(is_next, len(pairs), 0.5).pvalue > RARE


def test_next_follows_and_random_is_from_another_document(corpus, pairs):
    begins = corpus.sentence_starts[corpus.document_starts]
    for name in "ab":
        last = pairs[f"{name}_start"] + pairs[f"{name}_size"] - 1
        first_document = np.searchsorted(begins, pairs[f"{name}_start"], side="right")
        assert (first_document == np.searchsorted(begins, last, side="right")).all()
    documents = [np.searchsorted(begins, pairs[f"{n}_start"], side="right") - 1 for n in "ab"]
    is_next = pairs["label"] == IS_NEXT
    assert (documents[0] == documents[1])[is_next].all()
    assert (documents[0] != documents[1])[~is_next].all()
    behind = pairs["b_start"] - pairs["a_start"] - pairs["a_size"]
    assert (behind[is_next] >= 0).all()
    fits = is_next & (lengths_of(pairs) < LENGTH)  # nothing was cut
    assert fits.sum() > 100
    assert (behind[fits] == 0).all()
    # each other document as often as the rest, of those that A is from document 0
    others = documents[1][~is_next & (documents[0] == 0)]
    counts = np.bincount(others, minlength=corpus.documents)[1:]
    assert stats.chisquare(counts).pvalue > RARE


def test_lengths(pairs):
    assert lengths_of(pairs).max() == LENGTH
    assert pairs["a_size"].min() >= 1
    assert pairs["b_size"].min() >= 1


@pytest.mark.parametrize("probability", [0.1, 1.0])
def test_short_sequences(probability):
    """With sentences of a token each, a pair is as long as it aims to be: 2..57, all alike."""
    documents = [[f"d{d}"] * 20_000 for d in range(4)]
    tokenizer = train_tokenizer([d[0] for d in documents], 50, min_frequency=1)
    tokenizer.add_tokens([d[0] for d in documents])
    corpus = Corpus.from_documents(documents, tokenizer)
    assert corpus.tokens == 80_000
    settings = MaskingSettings(LENGTH, short_sequence_probability=probability)
    pairs = np.concatenate([epoch_pairs(corpus, settings, epoch) for epoch in range(3)])
    # random B may end early with its document, and so may what is near the end
    pairs = pairs[(pairs["label"] == IS_NEXT) & (pairs["a_start"] % 20_000 < 20_000 - 2 * ROOM)]
    counts = np.bincount(pairs["a_size"] + pairs["b_size"], minlength=ROOM + 1)
    assert counts[:2].sum() == 0
    lengths = np.arange(ROOM + 1)
    expected = np.where(lengths >= 2, probability / (ROOM - 1), 0.0)
    expected[ROOM] += 1 - probability
    assert stats.chisquare(counts[2:], expected[2:] * len(pairs)).pvalue > RARE


def test_cuts_take_the_front_or_the_back_by_chance():
    count = 5000
    pairs = np.zeros(count, dtype=[*((n, "i8") for n in ("a_start", "a_size", "b_start")),
                                   ("b_size", "i8"), ("key", "u8")])  # fmt: skip
    pairs["a_size"], pairs["b_size"], pairs["key"] = 100, 20, derive(4, np.arange(count))
    _truncate(pairs, 50)
    assert (pairs["a_size"] == 30).all()  # 70 went from A, the longer
    assert (pairs["b_size"] == 20).all()
    assert (pairs["b_start"] == 0).all()
    front = int(pairs["a_start"].sum())
    assert stats.binomtest(front, 70 * count, 0.5).pvalue > RARE
    assert pairs["a_start"].min() >= 0
    assert abs(pairs["a_start"].var() - 70 / 4) < 1.5


def test_epochs_copies_and_seeds(corpus):
    fresh, static = MaskingSettings(LENGTH), MaskingSettings(LENGTH, static_masks=True)
    first, second = (epoch_pairs(corpus, fresh, epoch) for epoch in (0, 1))
    assert np.array_equal(first, epoch_pairs(corpus, fresh, 0))
    assert not np.intersect1d(first["key"], second["key"]).size
    assert not np.intersect1d(first["key"], epoch_pairs(corpus, fresh, 0, seed=2)["key"]).size
    first, second = (epoch_pairs(corpus, static, epoch) for epoch in (0, 1))
    assert not np.array_equal(first, second)  # in another order
    assert np.array_equal(np.sort(first, order="key"), np.sort(second, order="key"))
    doubled = epoch_pairs(corpus, MaskingSettings(LENGTH, duplication=2))
    assert len(np.unique(doubled["key"])) == len(doubled)
    single = epoch_pairs(corpus, fresh, 0)
    assert np.isin(single["key"], doubled["key"]).all()
    for pairs, copies in ((single, 1), (doubled, 2)):
        # each copy of each document has a first pair, and no third copy has
        content = derive(derive(1, 1), 0)
        copy_keys = [derive(derive(content, c), np.arange(corpus.documents)) for c in range(3)]
        present = [bool(np.isin(derive(keys, 0), pairs["key"]).all()) for keys in copy_keys]
        absent = [not np.isin(derive(keys, 0), pairs["key"]).any() for keys in copy_keys]
        assert present == [True] * copies + [False] * (3 - copies)
        assert absent == [False] * copies + [True] * (3 - copies)


def test_pairs_do_not_depend_on_windows(corpus):
    settings = MaskingSettings(LENGTH)
    whole = epoch_pairs(corpus, settings)
    pieces = list(windows(corpus, settings, 1, 0, window_tokens=3000))
    assert len(pieces) > 5
    assert len(EpochPlan(corpus, settings, 1, 0, window_tokens=3000)) == len(pieces)
    by_pieces = np.concatenate(pieces)
    assert np.array_equal(np.sort(by_pieces, order="key"), np.sort(whole, order="key"))
    begins = corpus.sentence_starts[corpus.document_starts]
    documents = np.searchsorted(begins, by_pieces["a_start"], side="right")
    assert (np.diff(documents) != 0).mean() > 0.5  # shuffled: neighbours are of other documents
    assert abs(np.corrcoef(np.arange(len(documents)), documents)[0, 1]) < 0.3


def test_nothing_comes_from_the_other_part_of_a_split(corpus):
    for part, other in (corpus.split(0.3), corpus.split(0.3)[::-1]):
        begins = corpus.sentence_starts[corpus.document_starts]
        pairs = epoch_pairs(part, MaskingSettings(LENGTH, duplication=3))
        used = [np.searchsorted(begins, pairs[f"{n}_start"], side="right") - 1 for n in "ab"]
        used = np.unique(np.concatenate(used))
        assert np.array_equal(used, part.chosen)
        assert not np.intersect1d(used, other.chosen).size


@pytest.mark.parametrize("on_disk", [False, True])
def test_any_number_of_workers_makes_the_same(corpus, tmp_path, on_disk):
    tokenizer = train_tokenizer([s for d in DOCUMENTS for s in d], 2000, min_frequency=1)
    if on_disk:
        corpus = Corpus.build(DOCUMENTS, tokenizer, tmp_path / "c")
    part, _ = corpus.split(0.2)
    settings = MaskingSettings(LENGTH)
    expected = list(windows(part, settings, 1, 0, window_tokens=5000))
    for workers in (2,) if on_disk else (1, 2):
        made = list(windows(part, settings, 1, 0, workers, window_tokens=5000))
        assert len(made) == len(expected)
        assert all(map(np.array_equal, made, expected))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_worker_is_told_of_and_nothing_is_lost(corpus, number):
    arguments = corpus, MaskingSettings(LENGTH), 1, 0
    made = windows(*arguments, 1, window_tokens=300)
    first = next(made)
    for process in multiprocessing.active_children():
        os.kill(process.pid, number)
    with pytest.warns(RuntimeWarning, match="a process that makes training data died") as warned:
        rest = list(made)
    assert len(warned) == 1
    expected = list(windows(*arguments, window_tokens=300))
    assert len(rest) + 1 == len(expected) > 3
    assert all(map(np.array_equal, [first, *rest], expected))


def test_windows_left_early_leave_no_process_and_no_thread(corpus):
    """A pool that still ends while Python does can fail there, in a thread nobody waits for."""
    threads, processes = threading.active_count(), len(multiprocessing.active_children())
    left = windows(corpus, MaskingSettings(64), 1, 0, workers=2, window_tokens=2000)
    next(left)
    assert len(multiprocessing.active_children()) > processes
    left.close()
    assert len(multiprocessing.active_children()) == processes
    assert threading.active_count() == threads


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
def test_workers_end_with_a_killed_trainer():
    program = (
        "import multiprocessing, time\n"
        "from bertkern.data import Corpus, MaskingSettings, train_tokenizer\n"
        "from bertkern.data.pairs import windows\n"
        "if __name__ == '__main__':\n"
        "    texts = [['a b', 'b a']] * 9\n"
        "    corpus = Corpus.from_documents(texts, train_tokenizer(['a b'], 9))\n"
        "    made = windows(corpus, MaskingSettings(8), 0, 0, 1, window_tokens=1)\n"
        "    next(made)\n"
        "    print(*[p.pid for p in multiprocessing.active_children()], flush=True)\n"
        "    time.sleep(60)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    assert workers
    assert all(os.path.isdir(f"/proc/{pid}") for pid in workers)
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 20
    while any(os.path.isdir(f"/proc/{pid}") for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(os.path.isdir(f"/proc/{pid}") for pid in workers)
