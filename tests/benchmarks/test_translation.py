"""The translation benchmark: its rules, its verdict, and a small run from end to end."""

import json

import pytest
import torch
from bertkern.benchmarks.tasks import messages, translation

from bertkern.data.parallel_text import Pair
from bertkern.models.transformer_config import TransformerConfig

WORDS = {"open": "öffne", "close": "schließe", "the": "die", "file": "Datei", "socket": "Buchse"}


def pairs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(WORDS), (count, 4), generator=generator).tolist()
    english, german = list(WORDS), list(WORDS.values())
    return [
        Pair(" ".join(english[i] for i in row), " ".join(german[i] for i in row), "")
        for row in rows
    ]


def test_the_nearest_source_gives_its_target():
    train = [
        Pair("cannot open the file", "A", ""),
        Pair("cannot close the socket", "B", ""),
        Pair("permission denied", "C", ""),
    ]
    sources = ["permissions were denied", "cannot open a file", "closed the sockets"]
    assert translation.nearest(train, sources) == ["C", "A", "B"]


def test_scores_of_perfect_and_of_empty_translations():
    test = pairs(30, 0)
    right = translation.Scores.of([pair.target for pair in test], test)
    assert (right.bleu, right.low, right.high, right.chrf) == pytest.approx((100, 100, 100, 100))
    wrong = translation.Scores.of([pair.source for pair in test], test)
    assert wrong.low <= wrong.bleu <= wrong.high < 5
    assert str(right) == "BLEU 100.0 (100.0 to 100.0), chrF 100.0"


def test_the_verdict_is_on_intervals():
    def found(low, copied):
        return {"scores": {"beam search": {"low": low}, "copy": {"high": copied}}}

    assert translation.verdict(found(10.1, 10.0)) == []
    assert translation.verdict(found(10.0, 10.0)) == [
        "the interval of beam search begins at 10.0, that of copy ends at 10.0"
    ]


def test_the_command_writes_results_picture_and_page(tmp_path, monkeypatch, capsys):
    config = TransformerConfig(
        hidden_size=32, num_layers=1, num_attention_heads=2, intermediate_size=64
    )
    data = messages.Messages(pairs(200, 0), pairs(10, 1), pairs(15, 2), {"program": 225})
    monkeypatch.setattr(translation, "CONFIG", config)
    monkeypatch.setattr(translation, "VOCABULARY", 300)
    monkeypatch.setattr(translation, "read", lambda folder: {"program": []})
    monkeypatch.setattr(translation, "build", lambda catalogues, seed: data)
    picture, document = tmp_path / "curves.png", tmp_path / "page.md"
    options = ["--picture", picture, "--document", document, "--results", tmp_path]
    code = translation.main(["--steps", "3", *map(str, options)])
    printed = capsys.readouterr()
    assert code == 1  # three steps are too few
    assert "the interval of beam search begins at" in printed.out
    (results,) = tmp_path.glob("translation-*.json")
    found = json.loads(results.read_text("utf-8"))
    assert found["config"]["vocab_size"] <= 300
    assert found["data"]["digest"] == data.digest
    assert [step["step"] for step in found["history"]["steps"]] == [1, 2, 3]
    assert set(found["scores"]) == {"beam search", "greedy", "copy", "translation memory"}
    assert [example["source"] for example in found["examples"]] == [
        pair.source for pair in data.test[:12]
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = document.read_text("utf-8")
    assert "![learning curves](curves.png)" in text
    copied = found["scores"]["copy"]
    assert f"| copy | {copied['bleu']:.1f} | {copied['low']:.1f} to " in text
    assert f"| {data.test[0].source} | " in text


def test_a_cell_holds_any_text():
    assert translation._cell("a|b *c* <d> [e]") == r"a\|b \*c\* \<d\> \[e\]"


def test_the_rate_rises_in_a_tenth_of_the_steps_and_falls_as_one_over_the_root():
    settings = translation.settings_of(4000, 0)
    rates = [settings.rate(step) for step in range(4000)]
    assert max(rates) == pytest.approx(translation._PEAK)
    assert rates.index(max(rates)) in (399, 400)
    assert rates[1599] == pytest.approx(translation._PEAK / 2)  # after four times the warm-up
