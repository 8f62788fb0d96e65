"""Engines: the ways to compute an encoder from a folder of weights, ours and the peers'.

An engine is made from a folder (config.json, model.safetensors, a tokenizer) and a dtype, and is
then a function of a padded batch: ids [B, S] int64 and a mask [B, S] int64, 1 at tokens, on the
host, to hidden states [B, S, hidden], of which padding is nobody's business. What is converted or
compiled is so once, outside the measured time.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bertkern.models import BertConfig, BertModel

from .peers import Peers, without_warnings

Engine = Callable[[Tensor, Tensor], Tensor]
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")


def write_random_model(config: BertConfig, folder: Path) -> None:
    """A model of these sizes with fresh weights (always the same ones), and a vocabulary."""
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [f"word{i}" for i in range(config.vocab_size - len(special))]
    (folder / "vocab.txt").write_text("\n".join(special + words) + "\n", encoding="utf-8")


def bertkern_engine(
    folder: Path, dtype: torch.dtype, device: torch.device, backend: str | None = None
) -> Engine:
    """Ours, by the backend that it picks or the one that is named."""
    import bertkern

    model = BertModel.from_pretrained(folder).eval().to(dtype).to(device)

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(ids.to(device), mask).last_hidden_state

    if backend is None:
        return run

    def by_backend(ids: Tensor, mask: Tensor) -> Tensor:
        with bertkern.backend(backend):
            return run(ids, mask)

    return by_backend


def transformers_engine(
    folder: Path, dtype: torch.dtype, device: torch.device, attention: str, compiled: bool = False
) -> Engine:
    """transformers' BertModel with its attention "eager" or "sdpa", or ours."""
    import transformers

    import bertkern.integrations.transformers  # noqa: F401  registers "bertkern"

    with quiet_transformers():
        model = transformers.BertModel.from_pretrained(
            folder, attn_implementation=attention, dtype=dtype
        )
    model = model.eval().to(device)
    function = torch.compile(model, dynamic=True) if compiled else model

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            return function(ids.to(device), attention_mask=mask.to(device)).last_hidden_state

    return run


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the bars that loading draws."""
    from transformers.utils import logging

    with without_warnings():
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            if shown:
                logging.enable_progress_bar()


class _HiddenStates(nn.Module):
    """A model that takes and returns plain tensors, for the exporters."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states [B, S, hidden]."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def _exportable(folder: Path, attention: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    import transformers

    with quiet_transformers():
        model = transformers.BertModel.from_pretrained(
            folder, attn_implementation=attention, dtype=torch.float32
        )
    ids = torch.ones(2, 16, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return _HiddenStates(model.eval()).eval(), (ids, mask)


def onnxruntime_engine(folder: Path, work: Path) -> Engine:
    """ONNX Runtime, float32, with the fusions of its own transformer optimizer."""
    import onnxruntime
    from onnxruntime.transformers import optimizer

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    plain, fused = work / "plain.onnx", work / "fused.onnx"
    model, example = _exportable(folder, "eager")
    axes = {0: "B", 1: "S"}
    with without_warnings():
        torch.onnx.export(
            model,
            example,
            str(plain),
            input_names=["input_ids", "attention_mask"],
            output_names=["hidden"],
            dynamic_axes={"input_ids": axes, "attention_mask": axes, "hidden": axes},
            opset_version=17,
            dynamo=False,  # the optimizer's patterns are of this exporter's graphs
        )
        optimizer.optimize_model(
            str(plain),
            model_type="bert",
            num_heads=config["num_attention_heads"],
            hidden_size=config["hidden_size"],
        ).save_model_to_file(str(fused))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(fused), options, ["CPUExecutionProvider"])

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        fed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        return torch.from_numpy(session.run(None, fed)[0])

    return run


def openvino_engine(folder: Path, dtype: torch.dtype) -> Engine:
    """OpenVINO, computing in the dtype that is asked for."""
    import openvino

    model, example = _exportable(folder, "sdpa")
    with without_warnings(), torch.no_grad():
        converted = openvino.convert_model(model, example_input=example)
    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    program = openvino.Core().compile_model(converted, "CPU", options)

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        return torch.from_numpy(program([ids.numpy(), mask.numpy()])[0].copy())

    return run


def ctranslate2_engine(
    folder: Path, work: Path, dtype: torch.dtype, device: torch.device
) -> Engine:
    """CTranslate2: it takes lengths, so padding must stand on the right."""
    import ctranslate2
    import numpy as np

    source = work / "source"
    source.mkdir()
    for name in ("model.safetensors", *TOKENIZER_FILES):
        if (folder / name).exists():
            shutil.copy(folder / name, source / name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["position_embedding_type"] = "absolute"  # read by its converter, gone in transformers 5
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with quiet_transformers():
        ctranslate2.converters.TransformersConverter(str(source)).convert(str(work / "ctranslate2"))
    encoder = ctranslate2.Encoder(
        str(work / "ctranslate2"),
        device=device.type,
        compute_type=str(dtype).removeprefix("torch."),
        intra_threads=torch.get_num_threads(),
        inter_threads=1,
    )

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        view = ctranslate2.StorageView.from_array
        lengths = mask.sum(1).int().numpy()
        out = encoder.forward_batch(view(ids.int().numpy()), view(lengths)).last_hidden_state
        if device.type == "cuda":
            return torch.as_tensor(out, device=device)
        return torch.from_numpy(np.array(out))

    return run


def makers(
    folder: Path, work: Path, dtype: torch.dtype, who: Peers, convert: bool, compiled: bool
) -> dict[str, Callable[[], Engine]]:
    """How to make each engine that is here. Making one may fail: the caller names it with its
    reason.

    Args:
        convert: also those that convert the weights to a format of their own.
        compiled: also torch.compile.
    """
    device = who.device
    made: dict[str, Callable[[], Engine]] = {
        "bertkern": lambda: bertkern_engine(folder, dtype, device)
    }
    if "transformers" in who:

        def hugging_face(attention: str, compiled: bool = False) -> Callable[[], Engine]:
            return lambda: transformers_engine(folder, dtype, device, attention, compiled)

        made["transformers eager"] = hugging_face("eager")
        made["transformers sdpa"] = hugging_face("sdpa")
        made["bertkern in transformers"] = hugging_face("bertkern")
        if compiled and "compile" in who:
            made["transformers compiled"] = hugging_face("sdpa", compiled=True)
    if not convert:
        return made
    work.mkdir(parents=True, exist_ok=True)
    if "onnxruntime" in who and dtype == torch.float32 and device.type == "cpu":
        made["ONNX Runtime"] = lambda: onnxruntime_engine(folder, work)
    if "openvino" in who:
        made["OpenVINO"] = lambda: openvino_engine(folder, dtype)
    if "ctranslate2" in who:
        made["CTranslate2"] = lambda: ctranslate2_engine(folder, work, dtype, device)
    return made
