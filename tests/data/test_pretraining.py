"""Pre-training batches: against a plain assembly, in parts, resumed, from any process."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from data.numbered_documents import numbered_documents
from scipy import stats

from bertkern.data import Corpus, MaskingSettings, PretrainingData, train_tokenizer
from bertkern.data.packing import fill_batches
from bertkern.data.pairs import windows

LENGTH = 60
BUDGET = 1000
DOCUMENTS = numbered_documents()
TENSORS = ("input_ids", "token_type_ids", "position_ids", "labels", "next_sentence_label")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([s for d in DOCUMENTS for s in d], 2000, min_frequency=1)


@pytest.fixture(scope="module")
def corpus(tokenizer):
    return Corpus.from_documents(DOCUMENTS, tokenizer)


def make(corpus, tokenizer, seed=1, workers=0, **settings):
    return PretrainingData(
        corpus, tokenizer, MaskingSettings(LENGTH, **settings), seed, workers=workers
    )


@pytest.fixture(scope="module")
def data(corpus, tokenizer):
    return make(corpus, tokenizer)


def whole(batch):
    return batch.part(0, len(batch))


def same(first, second):
    return all(torch.equal(getattr(first, n), getattr(second, n)) for n in (*TENSORS, "cu_seqlens"))


def same_batches(first, second):
    first, second = list(first), list(second)
    return len(first) == len(second) and all(
        same(whole(a), whole(b)) for a, b in zip(first, second, strict=True)
    )


def original(part):
    """The token ids before masking."""
    ids = part.input_ids.clone()
    ids[part.label_tokens] = part.labels
    return ids


def test_longer_sequences_have_more_predictions(corpus, tokenizer):
    """BERT: at most 20 of 128 tokens, and of 512 then 80 (76 would be 15 %)."""
    data = make(corpus, tokenizer, masked_fraction=0.9, max_predictions=3)
    most = {}
    for length in (LENGTH, 4 * LENGTH):
        parts = [b.part(0, len(b)) for b in data.batches(0, 8 * LENGTH, max_length=length)]
        counts = []
        for part in parts:
            bounds = np.searchsorted(part.label_tokens.numpy(), part.cu_seqlens.numpy())
            counts += np.diff(bounds).tolist()
        most[length] = max(counts)
    assert most == {LENGTH: 3, 4 * LENGTH: 12}
    assert MaskingSettings(128, max_predictions=20).with_length(512).prediction_limit == 80
    assert MaskingSettings(128).with_length(512).prediction_limit == 77


def test_sequences(data, corpus):
    """[CLS] A [SEP] B [SEP] as the corpus has them, with types, positions and labels."""
    sequences = 0
    for batch in data.batches(0, BUDGET):
        part = whole(batch)
        ids = original(part).numpy()
        bounds = part.cu_seqlens.tolist()
        assert part.cu_seqlens.dtype == torch.int32
        assert part.tokens == len(ids) == bounds[-1] <= BUDGET
        assert part.sequences == len(batch) == len(bounds) - 1
        assert part.predictions == len(part.labels) == len(part.label_tokens)
        assert part.max_seqlen == max(np.diff(bounds)) == max(batch.lengths)
        assert part.sequence_offset == 0
        assert np.array_equal(np.diff(bounds), batch.lengths)
        for b, pair in enumerate(batch.pairs):
            mine = slice(bounds[b], bounds[b + 1])
            a, second = (
                corpus.ids[pair[f"{n}_start"] : pair[f"{n}_start"] + pair[f"{n}_size"]].tolist()
                for n in "ab"
            )
            cls, sep = data.special.cls, data.special.sep
            assert ids[mine].tolist() == [cls, *a, sep, *second, sep]
            types = [0] * (len(a) + 2) + [1] * (len(second) + 1)
            assert part.token_type_ids[mine].tolist() == types
            assert part.position_ids[mine].tolist() == list(range(len(types)))
            assert part.next_sentence_label[b] == pair["label"]
            sequences += 1
    assert sequences > 500


def test_statistics_of_an_epoch(data, corpus):
    """What a model sees over 100,000 tokens and more."""
    parts = [whole(batch) for epoch in range(3) for batch in data.batches(epoch, BUDGET)]
    tokens = sum(part.tokens for part in parts)
    predictions = sum(part.predictions for part in parts)
    assert tokens > 100_000
    assert predictions / tokens == pytest.approx(0.15, abs=0.003)  # 0.15 · length is rounded
    shown = torch.cat([part.input_ids[part.label_tokens] for part in parts])
    is_mask = int((shown == data.special.mask).sum())
    assert stats.binomtest(is_mask, predictions, 0.8).pvalue > 1e-5
    labels = torch.cat([part.next_sentence_label for part in parts])
    assert stats.binomtest(int(labels.sum()), len(labels), 0.5).pvalue > 1e-5


def test_parts_are_pieces_of_the_whole(data):
    batch = next(data.batches(0, BUDGET))
    everything = whole(batch)
    for cuts in ([0, 1, 4, len(batch)], list(range(len(batch) + 1))):
        parts = [batch.part(a, b) for a, b in pairwise(cuts)]
        assert [part.sequence_offset for part in parts] == cuts[:-1]
        assert {part.max_seqlen for part in parts} == {everything.max_seqlen}
        for name in TENSORS:
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(everything, name)), name
        before = np.cumsum([0] + [part.tokens for part in parts])
        places = [p.label_tokens + int(n) for p, n in zip(parts, before[:-1], strict=True)]
        assert torch.equal(torch.cat(places), everything.label_tokens)


def test_batches_are_filled(data):
    batches = list(data.batches(0, BUDGET))
    lengths = np.concatenate([batch.lengths for batch in batches])
    bounds = np.cumsum([0] + [len(batch) for batch in batches]).tolist()
    assert bounds == fill_batches(lengths, BUDGET)
    assert min(int(batch.lengths.sum()) for batch in batches[:-1]) > BUDGET - LENGTH


def test_batches_go_on_over_windows(data, monkeypatch):
    """Small windows do not make small batches."""
    monkeypatch.setattr(
        "bertkern.data.pretraining.windows", lambda *a: windows(*a, window_tokens=700)
    )
    test_batches_are_filled(data)


def test_a_start_skips_batches(data):
    batches = list(data.batches(2, BUDGET))
    for start in (0, 1, len(batches) // 2, len(batches) - 1, len(batches)):
        assert same_batches(data.batches(2, BUDGET, start), batches[start:])


def test_the_same_from_other_processes_and_from_disk(data, tokenizer, tmp_path):
    on_disk = Corpus.build(DOCUMENTS, tokenizer, tmp_path / "corpus")
    for workers in (0, 2):
        again = make(on_disk, tokenizer, workers=workers)
        assert same_batches(again.batches(1, BUDGET), data.batches(1, BUDGET))


def test_epochs_and_seeds(data, corpus, tokenizer):
    assert not same_batches(data.batches(0, BUDGET), data.batches(1, BUDGET))
    other = make(corpus, tokenizer, seed=2)
    assert not same_batches(data.batches(0, BUDGET), other.batches(0, BUDGET))


def examples(data, epoch):
    """Every example of an epoch, in an order of its own."""
    found = []
    for batch in data.batches(epoch, BUDGET):
        part = whole(batch)
        for ids in np.split(part.input_ids.numpy(), part.cu_seqlens[1:-1].tolist()):
            found.append(tuple(ids.tolist()))
    return sorted(found)


def test_static_and_fresh_masks(data, corpus, tokenizer):
    static = make(corpus, tokenizer, static_masks=True)
    assert examples(static, 0) == examples(static, 3)
    assert not same_batches(static.batches(0, BUDGET), static.batches(3, BUDGET))
    assert not set(examples(data, 0)) & set(examples(data, 3))


def test_duplication(data, corpus, tokenizer):
    """Twice the tokens, with other masks."""
    double = make(corpus, tokenizer, duplication=2)
    once, twice = examples(data, 0), examples(double, 0)
    assert len(set(twice)) == len(twice)
    assert sum(map(len, twice)) == pytest.approx(2 * sum(map(len, once)), rel=0.05)
    assert set(once) <= set(twice)


def test_another_length(data, corpus, tokenizer):
    """max_length of a phase is that of settings with it, limits of predictions included."""
    phase = data.batches(0, BUDGET, max_length=200)
    settings = MaskingSettings(200)
    expected = PretrainingData(corpus, tokenizer, settings, 1).batches(0, BUDGET)
    first = next(phase)
    assert first.lengths.max() == 200
    assert same(whole(first), whole(next(expected)))


def test_arguments(data):
    part = whole(next(data.batches(0, BUDGET)))
    arguments = part.arguments()
    assert set(arguments) == {*TENSORS, "cu_seqlens", "max_seqlen", "label_tokens",
                              "sequence_offset"}  # fmt: skip
    assert arguments["input_ids"] is part.input_ids
    assert part.arguments("meta")["labels"].device.type == "meta"


def test_refusals(corpus, tokenizer, data):
    one = Corpus.from_documents([["d1 s1", "d1 s2"], ["d2"]], tokenizer)
    with pytest.raises(ValueError, match=r"1 document\(s\) with two or more sentences"):
        PretrainingData(one, tokenizer)
    other = train_tokenizer(["d1 s1 d2"], 30, min_frequency=1)
    with pytest.raises(ValueError, match="the corpus was made with another tokenizer"):
        PretrainingData(corpus, other)
    with pytest.raises(ValueError, match="tokens_per_batch = 10 is less than max_length = 60"):
        data.batches(0, 10)
    with pytest.raises(ValueError, match="tokens_per_batch = 99 is less than max_length = 100"):
        data.batches(0, 99, max_length=100)
    with pytest.raises(ValueError, match="seed and workers must be at least 0, not -1 and 0"):
        PretrainingData(corpus, tokenizer, seed=-1)


def test_a_damaged_corpus_is_named(tokenizer, tmp_path):
    Corpus.build(DOCUMENTS, tokenizer, tmp_path / "c")
    path = tmp_path / "c" / "ids.bin"
    ids = np.fromfile(path, dtype="<u2")
    ids[100:] = 65_535
    ids.tofile(path)
    data = make(Corpus.open(tmp_path / "c"), tokenizer)
    with pytest.raises(ValueError, match=r"ids.bin: damaged: id 65535 in a vocabulary of"):
        whole(next(data.batches(0, BUDGET)))
