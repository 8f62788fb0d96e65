"""Words as vectors: similarities, nearest words, analogies, and a model's first embeddings.

    similarity(a, b)     cosine: a·b / (|a| |b|)
    nearest(a)           the words of the largest cosine
    analogy(a, b, c)     a is to b as c is to ?: nearest to b/|b| - a/|a| + c/|c|
                         (Mikolov, Yih and Zweig 2013)
    plane(words)         their two principal components, for a picture
    table_for(tokenizer) an embedding table whose tokens that are words begin as these

`bertkern.train.train_word_vectors` makes them from text; files are those of word2vec (see
`bertkern.models.word_vector_files`), so vectors of other programs serve as well.

Legend: N words, d numbers of a vector, V tokens of a tokenizer.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer
from torch import Tensor

from bertkern.data.tokenizer import SPECIAL_TOKENS

from . import word_vector_files

Vectors = NDArray[np.float32]

_SUGGESTIONS = 3
_COMPARED = 20_000  # words that an unknown one is compared with, letter by letter


class Neighbour(NamedTuple):
    """A word, and its cosine similarity with what was asked for."""

    word: str
    similarity: float


class WordVectors:
    """Words and their vectors.

    Args:
        words: N different words; those of `train_word_vectors` stand by falling frequency.
        vectors: [N, d], kept as float32.

    Raises:
        ValueError: sizes that do not fit one another, a word twice, or NaN or Inf in a vector.
    """

    def __init__(self, words: Sequence[str], vectors: ArrayLike) -> None:
        self.words = list(words)
        self.vectors: Vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        shape = self.vectors.shape
        if len(shape) != 2 or shape[0] != len(self.words) or 0 in shape:
            raise ValueError(
                f"vectors must be [N, d], a row for each of the {len(self.words)} words, "
                f"not {list(shape)}"
            )
        self._rows = {word: row for row, word in enumerate(self.words)}
        if len(self._rows) < len(self.words):
            twice = next(w for row, w in enumerate(self.words) if self._rows[w] != row)
            raise ValueError(f"the word {twice!r} has two vectors")
        # float64, so that no finite vector's norm is Inf
        self._norms = np.sqrt(np.einsum("nd,nd->n", self.vectors, self.vectors, dtype=np.float64))
        if not np.isfinite(self._norms).all():
            row = int(np.flatnonzero(~np.isfinite(self._norms))[0])
            raise ValueError(f"the vector of {self.words[row]!r} has NaN or Inf")

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return isinstance(word, str) and (word in self._rows or word.lower() in self._rows)

    @property
    def size(self) -> int:
        """d."""
        return int(self.vectors.shape[1])

    def vector(self, word: str) -> Vectors:
        """The vector of a word, float32 [d].

        Args:
            word: taken as it stands or, where there is none such, lower-cased.

        Raises:
            ValueError: it is not among the words.
        """
        return self.vectors[self._row(word)]

    def similarity(self, a: str, b: str) -> float:
        """The cosine of the angle between two words' vectors, -1 to 1; 0 where one is 0.

        Raises:
            ValueError: a or b is not among the words.
        """
        return float(self._unit(a) @ self._unit(b))

    def nearest(self, word: str, count: int = 10) -> list[Neighbour]:
        """The words whose vectors point most nearly where this word's does, itself left out.

        Raises:
            ValueError: it is not among the words, or count is below 1.
        """
        return self._nearest(self._unit(word), [word], count)

    def analogy(self, a: str, b: str, c: str, count: int = 10) -> list[Neighbour]:
        """The words that are to c as b is to a; none of the three themselves.

        Raises:
            ValueError: one is not among the words, or count is below 1.
        """
        return self._nearest(self._unit(b) - self._unit(a) + self._unit(c), [a, b, c], count)

    def plane(self, words: Sequence[str]) -> NDArray[np.float64]:
        """Where words lie on the plane in which they differ most, [len(words), 2].

        The first two principal components of their vectors, scaled to length 1; a component's
        largest number is positive, so that a picture does not flip.

        Raises:
            ValueError: fewer than two words, one that is not among them, or d is 1.
        """
        if len(words) < 2 or self.size < 2:
            raise ValueError(
                f"a plane needs two words and two numbers a word, not {len(words)} and {self.size}"
            )
        units = np.stack([self._unit(word) for word in words])
        centred = units - units.mean(axis=0)
        _, _, directions = np.linalg.svd(centred, full_matrices=False)
        places = centred @ directions[:2].T
        largest = np.abs(places).argmax(axis=0)
        return places * np.where(places[largest, [0, 1]] < 0, -1.0, 1.0)

    def table_for(
        self,
        tokenizer: Tokenizer,
        hidden_size: int,
        generator: torch.Generator | None = None,
        std: float | None = None,
    ) -> tuple[Tensor, int]:
        """An embedding table whose tokens that are words begin as their vectors.

        A token is a word if the tokenizer makes it, alone, of the word, of its form with a capital
        or in capitals; of several such words the first one counts. Vectors are multiplied by one
        number, so that the numbers of these rows have the root mean square `std`. Where
        d < hidden_size they are turned into the larger space, at random, which keeps every angle;
        where d > hidden_size they are projected on the hidden_size directions of most weight.

        Args:
            tokenizer: of the model.
            hidden_size: columns of the table.
            generator: draws the other rows, from N(0, std²), and the turn.
            std: None: hidden_size^-0.5, as of the Transformer's embedding; BERT's is 0.02.

        Returns:
            (float32 [V, hidden_size] on the CPU, how many rows begin as vectors).

        Raises:
            ValueError: hidden_size is below 1, or std is not above 0.
        """
        if hidden_size < 1:
            raise ValueError(f"hidden_size must be 1 or more, not {hidden_size}")
        std = hidden_size**-0.5 if std is None else std
        if not std > 0:
            raise ValueError(f"std must be above 0, not {std}")
        table = torch.randn(tokenizer.get_vocab_size(), hidden_size, generator=generator) * std
        row_of_token = self._rows_of_tokens(tokenizer)
        if not row_of_token:
            return table, 0
        tokens = torch.tensor(list(row_of_token), dtype=torch.int64)
        found = torch.from_numpy(self.vectors[list(row_of_token.values())])
        if self.size < hidden_size:
            turn, _ = torch.linalg.qr(torch.randn(hidden_size, self.size, generator=generator))
            found = found @ turn.T
        elif self.size > hidden_size:
            # of all words, so that it does not depend on the tokenizer
            _, directions = np.linalg.eigh(self.vectors.T.astype(np.float64) @ self.vectors)
            main = np.ascontiguousarray(directions[:, ::-1][:, :hidden_size], dtype=np.float32)
            found = found @ torch.from_numpy(main)
        mean_square = float(found.square().mean())
        table[tokens] = found * (std / mean_square**0.5 if mean_square else 1.0)
        return table, len(tokens)

    def save(self, path: str | os.PathLike[str], format: str | None = None) -> None:
        """Write a file of word2vec's text or binary format, whole or not at all.

        Args:
            path: named .txt or .vec (text), .bin (binary), any of them with .gz (compressed).
            format: "text" or "binary", whatever the name.

        Raises:
            ValueError: the name or the format is none of these; a word is empty or has white space,
                which ends words in these files.
        """
        word_vector_files.write(path, self.words, self.vectors, format)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        format: str | None = None,
        limit: int | None = None,
    ) -> WordVectors:
        """Read a file of word2vec's text or binary format.

        Args:
            path, format: as of `save`. A text file may lack the first line, as GloVe's do.
            limit: read the first so many words; None: all.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a name or format that is not known, a damaged file (it says where), a word
                twice, NaN or Inf.
        """
        words, vectors = word_vector_files.read(path, format, limit)
        try:
            return cls(words, vectors)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def _row(self, word: str) -> int:
        for form in (word, word.lower()):
            if form in self._rows:
                return self._rows[form]
        alike = difflib.get_close_matches(word.lower(), self.words[:_COMPARED], _SUGGESTIONS)
        raise ValueError(
            f"{word!r} is not among the {len(self):,} words"
            + (f"; spelled like it: {', '.join(alike)}" if alike else "")
        )

    def _unit(self, word: str) -> NDArray[np.float64]:
        """The vector with length 1, or 0."""
        row = self._row(word)
        return self.vectors[row] / (self._norms[row] or 1.0)

    def _nearest(
        self, vector: NDArray[np.float64], without: Sequence[str], count: int
    ) -> list[Neighbour]:
        if count < 1:
            raise ValueError(f"count must be 1 or more, not {count}")
        length = float(np.linalg.norm(vector)) or 1.0
        norms = np.where(self._norms > 0, self._norms, 1.0)
        cosines = self.vectors @ (vector / length).astype(np.float32) / norms
        cosines[[self._row(word) for word in without]] = -np.inf
        count = min(count, len(self) - len({self._row(word) for word in without}))
        best = np.argpartition(-cosines, min(count, len(self) - 1))[:count]
        ranked = best[np.lexsort((best, -cosines[best]))]
        return [Neighbour(self.words[row], float(cosines[row])) for row in ranked]

    def _rows_of_tokens(self, tokenizer: Tokenizer) -> dict[int, int]:
        """For each token id that is a word, the row of its vector."""
        special = {tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
        rows: dict[int, int] = {}
        for change in (str, str.capitalize, str.upper):
            forms = [change(word) for word in self.words]
            encodings = tokenizer.encode_batch_fast(forms, add_special_tokens=False)
            for row, encoding in enumerate(encodings):
                ids = encoding.ids
                if len(ids) == 1 and ids[0] not in special:
                    rows.setdefault(ids[0], row)
        return rows
