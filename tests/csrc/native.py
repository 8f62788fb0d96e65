"""The functions of bertkern._C on tensors: NaN-filled outputs, addresses and strides."""

import torch
from torch import Tensor

from bertkern import _C

DTYPES = {
    torch.float32: _C.DType.FLOAT32,
    torch.float16: _C.DType.FLOAT16,
    torch.bfloat16: _C.DType.BFLOAT16,
}
NO_DROPOUT = (0, 1.0, 0)


def dropout(p: float, seed: int) -> tuple[int, float, int]:
    """(threshold, scale, seed) as the kernels take them."""
    threshold = round(p * 65536)
    return threshold, (65536 / (65536 - threshold) if threshold < 65536 else 0.0), seed


def at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def _strides(t: Tensor) -> tuple[int, int, int]:
    return tuple(t.stride()[:3]) if t.dim() == 4 else (0, *t.stride()[:2])


def _sizes(q: Tensor, k: Tensor, cu: Tensor | None) -> tuple[int, ...]:
    """(batch, seqlen_q, seqlen_k, heads, key_heads, head_dim)"""
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[-3], k.shape[-3]
    return len(cu) - 1 if cu is not None else batch, seqlen_q, seqlen_k, q.shape[-2], *k.shape[-2:]


def _options(q, k, bias, keys, cu_q, cu_k, key_lengths, causal, window, softcap, drop, offset,
             threads) -> tuple:  # fmt: skip
    """The arguments that both directions end with."""
    nothing = (0, 0, 0, 0)
    shape, strides = (nothing, nothing) if bias is None else (tuple(bias.shape), bias.stride())
    bias_dtype = None if bias is None else DTYPES.get(bias.dtype)
    sizes = _sizes(q, k, cu_q)
    return (
        *(shape, strides, bias_dtype, at(keys), at(cu_q), at(cu_k), at(key_lengths)),
        *(*sizes, DTYPES[q.dtype], causal, *window, softcap, sizes[-1] ** -0.5, *drop, offset),
        threads,
    )


def attention_fwd(
    q, k, v, cu_q=None, cu_k=None, key_lengths=None, causal=0, drop=NO_DROPOUT, offset=0, threads=2,
    bias=None, keys=None, window=(-1, -1), softcap=0.0,
):  # fmt: skip
    batch, seqlen_q, _, heads, *_ = _sizes(q, k, cu_q)
    out = poisoned(*q.shape, dtype=q.dtype)
    lse = poisoned(heads, seqlen_q) if cu_q is not None else poisoned(batch, heads, seqlen_q)
    _C.cpu_attention_fwd(
        *(at(q), at(k), at(v), at(out), at(lse), at(bias)),
        *(_strides(q), _strides(k), _strides(v), _strides(out)),
        *_options(q, k, bias, keys, cu_q, cu_k, key_lengths, causal, window, softcap, drop, offset,
                  threads),
    )  # fmt: skip
    return out, lse


def attention_bwd(
    dout, q, k, v, out, lse, dlse=None, cu_q=None, cu_k=None, key_lengths=None, causal=0,
    drop=NO_DROPOUT, offset=0, threads=2, bias=None, keys=None, window=(-1, -1), softcap=0.0,
):  # fmt: skip
    """[dq, dk, dv], and dbias where there is a bias that is not bool."""
    wanted = [q, k, v] if bias is None or bias.dtype == torch.bool else [q, k, v, bias]
    grads = [poisoned(*t.shape, dtype=t.dtype) for t in wanted]
    _C.cpu_attention_bwd(
        *(at(t) for t in (dout, q, k, v, out, lse, dlse, bias, *grads[:3])),
        at(grads[3] if len(grads) > 3 else None),
        *(_strides(t) for t in (dout, q, k, v, out)),
        *_options(q, k, bias, keys, cu_q, cu_k, key_lengths, causal, window, softcap, drop, offset,
                  threads),
    )  # fmt: skip
    return grads


def layer_norm_fwd(x, weight, bias, eps=1e-5, residual=None, drop=NO_DROPOUT, rows=None, threads=2):
    n, cols = x.shape
    y, mean, rstd = poisoned(n, cols, dtype=x.dtype), poisoned(n), poisoned(n)
    z = poisoned(n, cols, dtype=x.dtype) if residual is not None else None
    _C.cpu_layer_norm_fwd(
        *(at(t) for t in (x, residual, weight, bias, y, z, mean, rstd, rows)),
        *(x.stride(0), residual.stride(0) if residual is not None else 0, n, cols, DTYPES[x.dtype]),
        *(_dtype(weight, x), _dtype(bias, x), eps, *drop, threads),
    )
    return y, z, mean, rstd


def _dtype(t: Tensor | None, x: Tensor) -> _C.DType:
    return DTYPES[(x if t is None else t).dtype]


def layer_norm_bwd(
    dy, z, weight, bias, mean, rstd, dz=None, residual=False, drop=NO_DROPOUT, rows=None, threads=2
):
    n, cols = z.shape
    dx = poisoned(n, cols, dtype=z.dtype)
    dresidual = poisoned(n, cols, dtype=z.dtype) if residual else None
    dweight, dbias = (
        None if t is None else torch.full_like(t, float("nan")) for t in (weight, bias)
    )
    _C.cpu_layer_norm_bwd(
        *(at(t) for t in (dy, dz, z, weight, mean, rstd, dx, dresidual, dweight, dbias, rows)),
        *(dy.stride(0), dz.stride(0) if dz is not None else 0, z.stride(0), n, cols),
        *(DTYPES[z.dtype], _dtype(weight, z), _dtype(bias, z), *drop, threads),
    )
    return dx, dresidual, dweight, dbias


def linear_fwd(x, w, bias, activation, save_z=False, threads=2):
    shape = (x.shape[0], w.shape[0])
    y, z = poisoned(*shape), poisoned(*shape) if save_z else None
    _C.cpu_linear_fwd(
        *(at(t) for t in (x, w, bias, y, z)),
        *(x.stride(0), w.stride(0), *shape, x.shape[1], activation, threads),
    )
    return y, z


def bias_act_fwd(
    x, bias, activation, residual=None, save_z=False, drop=NO_DROPOUT, rows=None, threads=2
):
    n, cols = x.shape
    y = poisoned(n, cols, dtype=x.dtype)
    z = poisoned(n, cols, dtype=x.dtype) if save_z else None
    _C.cpu_bias_act_fwd(
        *(at(t) for t in (x, bias, residual, y, z, rows)),
        *(x.stride(0), residual.stride(0) if residual is not None else 0, n, cols, DTYPES[x.dtype]),
        *(_dtype(bias, x), activation, *drop, threads),
    )
    return y, z


def act_bwd(dy, z, activation, bias=None, drop=NO_DROPOUT, rows=None, threads=2):
    n, cols = dy.shape
    dz = poisoned(n, cols, dtype=dy.dtype)
    dbias = None if bias is None else torch.full_like(bias, float("nan"))
    _C.cpu_act_bwd(
        *(at(t) for t in (dy, z, dz, dbias, rows)),
        *(dy.stride(0), z.stride(0) if z is not None else 0, n, cols, DTYPES[dy.dtype]),
        *(_dtype(bias, dy), activation, *drop, threads),
    )
    return dz, dbias


def hidden_dropout(x, drop, rows=None, threads=2):
    y = poisoned(*x.shape, dtype=x.dtype)
    _C.cpu_dropout(
        *(at(x), at(y), at(rows), x.stride(0), *x.shape, DTYPES[x.dtype], *drop, threads)
    )
    return y
