"""WordPiece tokenizers as BERT's (Wu et al. 2016): split into words, then longest pieces first.

The engine is `tokenizers`; here are BERT's settings, the files, and what the model needs to know.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer

from .files import replacing, write_text

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ALPHABET_LIMIT = 1000  # rarer characters become [UNK]


@dataclass(frozen=True)
class SpecialIds:
    """Vocabulary ids of BERT's special tokens."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> SpecialIds:
        """Those of a tokenizer.

        Raises:
            ValueError: one is not in its vocabulary.
        """
        found = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
        ids = [i for i in found.values() if i is not None]
        if len(ids) < len(found):
            missing = ", ".join(token for token, i in found.items() if i is None)
            raise ValueError(f"the vocabulary has no {missing}")
        return cls(*ids)

    def as_tuple(self) -> tuple[int, ...]:
        """The five ids."""
        return self.pad, self.unk, self.cls, self.sep, self.mask


def wordpiece(vocabulary: dict[str, int] | None = None, lowercase: bool = True) -> Tokenizer:
    """BERT's tokenizer around a vocabulary, by default an empty one, to be trained."""
    model = WordPiece(vocabulary or {}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    if vocabulary:
        _frame(tokenizer)
        tokenizer.add_special_tokens([t for t in SPECIAL_TOKENS if t in vocabulary])
    return tokenizer


def _frame(tokenizer: Tokenizer) -> None:
    """[CLS] A [SEP], or [CLS] A [SEP] B [SEP] with type 1 from B on."""
    special = SpecialIds.of(tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", special.cls), ("[SEP]", special.sep)],
    )


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 30522, lowercase: bool = True, min_frequency: int = 2
) -> Tokenizer:
    """Learn a WordPiece vocabulary from texts; the same texts give the same vocabulary.

    Args:
        texts: lines or sentences.
        vocab_size: at most so many tokens, the five special ones included.
        lowercase: whether texts are lower-cased and stripped of accents.
        min_frequency: how often a pair of pieces must occur to be merged.

    Raises:
        ValueError: vocab_size does not hold the special tokens and the characters of the texts, or
            the texts have no words.
    """
    tokenizer = wordpiece(lowercase=lowercase)
    texts = list(texts)
    alphabet = _alphabet(tokenizer, texts)
    if not alphabet:
        raise ValueError("no words to learn a vocabulary from: the texts are empty")
    # `tokenizers` numbers pieces in the order of a hash map and breaks ties of frequency by number;
    # giving it the alphabet, in order, makes the vocabulary the same in every run.
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        limit_alphabet=ALPHABET_LIMIT,
        special_tokens=[*SPECIAL_TOKENS, *alphabet],
        continuing_subword_prefix="##",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) > vocab_size:
        raise ValueError(
            f"vocab_size = {vocab_size} does not hold the characters of the text: with the special "
            f"tokens they are {len(vocabulary)}"
        )
    return wordpiece(vocabulary, lowercase)


def _alphabet(tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """The characters that words begin with, then "##" and those that they go on with; in order.

    Of more than ALPHABET_LIMIT characters, the most frequent.
    """
    starts: Counter[str] = Counter()
    inner: Counter[str] = Counter()
    for text in texts:
        normal = tokenizer.normalizer.normalize_str(text)
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal):
            starts[word[0]] += 1
            inner.update(word[1:])
    ranked = sorted(starts + inner, key=lambda c: (-starts[c] - inner[c], c))
    kept = sorted(ranked[:ALPHABET_LIMIT])
    return [c for c in kept if c in starts] + [f"##{c}" for c in kept if c in inner]


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer, with truncation and padding off.

    Args:
        path: a tokenizer.json, a vocab.txt, or a folder with one of them (tokenizer.json is
            preferred). A vocab.txt is lower-casing unless a tokenizer_config.json beside it says
            otherwise.

    Raises:
        FileNotFoundError: no such file, or neither in the folder.
        ValueError: the file is damaged.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / n for n in ("tokenizer.json", "vocab.txt") if (path / n).is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: no tokenizer.json and no vocab.txt")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".json":
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ValueError(f"{path}: damaged, or not a tokenizer ({error})") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    try:
        tokens = path.read_text(encoding="utf-8").splitlines()
        settings = path.with_name("tokenizer_config.json")
        lowercase = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
        return wordpiece(
            {token: i for i, token in enumerate(tokens)}, lowercase.get("do_lower_case", True)
        )
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a WordPiece vocabulary ({error})") from error


def save_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> None:
    """Write tokenizer.json, vocab.txt and tokenizer_config.json; AutoTokenizer reads the folder."""
    folder = Path(folder)
    with replacing(folder / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    write_text(folder / "vocab.txt", "".join(f"{token}\n" for token, _ in vocabulary))
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": bool(getattr(tokenizer.normalizer, "lowercase", True)),
        **dict(
            zip(
                ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"),
                SPECIAL_TOKENS,
                strict=True,
            )
        ),
    }
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
