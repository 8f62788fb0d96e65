"""Inference of models, and the engines that compute it: every engine that is here is right, what is
not is not timed, and the costs are those of the model."""

import contextlib
import json
import math

import pytest
import torch
from bertkern.benchmarks import engines, model_cases
from bertkern.benchmarks.model_cases import batch_of, check_engine, encoder_flops, infer
from torch.utils.flop_counter import FlopCounterMode

from bertkern.models import BertConfig, BertModel

CPU = torch.device("cpu")
F32 = torch.float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its vocabulary."""
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    folder = tmp_path_factory.mktemp("model")
    engines.write_random_model(config, folder)
    return folder


BATCH = batch_of([7, 3, 12])


@pytest.fixture(scope="module")
def truth(folder):
    """A function of a dtype: the real tokens of BATCH in fp64, and by plain ops in the dtype."""

    def of(dtype=F32, batch=BATCH):
        exact = engines.bertkern_engine(folder, torch.float64, CPU)
        plain = engines.bertkern_engine(folder, dtype, CPU, backend="reference")
        chosen = batch.mask.bool()
        return tuple(e(batch.ids, batch.mask)[chosen].double() for e in (exact, plain))

    return of


def assert_right(outcome):
    assert not outcome.error, outcome.error
    assert 0 < outcome.max_error < 1e-1


# engines


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_our_engine(folder, truth, dtype):
    for backend in (None, "reference"):
        engine = engines.bertkern_engine(folder, dtype, CPU, backend)
        assert_right(check_engine(engine, BATCH, *truth(dtype), CPU))


@pytest.mark.parametrize("attention", ["eager", "sdpa", "bertkern"])
def test_transformers(folder, truth, attention):
    pytest.importorskip("transformers", reason="transformers is not installed")
    engine = engines.transformers_engine(folder, F32, CPU, attention)
    assert_right(check_engine(engine, BATCH, *truth(), CPU))


def test_onnx_runtime(folder, truth, tmp_path):
    for name in ("transformers", "onnxruntime", "onnx"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    engine = engines.onnxruntime_engine(folder, tmp_path)
    assert_right(check_engine(engine, BATCH, *truth(), CPU))


def test_openvino(folder, truth):
    for name in ("transformers", "openvino"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    engine = engines.openvino_engine(folder, F32)
    assert_right(check_engine(engine, BATCH, *truth(), CPU))
    assert_right(check_engine(engine, batch_of([5]), *truth(F32, batch_of([5])), CPU))


def test_ctranslate2(folder, truth, tmp_path):
    for name in ("transformers", "ctranslate2"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    engine = engines.ctranslate2_engine(folder, tmp_path, F32, CPU)
    assert_right(check_engine(engine, BATCH, *truth(), CPU))


def test_which_engines_there_are(folder, tmp_path, who):
    def made(dtype, convert, compiled, *names):
        return set(engines.makers(folder, tmp_path, dtype, who(*names), convert, compiled))

    everybody = ("transformers", "compile", "onnxruntime", "openvino", "ctranslate2")
    ours, hugging_face = {"bertkern"}, {"transformers eager", "transformers sdpa"}
    hugging_face |= {"bertkern in transformers"}
    converted = {"ONNX Runtime", "OpenVINO", "CTranslate2"}
    assert made(F32, True, True) == ours
    assert made(F32, False, False, *everybody) == ours | hugging_face
    assert made(F32, False, True, *everybody) == ours | hugging_face | {"transformers compiled"}
    assert made(F32, True, False, *everybody) == ours | hugging_face | converted
    short = made(torch.bfloat16, True, False, *everybody)
    assert short == ours | hugging_face | converted - {"ONNX Runtime"}


def test_a_random_model_is_always_the_same(folder, tmp_path, tiny):
    torch.manual_seed(77)
    engines.write_random_model(tiny, tmp_path)
    again = (tmp_path / "model.safetensors").read_bytes()
    assert again == (folder / "model.safetensors").read_bytes()
    words = (tmp_path / "vocab.txt").read_text().split("\n")
    assert len(words) - 1 == len(set(words)) - 1 == tiny.vocab_size
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 32


# what counts


def falsified(engine, change):
    return lambda ids, mask: change(engine(ids, mask))


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h * 1.001,
        lambda h: h + 1e-4,
        lambda h: h.roll(1, 0),
        lambda h: h * math.nan,
        lambda h: h.index_fill(1, torch.tensor([2]), torch.nan),
        lambda h: h.bfloat16(),
        lambda h: torch.zeros_like(h),
    ],
    ids=["scaled", "shifted", "rolled", "NaN", "one NaN", "bfloat16", "zeros"],
)
def test_a_falsified_engine_is_wrong(folder, truth, change):
    engine = falsified(engines.bertkern_engine(folder, F32, CPU), change)
    outcome = check_engine(engine, BATCH, *truth(), CPU)
    assert outcome.error.startswith("wrong: rms error")


def test_an_engine_that_ignores_the_mask_is_wrong(folder, truth):
    engine = engines.bertkern_engine(folder, F32, CPU)
    outcome = check_engine(lambda i, m: engine(i, torch.ones_like(m)), BATCH, *truth(), CPU)
    assert outcome.error.startswith("wrong: ")


def test_padding_is_nobodys_business(folder, truth):
    def change(hidden):
        hidden = hidden.clone()
        hidden[~BATCH.mask.bool()] = torch.nan
        return hidden

    engine = falsified(engines.bertkern_engine(folder, F32, CPU), change)
    assert_right(check_engine(engine, BATCH, *truth(), CPU))


@pytest.mark.parametrize(
    "problem", [RuntimeError("no memory\nat all"), AssertionError("no memory"), KeyError("k")]
)
def test_an_engine_that_raises_is_not_run(truth, problem):
    def engine(ids, mask):
        raise problem

    outcome = check_engine(engine, BATCH, *truth(), CPU)
    assert outcome.error in ("not run: no memory", "not run: 'k'")


def test_an_engine_that_could_not_be_made_keeps_its_reason(truth):
    assert check_engine("not run: no", BATCH, *truth(), CPU).error == "not run: no"


def test_engines_that_cannot_be_made_disturb_nobody(make_run, tiny, monkeypatch):
    real = model_cases.makers

    def refuse():
        raise OSError("disk full")

    monkeypatch.setattr(model_cases, "makers", lambda *a: {"other": refuse, **real(*a)})
    run, _ = make_run()
    with model_cases.engines_of(tiny, F32, run, convert=False, compiled=False) as (made, truth):
        assert made["other"] == "not run: disk full"
        exact, plain = truth(BATCH)
        assert exact.shape == plain.shape == (sum(BATCH.lengths), 32)
        assert 0 < (exact - plain).abs().max() < 1e-4
        assert_right(check_engine(made["bertkern"], BATCH, exact, plain, CPU))


def test_rows_of_a_batch(folder, truth, make_run, tiny):
    engine = engines.bertkern_engine(folder, F32, CPU)
    run, rows = make_run()
    calls = []

    def fails_later(ids, mask):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of memory")
        return engine(ids, mask)

    who = {
        **{"bertkern": engine, "scaled": falsified(engine, lambda h: h * 1.01)},
        **{"absent": "not run: no", "fails later": fails_later},
    }
    infer("tiny", tiny, F32, who, lambda batch: truth(F32, batch), BATCH, run)
    by_peer = {row.peer: row for row in rows}
    assert set(by_peer) == set(who)
    good = by_peer["bertkern"]
    assert good.correct
    assert good.median_s > 0
    assert (good.suite, good.op, good.direction, good.dtype) == (
        *("models", "tiny", "forward", "float32"),
    )
    assert (good.items, good.unit, good.shape) == (22.0, "tokens", BATCH.shape)
    assert good.flops == encoder_flops(tiny, [7, 3, 12])
    assert good.floor_s == pytest.approx(max(good.flops / 4e9, good.bytes / 1e9))
    for peer, why in (("scaled", "wrong: "), ("absent", "not run: no"), ("fails later", "not run")):
        assert by_peer[peer].error.startswith(why)
        assert by_peer[peer].median_s is None
        assert not by_peer[peer].correct


# costs


def test_flops_are_those_of_the_products(folder, tiny):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.BertModel.from_pretrained(
        folder, attn_implementation="eager", add_pooling_layer=False
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(3, 10, dtype=torch.int64))
    assert encoder_flops(tiny, [10] * 3) == counter.get_total_flops()
    assert encoder_flops(tiny, [7, 3]) == encoder_flops(tiny, [7]) + encoder_flops(tiny, [3])


@pytest.mark.parametrize("config", [BertConfig.base(), BertConfig.large(), model_cases.mini()])
def test_parameters_of_the_layers(config):
    with torch.device("meta"):
        model = BertModel(config)
    layers = sum(p.numel() for name, p in model.named_parameters() if "layers." in name)
    assert model_cases.layer_parameters(config) == layers


def test_bytes(tiny):
    elements = model_cases.layer_parameters(tiny) + 2 * 22 * 32
    assert model_cases.encoder_bytes(tiny, 22, F32) == 4 * elements
    assert model_cases.encoder_bytes(tiny, 22, torch.bfloat16) == 2 * elements


# batches


def test_a_batch_has_words_where_its_mask_says():
    batch = batch_of([7, 3, 12])
    assert batch.mask.sum(1).tolist() == [7, 3, 12]
    assert batch.mask[1].tolist() == [1] * 3 + [0] * 9
    assert (batch.ids[batch.mask.bool()] >= 1000).all()
    assert (batch.ids[~batch.mask.bool()] == 0).all()
    assert torch.equal(batch.ids, batch_of([7, 3, 12]).ids)
    assert batch.shape == {"B": 3, "S": "3..12", "T": 22}
    assert batch_of([8] * 2).shape == {"B": 2, "S": 8}


@pytest.mark.parametrize("name", model_cases.CONFIGS)
@pytest.mark.parametrize("quick", [True, False])
def test_no_two_batches_of_a_model_have_one_shape(name, quick):
    for device in (CPU, torch.device("cuda")):
        shapes = [tuple(b.shape.items()) for b in model_cases.batches_of(name, device, quick)]
        assert not {shape for shape in shapes if shapes.count(shape) > 1}


# the runs


def test_inference_chooses_by_name(make_run, tiny, monkeypatch):
    monkeypatch.setattr(model_cases, "CONFIGS", {"mini": lambda: tiny, "base": lambda: tiny})
    monkeypatch.setattr(model_cases, "batches_of", lambda *a: [batch_of([4])])
    run, rows = make_run()
    model_cases.inference(run, [F32, torch.bfloat16], "mini")
    assert [(row.op, row.dtype, row.correct) for row in rows] == [
        *(("bert-mini", "float32", True), ("bert-mini", "bfloat16", True)),
    ]
    model_cases.inference(run, [F32], "base")  # left out of --quick on a CPU
    model_cases.inference(run, [F32], "no such model")
    assert len(rows) == 2


def test_every_floor_of_the_scaling_can_be_read_from_a_row(make_run, tiny, monkeypatch):
    from bertkern.benchmarks import limits

    monkeypatch.setattr(model_cases, "mini", lambda layers=2: tiny)
    monkeypatch.setattr(model_cases, "batch_of", lambda lengths, *more: batch_of([4], *more))
    monkeypatch.setattr(limits, "COPIES", (2**14, 2**16))
    monkeypatch.setattr(limits, "PRODUCT", {"cpu": 64})
    monkeypatch.setattr(limits, "SAMPLES", 3)
    monkeypatch.setattr(limits, "_fma_rates", dict)
    run, rows = make_run()
    facts, ceilings, threads = run.facts, run.limits, torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        model_cases.scaling(run, F32)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert run.facts is facts
    assert run.limits is ceilings
    assert {row.shape["L"] for row in rows if row.curve == "L"} == {1, 2, 8}
    of_threads = [row for row in rows if row.curve == "threads"]
    assert {row.shape["threads"] for row in of_threads} == {1, 2}
    for row in of_threads:
        assert row.provenance["threads"] == row.shape["threads"]
        measured = {r.op for r in rows if r.suite == "limits" and r.provenance == row.provenance}
        assert measured >= {"copy", "matrix product"}, "its ceilings were measured and not recorded"


def test_a_scaling_that_fails_leaves_the_threads_as_they_were(make_run, tiny, monkeypatch):
    def fails(device, dtypes, facts, quick):
        assert torch.get_num_threads() == 1
        raise OSError

    monkeypatch.setattr(model_cases, "mini", lambda layers=2: tiny)
    monkeypatch.setattr(model_cases, "infer", lambda *arguments: None)
    monkeypatch.setattr(model_cases, "engines_of", lambda *a, **k: contextlib.nullcontext((0, 0)))
    monkeypatch.setattr(model_cases, "measure_limits", fails)
    run, _ = make_run()
    facts, ceilings, threads = run.facts, run.limits, torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(OSError):  # noqa: PT011
            model_cases.scaling(run, F32)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert run.facts is facts
    assert run.limits is ceilings
