"""The command line, run in this process."""

import json

import pytest
import torch
from typer.testing import CliRunner

from bertkern.cli.main import app
from bertkern.data import save_tokenizer, train_tokenizer
from bertkern.models import BertConfig, BertForPreTraining, BertModel

SENTENCES = [
    "The small model reads the text.",
    "A kernel computes the attention of a sequence.",
    "Every token looks at every other token.",
    "The loss falls when the model learns.",
    "A sequence of words becomes a vector.",
    "Nobody reads the tokens of the padding.",
]


@pytest.fixture
def run():
    """Run `bertkern ...`; the result has exit_code, stdout and stderr."""

    def call(*arguments, **options):
        return CliRunner().invoke(app, [str(a) for a in arguments], **options)

    return call


@pytest.fixture
def refused(run):
    """Run a command that must fail with one line on stderr and exit code 1; returns the line."""

    def call(*arguments, **options):
        result = run(*arguments, **options)
        assert result.exit_code == 1, (result.exit_code, result.output, result.exception)
        assert isinstance(result.exception, SystemExit)
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("error: ")
        return lines[0]

    return call


@pytest.fixture
def corpus(tmp_path):
    """A text file of eight small documents."""
    path = tmp_path / "corpus.txt"
    documents = [" ".join(SENTENCES[i:] + SENTENCES[:i]) for i in range(6)] * 2
    path.write_text("\n\n".join(documents[:8]) + "\n", encoding="utf-8")
    return path


def save_small(folder, make):
    tokenizer = train_tokenizer(SENTENCES, vocab_size=200, min_frequency=1)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    make(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture
def encoder_folder(tmp_path):
    """A tiny sentence encoder."""
    return save_small(tmp_path / "encoder", BertModel)


@pytest.fixture
def pretrained_folder(tmp_path):
    """A tiny pre-trained BERT."""
    return save_small(tmp_path / "pretrained", BertForPreTraining)


@pytest.fixture
def config_file(tmp_path):
    """Write a config.json with some entries."""

    def write(**entries):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(entries))
        return path

    return write
