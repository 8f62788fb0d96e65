"""The tasks built from text: right examples, no leak, rules of thumb, transformers' twin."""

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from bertkern.benchmarks.tasks import (
    build,
    curves,
    endings,
    entailment,
    pretraining,
    questions,
    run,
    scores,
    twin,
)

from bertkern.data.masking import MaskingSettings
from bertkern.data.multiple_choice import read_multiple_choice
from bertkern.data.question_answering import read_questions
from bertkern.data.tokenizer import save_tokenizer, train_tokenizer
from bertkern.models import BertConfig
from bertkern.models.bert import BertModel
from bertkern.train.pretraining import PretrainingSettings

NOUNS = ("file", "socket", "string", "module", "thread", "parser", "queue", "header", "option")
STATES = ("missing", "closed", "empty", "locked", "broken", "unknown", "frozen")


def written_documents(count=16, sentences=24, seed=0):
    """Documents in which every rule finds something."""
    random = np.random.default_rng(seed)

    def noun():
        return f"{random.choice(NOUNS)} {random.integers(1000)}"

    def sentence():
        a, b, state = noun(), noun(), random.choice(STATES)
        return (
            f"If the {a} is {state}, the {b} is closed and ignored.",
            f"Return the name of the {a} if the {b} is {state}.",
            f"The {a} of the call must be a {state} {b} of the same kind.",
            f"The {a} in use contains every {state} {b}, and nothing else.",
            f"The {a} in use is removed when the {b} becomes {state}.",
            f"The {a} on top is a {state} kind of {b}.",
        )[random.integers(6)]

    return [[sentence() for _ in range(sentences)] for _ in range(count)]


@pytest.fixture(scope="module")
def documents():
    return written_documents()


@pytest.fixture(scope="module")
def data(documents):
    return build.build(documents, seed=3)


def test_a_sentence_is_turned_round():
    document = [
        "If the file is missing, an error is raised.",
        "Return True if the queue is empty (see below), False otherwise.",
        "Note that the hook is called before the module is imported.",
    ]
    found = [(two[0].hypothesis, two[1].hypothesis) for two in entailment.pairs(document)]
    assert found == [
        (
            "An error is raised if the file is missing.",
            "The file is missing if an error is raised.",
        ),
        ("If the queue is empty, True is returned.", "If True is returned, the queue is empty."),
        (
            "Before the module is imported, the hook is called.",
            "Before the hook is called, the module is imported.",
        ),
    ]
    assert [[pair.label for pair in two] for two in entailment.pairs(document)] == [[0, 1]] * 3


@pytest.mark.parametrize(
    "sentence",
    [
        "Close the file if necessary.",
        "The value is used unless the option is set.",  # "A unless B" is "B unless A"
        "If it is set, call the hook if the file exists.",
        "Set the option if the file exists.",
        "This holds even if the file exists.",
        "The file exists.",
    ],
)
def test_a_sentence_that_cannot_be_turned_is_left(sentence):
    assert list(entailment.pairs([sentence])) == []


def test_questions_by_hand():
    def asked(sentence):
        return [(question, answer) for _, question, answer in questions.asked(sentence)]

    assert asked("If the file is missing, an error is raised.") == [
        ("What happens if the file is missing?", "an error is raised")
    ]
    assert asked("Return the old value if the key was there.") == [
        ("What is returned if the key was there?", "the old value")
    ]
    assert asked("The encoding must be a valid name.") == [
        ("What must the encoding be?", "a valid name")
    ]
    assert asked("A header contains all the fields, in order.") == [
        ("What does a header contain?", "all the fields")
    ]
    assert asked("The hook is called when the file is closed.")[-1] == (
        "When is the hook called?",
        "when the file is closed",
    )
    assert asked("A path is a string of names.") == [("What is a path?", "a string of names")]
    assert asked("Nothing to ask here.") == []


def test_answers_stand_in_their_passages(data):
    for question in data.questions.train + data.questions.held_out:
        end = question.start + len(question.answer)
        assert question.passage[question.start : end] == question.answer
        assert len(question.passage.split()) <= 70
    kinds = [question.kind for question in data.questions.train]
    assert len(set(kinds)) >= 4


def test_a_passage_holds_the_sentence_and_its_neighbours():
    document = [f"Sentence {i} of some words." for i in range(6)]
    seen = set()
    for seed in range(20):
        before, passage = questions.passage_around(document, 2, np.random.default_rng(seed))
        assert passage[before:].startswith(document[2])
        assert passage in " ".join(document)
        assert passage.count(".") == 3
        seen.add(before)
    assert len(seen) == 3
    long = ["word " * 60 + f"{i}." for i in range(4)]
    before, passage = questions.passage_around(long, 1, np.random.default_rng(0))
    assert (before, passage) == (0, long[1])


def test_endings_by_hand(documents):
    found = list(endings.endings(documents, np.random.default_rng(0)))
    assert len(found) > 50
    labels = np.array([example.label for _, example in found])
    assert (np.bincount(labels, minlength=4) > 0.15 * len(found)).all()
    for number, example in found:
        document = documents[number]
        right = f"{example.sent2} {example.endings[example.label]}"
        places = [i for i, s in enumerate(document) if s == example.sent1]
        assert any(document[i + 1] == right for i in places if i + 1 < len(document))
        assert len(set(example.endings)) == 4
        lengths = [len(ending.split()) for ending in example.endings]
        assert max(abs(n - lengths[example.label]) for n in lengths) <= 3
        everything = {sentence for d in documents for sentence in d}
        assert all(f"{example.sent2} {ending}" in everything for ending in example.endings)


def test_no_document_is_on_both_sides(documents, data):
    parts = build.split_documents(documents, build.HELD_OUT, 3)
    sides = [{s for d in part for s in d} for part in parts]
    assert not {p.premise for p in data.entailment.train} & sides[1]
    assert not {p.premise for p in data.entailment.held_out} & sides[0]
    assert not {e.sent1 for e in data.endings.held_out} & sides[0]
    assert not any(q.passage.split(". ")[0] + "." in sides[0] for q in data.questions.held_out)
    for split in (data.entailment, data.questions, data.endings):
        assert split.train
        assert len(split.held_out) == len(split.documents) > 0
    for pair, number in zip(data.entailment.held_out, data.entailment.documents, strict=True):
        assert pair.premise in parts[1][number]


def test_a_text_of_training_is_not_held_out():
    twice = written_documents(2)
    documents = [twice[0], *written_documents(6, seed=1), twice[0]]
    for seed in range(8):
        data = build.build(documents, seed)
        for split, text in (
            (data.entailment, lambda pair: pair.premise),
            (data.questions, lambda question: question.question),
            (data.endings, lambda example: example.sent1),
        ):
            assert not {text(e) for e in split.train} & {text(e) for e in split.held_out}


def test_the_same_seed_gives_the_same_files(documents, data, tmp_path):
    for folder, one in (("a", data), ("b", build.build(documents, 3))):
        build.write(one, tmp_path / folder)
    other = build.write(build.build(documents, 4), tmp_path / "c")
    for name, paths in other.items():
        for path in paths:
            relative = path.relative_to(tmp_path / "c")
            a, b = ((tmp_path / folder / relative).read_bytes() for folder in "ab")
            assert a == b, name
            assert a != path.read_bytes(), name


def test_the_files_have_the_official_forms(data, tmp_path):
    paths = build.write(data, tmp_path)
    rows = [line.split("\t") for line in paths["entailment"][1].read_text("utf-8").splitlines()]
    assert rows[0] == ["index", "sentence1", "sentence2", "label"]
    assert {row[3] for row in rows[1:]} == {"entailment", "not_entailment"}
    asked = read_questions(paths["questions"][1], labelled=True)
    by_id = {int(q.id): q for q in asked}
    for number, question in enumerate(data.questions.held_out):
        read = by_id[number]
        assert (read.question, read.context) == (question.question, question.passage)
        assert (read.answers[0].text, read.answers[0].start) == (question.answer, question.start)
    squad = json.loads(paths["questions"][0].read_text("utf-8"))
    assert squad["version"] == "1.1"
    swag = list(csv.DictReader(io.StringIO(paths["endings"][1].read_text("utf-8"))))
    assert [row["sent2"] for row in swag] == [e.sent2 for e in data.endings.held_out]
    read = read_multiple_choice(paths["endings"][1], labelled=True)
    assert read.labels.tolist() == [e.label for e in data.endings.held_out]
    first = data.endings.held_out[0]
    assert read.endings[0] == [f"{first.sent2} {ending}" for ending in first.endings]


def words(text):
    return text.lower().replace(",", "").replace(".", "").split()


def test_word_overlap_tells_nothing_of_a_pair_turned_round(data):
    points = entailment.baselines(data.entailment.train, data.entailment.held_out)
    assert np.mean(points["word overlap"]) == 0.5
    assert np.mean(points["majority"]) == 0.5
    pairs = data.entailment.train
    for right, wrong in zip(pairs[::2], pairs[1::2], strict=True):
        assert (right.premise, right.label, wrong.label) == (wrong.premise, 0, 1)
        assert sorted(words(right.hypothesis)) == sorted(words(wrong.hypothesis))


def test_rules_find_what_is_there_to_find():
    pair = entailment.Pair("a b c d", "a b", 0), entailment.Pair("a b c d", "x y", 1)
    points = entailment.baselines(pair * 5, pair)
    assert points["word overlap"] == [1.0, 1.0]
    assert points["hypothesis alone"] == [1.0, 1.0]
    easy = endings.Ending("the red box", "The", ("red box.", "old hat.", "new car.", "big dog."), 0)
    tied = replace(easy, endings=("cat.", "hat.", "car.", "dog."), label=2)
    found = endings.baselines([easy, tied], [easy, tied])
    assert found["chance"] == [0.25, 0.25]
    assert found["word overlap"] == found["weighted overlap"] == [1.0, 0.25]
    asked = questions.Question(
        "Other words. If the box is red, it is opened. Last.",
        "What happens if the box is red?",
        "it is opened",
        32,
        "happens",
    )
    rules = questions.baselines([asked], [asked])
    assert rules["words in common"] == ["it is opened"]
    assert questions.word_f1(asked.answer, rules["position"][0]) > 0.7


def test_a_score_and_its_interval():
    one = scores.score([1.0] * 50 + [0.0] * 50, list(range(100)))
    assert one.mean == 0.5
    # the normal approximation of independent points
    assert one.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.015)
    assert one.high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.015)
    # documents of ten points each that agree: as wide as of ten points
    wide = scores.score(([1.0] * 10 + [0.0] * 10) * 5, [i // 10 for i in range(100)])
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * 0.5 / 10**0.5, abs=0.1)
    assert scores.score([1.0, 1.0], [0, 1]) == scores.Score(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="0 points"):
        scores.score([], [])


@pytest.fixture(scope="module")
def minilm(tmp_path_factory, documents):
    """A folder with a small encoder and its tokenizer, in the place of MiniLM."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = train_tokenizer([s for d in documents for s in d], 400)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=192,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.mark.parametrize("name", list(run.SETTINGS))
def test_both_learn_the_same(name, data, minilm, tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setattr(run, "packaged_minilm", lambda: minilm)
    split = getattr(data, name)
    split = replace(
        split,
        train=split.train[:44],
        held_out=split.held_out[:20],
        documents=split.documents[:20],
    )
    files = build.write(replace(data, **{name: split}), tmp_path / "data")[name]
    settings = replace(run.SETTINGS[name], epochs=2, batch_size=8, learning_rate=1e-3)
    sides = run.compare(name, files, split, settings, 0.0, tmp_path / "run")
    ours, theirs = sides["bertkern"], sides["transformers"]
    assert len(ours.course.losses) == 12
    assert ours.course.tokens == theirs.course.tokens > 0
    assert max(twin.agreement(ours.course.losses, theirs.course.losses)) < 1e-4
    assert ours.points == theirs.points
    assert len(set(ours.course.losses)) == 12
    rules = build.baselines(data)[name]
    found = run.entries(sides, run.of_figure(rules), split, settings)
    json.dumps(found)
    assert found["score_difference"] == {"mean": 0, "low": 0, "high": 0}
    assert not any(rule.endswith("f1") for rule in found["baselines"])
    run.report(name, found)


def test_the_verdict():
    found = {
        "bertkern": {"score": {"mean": 0.6, "low": 0.55, "high": 0.65}},
        "baselines": {"chance": {"mean": 0.5, "low": 0.45, "high": 0.54}},
        "largest_difference_of_first_losses": 1e-6,
    }
    assert run.verdict(found, 0.0) == []
    found["baselines"]["words"] = {"mean": 0.5, "low": 0.45, "high": 0.56}
    found["largest_difference_of_first_losses"] = float("nan")
    assert len(run.verdict(found, 0.0)) == 2
    assert len(run.verdict(found, 0.1)) == 1


def test_padding_keeps_every_token_and_label():
    cu_seqlens = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    arguments = {
        "input_ids": torch.arange(1, 10),
        "token_type_ids": torch.tensor([0, 0, 1, 0, 0, 0, 1, 1, 1]),
        "cu_seqlens": cu_seqlens,
        "label_tokens": torch.tensor([1, 8]),
        "labels": torch.tensor([70, 71]),
        "next_sentence_label": torch.tensor([0, 1, 0]),
    }
    inputs, mask = twin.padded(arguments)
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 0, 0], [4, 0, 0, 0, 0], [5, 6, 7, 8, 9]]
    assert torch.equal(inputs["attention_mask"].bool(), mask)
    assert torch.equal(inputs["input_ids"][mask], arguments["input_ids"])
    assert torch.equal(inputs["token_type_ids"][mask], arguments["token_type_ids"])
    assert inputs["labels"][0].tolist() == [-100, 70, -100, -100, -100]
    assert inputs["labels"][2].tolist() == [-100, -100, -100, -100, 71]
    assert inputs["next_sentence_label"].tolist() == [0, 1, 0]


def test_pretraining_of_both_is_the_same(documents, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = train_tokenizer([s for d in documents for s in d], 400)
    config = replace(
        pretraining.small_config(tokenizer.get_vocab_size(), 0.0),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    settings = PretrainingSettings(
        steps=12,
        tokens_per_batch=256,
        evaluation_tokens=512,
        evaluate_every=5,
        checkpoint_every=run.NEVER,
        masking=MaskingSettings(max_length=32),
    )
    found = pretraining.compare(documents, tokenizer, config, settings, tmp_path)
    json.dumps(found)
    assert max(found["relative_difference_of_losses"]) < 1e-4
    ours, theirs = found["bertkern"], found["transformers"]
    assert found["held_out_steps"] == [0, 5, 10, 12]
    assert ours["held_out_mlm_loss"] == pytest.approx(theirs["held_out_mlm_loss"], rel=1e-5)
    assert len(set(ours["held_out_mlm_loss"])) == 4
    assert ours["losses"][-1] < ours["losses"][0]
    assert ours["tokens"] == theirs["tokens"] > 0
    for side in (ours, theirs):
        assert len(side["durations"]) == 12
        assert min(side["durations"]) > 0
        assert side["seconds"] == pytest.approx(sum(side["durations"][1:]))


def test_the_verdict_on_pretraining():
    def found(loss, seconds, apart=0.0):
        return {
            "bertkern": {"held_out_mlm_loss": [9.0, loss], "seconds": seconds},
            "transformers": {"held_out_mlm_loss": [9.0, 5.0], "seconds": 10.0},
            "baselines": {"mlm_loss": 6.0},
            "largest_difference_of_first_losses": apart,
        }

    assert pretraining.verdict(found(5.0, 9.0), 0.0) == []
    assert len(pretraining.verdict(found(5.1, 9.0), 0.0)) == 1
    assert len(pretraining.verdict(found(6.1, 11.0), 0.0)) == 3
    assert len(pretraining.verdict(found(5.0, 9.0, 0.1), 0.0)) == 1
    assert pretraining.verdict(found(5.0, 9.0, 0.1), 0.1) == []


def test_a_picture_is_drawn_the_same_twice(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    ours, theirs = [3.0, 2.0, 1.0], [3.0, 2.0, 1.1]
    for name in ("a.png", "b.png"):
        curves.draw(
            tmp_path / name,
            "title",
            {"task": (ours, theirs)},
            {"task": twin.agreement(ours, theirs)},
        )
    a, b = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert a == b
    assert a.startswith(b"\x89PNG")


def test_an_unknown_task_is_an_error(capsys):
    with pytest.raises(SystemExit):
        run.main(["nonsense"])
    assert "allowed are entailment, questions, endings" in capsys.readouterr().err


def test_build_says_what_it_built(documents, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "standard_library_text", lambda: documents)
    assert build.main([str(tmp_path), "--seed", "3"]) == 0
    card = json.loads((tmp_path / "card.json").read_text("utf-8"))
    assert card["seed"] == 3
    said = capsys.readouterr().out
    for name in build.SIZES:
        assert card[name]["train"] > 0
        assert f"{name}: {card[name]['train']} training" in said
