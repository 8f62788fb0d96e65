"""The compile gate's cases: each Triton kernel, the rows of the tuning table that it runs with, and
the values of its compile-time options.

To add a kernel: a line in KERNELS; to add an option: its value in the variants that it costs
something in. A kernel or an option that is missing here is an error, not a case less.

Variants. "all": every option that costs registers is on at once, of those that the row serves.
"train" and "infer": what BERT runs with, variable length, with and without dropout. "padded": "all"
with a head dim below its power of two. Pointers, strides and sizes are multiples of 16, as torch
makes them.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

FLOATS = {"scale", "keep_scale", "eps", "softcap", "label_smoothing", "confidence", "share"}
FP32 = (
    "lse dlse delta mean rstd weight dweight dbias b db partial stats total m s z_sum z_target "
    "loss dloss part_m part_s"
)
TYPES = {f"{name}_ptr": "*fp32" for name in FP32.split()} | {
    "seed_ptr": "*i64", "dropout_rows_ptr": "*i64", "target_ptr": "*i64", "ignore_index": "i64",
    "ids_ptr": "*i64", "position_ids_ptr": "*i64", "type_ids_ptr": "*i64", "dtype_ptr": "*fp32",
    "cu_seqlens_q_ptr": "*i32", "cu_seqlens_k_ptr": "*i32", "key_lengths_ptr": "*i32",
    "cache_lengths_ptr": "*i32", "keys_ptr": "*u8",
}  # fmt: skip
ALIGNED_SIZES = {"ins", "outs", "cols_total"}


class Kernel(NamedTuple):
    """`passes`: the rows of the table of `op` that it runs with. `blocks`: the options that the
    numbers of a tile stand for. `rows`: the blocks that are rows of its products, none without."""

    module: str
    op: str
    passes: tuple[str, ...]
    blocks: tuple[str, ...]
    rows: tuple[str, ...]
    products: int  # of one tile of scores or of the result
    types: Mapping[str, str] = MappingProxyType({})


_MN = ("BLOCK_M", "BLOCK_N")
_RC = ("BLOCK_R", "BLOCK_C")
_LN = {"bias_ptr": "*fp32"}  # attention's bias has q's dtype
_MNK = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
_MKN = ("BLOCK_M", "BLOCK_K", "BLOCK_N")
KERNELS = {
    "attention_fwd": Kernel(
        "attention_fwd",
        "attention",
        ("fwd", "fwd_biased", "fwd_short", "fwd_short_biased"),
        _MN,
        ("BLOCK_M",),
        2,
    ),
    "attention_bwd_dq": Kernel("attention_bwd_dq", "attention", ("bwd_dq",), _MN, ("BLOCK_M",), 3),
    "attention_bwd_dkdv": Kernel(
        "attention_bwd_dkdv", "attention", ("bwd_dkdv",), _MN, ("BLOCK_N",), 4
    ),
    "attention_bwd_short": Kernel("attention_bwd_dkdv", "attention", ("bwd_short",), _MN, _MN, 5),
    "attention_bwd_dbias": Kernel(
        "attention_bwd_dbias", "attention", ("bwd_dbias",), _MN, ("BLOCK_M",), 2
    ),
    "attention_decode": Kernel(
        "attention_decode",
        "attention_decode",
        ("vector", "group"),
        ("KEYS",),
        (),
        2,
        {"stats_ptr": "*fp32", "partial_ptr": "*fp32"},
    ),
    "attention_decode_combine": Kernel(
        "attention_decode", "attention_decode", ("vector",), ("KEYS",), (), 0
    ),
    "linear_fwd": Kernel("linear", "linear", ("fwd",), _MNK, ("BLOCK_M",), 1),
    "linear_bwd_input": Kernel("linear", "linear", ("bwd_input",), _MKN, ("BLOCK_M",), 1),
    "linear_bwd_weight": Kernel(
        "linear", "linear", ("bwd_weight",), ("BLOCK_N", "BLOCK_K", "BLOCK_M"), ("BLOCK_N",), 1
    ),
    "linear_cross_entropy_fwd": Kernel(
        "linear_cross_entropy", "linear_cross_entropy", ("fwd",), _MNK, ("BLOCK_M",), 1
    ),
    "linear_cross_entropy_combine": Kernel(
        "linear_cross_entropy", "linear_cross_entropy", ("fwd",), (), (), 0
    ),
    "linear_cross_entropy_bwd_dz": Kernel(
        "linear_cross_entropy", "linear_cross_entropy", ("bwd_dz",), _MNK, ("BLOCK_M",), 1
    ),
    "linear_cross_entropy_bwd_dx": Kernel(
        "linear_cross_entropy",
        "linear_cross_entropy",
        ("bwd_dx",),
        _MKN,
        ("BLOCK_M",),
        1,
        {"dx_ptr": "*fp32"},
    ),
    "layer_norm_fwd": Kernel("layer_norm", "layer_norm", ("fwd",), _RC, (), 0, _LN),
    "layer_norm_bwd": Kernel("layer_norm", "layer_norm", ("bwd",), _RC, (), 0, _LN),
    "embedding_layer_norm_fwd": Kernel(
        "embedding_layer_norm", "layer_norm", ("fwd",), _RC, (), 0, _LN
    ),
    "embedding_layer_norm_bwd": Kernel(
        "embedding_layer_norm", "layer_norm", ("bwd",), _RC, (), 0, _LN
    ),
    "sum_partials": Kernel("layer_norm", "elementwise", ("",), _RC, (), 0),
    "dropout": Kernel("dropout", "elementwise", ("",), _RC, (), 0),
}

_ATTENTION_OFF = dict(
    ALIGN=0, LOW=False, HIGH=False, VARLEN=True, KEY_LENGTHS=False, KEY_PADDING=False, BIAS=0,
    SOFTCAP=False, DROPOUT=False, FOLD=True, DLSE=False,
    SUM_BATCH=True, SUM_HEADS=False, SUM_QUERIES=False, SUM_KEYS=False,
)  # fmt: skip
_ATTENTION_ALL = _ATTENTION_OFF | dict(
    ALIGN=1, LOW=True, HIGH=True, VARLEN=False, KEY_LENGTHS=True, KEY_PADDING=True, BIAS=1,
    SOFTCAP=True, DROPOUT=True, FOLD=False, DLSE=True, SUM_HEADS=True,
)  # fmt: skip
_FOLDED = dict(BIAS=0, SOFTCAP=False, FOLD=True)  # what the rows without "biased" serve
_HIDDEN_ALL = dict(
    DROPOUT=True, DROPOUT_ROWS=True, BIAS=True, WEIGHT=True, ADD=True, DZ=True, TYPE_IDS=True,
    TYPES=2,
)  # fmt: skip
VARIANTS = {
    "attention": {
        "all": _ATTENTION_ALL,
        "padded": _ATTENTION_ALL,
        "train": _ATTENTION_OFF | dict(DROPOUT=True),
        "infer": _ATTENTION_OFF,
    },
    "attention_decode": {"all": dict(DIRECT=False, SOFTCAP=True, BIAS="add")},
    "linear_cross_entropy": {"all": dict(BIAS=True, SMOOTHING=True, ADD=True)},
    "linear": {
        "all": _HIDDEN_ALL
        | dict(ACTIVATION="gelu", PREVIOUS="gelu", EPILOGUE=True, RESIDUAL=True, SAVE_Z=True)
    },
    "layer_norm": {
        "all": _HIDDEN_ALL | dict(WHOLE=True),
        "pieces": _HIDDEN_ALL | dict(WHOLE=False),
    },
    "elementwise": {"all": _HIDDEN_ALL},
}


class Case(NamedTuple):
    """One compilation."""

    kernel: str
    variant: str
    key: tuple  # of the row in the tuning table
    tile: tuple
    arch: int
    dtype: str
    precision: str

    @property
    def name(self):
        """kernel, row's limit, architecture, dtype, variant."""
        dtype = "tf32" if self.precision == "tf32" else self.dtype
        key = f"{self.key.kernel or 'any'}/{self.key.limit or 'any'}"
        return f"{self.kernel} {key} sm_{self.arch} {dtype} {self.variant}"

    @property
    def size(self):
        """Head dim or columns: the largest that the row serves, three quarters of it if padded."""
        return self.key.limit * 3 // 4 if self.variant == "padded" else self.key.limit

    @property
    def folded(self):
        """Whether the row serves no bias and no softcap, so that they are off in it."""
        return self.key.op == "attention" and self.key.bytes == 2 and "bias" not in self.key.kernel

    @property
    def weight(self):
        """About how long it compiles: fp32 products are unrolled into their multiplications."""
        return (self.precision == "ieee" and self.dtype == "fp32", self.key.limit)

    @property
    def sample(self):
        """Whether it is of the fixed sample of `make test`."""
        return (
            self.key.limit in (0, 64, 1024)
            and self.variant in ("all", "pieces")
            and (self.arch, self.dtype) in ((90, "bf16"), (80, "bf16"), (90, "fp32"))
        )

    @property
    def expect(self):
        """The kinds of instruction that its products must be on, each of them; () where it has no
        product."""
        kernel = KERNELS[self.kernel]
        if not kernel.rows:
            return ()
        if self.dtype == "fp32" and self.precision == "ieee":
            return ("FFMA",)
        if self.arch == 80:
            return ("HMMA",)
        tile = dict(zip(kernel.blocks, self.tile, strict=False))
        return tuple({"HGMMA" if tile[block] >= 64 else "HMMA" for block in kernel.rows})

    def about(self):
        """What a reader of the results needs to know of it."""
        return {
            "name": self.name, "kernel": self.kernel, "variant": self.variant, "row": str(self.key),
            "limit": self.key.limit, "size": self.size, "tile": list(self.tile[:-1]),
            "measured": self.tile[-1], "arch": self.arch, "dtype": self.dtype,
            "precision": self.precision,
        }  # fmt: skip


def cases():
    """Every case, from the tuning table."""
    from bertkern.kernels import tuning

    widest = {name: max(rows) for name, rows in tuning.LAYER_NORM.items()}
    for name, kernel in KERNELS.items():
        for key, tile in tuning.shipped():
            if (
                key.op != kernel.op
                or key.kernel.removesuffix("_tf32").removesuffix("_biased") not in kernel.passes
                or key.architecture == "interpreter"
            ):
                continue
            dtypes = {2: [("bf16", "ieee")], 4: [("fp32", "ieee"), ("fp32", "tf32")]}.get(
                key.bytes, [("bf16", "ieee"), ("fp32", "ieee")]
            )
            for variant in VARIANTS[key.op]:
                if variant == "pieces" and key.limit != widest[key.kernel, key.architecture]:
                    continue
                if variant in ("train", "infer") and (key.bytes != 2 or "bias" in key.kernel):
                    continue
                if variant == "infer" and not key.kernel.startswith("fwd"):
                    continue
                if key.op == "attention" and key.bytes == 4:
                    dtypes = [("fp32", "tf32" if "tf32" in key.kernel else "ieee")]
                for dtype, precision in dtypes:
                    arch = int(key.architecture.removeprefix("sm"))
                    yield Case(name, variant, key, tile, arch, dtype, precision)


def constants_of(case):
    """The values of a kernel's compile-time options by name, more than it may have."""
    from bertkern.kernels import tuning

    values = VARIANTS[case.key.op][case.variant] | (_FOLDED if case.folded else {})
    values |= dict(
        PRECISION=case.precision, EVEN=True, HEAD_DIM=case.size,
        BLOCK_D=tuning.block_d(case.size), SHORT="short" in case.key.kernel,
        GROUP={"vector": 1, "group": 4}.get(case.key.kernel, tuning.GROUP_M),
        SPLIT=tuning.VOCABULARY_SPLIT.get(case.key.architecture), BLOCK_M=tuning.COMBINE_ROWS,
    )  # fmt: skip
    return values | dict(zip(KERNELS[case.kernel].blocks, case.tile, strict=False))


def function_of(name):
    """The Triton function of a kernel."""
    module = importlib.import_module(f"bertkern.kernels.{KERNELS[name].module}")
    return getattr(module, f"{name}_kernel")


def source(case):
    """(kernel, signature, constants, attributes, options) for triton.compile."""
    kernel, constants = function_of(case.kernel), constants_of(case)
    types = TYPES | KERNELS[case.kernel].types
    signature, attributes = {}, {}
    parameters = inspect.signature(kernel.fn).parameters
    for index, (name, parameter) in enumerate(parameters.items()):
        if "constexpr" in str(parameter.annotation):
            if name not in constants:
                raise KeyError(f"gate_cases.py has no value for {name} of {case.kernel}")
            signature[name] = "constexpr"
            continue
        default = f"*{case.dtype}" if name.endswith("_ptr") else "i32"
        signature[name] = types.get(name, "fp32" if name in FLOATS else default)
        if signature[name].startswith("*") or name.startswith("stride") or name in ALIGNED_SIZES:
            attributes[(index,)] = [["tt.divisibility", 16]]
    constants = {k: v for k, v in constants.items() if signature.get(k) == "constexpr"}
    options = {"num_warps": case.tile.warps, "num_stages": getattr(case.tile, "stages", 3)}
    return kernel, signature, constants, attributes, options


def kernels_of_the_package():
    """Names of all kernels in bertkern.kernels: what KERNELS must cover."""
    import bertkern.kernels as package

    for module in pkgutil.iter_modules(package.__path__):
        for name in vars(importlib.import_module(f"{package.__name__}.{module.name}")):
            if name.endswith("_kernel"):
                yield name.removesuffix("_kernel")
