"""Word vectors: cosines by definition and as gensim's, and first embeddings."""

import numpy as np
import pytest
import torch

from bertkern.data import train_tokenizer
from bertkern.models.word_vectors import WordVectors

# king - man + woman = queen, exactly
WORDS = ["man", "woman", "king", "queen", "apple", "nothing"]
VECTORS = [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 2], [0, 0, 0, 0]]


@pytest.fixture
def few():
    return WordVectors(WORDS, VECTORS)


@pytest.fixture
def many():
    rng = np.random.default_rng(0)
    return WordVectors([f"w{i}" for i in range(80)], rng.standard_normal((80, 12)))


def test_similarities_are_cosines(few):
    assert few.similarity("man", "woman") == 0.0
    assert few.similarity("man", "king") == pytest.approx(0.5**0.5)
    assert few.similarity("King", "king") == pytest.approx(1.0)  # found by its lower-cased form
    assert few.similarity("nothing", "man") == 0.0
    assert len(few) == 6
    assert few.size == 4
    assert "King" in few
    assert "prince" not in few
    assert few.vector("apple").tolist() == [0, 0, 0, 2]
    assert few.vectors.dtype == np.float32


def test_nearest_words_against_all_cosines(many):
    v = many.vectors.astype(np.float64)
    unit = v / np.linalg.norm(v, axis=1, keepdims=True)
    cosines = unit @ unit[3]
    order = [i for i in np.argsort(-cosines) if i != 3]
    for count in (1, 5, 79, 500):
        found = many.nearest("w3", count)
        assert [n.word for n in found] == [f"w{i}" for i in order[:count]]
        assert [n.similarity for n in found] == pytest.approx(cosines[order[:count]], abs=1e-6)


def test_analogies(few, many):
    assert few.analogy("man", "king", "woman", 1)[0].word == "queen"
    v = many.vectors.astype(np.float64)
    unit = v / np.linalg.norm(v, axis=1, keepdims=True)
    goal = unit[5] - unit[4] + unit[6]
    cosines = unit @ goal / np.linalg.norm(goal)
    order = [i for i in np.argsort(-cosines) if i not in (4, 5, 6)]
    found = many.analogy("w4", "w5", "w6", 4)
    assert [n.word for n in found] == [f"w{i}" for i in order[:4]]
    assert [n.similarity for n in found] == pytest.approx(cosines[order[:4]], abs=1e-6)


def test_an_unknown_word_is_named_with_others_like_it(few):
    with pytest.raises(ValueError, match=r"'kings' is not among the 6 words; spelled like it: kin"):
        few.vector("kings")
    with pytest.raises(ValueError, match=r"'zzz' is not among the 6 words$"):
        few.nearest("zzz")
    with pytest.raises(ValueError, match="count must be 1 or more, not 0"):
        few.nearest("king", 0)


@pytest.mark.parametrize(
    ("words", "vectors", "message"),
    [
        (["a", "b"], [[1.0, 2.0]], r"a row for each of the 2 words, not \[1, 2\]"),
        ([], np.zeros((0, 3)), r"not \[0, 3\]"),
        (["a", "b", "a"], np.ones((3, 2)), "the word 'a' has two vectors"),
        (["a", "b"], [[1.0, 2.0], [np.nan, 0.0]], "the vector of 'b' has NaN or Inf"),
    ],
)
def test_vectors_that_are_none_are_refused(words, vectors, message):
    with pytest.raises(ValueError, match=message):
        WordVectors(words, vectors)


def test_the_plane_is_that_of_sklearn(many):
    decomposition = pytest.importorskip("sklearn.decomposition")
    words = many.words[:30]
    unit = np.stack([many.vector(w) / np.linalg.norm(many.vector(w)) for w in words])
    expected = decomposition.PCA(2, svd_solver="full").fit_transform(unit.astype(np.float64))
    found = many.plane(words)
    for column in range(2):
        sign = np.sign(expected[:, column] @ found[:, column])
        assert found[:, column] == pytest.approx(sign * expected[:, column], abs=1e-6)
        assert found[np.abs(found[:, column]).argmax(), column] > 0
    with pytest.raises(ValueError, match="two words"):
        many.plane(["w1"])


def test_answers_are_those_of_gensim(many):
    gensim = pytest.importorskip("gensim")
    theirs = gensim.models.KeyedVectors(many.size)
    theirs.add_vectors(many.words, many.vectors)
    for found, expected in (
        (many.nearest("w3", 5), theirs.most_similar("w3", topn=5)),
        (
            many.analogy("w4", "w5", "w6", 5),
            theirs.most_similar(positive=["w5", "w6"], negative=["w4"], topn=5),
        ),
    ):
        assert [n.word for n in found] == [word for word, _ in expected]
    assert many.similarity("w1", "w2") == pytest.approx(theirs.similarity("w1", "w2"), abs=1e-6)


def test_files_are_those_of_word_vector_files(many, tmp_path):
    many.save(tmp_path / "a.bin")
    again = WordVectors.load(tmp_path / "a.bin", limit=3)
    assert again.words == ["w0", "w1", "w2"]
    assert np.array_equal(again.vectors, many.vectors[:3])
    (tmp_path / "a.txt").write_text("2 1\na 1\na 2\n")
    with pytest.raises(ValueError, match=r"a.txt: the word 'a' has two vectors"):
        WordVectors.load(tmp_path / "a.txt")


SENTENCES = [
    "The dog saw the cat.",
    "Der Hund sah die Katze, und der Hund lief.",
    "the cat and the dog ran",
]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
@pytest.mark.parametrize("size", [4, 16, 40])
def test_a_first_embedding_table(kind, size):
    """As large as, smaller and larger than the vectors, which have 16 numbers."""
    tokenizer = train_tokenizer(
        SENTENCES * 4, 400, kind=kind, lowercase=kind == "wordpiece", min_frequency=1
    )
    rng = np.random.default_rng(0)
    vectors = WordVectors(
        ["der", "hund", "dog", "cat", "unseen"], 0.3 * rng.standard_normal((5, 16))
    )
    table, started = vectors.table_for(tokenizer, size, torch.Generator().manual_seed(0))
    again, _ = vectors.table_for(tokenizer, size, torch.Generator().manual_seed(0))
    assert torch.equal(table, again)
    assert table.shape == (tokenizer.get_vocab_size(), size)
    assert table.dtype == torch.float32

    def row(text):
        (token,) = tokenizer.encode(text, add_special_tokens=False).ids
        return table[token]

    texts = {"der": ["der"], "hund": ["Hund"], "dog": ["dog"], "cat": ["cat"]}
    if kind == "bpe":
        texts["der"].append("Der")
    assert started == sum(map(len, texts.values()))
    rows = [row(text) for forms in texts.values() for text in forms]
    mean_square = torch.stack(rows).square().mean()
    assert float(mean_square.sqrt()) == pytest.approx(size**-0.5, rel=1e-5)
    cosine = float(torch.cosine_similarity(row("dog"), row("cat"), dim=0))
    if size >= 16:
        assert cosine == pytest.approx(vectors.similarity("dog", "cat"), abs=1e-5)
    if size == 16:
        assert torch.cosine_similarity(row("dog"), torch.from_numpy(vectors.vector("dog")), dim=0)
    # the others are noise of the same size
    tokens = [
        tokenizer.encode(t, add_special_tokens=False).ids[0] for f in texts.values() for t in f
    ]
    others = torch.ones(len(table), dtype=torch.bool)
    others[tokens] = False
    noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(0)) * size**-0.5
    assert torch.equal(table[others], noise[others])


def test_projected_rows_are_those_of_the_most_weight():
    """Where the table has fewer columns, products of vectors change as little as they can."""
    tokenizer = train_tokenizer(SENTENCES * 4, 400, kind="bpe", lowercase=False, min_frequency=1)
    rng = np.random.default_rng(0)
    words = ["dog", "cat", "Hund", "sah", "ran"]
    plane = rng.standard_normal((5, 3)) @ rng.standard_normal((3, 16))  # they lie in 3 dimensions
    vectors = WordVectors(words, plane)
    table, started = vectors.table_for(tokenizer, 3, torch.Generator().manual_seed(0))
    assert started >= 5
    rows = torch.stack(
        [table[tokenizer.encode(w, add_special_tokens=False).ids[0]] for w in words]
    ).double()
    ratio = (rows @ rows.T).numpy() / (vectors.vectors.astype(np.float64) @ vectors.vectors.T)
    assert ratio == pytest.approx(np.full((5, 5), ratio[0, 0]), rel=1e-3)


def test_table_arguments_out_of_range(few):
    tokenizer = train_tokenizer(SENTENCES, 400, kind="bpe")
    with pytest.raises(ValueError, match="hidden_size must be 1 or more, not 0"):
        few.table_for(tokenizer, 0)
    with pytest.raises(ValueError, match="std must be above 0, not 0"):
        few.table_for(tokenizer, 8, std=0)
