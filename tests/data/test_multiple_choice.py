"""Multiple-choice files in SWAG's two forms and users' own, and their token ids."""

import json

import pytest
import transformers

from bertkern.data import save_tokenizer
from bertkern.data.multiple_choice import MultipleChoiceData, read_multiple_choice

SWAG = (
    ",video-id,fold-ind,startphrase,sent1,sent2,gold-source,"
    "ending0,ending1,ending2,ending3,label\n"
    '0,v1,1,"The cat, it",The cat sat.,It,gold,goes.,"sees, a dog.",plays.,listens.,2\n'
    "1,v1,2,A man He,A man.,He,gen,a.,b.,c.,d.,0\n"
)


def test_swag(write):
    read = read_multiple_choice(write("train.csv", SWAG))
    assert read.starts == ["The cat sat.", "A man."]
    assert read.endings[0] == ["It goes.", "It sees, a dog.", "It plays.", "It listens."]
    assert read.labels.tolist() == [2, 0]
    assert (read.choices, len(read), read.ids) == (4, 2, ["0", "1"])
    part = read.subset([1])
    assert (part.starts, part.labels.tolist(), part.ids) == (["A man."], [0], ["1"])


def test_the_full_form_puts_the_right_ending_at_each_place(write):
    header = "video-id,startphrase,gold-ending,distractor-0,distractor-1,distractor-2,"
    header += "distractor-3,sent1,sent2\n"
    rows = "".join(f"v,A He,right{i},x{i},y{i},z{i},,A.,He\n" for i in range(6))
    read = read_multiple_choice(write("full.csv", header + rows))
    assert read.labels.tolist() == [0, 1, 2, 3, 0, 1]
    for i, (endings, label) in enumerate(zip(read.endings, read.labels, strict=True)):
        assert endings[label] == f"He right{i}"
        assert sorted(endings) == sorted(f"He {w}{i}" for w in ("right", "x", "y", "z"))


def test_json_lines_and_files_without_labels(write):
    rows = [
        {"question": "Why?", "choices": ["a", "b", "c"], "label": 1, "id": "q1"},
        {"question": "How?", "choices": ["d", "e", "f"], "label": "2", "id": "q2"},
    ]
    read = read_multiple_choice(write("a.jsonl", "\n".join(map(json.dumps, rows))))
    assert (read.starts, read.choices, read.labels.tolist()) == (["Why?", "How?"], 3, [1, 2])
    assert read.endings[1] == ["d", "e", "f"]
    assert read.ids == ["q1", "q2"]
    path = write("test.csv", "sent1,sent2,ending0,ending1\nA.,He,b,c\n")
    assert read_multiple_choice(path).labels is None
    with pytest.raises(ValueError, match=r"test.csv: no column 'label'; found: 'sent1'"):
        read_multiple_choice(path, labelled=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sent1,ending0,ending1,label\na,b,c,2\n", r"line 2: label '2' is not .* allowed: 0, 1"),
        ("sent1,ending0,ending1,label\na,b,c,\n", r"line 2: label '' is not allowed"),
        ("sent1,ending0,label\na,b,0\n", r"line 2: 1 ending\(s\), but every example"),
        ("ending0,ending1,label\na,b,0\n", r"no column for the start \(sent1.*found: 'ending0'"),
        ("sent1,label\na,0\n", r"no columns for the endings .*found: 'sent1', 'label'"),
        ("sent1,gold-ending,distractor-0\na,b,c\n", r"no column 'distractor-1' for an ending"),
        ("id,sent1,ending0,ending1\n1,a,b,c\n1,a,b,c\n", r"line 3: id '1' was already at"),
    ],
)
def test_refusals(write, content, message):
    with pytest.raises(ValueError, match=message):
        read_multiple_choice(write("a.csv", content))


def test_every_example_has_as_many_endings(write):
    rows = '{"sent1": "a", "endings": ["b", "c"]}\n{"sent1": "a", "endings": ["b", "c", "d"]}'
    with pytest.raises(ValueError, match=r"line 2: 3 ending\(s\), .*the first has 2"):
        read_multiple_choice(write("a.jsonl", rows))


def test_token_ids_are_those_of_transformers(write, words, tmp_path):
    save_tokenizer(words, tmp_path / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    data = MultipleChoiceData(read_multiple_choice(write("a.csv", SWAG)), words, max_length=12)
    features = data.features
    assert len(data) == 2
    assert features.choices == 4
    cut = 0
    for r in range(8):
        start, ending = data.examples.starts[r // 4], data.examples.endings[r // 4][r % 4]
        expected = theirs(start, ending, truncation=True, max_length=12)
        part = slice(features.starts[r], features.starts[r + 1])
        assert features.input_ids[part].tolist() == expected["input_ids"]
        assert features.token_type_ids[part].tolist() == expected["token_type_ids"]
        cut += len(theirs(start, ending)["input_ids"]) > 12
    assert data.notes == [f"{cut} of 8 sequences cut to 12 tokens"]
    assert features.example_labels["labels"].tolist() == [2, 0]
