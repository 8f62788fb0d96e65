"""Translate against the Transformer's forward, and what it says of texts that it cannot take."""

import itertools
import math

import pytest
import torch

from bertkern.data import save_tokenizer, train_tokenizer
from bertkern.models import InputError, Transformer, TransformerConfig
from bertkern.models.generate import Hypothesis
from bertkern.models.next_token import Sampling
from bertkern.models.translate import Translate

TEXT = "ein eine der die das Haus Baum grün süß file not found cannot open 42 % ' ?"
WORDS = TEXT.split()
CLS, SEP = 2, 3


@pytest.fixture(scope="module", params=["bpe", "wordpiece"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([TEXT] * 3, 400, False, min_frequency=1, kind=request.param)
    config = TransformerConfig(
        vocab_size=tokenizer.get_vocab_size() + 5,  # as where a vocabulary is filled up to a tile
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    torch.manual_seed(4)
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:  # probabilities far from each other, so that rounding decides none
            parameter.data.mul_(2.0 if name == "embedding.weight" else 1.5)
    model.embedding.weight.data[SEP] *= 2  # some targets end, and some are cut
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def translate(folder):
    return Translate.from_pretrained(folder)


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 14, (30,), generator=generator).tolist()
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator))
        for n in lengths
    ]


def pieces(translate, text):
    encoding = translate.tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids


def never(translate):
    tokenizer, size = translate.tokenizer, translate.model.config.vocab_size
    names = ["[PAD]", "[CLS]", "[MASK]"]
    if type(tokenizer.model).__name__ == "BPE":
        names.append("[UNK]")
    return [*map(tokenizer.token_to_id, names), *range(tokenizer.get_vocab_size(), size)]


@torch.inference_mode()
def greedy_by_forward(translate, text, limit):
    """(text, score for alpha = 0.6, ended) by the whole forward for each token."""
    source = torch.tensor([[*pieces(translate, text), SEP]])
    target, log_p = [CLS], 0.0
    while len(target) <= limit and (target[-1] != SEP):
        logits = translate.model(source, torch.tensor([target])).logits[0, -1].double()
        steps = logits.log_softmax(0)
        steps[never(translate)] = -math.inf
        target.append(int(steps.argmax()))
        log_p += float(steps.max())
    ended = target[-1] == SEP
    found = translate.tokenizer.decode(target[1 : -1 if ended else None], skip_special_tokens=False)
    score = log_p / ((5 + len(target) - 1) / 6) ** 0.6
    return found[1:] if found.startswith(" ") else found, score, ended


def test_greedy_is_the_forwards_most_probable_token(translate, texts):
    ends = set()
    for text in texts[:8]:
        expected, score, ended = greedy_by_forward(translate, text, 20)
        (found,) = translate([text], beam_size=1, max_length=20)
        assert (found.text, found.finished, found.truncated) == (expected, ended, False)
        assert found.score == pytest.approx(score, rel=1e-4)
        assert found.alternatives == []
        ends.add(ended)
    assert ends == {True, False}


def test_limits_follow_the_source(translate, texts):
    """50 tokens more than the source has, [SEP] counted on both sides."""
    text = next(t for t in texts if not translate([t], beam_size=1, max_length=20)[0].finished)
    (found,) = translate([text], beam_size=1)
    limit = len(pieces(translate, text)) + 51
    assert (found.text, found.finished) == greedy_by_forward(translate, text, limit)[::2]
    assert not found.finished


def same(ours, theirs):
    """To float32 rounding: on the CPU the products are torch's (docs/numerics.md)."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.text, one.finished, one.truncated) == (
            other.text,
            other.finished,
            other.truncated,
        )
        assert one.score == pytest.approx(other.score, rel=1e-4)
        assert [a.text for a in one.alternatives] == [a.text for a in other.alternatives]


@pytest.mark.parametrize(
    "options",
    [
        {"beam_size": 3, "num": 2},
        {"sampling": Sampling(0.8, 20, 0.95, seed=4), "num": 2},
    ],
    ids=["beam", "sample"],
)
def test_neighbours_batches_and_windows_do_not_matter(translate, texts, options):
    texts, options = texts[:16], {**options, "max_length": 12}
    whole = translate(texts, **options)
    assert len({one.text for one in whole}) > 6
    assert all(len(one.alternatives) == 1 for one in whole)
    for one in whole:
        (other,) = one.alternatives
        assert (one.finished, one.score) >= (other.finished, other.score)
    for batch_size, window in ((1, 4), (7, 10)):
        same(
            list(translate.stream(iter(texts), batch_size=batch_size, window=window, **options)),
            whole,
        )


def test_samples_follow_the_seed(translate, texts):
    def drawn(seed):
        found = translate(texts[:5] * 2, sampling=Sampling(seed=seed), max_length=8)
        return [one.text for one in found]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert drawn(0)[:5] != drawn(0)[5:]  # the same texts, but other numbers


def test_long_texts_are_cut(folder):
    translate = Translate.from_pretrained(folder, max_source_length=6)
    text = " ".join(["Haus"] * 5)
    assert len(pieces(translate, text)) == 5
    fits, longer = translate([text, f"{text} Baum"], max_length=5)
    assert (fits.truncated, longer.truncated) == (False, True)
    assert (fits.text, fits.score) == (longer.text, pytest.approx(longer.score))


def test_a_text_without_a_word_is_nothing(translate):
    empty, other, blank = translate(["", "Haus", ""], num=2)
    for one in (empty, blank):
        assert (one.text, one.score, one.finished, one.alternatives) == ("", 0.0, True, [])
    assert len(other.alternatives) == 1
    assert translate([]) == []


def test_reads_no_further_than_its_window(translate):
    read = itertools.count(1)
    stream = translate.stream((f"Haus {i}" for i in read), window=8, max_length=2)
    for _ in range(3):
        next(stream)
    assert next(read) == 9


def test_pieces_become_the_text_again(translate):
    for text in ("süß der Baum", "not found 42 %", "Haus"):
        hypothesis = Hypothesis(pieces(translate, text), -1.0, -1.0, True)
        assert translate._read(hypothesis).text == text


def test_wrong_arguments(translate, folder, tmp_path):
    with pytest.raises(TypeError, match="not one string"):
        translate("Haus")
    with pytest.raises(TypeError, match="input 1: texts must be strings, not int"):
        translate(["Haus", 3])
    with pytest.raises(InputError, match="input 0: the text holds half of a surrogate"):
        translate(["\ud83d"])
    for options, message in (
        ({"beam_size": 0}, "beam_size must be at least 1, not 0"),
        ({"num": 5}, "num must be in 1..4, the beam size, not 5"),
        ({"max_length": 0}, "max_length must be at least 1, or None, not 0"),
        ({"length_penalty": -1.0}, "length_penalty must be 0 or more and finite, not -1.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    ):
        with pytest.raises(ValueError, match=message):
            translate.stream(["Haus"], **options)
    with pytest.raises(ValueError, match="max_source_length must be at least 2, not 1"):
        Translate.from_pretrained(folder, max_source_length=1)
    with pytest.raises(FileNotFoundError):
        Translate.from_pretrained(tmp_path / "nowhere")


def test_a_tokenizer_of_another_model_is_refused(translate):
    config = translate.model.config
    size = translate.tokenizer.get_vocab_size()
    small = Transformer(config.with_changes(vocab_size=size - 1))
    with pytest.raises(ValueError, match=f"has {size} tokens, the model only {size - 1}"):
        Translate(small, translate.tokenizer)
    other = Transformer(config.with_changes(bos_token_id=3, eos_token_id=2))
    with pytest.raises(ValueError, match=r"are \(0, 2, 3\), .* \(0, 3, 2\)"):
        Translate(other, translate.tokenizer)
