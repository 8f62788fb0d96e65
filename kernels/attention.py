"""Attention: out = dropout(softmax(scale * q kᵀ)) v, forward and backward, without the matrix of
scores.

Forward after Dao 2023 (FlashAttention-2) with the running softmax of Milakov & Gimelshein 2018; one
program owns BLOCK_M queries of one head and walks over its keys. Backward without atomics: one
kernel owns queries (dq) and one owns keys (dk, dv); both recompute the probabilities from q, k and
lse.

Legend: B batch, S sequence, T total tokens, H heads, D head dim; i a query, j a key, counted in
their own sequence; M, N, D as suffixes: BLOCK_M queries, BLOCK_N keys, BLOCK_D columns. s scores, p
probabilities, m running maximum, lse = log sum_j exp(s_ij) (natural logarithm), delta_i = sum_d
dout_id out_id - dlse_i.

Two layouts in one family: batched [B, S, H, D], keys optionally cut at key_lengths[b]; and varlen
[T, H, D], sequence b at rows cu_seqlens[b] .. cu_seqlens[b + 1]. Query i may see key j when j <
len_k and
    CAUSAL 0: always;   1 (bottom right): j <= i + len_k - len_q (batched: Sk - Sq);   2 (top left):
    j <= i.

What never happens, and why the masks stand where they stand:
- A row outside its sequence may hold NaN, and 0 * NaN = NaN: such rows of q, k, v, dout are loaded
  as 0, and p and ds are chosen by tl.where, not multiplied by a mask.
- A query that sees nothing has m = -inf, and exp(-inf - (-inf)) = NaN: its exponent is taken
  against 0, its sum is read as 1.
- Offsets of rows are int64: T * H * D passes 2^31.
The sizes of a tile depend on head dim and dtype only, so a sequence's result does not depend on its
neighbours.
"""

import torch
import triton

from . import tuning
from .attention_bwd import attention_bwd_dkdv_kernel, attention_bwd_dq_kernel
from .attention_fwd import attention_fwd_kernel
from .attention_tile import LOG2E
from .device import architecture, dot_precision, guard
from .dropout import threshold_and_scale


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    """(batch, token, head) strides; varlen has no batch."""
    return (0, *x.stride()[:2]) if x.dim() == 3 else tuple(x.stride()[:3])


def _lse_strides(lse: torch.Tensor) -> tuple[int, int]:
    """(batch, head) strides of a contiguous [B, H, Sq] or [H, Tq]."""
    return (0, lse.stride(0)) if lse.dim() == 2 else (lse.stride(0), lse.stride(1))


def _sizes(q, k, cu_seqlens_q, max_seqlen_q: int, max_seqlen_k: int) -> tuple[bool, int, int, int]:
    """(varlen, batch, longest query sequence, longest key sequence)."""
    if cu_seqlens_q is None:
        return False, q.shape[0], q.shape[1], k.shape[1]
    return True, cu_seqlens_q.numel() - 1, max_seqlen_q, max_seqlen_k


def attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    dropout_p: float,
    scale: float,
    sequence_offset: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse): out [B, Sq, H, D] or [Tq, H, D] in q's dtype, lse fp32 [B, H, Sq] or [H, Tq]."""
    varlen, batch, seqlen_q, seqlen_k = _sizes(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
    heads, head_dim = q.shape[-2:]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse_shape = (heads, q.shape[0]) if varlen else (batch, heads, seqlen_q)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    tile = tuning.attention("fwd", head_dim, q.element_size(), architecture(q))
    threshold, keep_scale = threshold_and_scale(dropout_p)
    q_blocks = max(1, triton.cdiv(seqlen_q, tile.block_m))
    with guard(q):
        attention_fwd_kernel[(q_blocks * heads * (batch + varlen),)](
            q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, key_lengths, dropout_seed,
            *_strides(q), *_strides(k), *_strides(v), *_strides(out), *_lse_strides(lse),
            batch, heads, seqlen_q, seqlen_k, q.shape[0], q_blocks, sequence_offset,
            scale * LOG2E.value, threshold, keep_scale,
            HEAD_DIM=head_dim, BLOCK_D=tuning.block_d(head_dim), BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            CAUSAL=causal, VARLEN=varlen, KEY_LENGTHS=key_lengths is not None,
            DROPOUT=dropout_p > 0,
            FOLD_SCALE=scale > 0, PRECISION=dot_precision(q.dtype), num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
    return out, lse


def attention_bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    dropout_p: float,
    scale: float,
    sequence_offset: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), contiguous. The same bits from run to run: no atomics, sums in the order of the
    index."""
    varlen, batch, seqlen_q, seqlen_k = _sizes(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
    heads, head_dim = q.shape[-2:]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    dlse_strides = (0, 0, 0)
    if dlse is not None:
        dlse_strides = (*_lse_strides(dlse), dlse.stride(-1))
        dlse_strides = (dlse_strides[0], dlse_strides[2], dlse_strides[1])
    threshold, keep_scale = threshold_and_scale(dropout_p)
    arch, itemsize = architecture(q), q.element_size()
    options = dict(
        HEAD_DIM=head_dim, BLOCK_D=tuning.block_d(head_dim), CAUSAL=causal, VARLEN=varlen,
        KEY_LENGTHS=key_lengths is not None, DROPOUT=dropout_p > 0,
        PRECISION=dot_precision(q.dtype),
    )  # fmt: skip
    with guard(q):
        if dq.numel():
            tile = tuning.attention("bwd_dq", head_dim, itemsize, arch)
            q_blocks = max(1, triton.cdiv(seqlen_q, tile.block_m))
            attention_bwd_dq_kernel[(q_blocks * heads * (batch + varlen),)](
                q, k, v, out, dout, lse, dlse, delta, dq,
                cu_seqlens_q, cu_seqlens_k, key_lengths, dropout_seed,
                *_strides(q), *_strides(k), *_strides(v), *_strides(out), *_strides(dout),
                *_strides(dq),
                *_lse_strides(lse), *dlse_strides,
                batch, heads, seqlen_q, seqlen_k, q.shape[0], q_blocks, sequence_offset,
                scale, threshold, keep_scale,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, DLSE=dlse is not None,
                num_warps=tile.warps, num_stages=tile.stages, **options,
            )  # fmt: skip
        if dk.numel():
            tile = tuning.attention("bwd_dkdv", head_dim, itemsize, arch)
            k_blocks = max(1, triton.cdiv(seqlen_k, tile.block_n))
            attention_bwd_dkdv_kernel[(k_blocks * heads * (batch + varlen),)](
                q, k, v, dout, lse, delta, dk, dv,
                cu_seqlens_q, cu_seqlens_k, key_lengths, dropout_seed,
                *_strides(q), *_strides(k), *_strides(v), *_strides(dout), *_strides(dk),
                *_lse_strides(lse),
                batch, heads, seqlen_q, seqlen_k, k.shape[0], k_blocks, sequence_offset,
                scale, threshold, keep_scale,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                num_warps=tile.warps, num_stages=tile.stages, **options,
            )  # fmt: skip
    return dq, dk, dv
