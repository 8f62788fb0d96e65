"""Classification files in the forms of GLUE, SuperGLUE and users, and their token ids."""

import numpy as np
import pytest
import transformers

from bertkern.data import save_tokenizer
from bertkern.data.classification import ClassificationData, read_classification

# header, first row and last row; the rows' texts are (A "b., C.) and (D, E), their labels 1 and 0
GLUE = {
    "RTE": (
        "index\tsentence1\tsentence2\tlabel",
        '0\tA "b.\tC.\tnot_entailment',
        "7\tD\tE\tentailment",
    ),
    "QNLI": (
        "index\tquestion\tsentence\tlabel",
        '0\tA "b.\tC.\tnot_entailment',
        "7\tD\tE\tentailment",
    ),
    "MRPC": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '1\t5\t6\tA "b.\tC.',
        "0\t8\t9\tD\tE",
    ),
    "QQP": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        '0\t1\t2\tA "b.\tC.\t1',
        "7\t3\t4\tD\tE\t0",
    ),
    "WNLI": ("index\tsentence1\tsentence2\tlabel", '0\tA "b.\tC.\t1', "7\tD\tE\t0"),
    "MNLI": (
        "index\tgenre\tsentence1_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        '0\tx\t(A)\tA "b.\tC.\tneutral\tneutral',
        "7\tx\t(D)\tD\tE\tneutral\tentailment",
    ),
}
NAMES = {
    "RTE": ["entailment", "not_entailment"],
    "QNLI": ["entailment", "not_entailment"],
    "MNLI": ["entailment", "neutral"],
}


@pytest.mark.parametrize("name", sorted(GLUE))
def test_glue_pairs(write, name):
    read = read_classification(write("train.tsv", "\n".join(GLUE[name]) + "\n"))
    assert read.texts == ['A "b.', "D"]
    assert read.pairs == ["C.", "E"]
    assert read.labels.tolist() == [1, 0]
    assert read.label_names == NAMES.get(name, ["0", "1"])
    assert read.ids == (["0", "1"] if name == "MRPC" else ["0", "7"])
    assert not read.regression


def test_single_sentences_scores_and_test_files(write):
    sst = read_classification(write("sst.tsv", "sentence\tlabel\nfine \t1\nbad \t0\n"))
    assert (sst.texts, sst.pairs, sst.labels.tolist()) == (["fine ", "bad "], None, [1, 0])
    cola = read_classification(write("cola.tsv", "gj04\t1\t\tFine.\ngj04\t0\t*\tBad the.\n"))
    assert (cola.texts, cola.labels.tolist()) == (["Fine.", "Bad the."], [1, 0])
    header = "index\tgenre\tsentence1\tsentence2\tscore\n"
    sts = read_classification(write("sts.tsv", header + "0\tx\ta\tb\t5.000\n1\tx\tc\td\t0.5\n"))
    assert sts.regression
    assert sts.label_names is None
    assert sts.labels.tolist() == [5.0, 0.5]
    assert sts.labels.dtype == np.float32
    path = write("test.tsv", "index\tsentence1\tsentence2\n3\ta\tb\n")
    unlabelled = read_classification(path)
    assert unlabelled.labels is None
    assert unlabelled.ids == ["3"]
    with pytest.raises(ValueError, match=r"test.tsv: no column .* for the label .*'sentence2'"):
        read_classification(path, labelled=True)


def test_superglue_and_users_forms(write):
    rte = '{"premise": "A", "hypothesis": "B", "label": "entailment", "idx": 4}\n'
    rte += '{"premise": "C", "hypothesis": "D", "label": "not_entailment", "idx": 5}\n'
    read = read_classification(write("val.jsonl", rte))
    assert (read.texts, read.pairs, read.labels.tolist()) == (["A", "C"], ["B", "D"], [0, 1])
    assert read.ids == ["4", "5"]
    boolean = write("b.jsonl", '{"text": "A", "label": true}\n{"text": "B", "label": false}')
    assert read_classification(boolean).label_names == ["false", "true"]
    own = write("own.csv", "id,what,kind\n1,good,yes\n2,bad,no\n3,ugly,no\n")
    read = read_classification(own, text="what", label="kind")
    assert (read.label_names, read.labels.tolist()) == (["no", "yes"], [1, 0, 0])
    numbers = write("n.csv", "text,label\na,10\nb,9\nc,2\n")
    read = read_classification(numbers)
    assert (read.label_names, read.labels.tolist()) == (["2", "9", "10"], [2, 1, 0])
    assert read_classification(numbers, regression=True).labels.tolist() == [10.0, 9.0, 2.0]
    secret = write("s.jsonl", '{"text": "A", "label": -1}\n{"text": "B", "label": -1}')
    assert read_classification(secret).labels is None
    assert "not labelled" in read_classification(secret).notes[0]


def label_file(write, labels):
    return write("l.csv", "text,label\n" + "".join(f"t,{label}\n" for label in labels))


def test_whole_numbers_with_decimals_are_classes(write):
    """As pandas writes them where a label is missing somewhere; the note says what was decided."""
    read = read_classification(label_file(write, ["1.0", "0.0", "2.0", "1"]))
    assert (read.label_names, read.labels.tolist()) == (["0", "1", "2"], [1, 0, 2, 1])
    assert read.notes == [
        "labels are 3 classes, whole numbers from 0 to 2; --regression takes them for scores"
    ]
    dev = read_classification(label_file(write, ["2.0", "0"]), label_names=read.label_names)
    assert (dev.labels.tolist(), dev.notes) == ([2, 0], [])
    scores = read_classification(label_file(write, ["1.0", "0.0"]), regression=True)
    assert (scores.labels.tolist(), scores.notes) == ([1.0, 0.0], [])
    versions = read_classification(label_file(write, ["1.0", "2.0", "none"]))
    assert versions.label_names == ["1.0", "2.0", "none"]
    versions = read_classification(label_file(write, ["1.0"]), label_names=["1.0", "none"])
    assert versions.labels.tolist() == [0]
    secret = read_classification(label_file(write, ["-1.0", "-1"]))
    assert secret.labels is None


def test_scores_are_told_from_many_classes(write):
    """STS-B's are scores also where all of a part are whole; numbers of 77 intents are classes."""
    read = read_classification(label_file(write, ["5.000", "2.8", "0.000"]))
    assert read.regression
    assert read.notes == [
        "labels are scores from 0 to 5, as not all are whole numbers; --no-regression takes them "
        "for classes"
    ]
    classes = read_classification(label_file(write, ["5.5", "2.5"]), regression=False)
    assert classes.label_names == ["2.5", "5.5"]
    read = read_classification(label_file(write, [f"{n}.0" for n in range(21)]))
    assert read.regression
    assert "as there are 21 of them" in read.notes[0]
    read = read_classification(label_file(write, range(77)))
    assert read.label_names == [str(n) for n in range(77)]
    assert "labels are 77 classes" in read.notes[0]
    assert read_classification(label_file(write, [0, 1])).notes == []


def test_subset_and_what_is_passed_over(write):
    rows = "A\tB\tneutral\nC\tD\t-\n\nE\tF\tentailment\n"
    read = read_classification(write("a.tsv", "sentence1\tsentence2\tgold_label\n" + rows))
    assert read.texts == ["A", "E"]
    assert read.notes == [
        "1 blank line(s) passed over",
        "1 example(s) left out, whose label is '-'",
    ]
    part = read.subset([1])
    assert (part.texts, part.pairs, part.labels.tolist(), part.ids) == (["E"], ["F"], [0], ["1"])


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("text,label\na,yes\nb,no\nc,ja\n", {"label_names": ["no", "yes"]},
         r"a.csv: line 4: label 'ja' is not allowed; allowed: 'no', 'yes'"),
        ("text,label\na,yes\nb,\n", {}, r"line 3: 'label' must be a label, not ''"),
        ("text,label\na,1.5\nb,no\n", {"regression": True}, r"line 3: .* a number, not 'no'"),
        ("text,label\na,1.5\nb,nan\n", {"regression": True}, r"line 3: .* a number, not 'nan'"),
        ("text,label\na,x\nb,x\n", {}, r"every label is 'x'; two classes are needed"),
        ("words,label\na,x\n", {}, r"no column .* for the text .*; found: 'words', 'label'; name"),
        ("text,label\na,x\n", {"text": "txt"}, r"no column 'txt' for the text; found: 'text'"),
        ("text,label\na,x\n", {"label": "y", "labelled": True}, r"no column 'y' for the label"),
        ("text,label\na,x\n", {"text_pair": "text"}, r"needs the column of the first text"),
        ("id,text,label\n5,a,x\n6,b,y\n5,c,x\n", {}, r"line 4: id '5' was already at .*line 2"),
    ],
)  # fmt: skip
def test_refusals(write, content, options, message):
    with pytest.raises(ValueError, match=message):
        read_classification(write("a.csv", content), **options)


def test_truncated_line_and_missing_label_of_one_example(write):
    path = write("a.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tx\n1\tc\n")
    with pytest.raises(ValueError, match=r"a.tsv: line 3: 2 field\(s\), but there must be 4"):
        read_classification(path)
    path = write("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl: line 2: no 'label'; found: 'text'"):
        read_classification(path)


@pytest.mark.parametrize("pairs", [False, True])
def test_token_ids_are_those_of_transformers(write, words, tmp_path, pairs):
    save_tokenizer(words, tmp_path / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    rng = np.random.default_rng(0)
    vocabulary = ["cat", "dog", "Café", "xyz", "1895", "guitar"]
    texts, seconds = (
        [" ".join(rng.choice(vocabulary, n)) for n in rng.integers(1, 14, 30)] for _ in range(2)
    )
    rows = "".join(
        f"{a}\t{b}\t{i % 2}\n" for i, (a, b) in enumerate(zip(texts, seconds, strict=True))
    )
    path = write("a.tsv", "sentence1\tsentence2\tlabel\n" + rows)
    columns = {} if pairs else {"text": "sentence1"}
    data = ClassificationData(read_classification(path, **columns), words, max_length=16)
    expected = theirs(texts, seconds if pairs else None, truncation=True, max_length=16)
    starts = data.features.starts
    cut = 0
    for e in range(len(data)):
        part = slice(starts[e], starts[e + 1])
        assert data.features.input_ids[part].tolist() == expected["input_ids"][e]
        assert data.features.token_type_ids[part].tolist() == expected["token_type_ids"][e]
        whole = theirs(texts[e], seconds[e] if pairs else None)["input_ids"]
        cut += len(whole) > 16
    assert 0 < cut < 30
    assert data.notes == [f"{cut} of 30 examples cut to 16 tokens"]
    assert data.features.example_labels["labels"].tolist() == [i % 2 for i in range(30)]
