"""bertkern fill-mask."""

import json

from bertkern.models import FillMask

TEXT = "the [MASK] reads the text"


def test_words_with_probabilities(run, pretrained_folder):
    result = run("fill-mask", TEXT, "-m", pretrained_folder, "--top", "3", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert TEXT in result.stdout
    assert result.stdout.count("%") == 3


def test_files_and_standard_input_give_what_the_class_gives(run, pretrained_folder, tmp_path):
    texts = [TEXT, "[MASK] [MASK]", "every token looks at [MASK]"]
    path, out = tmp_path / "texts.txt", tmp_path / "guesses.jsonl"
    path.write_text("\n\n".join(texts))
    result = run("fill-mask", "-f", path, "-m", pretrained_folder, "-o", out, "--top", "2")
    assert result.exit_code == 0, result.output
    assert "3 texts" in result.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["text"] for row in rows] == texts
    assert [row["line"] for row in rows] == [1, 3, 5]
    expected = FillMask.from_pretrained(pretrained_folder)(texts, 2)
    for row, filled in zip(rows, expected, strict=True):
        found = [[guess["token"] for guess in mask] for mask in row["masks"]]
        assert found == [[guess.token for guess in mask] for mask in filled.masks]
    piped = run("fill-mask", "-m", pretrained_folder, "--top", "2", input="\n".join(texts).encode())
    assert [json.loads(line)["masks"] for line in piped.stdout.splitlines()] == [
        row["masks"] for row in rows
    ]


def test_a_table_for_other_programs(run, pretrained_folder):
    result = run("fill-mask", TEXT, "-m", pretrained_folder, "--format", "tsv", "--target", "model")
    header, row = (line.split("\t") for line in result.stdout.splitlines())
    found = dict(zip(header, row, strict=True))
    assert (found["mask"], found["rank"], found["token"]) == ("1", "1", "model")
    assert 0 < float(found["probability"]) < 1


def test_a_line_without_mask_is_named_and_nothing_is_written(refused, pretrained_folder, tmp_path):
    path, out = tmp_path / "texts.txt", tmp_path / "out.jsonl"
    path.write_text(f"{TEXT}\n" * 9 + "nothing here\n")
    line = refused("fill-mask", "-f", path, "-m", pretrained_folder, "-o", out, "--window", "4")
    assert f"{path}: line 10: no [MASK] in 'nothing here'" in line
    assert not out.exists()


def test_cut_texts_are_flagged(run, pretrained_folder):
    long = TEXT + " token" * 80
    result = run("fill-mask", "-m", pretrained_folder, input=long.encode())
    assert json.loads(result.stdout)["truncated"] is True
    assert "1 of 1 texts cut to 64 tokens" in result.stderr


def test_a_text_without_mask_is_refused(refused, pretrained_folder):
    line = refused("fill-mask", "no place here", "-m", pretrained_folder)
    assert "argument 1: no [MASK]" in line


def test_texts_and_files_together_are_refused(refused, pretrained_folder):
    assert "not both" in refused("fill-mask", TEXT, "-f", "-", "-m", pretrained_folder)


def test_more_words_than_the_vocabulary_are_refused(refused, pretrained_folder):
    assert "--top 999" in refused("fill-mask", TEXT, "-m", pretrained_folder, "--top", "999")


def test_a_model_without_the_head_is_refused(refused, encoder_folder):
    line = refused("fill-mask", TEXT, "-m", encoder_folder)
    assert "missing tensors" in line
