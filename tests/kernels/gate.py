"""Compile gate: what the Triton kernels become for sm_80 and sm_90, read from their machine code.

    python tests/kernels/gate.py          compile the sample below, print one JSON object per case

No GPU is needed: Triton's wheel carries ptxas and cuobjdump. The interpreter accepts much that the
compiler refuses, and neither says whether a tile fits the registers; this does. Run it in a process
without TRITON_INTERPRET. Tiles, warps and stages are those of the tuning table, every option that
costs registers is on, and pointers, strides and sizes are multiples of 16, as torch makes them.
"""

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

INSTRUCTIONS = ("HGMMA", "HMMA", "FFMA", "IMAD", "MUFU", "LDGSTS", "LDL", "STL")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
FLOATS = {"scale", "scale_log2", "keep_scale", "eps"}
FP32 = {
    "lse_ptr",
    "dlse_ptr",
    "delta_ptr",
    "mean_ptr",
    "rstd_ptr",
    "weight_ptr",
    "bias_ptr",
    "b_ptr",
}
FP32 |= {"dweight_ptr", "dbias_ptr", "db_ptr", "partial_ptr", "total_ptr"}
INT64, INT32 = {"seed_ptr", "dropout_rows_ptr"}, {"cu_seqlens_q_ptr", "cu_seqlens_k_ptr"}
ALIGNED_SIZES = {"ins", "outs", "cols_total"}


class Case(NamedTuple):
    """One compilation: a kernel of bertkern.kernels, a row of the tuning table, an architecture."""

    kernel: str
    arch: int
    dtype: str
    shape: int  # head dim (attention) or columns (LayerNorm)
    expect: str  # the instruction that does the work


SAMPLE = (
    Case("attention_fwd", 90, "bf16", 64, "HGMMA"),
    Case("attention_bwd_dq", 90, "bf16", 64, "HGMMA"),
    Case("attention_bwd_dkdv", 90, "bf16", 64, "HGMMA"),
    Case("attention_bwd_dkdv", 90, "fp16", 128, "HGMMA"),
    Case("attention_fwd", 90, "fp32", 64, "FFMA"),
    Case("attention_bwd_dkdv", 80, "bf16", 64, "HMMA"),
    Case("linear_fwd", 90, "bf16", 0, "HGMMA"),
    Case("linear_bwd_input", 90, "bf16", 0, "HGMMA"),
    Case("linear_bwd_weight", 90, "bf16", 0, "HGMMA"),
    Case("linear_fwd", 80, "fp16", 0, "HMMA"),
    Case("layer_norm_fwd", 90, "bf16", 768, "FFMA"),
    Case("layer_norm_bwd", 90, "bf16", 768, "FFMA"),
    Case("dropout", 80, "fp16", 768, "IMAD"),
)


def configuration(case):
    """(kernel, constants, warps, stages) of a case."""
    from bertkern.kernels import attention, dropout, layer_norm, linear, tuning

    arch, itemsize = f"sm{case.arch}", 4 if case.dtype == "fp32" else 2
    options = dict(
        CAUSAL=1, VARLEN=True, KEY_LENGTHS=False, key_lengths_ptr=None, DROPOUT=True, DLSE=True,
        FOLD_SCALE=True, PRECISION="ieee", DROPOUT_ROWS=True, BIAS=True, WEIGHT=True, ADD=True,
        RESIDUAL=True, DZ=True, SAVE_Z=True, EVEN=True, WHOLE=True, GROUP=tuning.GROUP_M,
    )  # fmt: skip
    if case.kernel.startswith("attention"):
        name = case.kernel.removeprefix("attention_")
        tile = tuning.attention(name, case.shape, itemsize, arch)
        block_d = tuning.block_d(case.shape)
        options |= dict(
            HEAD_DIM=case.shape, BLOCK_D=block_d, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n
        )
        module, stages = attention, tile.stages
    elif case.kernel.startswith("linear"):
        name = case.kernel.removeprefix("linear_")
        tile = tuning.gemm(name, itemsize, arch)
        # Rows and columns of the result, then the summed dimension.
        letters = {"fwd": "MNK", "bwd_input": "MKN", "bwd_weight": "NKM"}[name]
        options |= {f"BLOCK_{letter}": size for letter, size in zip(letters, tile[:3], strict=True)}
        options |= dict(ACTIVATION="gelu" if name == "fwd" else "", PREVIOUS="gelu", EPILOGUE=True)
        module, stages = linear, tile.stages
    else:
        if case.kernel == "dropout":
            tile = tuning.elementwise(case.shape, arch)
        else:
            tile = tuning.layer_norm(case.kernel.removeprefix("layer_norm_"), case.shape, arch)
        options |= dict(BLOCK_R=tile.block_r, BLOCK_C=tile.block_c)
        module, stages = dropout if case.kernel == "dropout" else layer_norm, 3
    kernel = getattr(module, f"{case.kernel}_kernel")
    return kernel, {k: v for k, v in options.items() if k in kernel.arg_names}, tile.warps, stages


def argument_type(name, dtype):
    """Triton's name for the type of one run-time argument."""
    for names, kind in ((FP32, "*fp32"), (INT64, "*i64"), (INT32, "*i32"), (FLOATS, "fp32")):
        if name in names:
            return kind
    return f"*{dtype}" if name.endswith("_ptr") else "i32"


def compile_case(case):
    """Registers, spills, shared memory and instruction counts of one case."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants, warps, stages = configuration(case)
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else argument_type(name, case.dtype)
        aligned = (
            signature[name].startswith("*") or name.startswith("stride") or name in ALIGNED_SIZES
        )
        if aligned and name not in constants:
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", case.arch, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass, usage = (
            subprocess.run(
                [cuobjdump, flag, file.name], check=True, capture_output=True, text=True
            ).stdout
            for flag in ("-sass", "-res-usage")
        )
    counts = {name: len(re.findall(rf"\b{name}\b", sass)) for name in INSTRUCTIONS}
    return {
        **case._asdict(),
        "warps": warps,
        "stages": stages,
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "shared": compiled.metadata.shared,
        "instructions": counts,
    }


def faults(result):
    """What is wrong with a compiled case, in words; nothing if all is well."""
    found, counts = [], result["instructions"]
    if result["stack"] or counts["LDL"] or counts["STL"]:
        found.append(f"spills: {result['stack']} bytes of stack, {counts['LDL']} loads")
    if result["shared"] > SHARED_LIMIT[result["arch"]]:
        found.append(f"shared memory: {result['shared']} > {SHARED_LIMIT[result['arch']]} bytes")
    if not counts[result["expect"]]:
        found.append(f"no {result['expect']} in the machine code")
    return found


def main():
    """Compile the sample on two processes, the long ones first."""
    failed = False
    with ProcessPoolExecutor(2) as pool:
        for result in pool.map(compile_case, SAMPLE):
            result["faults"] = faults(result)
            failed |= bool(result["faults"])
            print(json.dumps(result), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
