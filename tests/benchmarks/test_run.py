"""The command: what it refuses, what it writes, and that what was measured is there whatever
happens."""

import itertools

import pytest
import torch
from bertkern.benchmarks import harness, limits, op_cases, report, run
from bertkern.benchmarks.row import read_rows

import bertkern

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small cases, and ceilings that are measured fast."""
    monkeypatch.setattr(limits, "COPIES", (2**14, 2**16))
    monkeypatch.setattr(limits, "PRODUCT", {"cpu": 64})
    monkeypatch.setattr(limits, "SAMPLES", 3)
    monkeypatch.setattr(harness, "added_bytes", lambda call, device: (call(), None))

    def cases(who, dtype, quick):
        yield op_cases.layer_norm(8, 32, dtype, who)
        yield op_cases.layer_norm(9, 32, dtype, who)
        yield op_cases.dropout_add_layer_norm(8, 32, dtype, who, 0.0)
        yield op_cases.linear(8, 16, 16, dtype, who, None)

    monkeypatch.setattr(op_cases, "cases", cases)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The exit code and the rows of `bertkern bench` on the CPU."""
    reports = []
    monkeypatch.setattr(report, "main", lambda arguments: reports.append(arguments) or 0)

    def call(*arguments, samples=1):
        code = run.main(
            [*arguments, "--device", "cpu", "--samples", str(samples), "--results", str(tmp_path)]
        )
        files = sorted(tmp_path.glob("*.jsonl"))
        return code, read_rows(files), files

    call.reports = reports
    return call


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["opps"], ["opps", *run.SUITES, "report", "compare"]),
        (["ops", "model"], ["model", *run.SUITES]),
        (["--dtype", "float7"], ["float7", *run.DTYPES]),
        (["--dtype", "float32,int8"], ["int8", *run.DTYPES]),
        (["--peers", "eager,eagle"], ["eagle", "eager", "none", "sdpa", "ctranslate2"]),
        (["--device", "tpu"], ["tpu", "cpu", "cuda"]),
        (["--device", "meta"], ["meta", "cpu", "cuda"]),
        (["--samples", "0"], ["--samples 0", "at least 1"]),
        (["--samples", "few"], ["few"]),
        (["--fast"], ["--fast"]),
    ],
    ids=" ".join,
)
def test_what_is_not_allowed_is_refused(arguments, named, capsys, tmp_path):
    device = [] if "--device" in arguments else ["--device", "cpu"]
    with pytest.raises(SystemExit) as refused:
        run.main([*arguments, *device, "--results", str(tmp_path)])
    assert refused.value.code == 2
    said = capsys.readouterr().err.split("error: ")[-1]
    assert all(name in said for name in named), said
    assert not list(tmp_path.iterdir())


def test_cuda_is_refused_where_there_is_none(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as refused:
        run.main(["--device", "cuda"])
    assert refused.value.code == 2
    assert "allowed are cpu" in capsys.readouterr().err


def test_rows_are_written_with_limits_and_what_is_absent(command, capsys):
    code, rows, (file,) = command("ops", "--only", "layer_norm[", "--peers", "eager,flash-attn")
    assert code == 0
    assert file.name.startswith("ops-")
    assert len({str(row.provenance) for row in rows}) == 1
    assert rows[0].provenance["torch"] == torch.__version__
    assert {row.op for row in rows if row.suite == "limits"} >= {"copy", "matrix product"}
    (absent,) = [row for row in rows if row.op == "peer"]
    assert (absent.peer, absent.correct, absent.median_s) == ("FlashAttention 2", False, None)
    assert absent.error.startswith("absent: ")
    ops = [row for row in rows if row.suite == "ops" and row.op != "peer"]
    assert {row.op for row in ops} == {"layer_norm", "dropout_add_layer_norm"}
    assert {row.peer for row in ops} == {"bertkern", "torch eager"}
    assert {row.direction for row in ops} == {"forward", "forward+backward"}
    for row in ops:
        assert row.correct
        assert row.samples == 1
        assert row.floor_s > 0
    said = capsys.readouterr()
    assert "layer_norm" in said.out
    assert "FlashAttention 2: absent" in said.out
    assert str(file) in said.out
    (arguments,) = command.reports
    assert str(file) in arguments


def test_every_dtype_that_is_asked_for_has_rows_and_a_floor(command):
    code, rows, _ = command(
        *("ops", "--only", "linear[", "--peers", "none", "--dtype", "bfloat16,float32")
    )
    assert code == 0
    ops = [row for row in rows if row.suite == "ops"]
    assert {row.dtype for row in ops} == {"bfloat16", "float32"}
    assert all(row.floor_s for row in ops)


def test_the_suites_run_in_the_order_given(command, monkeypatch):
    ran = []
    monkeypatch.setattr(run, "run_ops", lambda *a: ran.append("ops"))
    monkeypatch.setattr(run, "run_models", lambda *a: ran.append("models"))
    monkeypatch.setattr(run, "run_training", lambda *a: ran.append("training"))
    assert command("training", "ops", "--peers", "none")[0] == 0
    assert ran == ["training", "ops"]
    ran.clear()
    assert command("--peers", "none")[0] == 0
    assert ran == ["ops", "models", "training"]


def test_models_by_name(command, monkeypatch):
    ran = []
    monkeypatch.setattr(run, "inference", lambda run, dtypes, only: ran.append(only))
    monkeypatch.setattr(run, "sentences_per_second", lambda *a: ran.append("sentences"))
    monkeypatch.setattr(run, "decoding", lambda run, dtypes, only: ran.append(f"decode {only}"))
    command("models", "--peers", "none", "--only", "bert-mini")
    command("models", "--peers", "none", "--only", "minilm")
    assert ran == ["bert-mini", "decode bert-mini", "minilm", "sentences", "decode minilm"]


def test_training_by_name(command, monkeypatch):
    ran = []
    for name in ("training", "transformer_training"):
        monkeypatch.setattr(
            run, name, lambda run, dtypes, only, name=name: ran.append((name, only))
        )
    command("training", "--peers", "none", "--only", "transformer")
    assert ran == [("training", "transformer"), ("transformer_training", "transformer")]


def test_the_report_is_of_this_run(tmp_path, capsys):
    where = ["--results", str(tmp_path / "results"), "--report", str(tmp_path / "page")]
    options = ["--device", "cpu", "--samples", "1", "--peers", "eager", "--only", "layer_norm[N=9"]
    assert run.main(["ops", *options, *where]) == 0
    (page,) = (tmp_path / "page").glob("*.html")
    assert "layer_norm" in page.read_text()


def test_no_report(command):
    command("ops", "--only", "linear", "--peers", "none", "--no-report")
    assert command.reports == []


def test_a_wrong_output_is_exit_code_1_and_a_wrong_row(command, monkeypatch, capsys):
    op = bertkern.linear
    monkeypatch.setattr(bertkern, "linear", lambda *a, **k: op(*a, **k) * 1.001)
    code, rows, _ = command("ops", "--peers", "eager")
    assert code == 1
    wrong = [row for row in rows if row.error]
    assert {(row.op, row.peer) for row in wrong} == {("linear", "bertkern")}
    assert all(row.median_s is None and not row.correct for row in wrong)
    assert "wrong output: linear N=8 K=16 F=16 forward bertkern" in capsys.readouterr().out


def test_a_wrong_output_of_another_package_is_a_wrong_row_and_no_failure(command, monkeypatch):
    monkeypatch.setattr(
        op_cases,
        "torch_peers",
        lambda *a, **k: {"torch eager": harness.Peer(lambda x, w, b: x @ w.T)},
    )
    code, rows, _ = command("ops", "--only", "linear", "--peers", "eager")
    assert code == 0
    (wrong,) = [row for row in rows if row.error and row.direction == "forward"]
    assert wrong.peer == "torch eager"
    assert wrong.error.startswith("wrong: output")
    assert wrong.median_s is None


@pytest.mark.parametrize(("ours", "code"), [(False, 0), (True, 1)])
def test_only_our_own_refusal_is_a_failure(command, monkeypatch, ours, code):
    def refuse(*arguments, **options):
        raise NotImplementedError("no kernel")

    if ours:
        monkeypatch.setattr(bertkern, "layer_norm", refuse)
    else:
        peers = {"torch eager": harness.Peer(refuse)}
        monkeypatch.setattr(op_cases, "torch_peers", lambda *arguments, **options: peers)
    found, rows, _ = command("ops", "--peers", "eager", "--only", "layer_norm[N=8")
    errors = {row.peer: row.error for row in rows if row.op == "layer_norm"}
    assert errors["bertkern" if ours else "torch eager"] == "not run: no kernel"
    assert not errors["torch eager" if ours else "bertkern"]
    assert found == code


def test_only_without_a_case_is_told(command):
    assert command("ops", "--peers", "none", "--only", "no such case")[0] == 2


def test_an_interrupt_leaves_the_rows_of_the_finished_cases(command, monkeypatch, capsys):
    op, calls = bertkern.dropout_add_layer_norm, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return op(*arguments, **options)

    monkeypatch.setattr(bertkern, "dropout_add_layer_norm", interrupted)
    code, rows, (file,) = command("ops", "--peers", "none")
    assert code == 130
    assert {(row.op, row.shape["N"]) for row in rows if row.suite == "ops"} == {
        *(("layer_norm", 8), ("layer_norm", 9)),
    }
    assert any(row.suite == "limits" for row in rows)
    said = capsys.readouterr().out
    assert f"interrupted; what was measured is above, and what was written is in {file}" in said
    assert command.reports == []


def test_rows_are_written_as_soon_as_they_are_measured(command, monkeypatch, tmp_path):
    """A run that is killed has written what it measured."""
    counts = []
    real = run.run_case

    def counting(*arguments):
        counts.append(sum(len(read_rows([path])) for path in tmp_path.glob("*.jsonl")))
        return real(*arguments)

    monkeypatch.setattr(run, "run_case", counting)
    command("ops", "--peers", "none")
    assert counts[0] > 0  # the limits
    assert [b - a for a, b in itertools.pairwise(counts)] == [2, 2, 2]


def test_the_list_names_what_only_selects_from(capsys):
    assert run.main(["--list", "--device", "cpu", "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "ops layer_norm[N=8,C=32]" in lines
    assert "models minilm sentences" in lines
    assert "models transformer-mini decode" in lines
    assert {"training bert-mini", "training transformer-mini"} <= set(lines)
    assert len(lines) == len(set(lines))


def test_report_and_compare_get_their_arguments(monkeypatch):
    got = []
    monkeypatch.setattr(report, "main", lambda arguments: got.append(("report", arguments)) or 7)
    monkeypatch.setattr(
        run.compare, "main", lambda arguments: got.append(("compare", arguments)) or 8
    )
    assert run.main(["report", "a.jsonl"]) == 7
    assert run.main(["compare", "a", "b"]) == 8
    assert got == [("report", ["a.jsonl"]), ("compare", ["a", "b"])]


def test_a_full_disk_loses_no_figure(command, monkeypatch, capsys):
    written = []

    def full(rows, path):
        written.append(path)
        if len(written) > 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "write_rows", full)
    assert command("ops", "--peers", "none")[0] == 1
    out = capsys.readouterr().out
    assert "layer_norm N=8 C=32" in out
    assert "No space left on device" in out
