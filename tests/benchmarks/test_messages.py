"""The messages data set: clean, without a leak, the same every time."""

from itertools import product

import numpy as np
import pytest
from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from bertkern.benchmarks.tasks import messages

from bertkern.data.parallel_text import Pair, read_parallel


def pair(source, target, where=None):
    return Pair(source, target, where or f"file: {source}")


def many(count):
    """Messages of their own letters."""
    names = ["".join(letters) for letters in product("abcdefgh", repeat=4)][:count]
    return [pair(f"open {name}", f"{name} öffnen") for name in names]


def write_catalogue(path, pairs):
    catalogue = Catalog()
    for source, target in pairs:
        catalogue.add(source, target)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        write_mo(file, catalogue)


def test_read(tmp_path):
    write_catalogue(tmp_path / "locale/de/LC_MESSAGES/b.mo", [("_Open", "_Öffnen")])
    write_catalogue(tmp_path / "vim/lang/de/LC_MESSAGES/a.mo", [("Close", "Schließen")])
    write_catalogue(tmp_path / "locale/de/LC_MESSAGES/iso_639.mo", [("German", "Deutsch")])
    write_catalogue(tmp_path / "locale/de/LC_MESSAGES/empty.mo", [])
    write_catalogue(tmp_path / "locale/fr/LC_MESSAGES/b.mo", [("Open", "Ouvrir")])
    found = messages.read(tmp_path)
    assert {name: [(p.source, p.target) for p in pairs] for name, pairs in found.items()} == {
        "a": [("Close", "Schließen")],
        "b": [("Open", "Öffnen")],
    }
    with pytest.raises(FileNotFoundError, match="locale/fr: no "):
        messages.read(tmp_path / "locale" / "fr")


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("Cannot open '%s': %m", "cannot open %d"),
        ("line %lu, column %-5.2f", "Line 7, column 12!"),
        ("%1$s is no file", "'%s' is no file"),
    ],
)
def test_nearly_the_same_messages_have_one_key(text, other):
    assert messages.key(text) == messages.key(other) != ""
    assert messages.key(text) != messages.key(text + " now")


def test_clean():
    found = messages.clean(
        {
            "a": [
                pair("Cannot open %s", "Kann %s nicht öffnen"),
                pair("cannot open '%d'", "Öffnen von %d unmöglich"),  # nearly the same source
                pair("Unable to open %s", "Kann %d nicht öffnen."),  # nearly the same target
                pair("Status: 3", "Status 4"),  # not translated
                pair("%d%%", "%d %%"),
                pair("x" * 51, "zu lang"),
                pair("too long", "x" * 76),
            ],
            "b": [pair("Cannot open!", "Nicht zu öffnen"), pair("Close", "Schließen")],
            "c": [],
        }
    )
    assert {name: [p.source for p in pairs] for name, pairs in found.items()} == {
        "a": ["Cannot open %s"],
        "b": ["Close"],
        "c": [],
    }


def test_build_and_write(tmp_path):
    catalogues = {"b": many(2400), "a": many(3000), "c": []}
    built = messages.build(catalogues, seed=1)
    assert (len(built.dev), len(built.test)) == (messages.DEV, messages.TEST)
    assert built.taken == {"b": 2400, "a": 600}
    parts = [{(p.source, p.target) for p in part} for part in (built.train, built.dev, built.test)]
    assert sum(map(len, parts)) == 3000
    assert set.union(*parts) == {(p.source, p.target) for p in many(3000)}
    assert built.digest == messages.build(catalogues, seed=1).digest
    assert built.digest != messages.build(catalogues, seed=2).digest
    numbers = {p.source: number for number, p in enumerate(many(3000))}
    where = [numbers[p.source] for p in built.test]  # from everywhere
    assert abs(np.mean(where) - 1500) < 5 * 3000 / np.sqrt(12 * messages.TEST)
    messages.write(built, tmp_path)
    for name in ("train", "dev", "test"):
        read = read_parallel([tmp_path / f"{name}.tsv"])
        assert [(p.source, p.target) for p in read] == [
            (p.source, p.target) for p in getattr(built, name)
        ]
    with pytest.raises(ValueError, match="2599 messages: at least 2600 are needed"):
        messages.build({"a": many(2599)})


def test_forms_of_a_message_stay_together():
    """Its singular and its plural stand at one place of the catalogue."""
    pairs = many(3000)
    together = [pair(p.source, p.target, f"file: {i // 2}") for i, p in enumerate(pairs)]
    built = messages.build({"a": together})
    parts = [{p.where for p in part} for part in (built.train, built.dev, built.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1500
    assert (len(built.dev), len(built.test)) == (messages.DEV, messages.TEST)


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(messages, "DEV", 1)
    monkeypatch.setattr(messages, "TEST", 2)
    pairs = [(p.source, p.target) for p in many(9)]
    write_catalogue(tmp_path / "de/LC_MESSAGES/program.mo", pairs)
    assert messages.main([str(tmp_path / "out"), "--folder", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "9  program" in printed
    assert "6 training, 1 dev, 2 test pairs" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dev.tsv",
        "test.tsv",
        "train.tsv",
    ]
