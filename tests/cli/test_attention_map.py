"""bertkern attention-map: the page's data are the probabilities, and both files are whole."""

import base64
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from bertkern.cli.attention_map import _shrunk, encode_weights, write_page
from bertkern.data import load_tokenizer
from bertkern.models import BertModel, attention_map

TEXT = "The loss </script> falls <b>when</b> $x_1$ \U0001f600 learns."
VOID = {"meta"}


class Page(HTMLParser):
    """Collects scripts and ids; every element must be closed, in order."""

    def __init__(self, path):
        super().__init__()
        self.scripts, self.ids, self._open, self._script = {}, [], [], None
        self.links = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.links += [v for k, v in attrs if k in ("src", "href")]
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag not in VOID:
            self._open.append(tag)
        if tag == "script":
            self._script = attributes.get("id", "program")
            self.scripts[self._script] = ""

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        self._script = None

    def handle_data(self, data):
        if self._script:
            self.scripts[self._script] += data


def decoded(page):
    """The weights as the page's script reads them, and its data."""
    data = json.loads(page.scripts["data"])
    kind = "<u2" if data["levels"] > 255 else "u1"
    stored = np.frombuffer(base64.b64decode(page.scripts["weights"]), kind)
    tokens = len(data["tokens"])
    stored = stored.reshape(data["layers"], data["heads"], tokens, tokens)
    return (stored / data["levels"]) ** 2, data


def random_weights(layers, heads, tokens):
    return (torch.randn(layers, heads, tokens, tokens) * 3).softmax(-1).numpy()


def test_both_files_by_default(run, encoder_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("attention-map", TEXT, "--pair", "it reads", "-m", encoder_folder)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "attention-map.png").read_bytes().startswith(b"\x89PNG")
    weights, data = decoded(Page(tmp_path / "attention-map.html"))
    encoding = load_tokenizer(encoder_folder).encode(TEXT, "it reads")
    assert data["tokens"] == encoding.tokens
    assert data["text"] == f"{TEXT} | it reads"
    model = BertModel.from_pretrained(encoder_folder)
    ids, types = torch.tensor(encoding.ids), torch.tensor(encoding.type_ids)
    expected = attention_map(model, ids, types).numpy()
    assert weights.shape == expected.shape
    assert np.abs(weights - expected).max() <= 1 / 65535 + 1e-6


@pytest.mark.parametrize("tokens", [3, 200])
def test_weights_are_as_exact_as_the_page_says(tmp_path, tokens):
    weights = random_weights(6, 40, tokens)
    levels, _ = encode_weights(weights)
    assert levels == (65535 if tokens == 3 else 255)
    path = tmp_path / "map.html"
    write_page(path, weights, ["t"] * tokens, "text", "model")
    found, _ = decoded(Page(path))
    allowed = np.sqrt(weights.astype(np.float64)) / levels + 0.2501 / levels**2 + 1e-7
    assert (np.abs(found - weights) <= allowed).all()


def test_the_page_is_one_file_whose_script_finds_its_elements(tmp_path):
    path = tmp_path / "map.html"
    write_page(path, random_weights(1, 1, 2), ["<!--", "</script>"], "<script>", "m")
    page = Page(path)
    assert not page.links
    assert "http" not in path.read_text().replace("http-equiv", "")
    assert len(page.ids) == len(set(page.ids))
    program = page.scripts["program"]
    asked = {part.split('"')[0] for part in program.split('$("')[1:]}
    assert asked <= set(page.ids)
    assert decoded(page)[1]["tokens"] == ["<!--", "</script>"]


def test_a_line_one_token_wide_survives_shrinking():
    weights = np.zeros((1, 1, 500, 500), np.float32)
    weights[0, 0, 123] = weights[0, 0, :, 499] = 1
    small = _shrunk(weights, 176)
    assert small.shape == (1, 1, 167, 167)
    assert (small[0, 0, 41] == 1).all()
    assert (small[0, 0, :, 166] == 1).all()
    assert small.sum() == 2 * 167 - 1
    assert np.array_equal(_shrunk(weights, 500), weights)


def test_long_texts_are_cut_and_drawn(run, encoder_folder, tmp_path):
    out = tmp_path / "new" / "map.png"
    result = run("attention-map", "token " * 99, "-m", encoder_folder, "-o", out)
    assert result.exit_code == 0, result.output
    assert "cut to the 64 tokens" in result.stderr
    assert [p.name for p in out.parent.iterdir()] == ["map.png"]


def test_other_files_are_refused(refused, encoder_folder, tmp_path):
    line = refused("attention-map", "a", "-m", encoder_folder, "-o", tmp_path / "map.pdf")
    assert "must end in .html or .png" in line
    (tmp_path / "x.png").mkdir()
    assert "it is a folder" in refused(
        "attention-map", "a", "-m", encoder_folder, "-o", tmp_path / "x.png"
    )
