"""Where the tokens of a batch are: unpadding, its inverse, and the tokens that carry labels.

A padded batch [B, S] is computed on its T real tokens only. Sequence b owns the tokens
cu_seqlens[b] ... cu_seqlens[b + 1] - 1 (ByteTransformer, Zhai et al. 2022; flash-attention's
varlen format). Masks may pad left, right, or leave holes: a token keeps the column that it had.

Legend: B sequences, S padded length, T real tokens, P tokens that carry a label.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = (
    -100
)  # the label of a position that has none, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class TokenLayout:
    """The place of T tokens in their sequences and in the padded batch.

    Attributes:
        cu_seqlens: int32 [B + 1], first token of each sequence, then T.
        max_seqlen: at least the length of the longest sequence.
        rows: int64 [T], each token's row b * S + s in the padded layout. It indexes the padded
            batch and it is the row of hidden dropout, so that masks do not depend on the padding.
            None: row t is token t.
        positions: int64 [T], each token's column s.
        padded_shape: (B, S), or None when the batch came packed.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    rows: Tensor | None
    positions: Tensor
    padded_shape: tuple[int, int] | None

    @property
    def batch_size(self) -> int:
        """B."""
        return self.cu_seqlens.shape[0] - 1

    def unpad(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [T, ...]; what came packed is returned as it is."""
        if self.padded_shape is None:
            return x
        x = x.flatten(0, 1)
        return x if self.rows is None else x.index_select(0, self.rows)

    def pad(self, x: Tensor) -> Tensor:
        """[T, ...] -> [B, S, ...] with zeros at padding; packed stays packed."""
        if self.padded_shape is None:
            return x
        batch, seqlen = self.padded_shape
        if self.rows is not None:
            x = x.new_zeros(batch * seqlen, *x.shape[1:]).index_copy(0, self.rows, x)
        return x.unflatten(0, self.padded_shape)

    def first_tokens(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [B, hidden]: the first token of each sequence, zeros for an empty one."""
        if x.shape[0] == 0:
            return x.new_zeros(self.batch_size, x.shape[1])
        first = self.cu_seqlens[:-1].long()
        empty = self.cu_seqlens[1:] == self.cu_seqlens[:-1]
        return x.index_select(0, first.clamp(max=x.shape[0] - 1)).masked_fill(empty[:, None], 0.0)


def _kth_true(flags: Tensor, count: int) -> Tensor:
    """Indices of the `count` true elements of flags [N]: nonzero without a synchronisation.

    The k-th true element stands where the running count first reaches k + 1.
    """
    running = flags.cumsum(0)
    return torch.searchsorted(running, torch.arange(1, count + 1, device=flags.device))


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, from the host without waiting."""
    if tensor.device == device:
        return tensor
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _check_matches(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} must have the shape of input_ids, {shape}, not {tuple(tensor.shape)}"
        )
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name} must be bool or integer, not {tensor.dtype}")


def padded_layout(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[TokenLayout, tuple[Tensor, Tensor] | None]:
    """The layout of a padded batch, and the labels that it carries.

    Costs exactly one synchronisation when the mask or the labels are on a GPU, none when they are
    on the host (they are read there and what follows from them moves without waiting) or absent.

    Args:
        shape: (B, S).
        device: where the computation will be.
        attention_mask: bool or integer [B, S], 0 at padding, or None: no padding.
        labels: int64 [B, S], IGNORE_INDEX where there is none, or None. Labels at padding do not
            count.

    Returns:
        (layout, None or (tokens int64 [P] in 0..T-1, their labels int64 [P])).
    """
    batch, seqlen = shape
    given = [t for t in (attention_mask, labels) if t is not None]
    place = next((t.device for t in given if t.device.type != "cpu"), torch.device("cpu"))
    if attention_mask is not None:
        _check_matches("attention_mask", attention_mask, shape)
        kept = _to(attention_mask, place) != 0
        lengths = kept.sum(1)
        numbers = [lengths.sum(), lengths.max() if batch else lengths.sum()]
    else:
        numbers = []
    if labels is not None:
        _check_matches("labels", labels, shape)
        labels = _to(labels, place)
        labelled = labels != IGNORE_INDEX
        if attention_mask is not None:
            labelled = labelled & kept
        numbers.append(labelled.sum())
    counts = torch.stack(numbers).tolist() if numbers else []  # the one synchronisation

    if attention_mask is None:
        layout = TokenLayout(
            torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen,
            seqlen,
            None,
            torch.arange(seqlen, device=device).repeat(batch),
            shape,
        )
    else:
        rows = _kth_true(kept.flatten(), counts[0])
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        layout = TokenLayout(
            _to(cu_seqlens, device),
            counts[1],
            _to(rows, device),
            _to(rows % max(seqlen, 1), device),
            shape,
        )
    if labels is None:
        return layout, None
    labelled_rows = _kth_true(labelled.flatten(), counts[-1])
    tokens = labelled_rows
    if attention_mask is not None:
        tokens = kept.flatten().cumsum(0)[labelled_rows] - 1
    return layout, (_to(tokens, device), _to(labels.flatten()[labelled_rows], device))


def packed_layout(
    tokens: int, cu_seqlens: Tensor, max_seqlen: int, device: torch.device
) -> TokenLayout:
    """The layout of a packed batch; never synchronises with a GPU.

    Rows are those of a padded batch of width `max_seqlen`. Tokens past cu_seqlens[-1] (a batch
    filled to a fixed budget) follow as if they were one more sequence, with positions that stay
    below max_seqlen.

    Args:
        tokens: T.
        cu_seqlens: int32 [B + 1] on `device`: 0, then the running sum of the lengths.
        max_seqlen: the longest length, or more.
        device: where the computation will be.
    """
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens must be int32 [B + 1], not {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, the input on {device}")
    if not isinstance(max_seqlen, int) or max_seqlen < 0:
        raise ValueError(f"max_seqlen must be an int >= 0, not {max_seqlen!r}")
    if device.type == "cpu" and not torch.compiler.is_compiling():
        lengths = cu_seqlens.diff()
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) > tokens or bool((lengths < 0).any()):
            raise ValueError(
                f"cu_seqlens must rise from 0 to at most T = {tokens}, not {cu_seqlens.tolist()}"
            )
        if lengths.numel() and int(lengths.max()) > max_seqlen:
            raise ValueError(
                f"max_seqlen = {max_seqlen} is less than a length, {int(lengths.max())}"
            )
    starts = cu_seqlens.long()
    token = torch.arange(tokens, device=device)
    sequence = torch.searchsorted(starts[1:].contiguous(), token, right=True)
    column = token - starts[sequence]
    rows = sequence * max_seqlen + column
    return TokenLayout(cu_seqlens, max_seqlen, rows, column.clamp(max=max(max_seqlen - 1, 0)), None)
