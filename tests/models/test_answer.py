"""Answer against every span of every window, scored with transformers' logits."""

import itertools

import numpy as np
import pytest
import torch
import transformers

from bertkern.data import save_tokenizer, train_tokenizer
from bertkern.models import Answer, BertConfig, BertForQuestionAnswering, InputError

WORDS = [f"w{i}" for i in range(30)]
POSITIONS = 40
LENGTH, STRIDE, QUERY, LONGEST = 32, 7, 9, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
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
    BertForQuestionAnswering(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def reader(folder):
    return Answer.from_pretrained(folder, max_length=LENGTH, stride=STRIDE, max_query_length=QUERY)


@pytest.fixture(scope="module")
def questions():
    generator = torch.Generator().manual_seed(1)

    def text(length):
        return "  ".join(WORDS[i] for i in torch.randint(30, (length,), generator=generator))

    lengths = [(3, 5), (1, 20), (9, 21), (4, 60), (12, 33), (0, 8), (5, 47), (2, 1)]
    return [*((text(q), text(c)) for q, c in lengths), ("w1 \0 ?", "é \U0001f600 w2,\nw3 w4 \0w5")]


def brute_force(folder, question, context):
    """(best span (start, end, score), score of the empty answer), from the definition."""
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertForQuestionAnswering.from_pretrained(folder).eval()
    query = tokenizer(question, add_special_tokens=False)["input_ids"][:QUERY]
    encoded = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    room = LENGTH - len(query) - 3
    starts = [0]
    while starts[-1] + room < len(ids):
        starts.append(starts[-1] + STRIDE)
    spans = [range(s, min(s + room, len(ids))) for s in starts]

    def context_of(token, span):
        return min(token - span.start, span.stop - 1 - token) + 0.01 * len(span)

    owner = [
        max(
            (k for k, span in enumerate(spans) if token in span),
            key=lambda k, token=token: (context_of(token, spans[k]), -k),
        )
        for token in range(len(ids))
    ]
    best, null = None, np.inf
    for k, span in enumerate(spans):
        first = [tokenizer.cls_token_id, *query, tokenizer.sep_token_id]
        second = [*ids[span.start : span.stop], tokenizer.sep_token_id]
        with torch.no_grad():
            output = model(
                torch.tensor([first + second]),
                token_type_ids=torch.tensor([[0] * len(first) + [1] * len(second)]),
            )
        start, end = (x[0].double().tolist() for x in (output.start_logits, output.end_logits))
        null = min(null, start[0] + end[0])
        for i, j in itertools.product(span, span):
            if owner[i] != k or not 0 <= j - i < LONGEST:
                continue
            shift = len(first) - span.start
            score = start[i + shift] + end[j + shift]
            if best is None or score > best[2]:
                best = (offsets[i][0], offsets[j][1], score)
    return best, null


def test_finds_what_brute_force_finds(folder, reader, questions):
    found = reader(questions, n_best=1000, max_answer_tokens=LONGEST)
    for (question, context), answered in zip(questions, found, strict=True):
        (start, end, score), null = brute_force(folder, question, context)
        best = answered.best
        assert best.score == pytest.approx(score, abs=1e-4)
        assert (best.start, best.end) == (start, end)
        assert best.text == context[start:end]
        assert answered.null_difference == pytest.approx(null - score, abs=2e-4)


def test_ranked_answers(reader, questions):
    for (_, context), answered in zip(questions, reader(questions, n_best=5), strict=True):
        assert answered.ranked[0][0] == answered.best
        assert 1 <= len(answered.ranked) <= 5
        scores = [span.score for span, _ in answered.ranked]
        assert scores == sorted(scores, reverse=True)
        probabilities = torch.tensor([p for _, p in answered.ranked], dtype=torch.float64)
        expected = torch.tensor(scores, dtype=torch.float64).softmax(0)
        torch.testing.assert_close(probabilities, expected)
        assert all(context[s.start : s.end] == s.text != "" for s, _ in answered.ranked)


def test_the_null_threshold(reader, questions):
    for question in questions:
        (always,) = reader([question])
        assert always.best.text
        difference = always.null_difference
        (below,) = reader([question], null_threshold=difference - 1e-3)
        assert (below.best.text, below.best.start, below.best.end) == ("", 0, 0)
        (above,) = reader([question], null_threshold=difference + 1e-3)
        assert above.best.text == always.best.text
        assert "" in [span.text for span, _ in above.ranked]


def test_a_text_without_words_has_no_answer(reader):
    for context in ("", " \n", "\0"):
        (answered,) = reader([("w1", context)])
        assert answered.best.text == ""
        assert [span.text for span, _ in answered.ranked] == [""]


def test_a_long_question_is_cut_and_said_to_be(reader, questions):
    truncated = [answered.truncated for answered in reader(questions)]
    lengths = [len(reader.tokenizer.encode(q, add_special_tokens=False)) for q, _ in questions]
    assert truncated == [length > QUERY for length in lengths]
    assert any(truncated)


def test_neighbours_batches_and_windows_do_not_matter(reader, questions):
    """To float32 rounding: on the CPU the products are torch's (docs/numerics.md)."""
    whole = reader(questions)
    for batch_size, window in ((1, 1), (3, 4), (64, 1000)):
        found = list(reader.stream(iter(questions), batch_size=batch_size, window=window))
        for ours, theirs in zip(found, whole, strict=True):
            assert (ours.best.start, ours.best.end) == (theirs.best.start, theirs.best.end)
            assert ours.best.score == pytest.approx(theirs.best.score, abs=1e-4)


def test_default_windows_fit_a_model_of_few_positions(folder, questions):
    reader = Answer.from_pretrained(folder)
    assert reader.settings.max_length == POSITIONS
    assert all(answered.best.text for answered in reader(questions))


def test_wrong_arguments(folder, reader):
    with pytest.raises(ValueError, match=rf"max_length must be in 3..{POSITIONS}.*not 41"):
        Answer.from_pretrained(folder, max_length=41)
    with pytest.raises(ValueError, match="stride = 30 or more"):
        Answer.from_pretrained(folder, stride=30)
    with pytest.raises(ValueError, match="n_best must be at least 1, not 0"):
        reader([("w1", "w2")], n_best=0)
    with pytest.raises(InputError, match=r"input 1: .*surrogate"):
        reader([("w1", "w2"), ("w1", "\udfff")])
    with pytest.raises(TypeError, match="input 0: texts must be strings, not NoneType"):
        reader([("w1", None)])
