"""Tokenizers: WordPiece as BERT's (Wu et al. 2016), or byte-level BPE (Radford et al. 2019).

    wordpiece   words are cut into the longest pieces of the vocabulary, those inside of a word
                marked ##; what cannot be cut becomes [UNK]
    bpe         pairs of bytes are merged (Sennrich et al. 2016), in the order learned; pieces at
                the beginning of a word carry its space as Ġ; nothing is unknown

The engine is `tokenizers`; here are BERT's settings and special tokens, the files, and what the
data and the model need to know of a vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece
from tokenizers.trainers import BpeTrainer, WordPieceTrainer

from .files import replacing, write_text

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
KINDS = ("wordpiece", "bpe")
ALPHABET_LIMIT = 1000  # rarer characters become [UNK]
_CHUNK_TEXTS = 10_000  # texts whose words are counted at once
_BYTE_LEVEL_SPACES = "ĠĊĉč"  # space, line feed, tab, carriage return


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


def byte_level_bpe(
    vocabulary: dict[str, int] | None = None,
    merges: list[tuple[str, str]] | None = None,
    lowercase: bool = True,
) -> Tokenizer:
    """Byte-level BPE with BERT's special tokens, by default an empty one, to be trained."""
    tokenizer = Tokenizer(BPE(vocabulary, merges) if vocabulary else BPE())
    steps = [normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])]
    tokenizer.normalizer = normalizers.Sequence(steps)
    # a space before every text, so that a word has one form wherever it stands
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    if vocabulary:
        _frame(tokenizer)
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS[:-1]))
        # the space before a masked word belongs to it
        tokenizer.add_special_tokens([AddedToken(SPECIAL_TOKENS[-1], lstrip=True)])
    return tokenizer


def train_tokenizer(
    texts: Iterable[str] | Callable[[], Iterable[str]],
    vocab_size: int = 30522,
    lowercase: bool = True,
    min_frequency: int = 2,
    *,
    kind: str = "wordpiece",
) -> Tokenizer:
    """Learn a vocabulary from texts; the same texts give the same vocabulary.

    Args:
        texts: lines or sentences, or a function that gives them anew each time: then they are
            streamed, twice for WordPiece, and may be larger than memory. An iterator that can be
            read only once is held in memory.
        vocab_size: at most so many tokens, the five special ones included.
        lowercase: whether texts are lower-cased and, for WordPiece, stripped of accents.
        min_frequency: how often a pair of pieces must occur to be merged.
        kind: "wordpiece" or "bpe".

    Raises:
        ValueError: vocab_size does not hold the special tokens and the characters of the texts (for
            BPE, all 256 bytes), the texts have no words, or kind is neither.
    """
    if callable(texts):
        read = texts
    else:
        again = list(texts) if iter(texts) is texts else texts

        def read() -> Iterable[str]:
            return again

    if kind == "wordpiece":
        return _train_wordpiece(read, vocab_size, lowercase, min_frequency)
    if kind == "bpe":
        return _train_bpe(read, vocab_size, lowercase, min_frequency)
    raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")


def _train_wordpiece(
    read: Callable[[], Iterable[str]], vocab_size: int, lowercase: bool, min_frequency: int
) -> Tokenizer:
    tokenizer = wordpiece(lowercase=lowercase)
    alphabet = _alphabet(tokenizer, read())
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
    tokenizer.train_from_iterator(read(), trainer)
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) > vocab_size:
        raise ValueError(
            f"vocab_size = {vocab_size} does not hold the characters of the text: with the special "
            f"tokens they are {len(vocabulary)}"
        )
    return wordpiece(vocabulary, lowercase)


def _train_bpe(
    read: Callable[[], Iterable[str]], vocab_size: int, lowercase: bool, min_frequency: int
) -> Tokenizer:
    least = len(SPECIAL_TOKENS) + 256
    if vocab_size < least:
        raise ValueError(
            f"vocab_size = {vocab_size} does not hold the special tokens and 256 bytes: {least}"
        )
    tokenizer = byte_level_bpe(lowercase=lowercase)
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = 0

    def counted() -> Iterator[str]:
        nonlocal words
        for text in read():
            words += bool(text.strip())
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if not words:
        raise ValueError("no words to learn a vocabulary from: the texts are empty")
    model = json.loads(tokenizer.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    return byte_level_bpe(model["vocab"], merges, lowercase)


def _alphabet(tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """The characters that words begin with, then "##" and those that they go on with; in order.

    Of more than ALPHABET_LIMIT characters, the most frequent.
    """
    starts: Counter[str] = Counter()
    inner: Counter[str] = Counter()
    texts = iter(texts)
    while chunk := list(islice(texts, _CHUNK_TEXTS)):
        words: Counter[str] = Counter()
        for text in chunk:
            normal = tokenizer.normalizer.normalize_str(text)
            words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal))
        for word, count in words.items():
            starts[word[0]] += count
            for character in word[1:]:
                inner[character] += count
    ranked = sorted(starts + inner, key=lambda c: (-starts[c] - inner[c], c))
    kept = sorted(ranked[:ALPHABET_LIMIT])
    return [c for c in kept if c in starts] + [f"##{c}" for c in kept if c in inner]


def vocabulary_digest(tokenizer: Tokenizer) -> str:
    """A digest of the vocabulary, by which token ids find the tokenizer that made them."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def continuation_ids(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Which ids go on with the word before, bool [V]: what whole-word masking joins.

    For WordPiece, the pieces with its prefix (##). For byte-level BPE, those that begin neither
    with white space (Ġ) nor with ASCII punctuation, before which its rule cuts as well.

    Raises:
        ValueError: a tokenizer of another kind.
    """
    description = json.loads(tokenizer.to_str())
    model, cut = description["model"], description["pre_tokenizer"] or {}
    kinds = {step["type"] for step in cut.get("pretokenizers", [cut]) if step}
    if model["type"] == "WordPiece":
        prefix = model["continuing_subword_prefix"]
        inner = {i: token.startswith(prefix) for token, i in tokenizer.get_vocab().items()}
    elif model["type"] == "BPE" and "ByteLevel" in kinds:
        opening = {*string.punctuation, *_BYTE_LEVEL_SPACES}
        inner = {i: token[:1] not in opening for token, i in tokenizer.get_vocab().items()}
    else:
        raise ValueError(
            f"whole-word masking knows WordPiece and byte-level BPE, not {model['type']} after "
            f"{cut.get('type', 'no pre-tokenizer')}"
        )
    flags = np.zeros(tokenizer.get_vocab_size(), dtype=np.bool_)
    for i, is_inner in inner.items():
        flags[i] = is_inner
    for token in SPECIAL_TOKENS:
        flags[tokenizer.token_to_id(token)] = False
    return flags


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
        # a line ends at \n alone: other breaks of Unicode are tokens of some vocabularies
        lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
        beside = path.with_name("tokenizer_config.json")
        settings = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
        tokenizer = wordpiece(
            {token.rstrip("\r"): i for i, token in enumerate(lines)},
            settings.get("do_lower_case", True),
        )
        tokenizer.normalizer = normalizers.BertNormalizer(
            lowercase=settings.get("do_lower_case", True),
            strip_accents=settings.get("strip_accents"),
            handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        )
        return tokenizer
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a WordPiece vocabulary ({error})") from error


def save_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> None:
    """Write tokenizer.json, tokenizer_config.json and, of WordPiece, vocab.txt.

    `load_tokenizer` and transformers' AutoTokenizer read the folder.
    """
    folder = Path(folder)
    with replacing(folder / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    is_wordpiece = isinstance(tokenizer.model, WordPiece)
    if is_wordpiece:
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        write_text(folder / "vocab.txt", "".join(f"{token}\n" for token, _ in vocabulary))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    settings: dict[str, object] = dict(zip(names, SPECIAL_TOKENS, strict=True))
    if is_wordpiece:
        lowercase = bool(getattr(tokenizer.normalizer, "lowercase", True))
        settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": lowercase, **settings}
    else:
        arguments = ["input_ids", "token_type_ids", "attention_mask"]  # of a BERT
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": arguments,
            **settings,
        }
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
