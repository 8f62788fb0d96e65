"""Where the tokens of a batch are: unpadding, its inverse, and the tokens that carry labels.

A padded batch [B, S] is computed on its T real tokens only. Sequence b owns the tokens
cu_seqlens[b] ... cu_seqlens[b + 1] - 1 (ByteTransformer, Zhai et al. 2022; flash-attention's
varlen format). Masks may pad left, right, or leave holes: a token keeps the column that it had.

Dropout numbers the sequences of a whole batch. A process, or a step of gradient accumulation, that
computes a part of the batch says by `sequence_offset` where its part begins: the masks of the parts
are then those of the whole.

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
        rows: int64 [T], each token's row b * S + s in the padded batch. None: row t is token t.
        positions: int64 [T], each token's column s.
        padded_shape: (B, S), or None when the batch came packed.
        sequence_offset: the number of this batch's first sequence in the whole batch.
        dropout_rows: int64 [T], each token's row in the padded whole batch: the row of hidden
            dropout, so that masks depend neither on the padding nor on how a batch is split. None:
            row t is token t.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    rows: Tensor | None
    positions: Tensor
    padded_shape: tuple[int, int] | None
    sequence_offset: int
    dropout_rows: Tensor | None

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

    def pad(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[T, ...] -> [B, S, ...] with `fill` at padding; packed stays packed."""
        if self.padded_shape is None:
            return x
        batch, seqlen = self.padded_shape
        if self.rows is not None:
            padding = x.new_full((batch * seqlen, *x.shape[1:]), fill)
            x = padding.index_copy(0, self.rows, x)
        return x.unflatten(0, self.padded_shape)

    def by_sequence(self, x: Tensor, fill: float) -> Tensor:
        """[T, ...] -> [B, max_seqlen, ...]: row b holds the tokens of sequence b, then `fill`.

        A token is read once and padding reads a row of its own, so the gradient of each token is
        one term: deterministic.
        """
        column = torch.arange(self.max_seqlen, device=x.device)
        starts, ends = self.cu_seqlens[:-1, None].long(), self.cu_seqlens[1:, None].long()
        token = torch.where(starts + column < ends, starts + column, x.shape[0])
        with_filler = torch.cat((x, x.new_full((1, *x.shape[1:]), fill)))
        return with_filler.index_select(0, token.flatten()).unflatten(0, token.shape)

    def sequence_rows(self) -> Tensor | None:
        """The number of each sequence in the whole batch, int64 [B]; None: they count from 0.

        The rows of the dropout of what there is once a sequence.
        """
        if self.sequence_offset == 0:
            return None
        return torch.arange(self.batch_size, device=self.cu_seqlens.device) + self.sequence_offset

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


def _check_offset(sequence_offset: int) -> None:
    if not isinstance(sequence_offset, (int, torch.SymInt)) or sequence_offset < 0:
        raise ValueError(f"sequence_offset must be an int >= 0, not {sequence_offset!r}")


def padded_layout(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    sequence_offset: int = 0,
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
        sequence_offset: the number of the first sequence in the whole batch, which is as wide.

    Returns:
        (layout, None or (tokens int64 [P] in 0..T-1, their labels int64 [P])).
    """
    _check_offset(sequence_offset)
    batch, seqlen = shape
    first_row = sequence_offset * seqlen
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
            sequence_offset,
            torch.arange(batch * seqlen, device=device) + first_row if first_row else None,
        )
    else:
        rows = _kth_true(kept.flatten(), counts[0])
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        places = _to(rows, device)
        layout = TokenLayout(
            _to(cu_seqlens, device),
            counts[1],
            places,
            _to(rows % max(seqlen, 1), device),
            shape,
            sequence_offset,
            places + first_row if first_row else places,
        )
    if labels is None:
        return layout, None
    labelled_rows = _kth_true(labelled.flatten(), counts[-1])
    tokens = labelled_rows
    if attention_mask is not None:
        tokens = kept.flatten().cumsum(0)[labelled_rows] - 1
    return layout, (_to(tokens, device), _to(labels.flatten()[labelled_rows], device))


def packed_layout(
    tokens: int,
    cu_seqlens: Tensor,
    max_seqlen: int,
    device: torch.device,
    sequence_offset: int = 0,
) -> TokenLayout:
    """The layout of a packed batch; never synchronises with a GPU.

    Dropout's rows are those of a padded batch of width `max_seqlen`. Tokens past cu_seqlens[-1] (a
    batch filled to a fixed budget) follow as if they were one more sequence, with positions that
    stay below max_seqlen.

    Args:
        tokens: T.
        cu_seqlens: int32 [B + 1] on `device`: 0, then the running sum of the lengths.
        max_seqlen: the longest length of the whole batch, or more.
        device: where the computation will be.
        sequence_offset: the number of the first sequence in the whole batch.
    """
    _check_offset(sequence_offset)
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
    dropout_rows = (sequence + sequence_offset) * max_seqlen + column
    positions = column.clamp(max=max(max_seqlen - 1, 0))
    return TokenLayout(cu_seqlens, max_seqlen, None, positions, None, sequence_offset, dropout_rows)
