"""bertkern translate."""

import csv
import json

import pytest
import torch

from bertkern.data import save_tokenizer, train_tokenizer
from bertkern.models import Sampling, Transformer, TransformerConfig, Translate

TEXTS = ["the file was not found", "cannot open", "süß % ' der Baum", "open the file"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Transformer that has learned nothing."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(TEXTS * 3, 330, False, min_frequency=1, kind="bpe")
    config = TransformerConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    torch.manual_seed(0)
    Transformer(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def one_line(text):
    return " ".join(text.splitlines())


def test_a_line_of_text_for_each_line(run, folder, tmp_path):
    expected = Translate.from_pretrained(folder)(TEXTS, max_length=9)
    path, out = tmp_path / "texts.txt", tmp_path / "translated.txt"
    path.write_text("\n".join([*TEXTS[:2], "", *TEXTS[2:]]) + "\n", encoding="utf-8")
    result = run("translate", "-f", path, "-m", folder, "-o", out, "--max-length", "9")
    assert result.exit_code == 0, result.output
    assert "5 texts" in result.stderr
    lines = out.read_text(encoding="utf-8").split("\n")
    assert lines[2] == ""
    assert lines[:2] + lines[3:-1] == [one_line(one.text) for one in expected]
    piped = run("translate", "-m", folder, "--max-length", "9", input=path.read_bytes())
    assert piped.stdout == out.read_text(encoding="utf-8")
    given = run("translate", *TEXTS, "-m", folder, "--max-length", "9", "--window", "1")
    assert given.stdout.splitlines() == lines[:2] + lines[3:-1]


def test_line_breaks_in_a_translation_become_spaces(run, folder, monkeypatch):
    real = Translate._read
    broken = lambda self, hypothesis: real(self, hypothesis)._replace(text="a\nb\r\nc")  # noqa: E731
    monkeypatch.setattr(Translate, "_read", broken)
    assert run("translate", "open", "-m", folder).stdout == "a b c\n"
    (record,) = run("translate", "open", "-m", folder, "--format", "jsonl").stdout.splitlines()
    assert json.loads(record)["translation"] == "a\nb\r\nc"


def test_json_lines_in_and_out(run, folder, tmp_path):
    path, out = tmp_path / "texts.jsonl", tmp_path / "out.jsonl"
    records = [{"id": n, "text": text} for n, text in enumerate([*TEXTS, ""])]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ("--beam-size", "3", "--length-penalty", "1", "--max-length", "7")
    result = run("translate", "-f", path, "-m", folder, "-o", out, *options, "--alternatives", "2")
    assert result.exit_code == 0, result.output
    expected = Translate.from_pretrained(folder)(
        [*TEXTS, ""], beam_size=3, length_penalty=1.0, num=3, max_length=7
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["line"]) for row in rows] == [(n, n + 1) for n in range(5)]
    for row, one in zip(rows, expected, strict=True):
        assert row["translation"] == one.text
        assert row["score"] == pytest.approx(one.score, abs=1e-5)
        assert row.get("unfinished", False) is not one.finished
        others = row.get("alternatives", [])
        assert [other["translation"] for other in others] == [a.text for a in one.alternatives]
    assert rows[-1]["translation"] == ""


def test_a_table_has_a_row_for_each_alternative(run, folder):
    result = run(
        "translate", *TEXTS[:2], "-m", folder, "--format", "tsv", "--alternatives", "1",
        "--max-length", "5",
    )  # fmt: skip
    rows = list(csv.DictReader(result.stdout.splitlines(), dialect="excel-tab"))
    assert [(row["text"], row["rank"]) for row in rows] == [
        (text, rank) for text in TEXTS[:2] for rank in ("1", "2")
    ]
    assert all(float(row["score"]) < 0 for row in rows)
    shown = run(
        "translate", TEXTS[0], "-m", folder, "--format", "table", "--alternatives", "1",
        "--max-length", "5",
    ).stdout.splitlines()  # fmt: skip
    assert shown[0] == TEXTS[0]
    assert len(shown) == 3


def test_samples(run, folder):
    options = ("--sample", "--temperature", "0.7", "--top-k", "50", "--top-p", "0.9")
    sampling = Sampling(0.7, 50, 0.9, seed=5)
    expected = Translate.from_pretrained(folder)(TEXTS, sampling=sampling, max_length=8)
    result = run("translate", *TEXTS, "-m", folder, *options, "--seed", "5", "--max-length", "8")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [one_line(one.text) for one in expected]
    other = run("translate", *TEXTS, "-m", folder, *options, "--seed", "6", "--max-length", "8")
    assert other.stdout != result.stdout


def test_cut_texts_are_flagged(run, folder):
    arguments = ("-m", folder, "--max-source-length", "4", "--max-length", "3")
    result = run("translate", *arguments, "--format", "jsonl", input=" ".join(TEXTS).encode())
    assert json.loads(result.stdout)["truncated"] is True
    assert "1 of 1 texts cut to 4 tokens" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-f", "-"], "give texts or --file, not both"),
        (["--temperature", "0.5"], "--temperature needs --sample"),
        (["--top-k", "5"], "--top-k needs --sample"),
        (["--sample", "--beam-size", "3"], "give --sample or --beam-size, not both"),
        (["--sample", "--temperature", "0"], "temperature must be positive and finite, not 0"),
        (["--sample", "--top-p", "1.5"], "top_p must be above 0 and at most 1, not 1.5"),
        (["--alternatives", "3", "--beam-size", "3"], "--alternatives 3 needs --beam-size 4"),
    ],
)
def test_options_that_do_not_go_together(refused, folder, options, message):
    assert message in refused("translate", "open", "-m", folder, *options)


def test_another_model_is_refused(refused, pretrained_folder, tmp_path):
    assert "bertkern-transformer" in refused("translate", "open", "-m", pretrained_folder)
    assert "nowhere" in refused("translate", "open", "-m", tmp_path / "nowhere")


def test_nothing_is_written_where_a_line_is_bad(refused, folder, tmp_path):
    path, out = tmp_path / "texts.jsonl", tmp_path / "out.txt"
    path.write_text('{"text": "open"}\n{"txt": "open"}\n')
    line = refused("translate", "-f", path, "-m", folder, "-o", out, "--max-length", "2")
    assert f"{path}: line 2: no 'text'; found: 'txt'" in line
    assert not out.exists()


def test_results_never_replace_what_is_read(run, folder, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("cannot open\n", encoding="utf-8")
    result = run("translate", "--file", path, "--model", folder, "--out", path)
    assert result.exit_code == 1
    assert "is a file that is read: its text would be lost" in one_line(result.stderr)
    assert path.read_text(encoding="utf-8") == "cannot open\n"


def test_alternatives_are_not_lost(run, folder):
    """Off a terminal the default is one translation a line, which has no place for them."""
    options = ("--alternatives", "1", "--model", folder, "--max-length", "4")
    record = json.loads(run("translate", "cannot open", *options).stdout)
    assert len(record["alternatives"]) == 1
    refused = run("translate", "cannot open", *options, "--format", "text")
    assert refused.exit_code == 1
    assert "take jsonl, tsv or csv" in one_line(refused.stderr)
