"""FillMask against transformers' logits, and what it says of texts that it cannot fill."""

import itertools

import pytest
import torch
import transformers

from bertkern.data import save_tokenizer, train_tokenizer
from bertkern.models import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    FillMask,
    InputError,
)

WORDS = [f"w{i}" for i in range(30)]
POSITIONS = 24


@pytest.fixture(scope="module", params=[BertForMaskedLM, BertForPreTraining])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, 200, min_frequency=1)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    request.param(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def filler(folder):
    return FillMask.from_pretrained(folder)


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(1)
    texts = []
    for length in torch.randint(1, 18, (60,), generator=generator).tolist():
        words = [WORDS[i] for i in torch.randint(30, (length,), generator=generator)]
        for place in torch.randint(length, (2,), generator=generator).tolist():
            words[place] = "[MASK]"
        texts.append(" ".join(words))
    return [*texts, "[MASK]", "\0[MASK] \U0001f600 w3"]


def their_probabilities(folder, text):
    """transformers' probabilities [P, V] at the [MASK]s of a text."""
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    return logits[inputs["input_ids"][0] == tokenizer.mask_token_id].softmax(1), tokenizer


def test_agrees_with_transformers(folder, filler, texts):
    for text in (*texts[::12], texts[-1]):
        expected, tokenizer = their_probabilities(folder, text)
        (filled,) = filler([text], top_k=4)
        assert len(filled.masks) == len(expected)
        assert not filled.truncated
        for guesses, row in zip(filled.masks, expected, strict=True):
            best = row.topk(4)
            assert [g.token for g in guesses] == tokenizer.convert_ids_to_tokens(best.indices)
            found = torch.tensor([g.probability for g in guesses])
            torch.testing.assert_close(found, best.values, rtol=1e-4, atol=1e-6)


def test_targets_keep_their_probability_among_all(folder, filler, texts):
    expected, tokenizer = their_probabilities(folder, texts[0])
    words = ["w7", "w11", "w7"]
    (filled,) = filler([texts[0]], top_k=5, targets=words)
    ids = tokenizer.convert_tokens_to_ids(["w7", "w11"])
    for guesses, row in zip(filled.masks, expected, strict=True):
        assert {g.token for g in guesses} == {"w7", "w11"}
        assert guesses[0].probability >= guesses[1].probability
        by_token = {g.token: g.probability for g in guesses}
        found = torch.tensor([by_token["w7"], by_token["w11"]])
        torch.testing.assert_close(found, row[ids], rtol=1e-4, atol=1e-6)


def test_neighbours_batches_and_windows_do_not_matter(filler, texts):
    """To float32 rounding: on the CPU the products are torch's (docs/numerics.md)."""
    whole = filler(texts, top_k=3)
    for batch_size, window in ((1, 1), (7, 10), (64, 1000)):
        found = list(filler.stream(iter(texts), 3, None, batch_size, window))
        assert len(found) == len(texts)
        for ours, theirs in zip(found, whole, strict=True):
            for one, other in zip(ours.masks, theirs.masks, strict=True):
                assert [g.token for g in one] == [g.token for g in other]
                assert [g.probability for g in one] == pytest.approx(
                    [g.probability for g in other], rel=1e-4
                )


def test_reads_no_further_than_its_window(filler):
    read = itertools.count(1)
    stream = filler.stream((f"w{i % 30} [MASK]" for i in read), window=8)
    for _ in range(3):
        next(stream)
    assert next(read) == 9


def test_long_texts_are_cut(filler):
    ahead = " ".join(["[MASK]"] + ["w1"] * 40)
    behind = " ".join(["w1"] * 40 + ["[MASK]"])
    first, second = filler([ahead, behind])
    assert first.truncated
    assert len(first.masks) == 1
    assert second.truncated
    assert second.masks == []


def test_a_text_without_mask_is_named(filler):
    with pytest.raises(InputError, match=r"input 2: no \[MASK\] in 'w3'") as caught:
        filler(["[MASK]", "w1 [MASK]", "w3"])
    assert caught.value.index == 2
    stream = filler.stream(["[MASK]", ""], window=1)
    next(stream)
    with pytest.raises(InputError, match="input 1: no"):
        next(stream)


def test_wrong_arguments(filler, folder, tmp_path):
    size = filler.model.config.vocab_size
    with pytest.raises(TypeError, match="not one string"):
        filler("w1 [MASK]")
    for wrong in (0, size + 1):
        with pytest.raises(ValueError, match=rf"top_k must be in 1..{size}.*not {wrong}"):
            filler(["[MASK]"], top_k=wrong)
    with pytest.raises(ValueError, match="which has no 'W1', 'none'"):
        filler(["[MASK]"], targets=["w1", "W1", "none"])
    with pytest.raises(ValueError, match="at least one token"):
        filler(["[MASK]"], targets=[])
    BertModel(filler.model.config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="missing tensors"):
        FillMask.from_pretrained(tmp_path)
