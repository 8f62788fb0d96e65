"""A small tokenizer, and files to read."""

import pytest

from bertkern.data import train_tokenizer

TEXTS = [
    "The cat sat on the mat, and the dog saw the cat.",
    "A man plays the guitar; nobody listens to it today.",
    "Where did the dog go? It went to New York in 1895 with Ann Lee.",
    "Café naïve über résumé!",
]


@pytest.fixture(scope="session")
def words():
    """A WordPiece tokenizer of a few English words, all letters and digits."""
    letters = " ".join("abcdefghijklmnopqrstuvwxyz0123456789")
    joined = "abcdefghijklmnopqrstuvwxyz0123456789"
    return train_tokenizer([*TEXTS * 3, letters, joined, joined[::-1]], 300, min_frequency=1)


@pytest.fixture
def write(tmp_path):
    """Write a file into the test's folder; its path."""

    def call(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return call
