"""Attention: out = dropout(softmax(score(q kᵀ))) v, forward and backward, without the matrix of
scores.

Forward after Dao 2023 (FlashAttention-2) with the running softmax of Milakov & Gimelshein 2018; one
program owns BLOCK_M queries of one head and walks over its keys. Backward without atomics: one
kernel owns queries (dq) and one owns keys (dk, dv), or one does it all where the keys are few; all
recompute the probabilities from q, k and lse.

Legend: B batch, S sequence, T total tokens, H heads, D head dim; i a query, j a key, counted in
their own sequence; M, N, D as suffixes: BLOCK_M queries, BLOCK_N keys, BLOCK_D columns. x scores
before, s after cap and bias, p probabilities, m running maximum, lse = log sum_j exp(s_ij) (natural
logarithm), delta_i = sum_d dout_id out_id - dlse_i. `group`: query heads that share a key head.

Two layouts in one family: batched [B, S, H, D], keys optionally cut at key_lengths[b] and chosen by
key_padding_mask[b, j]; and varlen [T, H, D], sequence b at rows cu_seqlens[b] .. cu_seqlens[b + 1].
Query i may see key j when j < len_k and i + low <= j <= i + high (attention_tile.band_of).

What never happens, and why the masks stand where they stand:
- A row outside its sequence may hold NaN, and 0 * NaN = NaN: such rows of q, k, v, dout are loaded
  as 0, and p and ds are chosen by tl.where, not multiplied by a mask.
- A query that sees nothing has m = -inf, and exp(-inf - (-inf)) = NaN: its exponent is taken
  against 0, its sum is read as 1.
- Offsets of rows are int64: T * H * D passes 2^31.

The sizes of a tile depend on head dim and dtype, and on whether a sequence's own keys fit the short
tile (its length class); a call in which both classes may occur launches both and each program
passes over the sequences of the other. So a sequence's result does not depend on its neighbours.
"""

import torch
import triton

from . import tuning
from .attention_bwd_dbias import attention_bwd_dbias_kernel
from .attention_bwd_dkdv import attention_bwd_dkdv_kernel, attention_bwd_short_kernel
from .attention_bwd_dq import attention_bwd_dq_kernel
from .attention_fwd import attention_fwd_kernel
from .device import architecture, dot_precision, guard
from .dropout import threshold_and_scale

CAUSAL_BOTTOM_RIGHT, CAUSAL_TOP_LEFT = 1, 2
_NO_LIMIT = 2**31 - 1


class _Call:
    """What every launch of one call shares, in the order of the kernels' arguments."""

    def __init__(self, q, k, v, bias, key_padding_mask, cu_seqlens_q, cu_seqlens_k, key_lengths,
                 dropout_seed, max_seqlen_q, max_seqlen_k, causal, window_left, window_right,
                 softcap, dropout_p, scale, sequence_offset, heads_first) -> None:  # fmt: skip
        self.varlen, self.heads_first = cu_seqlens_q is not None, heads_first
        heads_at, tokens_at = (1, 2) if heads_first else (-2, -3)
        self.heads, head_dim = q.shape[heads_at], q.shape[-1]
        self.key_heads = k.shape[heads_at]
        self.group = self.heads // max(self.key_heads, 1)
        if self.varlen:
            self.batch = cu_seqlens_q.numel() - 1
            self.seqlen_q, self.seqlen_k = max_seqlen_q, max_seqlen_k
        else:
            self.batch = q.shape[0]
            self.seqlen_q, self.seqlen_k = q.shape[tokens_at], k.shape[tokens_at]
        if causal:
            window_right = 0
        threshold, keep_scale = threshold_and_scale(dropout_p)
        self.numbers = (
            max(window_left, 0), max(window_right, 0), sequence_offset, scale, softcap, threshold,
            keep_scale,
        )  # fmt: skip
        self.bias, bias_kind = bias, 0
        self.bias_strides = (0, 0, 0, 0)
        if bias is not None:
            bias_kind = 2 if bias.dtype == torch.bool else 1
            self.bias = bias.view(torch.uint8) if bias_kind == 2 else bias
            # A dimension of size 1 is read again and again: stride 0.
            self.bias_strides = tuple(
                0 if size == 1 else stride
                for size, stride in zip(bias.shape, bias.stride(), strict=True)
            )
        self.keys, self.keys_stride = None, 0
        if key_padding_mask is not None:
            self.keys = key_padding_mask.contiguous().view(torch.uint8)
            self.keys_stride = self.keys.stride(0)
        self.indices = (cu_seqlens_q, cu_seqlens_k, key_lengths, dropout_seed)
        self.itemsize, self.arch, self.head_dim = q.element_size(), architecture(q), head_dim
        self.inputs = (*self.strides(q), *self.strides(k), *self.strides(v))
        self.options = dict(
            HEAD_DIM=head_dim, BLOCK_D=tuning.block_d(head_dim),
            ALIGN=0 if causal == CAUSAL_TOP_LEFT else 1, LOW=window_left >= 0,
            HIGH=window_right >= 0, VARLEN=self.varlen, KEY_LENGTHS=key_lengths is not None,
            KEY_PADDING=self.keys is not None, SOFTCAP=softcap != 0.0, DROPOUT=dropout_p > 0,
            PRECISION=dot_precision(q.dtype),
        )  # fmt: skip
        # scale * log2(e) in one factor: max(factor * x) = factor * max(x) only for scale > 0.
        self.bias_options = dict(
            BIAS=bias_kind, FOLD=self.itemsize == 2 and scale > 0 and not bias_kind and not softcap
        )

    def strides(self, x: torch.Tensor) -> tuple[int, int, int]:
        """(batch, token, head) strides of q, k, v or what is like them; varlen has no batch."""
        if self.varlen:
            return 0, x.stride(0), x.stride(1)
        batch, first, second = x.stride()[:3]
        return (batch, second, first) if self.heads_first else (batch, first, second)

    def empty_like(self, x: torch.Tensor) -> torch.Tensor:
        """Of x's sizes, in memory a contiguous [B, S, H, D] or [T, H, D], and no view of one."""
        if not self.heads_first:
            return torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _, heads, tokens, head_dim = x.shape
        strides = (tokens * heads * head_dim, head_dim, heads * head_dim, 1)
        return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)

    def tile(self, kernel: str) -> tuning.AttentionTile:
        return tuning.attention(
            kernel, self.head_dim, self.itemsize, self.arch, not self.bias_options["FOLD"],
            self.options["PRECISION"],
        )  # fmt: skip

    def classes(self, short: str) -> tuple[bool, bool, int]:
        """(whether short sequences may occur, whether long ones may, the most keys of a short
        one)."""
        most = self.tile(short).block_n
        own = self.varlen or self.options["KEY_LENGTHS"]  # else each has exactly seqlen_k keys
        return own or self.seqlen_k <= most, self.seqlen_k > most, most


def _lse_strides(lse: torch.Tensor) -> tuple[int, int]:
    """(batch, head) strides of a contiguous [B, H, Sq] or [H, Tq]."""
    return (0, lse.stride(0)) if lse.dim() == 2 else (lse.stride(0), lse.stride(1))


def attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    scale: float,
    sequence_offset: int,
    heads_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse): out like q, lse fp32 [B, H, Sq] or [H, Tq]. heads_first: q, k, v and out are
    [B, H, S, D], out in memory [B, S, H, D]."""
    call = _Call(
        q, k, v, bias, key_padding_mask, cu_seqlens_q, cu_seqlens_k, key_lengths, dropout_seed,
        max_seqlen_q, max_seqlen_k, causal, window_left, window_right, softcap, dropout_p, scale,
        sequence_offset, heads_first,
    )  # fmt: skip
    out, strides = call.empty_like(q), call.strides
    heads, varlen = call.heads, call.varlen
    lse_shape = (heads, q.shape[0]) if varlen else (call.batch, heads, call.seqlen_q)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    has_short, has_long, most = call.classes("fwd_short")
    launches = [("fwd_short", 0, most)] if has_short else []
    launches += [("fwd", most + 1, _NO_LIMIT)] if has_long else []
    with guard(q):
        for kernel, least_keys, most_keys in launches:
            tile = call.tile(kernel)
            q_blocks = max(1, triton.cdiv(call.seqlen_q, tile.block_m))
            slack = int(varlen and kernel == launches[-1][0])
            attention_fwd_kernel[(q_blocks * heads * (call.batch + slack),)](
                q, k, v, out, lse, call.bias, call.keys, *call.indices,
                *call.inputs, *strides(out), *_lse_strides(lse), *call.bias_strides,
                call.keys_stride, call.batch, heads, call.group, call.seqlen_q, call.seqlen_k,
                q.shape[0], q_blocks, least_keys, most_keys, *call.numbers,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, SHORT=kernel == "fwd_short",
                num_warps=tile.warps, num_stages=tile.stages, **call.options, **call.bias_options,
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
    bias: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    scale: float,
    sequence_offset: int,
    heads_first: bool,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dq, dk, dv, dbias), in memory contiguous [B, S, H, D] or [T, H, D]; dbias only if bias_grad.
    The same bits from run to run: no atomics, sums in the order of the index."""
    call = _Call(
        q, k, v, bias, key_padding_mask, cu_seqlens_q, cu_seqlens_k, key_lengths, dropout_seed,
        max_seqlen_q, max_seqlen_k, causal, window_left, window_right, softcap, dropout_p, scale,
        sequence_offset, heads_first,
    )  # fmt: skip
    dq, dk, dv = (call.empty_like(t) for t in (q, k, v))
    strides = call.strides
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    dlse_strides = (0, 0, 0)  # batch, query, head
    if dlse is not None:
        batch, head = _lse_strides(dlse)
        dlse_strides = (batch, dlse.stride(-1), head)
    lse_strides, extra = _lse_strides(lse), int(call.varlen)
    has_short, has_long, most = call.classes("bwd_short")
    with guard(q):
        if has_short and dq.numel() + dk.numel():
            tile = call.tile("bwd_short")
            slack = int(call.varlen and not has_long)
            attention_bwd_short_kernel[(call.key_heads * (call.batch + slack),)](
                q, k, v, dout, lse, dlse, delta, dq, dk, dv, call.bias, call.keys, *call.indices,
                *call.inputs, *strides(dout), *strides(dq), *strides(dk), *lse_strides,
                *dlse_strides, *call.bias_strides, call.keys_stride,
                call.batch, call.key_heads, call.group, call.seqlen_q, call.seqlen_k, q.shape[0],
                k.shape[0], *call.numbers,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, DLSE=dlse is not None,
                num_warps=tile.warps, num_stages=tile.stages, **call.options, **call.bias_options,
            )  # fmt: skip
        if has_long and dq.numel():
            tile = call.tile("bwd_dq")
            q_blocks = max(1, triton.cdiv(call.seqlen_q, tile.block_m))
            attention_bwd_dq_kernel[(q_blocks * call.heads * (call.batch + extra),)](
                q, k, v, out, dout, lse, dlse, delta, dq, call.bias, call.keys, *call.indices,
                *call.inputs, *strides(out), *strides(dout), *strides(dq), *lse_strides,
                *dlse_strides, *call.bias_strides, call.keys_stride,
                call.batch, call.heads, call.group, call.seqlen_q, call.seqlen_k, q.shape[0],
                q_blocks, most + 1, *call.numbers,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, DLSE=dlse is not None,
                num_warps=tile.warps, num_stages=tile.stages, **call.options, **call.bias_options,
            )  # fmt: skip
        if has_long and dk.numel():
            tile = call.tile("bwd_dkdv")
            k_blocks = max(1, triton.cdiv(call.seqlen_k, tile.block_n))
            attention_bwd_dkdv_kernel[(k_blocks * call.key_heads * (call.batch + extra),)](
                q, k, v, dout, lse, delta, dk, dv, call.bias, call.keys, *call.indices,
                *call.inputs, *strides(dout), *strides(dk), *lse_strides, *call.bias_strides,
                call.keys_stride,
                call.batch, call.key_heads, call.group, call.seqlen_q, call.seqlen_k, k.shape[0],
                k_blocks, most + 1, *call.numbers,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                num_warps=tile.warps, num_stages=tile.stages, **call.options, **call.bias_options,
            )  # fmt: skip
        dbias = None
        if bias_grad:
            dbias = _bias_grad(call, dout, q, k, v, lse, delta, bias)
    return dq, dk, dv, dbias


def _bias_grad(call: _Call, dout, q, k, v, lse, delta, bias: torch.Tensor) -> torch.Tensor:
    """dbias in bias's shape and dtype, summed over the dimensions of size 1."""
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    if dbias.numel() == 0:
        return dbias
    tile = call.tile("bwd_dbias")
    full = (call.batch, call.heads, call.seqlen_q, call.seqlen_k)
    over = [size == 1 and whole != 1 for size, whole in zip(bias.shape, full, strict=True)]
    q_blocks, k_blocks = triton.cdiv(full[2], tile.block_m), triton.cdiv(full[3], tile.block_n)
    grid = bias.shape[0] * bias.shape[1]
    grid *= (1 if over[2] else q_blocks) * (1 if over[3] else k_blocks)
    attention_bwd_dbias_kernel[(grid,)](
        q, k, v, dout, lse, delta, call.bias, dbias, call.keys, *call.indices,
        *call.inputs, *call.strides(dout), *_lse_strides(lse), *call.bias_strides, call.keys_stride,
        *dbias.stride(),
        call.batch, call.heads, call.group, call.seqlen_q, call.seqlen_k, bias.shape[1],
        q_blocks, k_blocks, *call.numbers,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        SUM_BATCH=over[0], SUM_HEADS=over[1], SUM_QUERIES=over[2], SUM_KEYS=over[3],
        num_warps=tile.warps, num_stages=tile.stages, **call.options,
    )  # fmt: skip
    return dbias
