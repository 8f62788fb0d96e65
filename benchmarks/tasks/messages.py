"""English messages of programs and their German translations, from this system's catalogues.

    python -m bertkern.benchmarks.tasks.messages OUT [--folder FOLDER] [--seed N]

    OUT/train.tsv, OUT/dev.tsv, OUT/test.tsv   source and target, with a header

Programs bring their messages as gettext catalogues (FOLDER/**/de/LC_MESSAGES/*.mo, by default of
/usr/share); no download. Left out are lists of names (languages, countries, currencies, keyboards),
messages that are not translated, and long ones. Of messages that differ in case, digits,
punctuation or format codes only, on either side, the first is kept, and the singular and plural of
one message stay together: so no message that is held out is trained on in any of these forms. The
same catalogues and the same seed give the same
files; printed are the catalogues, how many messages each gives, and a digest.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bertkern.data.files import write_text
from bertkern.data.parallel_text import Pair, read_parallel

FOLDER = Path("/usr/share")
PATTERN = "**/de/LC_MESSAGES/*.mo"
NAMES = re.compile(r"iso_|xkeyboard")  # catalogues of names, which cannot be translated but known
DEV, TEST = 300, 1000
MOST_CHARACTERS = 50  # of a source; its target may have half as many again
_FORMAT = re.compile(r"%[-+#$'*.\d]*(?:hh|h|ll|l|j|z|t)?[a-zA-Z]")
_NO_LETTERS = re.compile(r"[\W\d_]+")


@dataclass(frozen=True)
class Messages:
    """The data set.

    Attributes:
        train, dev, test: pairs; figures on the way are of dev, those at the end of test.
        taken: how many pairs each catalogue gave.
    """

    train: list[Pair]
    dev: list[Pair]
    test: list[Pair]
    taken: dict[str, int]

    @property
    def digest(self) -> str:
        """Of all texts in order: whether two machines have the same."""
        texts = (f"{p.source}\t{p.target}\n" for p in (*self.train, *self.dev, *self.test))
        return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]


def read(folder: Path) -> dict[str, list[Pair]]:
    """The pairs of each catalogue below the folder, without those of names.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = {str(path): path.stem for path in sorted(folder.glob(PATTERN))}
    chosen = {path: name for path, name in paths.items() if not NAMES.match(name)}
    found: dict[str, list[Pair]] = {}
    for pair in read_parallel(chosen, accelerators=False) if chosen else ():
        found.setdefault(chosen[pair.where.rpartition(": ")[0]], []).append(pair)
    if not found:
        raise FileNotFoundError(
            f"{folder}: no {PATTERN}; the messages of programs come with Linux distributions, "
            "where languages other than English are installed"
        )
    return found


def key(text: str) -> str:
    """What nearly the same messages have in common."""
    return " ".join(_NO_LETTERS.sub(" ", _FORMAT.sub(" ", text)).casefold().split())


def clean(catalogues: Mapping[str, Sequence[Pair]]) -> dict[str, list[Pair]]:
    """Those that are translated, short, and nearly like none before them, by catalogue."""
    seen: tuple[set[str], set[str]] = (set(), set())
    kept: dict[str, list[Pair]] = {}
    for name, pairs in catalogues.items():
        kept[name] = []
        for pair in pairs:
            keys = key(pair.source), key(pair.target)
            if (
                all(keys)
                and keys[0] != keys[1]
                and len(pair.source) <= MOST_CHARACTERS
                and len(pair.target) <= 1.5 * MOST_CHARACTERS
                and not any(k in known for k, known in zip(keys, seen, strict=True))
            ):
                kept[name].append(pair)
                for k, known in zip(keys, seen, strict=True):
                    known.add(k)
    return kept


def build(catalogues: Mapping[str, Sequence[Pair]], seed: int = 0) -> Messages:
    """The data set of catalogues: DEV and TEST of their messages, chosen at random, are held out.

    Raises:
        ValueError: fewer than twice as many messages as are held out.
    """
    kept = clean(catalogues)
    pairs = [pair for name in kept for pair in kept[name]]
    if len(pairs) < 2 * (DEV + TEST):
        raise ValueError(
            f"{len(pairs)} messages: at least {2 * (DEV + TEST)} are needed, of which {DEV + TEST} "
            "are held out"
        )
    forms: dict[str, list[Pair]] = {}  # of each message: one, or its singular and its plural
    for pair in pairs:
        forms.setdefault(pair.where, []).append(pair)
    messages = list(forms.values())
    train, dev, test = list[Pair](), list[Pair](), list[Pair]()
    for number in np.random.default_rng(seed).permutation(len(messages)).tolist():
        part = test if len(test) < TEST else dev if len(dev) < DEV else train
        part.extend(messages[number])
    return Messages(train, dev, test, {name: len(kept[name]) for name in kept if kept[name]})


def write(messages: Messages, out: Path) -> None:
    """The three files."""
    for name in ("train", "dev", "test"):
        rows = [("source", "target"), *((p.source, p.target) for p in getattr(messages, name))]
        write_text(out / f"{name}.tsv", "".join(f"{a}\t{b}\n" for a, b in rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the data set, write it and print what it took."""
    parser = argparse.ArgumentParser(
        prog="python -m bertkern.benchmarks.tasks.messages",
        description="English messages and their German translations, from gettext catalogues.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the three files")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where catalogues are")
    parser.add_argument("--seed", type=int, default=0, help="of what is held out")
    options = parser.parse_args(arguments)
    messages = build(read(options.folder), options.seed)
    write(messages, options.out)
    for name, count in messages.taken.items():
        print(f"{count:6,}  {name}")
    sizes = (len(messages.train), len(messages.dev), len(messages.test))
    print("{:,} training, {:,} dev, {:,} test pairs".format(*sizes), f"(digest {messages.digest})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
