"""Windows, batches and packing of the serving classes."""

import itertools

import pytest
import torch

from bertkern.data import train_tokenizer
from bertkern.data.features import TokenSequence
from bertkern.models import InputError
from bertkern.models.serving import (
    TOKENS_PER_BATCH,
    batches_by_length,
    check_stream,
    computed,
    cutting_tokenizer,
    length_limit,
    pack,
    tokenize,
    windows,
)


@pytest.fixture(scope="module")
def tokenizer():
    return cutting_tokenizer(train_tokenizer(["a b c d e f g"] * 3, 40, min_frequency=1), 6)


def test_windows_read_no_further_than_they_must():
    read = itertools.count()
    found = windows(read, 3)
    assert next(found) == (0, [0, 1, 2])
    assert next(read) == 3
    assert list(windows("abcde", 2)) == [(0, ["a", "b"]), (2, ["c", "d"]), (4, ["e"])]
    assert list(windows([], 2)) == []


def test_batches_hold_every_sequence_once_within_both_limits():
    lengths = torch.randint(1, 512, (900,)).tolist()
    batches = list(batches_by_length(lengths, 48))
    assert sorted(i for batch in batches for i in batch) == list(range(900))
    assert all(len(batch) <= 48 for batch in batches)
    assert all(sum(lengths[i] for i in batch) <= TOKENS_PER_BATCH for batch in batches)
    assert any(len(batch) < 48 for batch in batches[:-1])  # the token budget was felt
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(lengths, reverse=True)


def test_results_come_in_the_order_of_the_input():
    sequences = [TokenSequence([k] * k, [0] * k) for k in (3, 9, 1, 9, 4)]
    seen = []

    def compute(batch):
        seen.append([len(sequence.input_ids) for sequence in batch])
        return [sequence.input_ids[0] for sequence in batch]

    assert computed(sequences, compute, 2) == [3, 9, 1, 9, 4]
    assert seen == [[9, 9], [4, 3], [1]]
    assert computed([], compute, 2) == []


def test_pack():
    packed = pack([TokenSequence([5, 6, 7], [0, 0, 1]), TokenSequence([8], [0])], "cpu")
    assert packed.input_ids.tolist() == [5, 6, 7, 8]
    assert packed.token_type_ids.tolist() == [0, 0, 1, 0]
    assert packed.cu_seqlens.tolist() == [0, 3, 4]
    assert packed.cu_seqlens.dtype == torch.int32
    assert (packed.max_seqlen, packed.sequences) == (3, 2)


def test_long_texts_are_cut_and_said_to_be(tokenizer):
    sequences, cut = tokenize(tokenizer, ["a b c d", "a b c d e", "", ("a b c", "d e")], 0)
    assert [len(sequence.input_ids) for sequence in sequences] == [6, 6, 2, 6]
    assert cut == [False, True, False, True]
    assert sequences[3].token_type_ids[-1] == 1


def test_the_given_tokenizer_is_left_alone():
    given = train_tokenizer(["a b c d e f g"] * 3, 40, min_frequency=1)
    cutting_tokenizer(given, 3)
    assert given.truncation is None


def test_texts_that_are_none(tokenizer):
    with pytest.raises(InputError, match="input 8: the text holds half of a surrogate") as caught:
        tokenize(tokenizer, ["fine \U0001f600", "\ud83d"], 7)
    assert caught.value.index == 8
    with pytest.raises(TypeError, match="input 1: texts must be strings, not int"):
        tokenize(tokenizer, ["a", ("b", 3)], 0)


def test_wrong_sizes():
    assert length_limit("max_length", None, 64) == 64
    for wrong in (2, 65):
        with pytest.raises(ValueError, match=rf"max_length must be in 3..64.*not {wrong}"):
            length_limit("max_length", wrong, 64)
    with pytest.raises(ValueError, match="window must be at least 1, not 0"):
        check_stream([], 1, 0)
    with pytest.raises(TypeError, match="not one string"):
        check_stream("text", 1, 1)
