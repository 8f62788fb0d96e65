"""What the compiled extension offers (csrc/bindings.cpp). Only `bertkern.ops` and `bertkern.info`
use it.

Conventions of every function: tensors come as the address of their first element
(`tensor.data_ptr()`),
0 stands for an absent optional tensor; strides count elements; the last dimension's stride is 1;
outputs
are contiguous unless strides are passed for them and are written completely, whatever they held.
`(dropout_threshold, dropout_scale, dropout_seed)`: threshold t = round(p · 65536), scale
65536 / (65536 − t) (0 when t is 65536), the int64 seed; t = 0 switches dropout off.
`threads` is the most threads to use; results do not depend on it.

More than 500 lines: a stub file describes a whole module.
"""

import enum
from collections.abc import Callable, Sequence

from torch import Tensor

Strides = tuple[int, int, int]
FourSizes = tuple[int, int, int, int]
Tables = Sequence[int]  # three: of word, position and type

class DType(enum.Enum):
    """Element type of a tensor."""

    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2

class Activation(enum.Enum):
    """Activation function of a feed-forward layer."""

    NONE = 0
    GELU = 1
    GELU_TANH = 2
    RELU = 3

def build_info() -> dict[str, str]:
    """compiler, cpu_isas, cpu_isa (in use), parallel, cuda ("13.0" or "absent: reason"),
    cuda_targets."""

def cpu_isas() -> list[str]:
    """Instruction sets compiled in that this processor has, best last."""

def set_cpu_isa(name: str) -> None:
    """Use one of `cpu_isas()` from now on (tests; BERTKERN_CPU_ISA in the environment does the
    same)."""

def cpu_fma_rates(type: str, threads: int) -> list[float]:
    """Operations a second (two a multiply-add) that the processor's widest instruction for
    "float32", "bfloat16" or "int8" reaches from registers, of some repeats; empty where it has
    none."""

def usual_call(
    pattern: str, exchange: object, types: tuple[type, ...], is_neg: Callable[[Tensor], bool]
) -> Callable[..., int] | None:
    """A function of as many tensors as `pattern` names that says whether they are as it says
    (2: and one asks for a gradient; 1: and none does) or not (0). csrc/usual_call.h has the
    language of patterns. None where `exchange` is of a version that is not known."""

def cuda_device_count() -> tuple[int, str | None]:
    """(devices, None), or (0, why there is none: not compiled, no driver, driver too old ...)."""

def cuda_unusable() -> str | None:
    """Why the CUDA kernels cannot be used in this process; None when they can."""

def cuda_layer_norm_max_cols() -> int:
    """Most columns that the CUDA LayerNorm kernels hold in registers."""

def cuda_layer_norm_partials(rows: int) -> int:
    """P, the rows of the `partial` buffer of cuda_layer_norm_bwd and
    cuda_embedding_layer_norm_bwd."""

def cuda_embedding_layer_norm_chunks(rows: int) -> int:
    """The rows of the `partial` buffer of cuda_embedding_layer_norm_tables."""

def cpu_attention_fwd(
    q: int,
    k: int,
    v: int,
    out: int,
    lse: int,
    bias: int,
    q_strides: Strides,
    k_strides: Strides,
    v_strides: Strides,
    out_strides: Strides,
    bias_sizes: FourSizes,
    bias_strides: FourSizes,
    bias_dtype: DType | None,
    key_padding_mask: int,
    cu_seqlens_q: int,
    cu_seqlens_k: int,
    key_lengths: int,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    heads: int,
    key_heads: int,
    head_dim: int,
    dtype: DType,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    dropout_threshold: int,
    dropout_scale: float,
    dropout_seed: int,
    sequence_offset: int,
    threads: int,
) -> None:
    """out = dropout(softmax(score(q kᵀ))) v, lse = log Σ exp(score), score(x) = softcap(scale · x)
    + bias.

    Strides are (batch, sequence, head). Batched: q, out [B, Sq, H, D], k, v [B, Sk, Hk, D], lse
    fp32 [B, H, Sq], key_lengths int32 [B] or 0, key_padding_mask bool [B, Sk] contiguous or 0.
    Variable length (cu_seqlens_* int32 [B + 1], both or neither): q, out [Tq, H, D], k, v
    [Tk, Hk, D], lse fp32 [H, Tq]; the strides' batch entry is ignored, seqlen_q is Tq and seqlen_k
    is Tk. heads is a multiple of key_heads: query head h reads key head h // (heads / key_heads).
    bias [B or 1, H or 1, Sq or 1, Sk or 1] (in variable length Sq and Sk are at least the longest
    sequences'), or 0: added, in dtype or FLOAT32; with bias_dtype None bool, False being -inf.
    causal: 0, 1 (bottom right) or 2 (top left); a window's side of -1 is open. Raises ValueError
    for lengths that leave the tensors.
    """

def cpu_attention_bwd(
    dout: int,
    q: int,
    k: int,
    v: int,
    out: int,
    lse: int,
    dlse: int,
    bias: int,
    dq: int,
    dk: int,
    dv: int,
    dbias: int,
    dout_strides: Strides,
    q_strides: Strides,
    k_strides: Strides,
    v_strides: Strides,
    out_strides: Strides,
    bias_sizes: FourSizes,
    bias_strides: FourSizes,
    bias_dtype: DType | None,
    key_padding_mask: int,
    cu_seqlens_q: int,
    cu_seqlens_k: int,
    key_lengths: int,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    heads: int,
    key_heads: int,
    head_dim: int,
    dtype: DType,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    dropout_threshold: int,
    dropout_scale: float,
    dropout_seed: int,
    sequence_offset: int,
    threads: int,
) -> None:
    """Gradients of cpu_attention_fwd. dq, dk, dv are contiguous in the layout of q, k, v; dlse
    fp32 like lse, or 0. dbias is contiguous in bias's sizes and dtype, the sum over whatever bias
    was broadcast over, in one order; or 0."""

def cpu_layer_norm_fwd(
    x: int,
    residual: int,
    weight: int,
    bias: int,
    y: int,
    z: int,
    mean: int,
    rstd: int,
    dropout_rows: int,
    x_stride: int,
    residual_stride: int,
    rows: int,
    cols: int,
    dtype: DType,
    weight_dtype: DType,
    bias_dtype: DType,
    eps: float,
    dropout_threshold: int,
    dropout_scale: float,
    dropout_seed: int,
    threads: int,
) -> None:
    """y = (z − mean) · rstd · weight + bias, z = residual + dropout(x), or x itself when residual
    is 0.

    x, residual [rows, cols] with a row stride, y, z [rows, cols] contiguous, mean, rstd fp32
    [rows],
    dropout_rows int64 [rows] or 0. z is not written when it is 0, which needs residual 0.
    """

def cpu_embedding_layer_norm_fwd(
    ids: int,
    position_ids: int,
    type_ids: int,
    word: int,
    position: int,
    type: int,
    weight: int,
    bias: int,
    y: int,
    mean: int,
    rstd: int,
    dropout_rows: int,
    word_stride: int,
    position_stride: int,
    type_stride: int,
    rows: int,
    cols: int,
    dtype: DType,
    weight_dtype: DType,
    bias_dtype: DType,
    eps: float,
    dropout_threshold: int,
    dropout_scale: float,
    dropout_seed: int,
    threads: int,
) -> None:
    """y = dropout((z − mean) · rstd · weight + bias), z = word[id] + position[p] + type[t] in fp32.

    ids, position_ids, type_ids int64 [rows], rows of the tables (the caller checked them); type_ids
    0: type row 0. The tables have `dtype` and a row stride; y [rows, cols] contiguous, mean, rstd
    fp32 [rows]."""

def cpu_layer_norm_bwd(
    dy: int,
    dz: int,
    z: int,
    weight: int,
    mean: int,
    rstd: int,
    dx: int,
    dresidual: int,
    dweight: int,
    dbias: int,
    dropout_rows: int,
    dy_stride: int,
    dz_stride: int,
    z_stride: int,
    rows: int,
    cols: int,
    dtype: DType,
    weight_dtype: DType,
    bias_dtype: DType,
    dropout_threshold: int,
    dropout_scale: float,
    dropout_seed: int,
    threads: int,
) -> None:
    """dresidual = dz + rstd · (g − mean(g) − x̂ · mean(g · x̂)), g = dy · weight; dx =
    dropout'(dresidual).

    z is what cpu_layer_norm_fwd normalised (x when there was no residual). dz may be 0. dresidual
    0: not
    written. dweight, dbias [cols] in weight's and bias's dtype, 0 where there is none.
    """

def cpu_dropout(
    x: int,
    y: int,
    dropout_rows: int,
    x_stride: int,
    rows: int,
    cols: int,
    dtype: DType,
    dropout_threshold: int,
    dropout_scale: float,
    dropout_seed: int,
    threads: int,
) -> None:
    """y = dropout(x), x [rows, cols] with a row stride, y contiguous."""

def cpu_linear_fwd(
    x: int,
    w: int,
    bias: int,
    y: int,
    z: int,
    x_stride: int,
    w_stride: int,
    rows: int,
    cols: int,
    depth: int,
    activation: Activation,
    threads: int,
) -> None:
    """z = x wᵀ + bias, y = act(z), all float32: x [rows, depth], w [cols, depth], y, z [rows,
    cols]. bias and z may be 0. Fast for few rows; depth at least 1."""

def cpu_bias_act_fwd(
    x: int,
    bias: int,
    residual: int,
    y: int,
    z: int,
    dropout_rows: int,
    x_stride: int,
    residual_stride: int,
    rows: int,
    cols: int,
    dtype: DType,
    bias_dtype: DType,
    activation: Activation,
    dropout_threshold: int,
    dropout_scale: float,
    dropout_seed: int,
    threads: int,
) -> None:
    """z = x + bias, y = residual + dropout(act(z)). bias, residual and z may be 0. y may be x, z
    may be x, if contiguous."""

def cpu_act_bwd(
    dy: int,
    z: int,
    dz: int,
    dbias: int,
    dropout_rows: int,
    dy_stride: int,
    z_stride: int,
    rows: int,
    cols: int,
    dtype: DType,
    bias_dtype: DType,
    activation: Activation,
    dropout_threshold: int,
    dropout_scale: float,
    dropout_seed: int,
    threads: int,
) -> None:
    """dz = dropout'(dy) · act'(z), dbias = Σ_rows dz (0: not wanted). z may be 0 for
    Activation.NONE and dz 0 if only dbias is wanted."""

def cuda_attention_fwd(
    q: int,
    k: int,
    v: int,
    out: int,
    lse: int,
    bias: int,
    q_strides: Strides,
    k_strides: Strides,
    v_strides: Strides,
    out_strides: Strides,
    bias_sizes: FourSizes,
    bias_strides: FourSizes,
    bias_dtype: DType | None,
    key_padding_mask: int,
    cu_seqlens_q: int,
    cu_seqlens_k: int,
    key_lengths: int,
    order: int,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    total_q: int,
    total_k: int,
    heads: int,
    key_heads: int,
    head_dim: int,
    dtype: DType,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    dropout_threshold: int,
    dropout_scale: float,
    dropout_seed: int,
    sequence_offset: int,
    device: int,
    stream: int,
) -> None:
    """As cpu_attention_fwd, on a device and its stream: fp16 and bf16, head dims that are multiples
    of 8 up to 128, every row of q, k, v and out on a multiple of 16 bytes; dropout_seed is an
    address on the device. In variable length seqlen_q and seqlen_k are the longest sequences' (or
    more), total_q and total_k the rows; lengths are not checked. `order` is scratch there, int32
    [batch], which names the sequences longest first on Hopper. Raises ValueError for what it cannot
    take, RuntimeError when a launch fails."""

def cuda_attention_bwd(
    dout: int,
    q: int,
    k: int,
    v: int,
    out: int,
    lse: int,
    dlse: int,
    delta: int,
    bias: int,
    dq: int,
    dk: int,
    dv: int,
    dbias: int,
    dout_strides: Strides,
    q_strides: Strides,
    k_strides: Strides,
    v_strides: Strides,
    out_strides: Strides,
    bias_sizes: FourSizes,
    bias_strides: FourSizes,
    bias_dtype: DType | None,
    key_padding_mask: int,
    cu_seqlens_q: int,
    cu_seqlens_k: int,
    key_lengths: int,
    order: int,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    total_q: int,
    total_k: int,
    heads: int,
    key_heads: int,
    head_dim: int,
    dtype: DType,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    dropout_threshold: int,
    dropout_scale: float,
    dropout_seed: int,
    sequence_offset: int,
    device: int,
    stream: int,
) -> None:
    """As cpu_attention_bwd, with the limits of cuda_attention_fwd. delta, fp32 like lse, is
    scratch; so is order in variable length, int32 [2, batch]. The same bits from run to run."""

def cuda_layer_norm_fwd(
    x: int,
    residual: int,
    weight: int,
    bias: int,
    y: int,
    z: int,
    mean: int,
    rstd: int,
    dropout_rows: int,
    dropout_seed: int,
    x_stride: int,
    residual_stride: int,
    rows: int,
    cols: int,
    dtype: DType,
    weight_dtype: DType,
    eps: float,
    dropout_threshold: int,
    dropout_scale: float,
    device: int,
    stream: int,
) -> None:
    """As cpu_layer_norm_fwd, on device `device` and its stream (a cudaStream_t as an int).

    dropout_seed is the address of the int64 on the device. weight and bias share weight_dtype,
    which is
    FLOAT32 or dtype. cols ≤ cuda_layer_norm_max_cols(). Raises ValueError for what it cannot take
    and
    RuntimeError with CUDA's own message when a launch fails.
    """

def cuda_layer_norm_bwd(
    dy: int,
    dz: int,
    z: int,
    weight: int,
    mean: int,
    rstd: int,
    dx: int,
    dresidual: int,
    dweight: int,
    dbias: int,
    partial: int,
    dropout_rows: int,
    dropout_seed: int,
    dy_stride: int,
    dz_stride: int,
    z_stride: int,
    rows: int,
    cols: int,
    dtype: DType,
    weight_dtype: DType,
    dropout_threshold: int,
    dropout_scale: float,
    device: int,
    stream: int,
) -> None:
    """As cpu_layer_norm_bwd. partial: fp32 [cuda_layer_norm_partials(rows), 2, cols], needed for
    dweight or dbias."""

def cuda_embedding_layer_norm_fwd(
    ids: Tables,
    wide_ids: Sequence[bool],
    tables: Tables,
    strides: Tables,
    sizes: Tables,
    weight: int,
    bias: int,
    y: int,
    mean: int,
    rstd: int,
    dropout_rows: int,
    dropout_seed: int,
    rows: int,
    cols: int,
    dtype: DType,
    weight_dtype: DType,
    eps: float,
    dropout_threshold: int,
    dropout_scale: float,
    device: int,
    stream: int,
) -> None:
    """y = dropout((z − mean) · rstd · weight + bias), z = word[id] + position[p] + type[t] in fp32.

    ids [rows], int64 where wide, else int32; address 0: row 0 everywhere. Tables have sizes[i]
    rows, of `dtype`, with a row stride. A token with an id that its table does not have gets NaN in
    y, mean and rstd. Otherwise as cuda_layer_norm_fwd; at most 2^31 − 1 rows in all tables, and a
    third as many tokens.
    """

def cuda_embedding_layer_norm_keys(
    ids: Tables,
    wide_ids: Sequence[bool],
    sizes: Tables,
    keys: int,
    rows: int,
    device: int,
    stream: int,
) -> None:
    """keys int32 [3, rows]: the rows of word, position and type that each token reads, the tables
    counted as one of sizes[0] + sizes[1] + sizes[2] rows. An id that its table does not have counts
    as its nearest row."""

def cuda_embedding_layer_norm_bwd(
    dy: int,
    keys: int,
    tables: Tables,
    strides: Tables,
    sizes: Tables,
    weight: int,
    mean: int,
    rstd: int,
    dz: int,
    dweight: int,
    dbias: int,
    partial: int,
    dropout_rows: int,
    dropout_seed: int,
    dy_stride: int,
    dz_stride: int,
    rows: int,
    cols: int,
    dtype: DType,
    weight_dtype: DType,
    dropout_threshold: int,
    dropout_scale: float,
    device: int,
    stream: int,
) -> None:
    """The gradients of z and of weight and bias; keys as cuda_embedding_layer_norm_keys made them.

    dz [rows, dz_stride] of `dtype`; dz_stride is a multiple of 8, at least cols, and the columns
    from cols on are anything. partial as in cuda_layer_norm_bwd. rows and cols are at least 1.
    """

def cuda_embedding_layer_norm_tables(
    dz: int,
    keys: int,
    order: int,
    partial: int,
    gradients: Tables,
    sizes: Tables,
    dz_stride: int,
    rows: int,
    cols: int,
    padding_row: int,
    dtype: DType,
    device: int,
    stream: int,
) -> None:
    """The gradients of the three tables [sizes[i], cols], contiguous: sums of the rows of dz whose
    keys name the same row, in fp32 and in a fixed order; 0 in rows that no key names and in
    padding_row of word (−1: none).

    keys [3 · rows] ascending, equal ones in their former order; order int64: where each stood
    before. partial: fp32 [cuda_embedding_layer_norm_chunks(rows), 2, dz_stride].
    """
