"""Whom the suite compares with: which of them are here, and how they compute attention.

Every peer is optional. A package is first imported in a process of its own with a time limit, so
that one that is missing, broken, slow or crashes is named "absent" with its reason and disturbs
nothing. Peers of the other ops stand with their cases in op_cases.py; those of whole models in
engines.py.
"""

import functools
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

IMPORT_LIMIT_S = 60.0

# What --peers takes: name -> the module that has it ("" for what is in torch) and what it is.
GROUPS: dict[str, tuple[str, str]] = {
    "eager": ("", "plain torch ops"),
    "sdpa": ("", "torch's scaled_dot_product_attention, by backend"),
    "compile": ("", "torch.compile of the plain ops"),
    "flex": ("", "torch's FlexAttention, compiled"),
    "flash-attn": ("flash_attn", "FlashAttention 2"),
    "flash-attn-3": ("flash_attn_interface", "FlashAttention 3"),
    "flash-attn-4": ("flash_attn.cute", "FlashAttention 4"),
    "xformers": ("xformers.ops", "xFormers"),
    "liger": ("liger_kernel.transformers.functional", "Liger-Kernel"),
    "transformer-engine": ("transformer_engine.pytorch", "Transformer Engine"),
    "transformers": ("transformers", "Hugging Face transformers: eager, sdpa, compiled"),
    "sentence-transformers": ("sentence_transformers", "sentence-transformers"),
    "onnxruntime": ("onnxruntime", "ONNX Runtime"),
    "openvino": ("openvino", "OpenVINO"),
    "ctranslate2": ("ctranslate2", "CTranslate2"),
}
FLASH = ("flash-attn", "flash-attn-3", "flash-attn-4")
FLASH_WITH_DROPOUT = FLASH[:1]
GPU_ONLY = (*FLASH, "xformers", "liger", "transformer-engine")
CPU_ONLY = ("openvino",)
COMPILED = ("compile", "flex")  # slow to start: left out of --quick


class Peers:
    """The peers of a run: those that were asked for and are here.

    Args:
        wanted: names of GROUPS; None means all.
        device: peers that have no kernels for it are absent.
        quick: leave out what compiles for long.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(
        self, wanted: Sequence[str] | None, device: torch.device, quick: bool = False
    ) -> None:
        unknown = [name for name in wanted or () if name not in GROUPS]
        if unknown:
            raise ValueError(
                f"--peers {','.join(unknown)}: allowed are none, or some of {', '.join(GROUPS)}"
            )
        self.device = device
        self.quick = quick
        self.asked = wanted is not None
        self.absent: dict[str, str] = {}
        self.present: list[str] = []
        candidates = []
        for name in GROUPS if wanted is None else wanted:
            if device.type != "cuda" and name in GPU_ONLY:
                self.absent[name] = f"absent: {GROUPS[name][1]} needs a CUDA GPU"
            elif device.type != "cpu" and name in CPU_ONLY:
                self.absent[name] = f"absent: {GROUPS[name][1]} runs on CPUs"
            elif quick and not self.asked and name in COMPILED:
                self.absent[name] = "absent: left out of --quick; --peers asks for it"
            else:
                candidates.append(name)
        reasons = _import_each([GROUPS[name][0] for name in candidates])
        for name in candidates:
            problem = reasons[GROUPS[name][0]]
            if problem:
                self.absent[name] = f"absent: {problem}"
            else:
                self.present.append(name)

    def __contains__(self, name: str) -> bool:
        return name in self.present


def _import_each(modules: Sequence[str]) -> dict[str, str]:
    """For each module "", or why it cannot be imported; all at once, each in its own process."""
    reasons = {"": ""}
    deadline = time.monotonic() + IMPORT_LIMIT_S
    with ExitStack() as opened:
        running = {}
        for module in dict.fromkeys(name for name in modules if name):
            errors = opened.enter_context(tempfile.TemporaryFile())
            running[module] = (
                errors,
                subprocess.Popen(
                    [sys.executable, "-c", f"import {module}"],
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    start_new_session=True,  # what it starts goes with it
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                ),
            )
        for module, (errors, process) in running.items():
            try:
                code = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                reasons[module] = f"import {module} took more than {IMPORT_LIMIT_S:.0f} s"
            else:
                errors.seek(0)
                lines = errors.read().decode(errors="replace").split("\n")
                said = [line.strip() for line in lines if line.strip()]
                reasons[module] = (said or [f"exit code {code}"])[-1] if code else ""
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return reasons


def lazily(make: Callable[..., Callable[..., Tensor]]) -> Callable[..., Callable[..., Tensor]]:
    """A peer that is made at its first call: what is missing in its package then is its own
    error."""

    @functools.wraps(make)
    def deferred(*options: Any) -> Callable[..., Tensor]:
        made: list[Callable[..., Tensor]] = []

        def run(*tensors: Tensor) -> Tensor:
            if not made:
                made.append(make(*options))
            return made[0](*tensors)

        return run

    return deferred


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function under torch.compile, compiled for the shapes of its first call."""
    return torch.compile(function, dynamic=False)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Peers warn of what does not concern a measurement."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


# Attention. Each function takes q, k, v [B, S, H, D], for some also a bias [1, H, S, S] that has a
# gradient, and returns [B, S, H, D].

SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def eager(seen: Tensor | None, causal: bool, dropout_p: float) -> Callable[..., Tensor]:
    """softmax(q k^T / sqrt(D) + bias) v in plain torch ops, in the dtype of its inputs.

    Args:
        seen: bool, True where a key may be seen; broadcastable to [B, H, S, S].
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        if causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~allowed, -torch.inf)
        probabilities = torch.softmax(scores, dim=-1)
        if dropout_p:
            probabilities = F.dropout(probabilities, dropout_p)
        return (probabilities @ v).transpose(1, 2)

    return attention


def sdpa(
    seen: Tensor | None, causal: bool, dropout_p: float, backend: str = ""
) -> Callable[..., Tensor]:
    """torch's attention, by the backend that it picks or the one that is named."""

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mask = seen if bias is None else bias
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=causal
        )
        return out.transpose(1, 2)

    if not backend:
        return attention

    def by_backend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        with sdpa_kernel(SDPA_BACKENDS[backend]):
            return attention(q, k, v, bias)

    return by_backend


@lazily
def flex(lengths: Tensor | None, causal: bool, seqlen: int) -> Callable[..., Tensor]:
    """FlexAttention with a block mask made in advance, as its users do.

    Args:
        lengths: keys of each sequence [B], for padded batches.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled_flex = torch.compile(flex_attention, dynamic=False)
    masks: dict[torch.device, Any] = {}

    def mask_of(q: Tensor) -> Any:
        if lengths is None and not causal:
            return None
        if q.device not in masks:
            here = None if lengths is None else lengths.to(q.device)

            def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
                allowed = query >= key if causal else key >= 0
                return allowed if here is None else allowed & (key < here[b])

            batch = None if here is None else here.shape[0]
            masks[q.device] = create_block_mask(seen, batch, None, seqlen, seqlen, str(q.device))
        return masks[q.device]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = mask_of(q)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = compiled_flex(q, k, v, block_mask=mask)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return attention


def first(result: Any) -> Tensor:
    """The output of a function that may return its lse, too."""
    return result[0] if isinstance(result, tuple) else result


@lazily
def flash_attention(group: str, causal: bool, dropout_p: float) -> Callable[..., Tensor]:
    """FlashAttention 2, 3 or 4; only 2 has dropout."""
    if group == "flash-attn":
        from flash_attn import flash_attn_func as function

        return lambda q, k, v: first(function(q, k, v, dropout_p=dropout_p, causal=causal))
    if group == "flash-attn-3":
        from flash_attn_interface import flash_attn_func as function
    else:
        from flash_attn.cute import flash_attn_func as function
    return lambda q, k, v: first(function(q, k, v, causal=causal))


@lazily
def flash_attention_varlen(
    group: str, cu_seqlens: Tensor, longest: int, dropout_p: float
) -> Callable[..., Tensor]:
    """FlashAttention on packed q, k, v [T, H, D]."""
    if group == "flash-attn":
        from flash_attn import flash_attn_varlen_func as function
    elif group == "flash-attn-3":
        from flash_attn_interface import flash_attn_varlen_func as function
    else:
        from flash_attn.cute import flash_attn_varlen_func as function
    options: dict[str, Any] = {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }
    if group == "flash-attn":
        options["dropout_p"] = dropout_p
    return lambda q, k, v: first(function(q, k, v, **options))


@lazily
def xformers(bias: Any, causal: bool, dropout_p: float) -> Callable[..., Tensor]:
    """xFormers' memory-efficient attention; bias is None, or one of its own."""
    import xformers.ops

    mask = xformers.ops.LowerTriangularMask() if causal else bias
    function = xformers.ops.memory_efficient_attention
    return lambda q, k, v: function(q, k, v, attn_bias=mask, p=dropout_p)


@lazily
def transformer_engine(
    heads: int, head_dim: int, causal: bool, dropout_p: float
) -> Callable[..., Tensor]:
    """Transformer Engine's DotProductAttention."""
    import transformer_engine.pytorch as te

    module = te.DotProductAttention(
        heads,
        head_dim,
        attention_dropout=dropout_p,
        qkv_format="bshd",
        attn_mask_type="causal" if causal else "no_mask",
    )
    return lambda q, k, v: module(q, k, v).reshape(q.shape)


# Other ops.


@lazily
def liger_layer_norm(eps: float) -> Callable[..., Tensor]:
    """Liger-Kernel's LayerNorm of x, weight, bias."""
    from liger_kernel.transformers.functional import liger_layer_norm as function

    return lambda x, weight, bias: function(x, weight, bias, eps)


@lazily
def transformer_engine_layer_norm(columns: int, eps: float) -> Callable[..., Tensor]:
    """Transformer Engine's LayerNorm of x, weight, bias."""
    import transformer_engine.pytorch as te

    module = te.LayerNorm(columns, eps=eps)
    return lambda x, weight, bias: torch.func.functional_call(
        module, {"weight": weight, "bias": bias}, (x,)
    )


@lazily
def liger_linear_cross_entropy(target: Tensor) -> Callable[..., Tensor]:
    """Liger-Kernel's mean loss of x, weight, bias."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as function

    return lambda x, w, b: function(x, w, target, bias=b)
