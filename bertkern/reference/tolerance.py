"""The tolerance rule of the house: as exact as torch's own arithmetic in the same dtype, and no
looser.

    max|out - ref64| <= k * max|same_dtype - ref64| + 2 * max|(ref + 0.3) - 0.3 - ref|,   k = 2 (3
    for gradients)

and the same with the root mean square over every 64 consecutive rows of every matrix in place of
the maximum, so that large rows do not excuse small ones. `same_dtype` is the plain computation in
the tested dtype; `(ref + 0.3) - 0.3 - ref`, in that dtype, is one rounding of a value of size ~0.3.

In fp32 nothing but sums is rounded, and the largest error of one order of summation is a random
number: two equally exact computations break the rule against each other about once in fifty small
cases, other cases on every machine. So a miss by less than NEAR is a NearMiss, and
`hold_in_most_draws` draws fresh inputs before it believes it.
"""

import math
from collections.abc import Callable

import torch

ROWS = 64
NEAR = 2.0
DRAWS = 5


class NearMiss(AssertionError):
    """The rule is broken, by less than NEAR times the bound."""


def hold_in_most_draws(check: Callable[[int], object]) -> None:
    """Run check(0), which draws its inputs from that seed; after a near miss also check(1) … of
    DRAWS in all, most of which must hold. A greater miss fails at once."""
    misses = []
    for draw in range(DRAWS):
        try:
            check(draw)
        except NearMiss as miss:
            misses.append(miss)
            if len(misses) > DRAWS // 2:
                raise
        if not misses:
            return


def _rms_per_rows(error: torch.Tensor) -> torch.Tensor:
    """Root mean square of `error` [..., rows, cols] over every ROWS consecutive rows: [n].

    The last block is the last ROWS rows, not a remainder of a few.
    """
    matrix = error.reshape(-1, *error.shape[-2:]) if error.dim() >= 2 else error.reshape(1, -1, 1)
    rows, cols = matrix.shape[1:]
    whole = rows // ROWS * ROWS
    blocks = [matrix[:, :whole].reshape(-1, ROWS * cols)] if whole else []
    if whole < rows:
        blocks.append(matrix[:, -ROWS:].flatten(1))
    return torch.cat([torch.linalg.vector_norm(b, dim=1) / b.shape[1] ** 0.5 for b in blocks])


def _largest(error: torch.Tensor) -> float:
    """max|error|."""
    return torch.linalg.vector_norm(error, ord=float("inf")).item()


def cancelling(terms: torch.Tensor, dtype: torch.dtype) -> float:
    """The rounding of a sum of these terms, which cancel: half a unit of `dtype` in each."""
    return 0.5 * torch.finfo(dtype).eps * terms.detach().double().abs().sum().item()


class Bound:
    """The rule for one tensor: what its values may be, worked out once for all that are held to it.

    Args:
        ref64: the exact values. Matrices are the last two dimensions: rows (queries, tokens) second
            to last.
        same_dtype: the plain computation in the tested dtype.
        dtype: the tested dtype.
        grad: whether it is a gradient.
        noise: an error allowed besides, for sums whose terms cancel: their rounding is that of the
            terms, and torch's own error may happen to be 0. See `cancelling`.
    """

    def __init__(
        self,
        ref64: torch.Tensor,
        same_dtype: torch.Tensor,
        dtype: torch.dtype,
        *,
        grad: bool = False,
        noise: float = 0.0,
    ) -> None:
        self.dtype = dtype
        self.truth = ref64.detach().double()
        # None, or where the truth is NaN, and where it leaves the dtype's range.
        self.nan: torch.Tensor | None = None
        self.beyond: torch.Tensor | None = None
        if self.truth.numel() == 0:
            return
        rounded = self.truth.to(dtype)
        same64 = same_dtype.detach().double().to(self.truth.device)
        if not same64.isfinite().all():
            # Where only plain torch leaves the range, the yardstick is the truth, rounded as its
            # values are.
            own = self.truth.to(same_dtype.dtype).double()
            same64 = torch.where(same64.isfinite(), same64, own)
        if not rounded.isfinite().all():
            self.nan = self.truth.isnan()
            self.beyond = ~rounded.isfinite() & ~self.nan
            self.infinities = rounded[self.beyond]
            undefined = self.nan | self.beyond
            self.truth, same64 = (t.masked_fill(undefined, 0.0) for t in (self.truth, same64))
            rounded = self.truth.to(dtype)
        rounding = ((rounded + 0.3) - 0.3 - rounded).double()
        allowed = same64 - self.truth
        factor = 3.0 if grad else 2.0
        self.most = factor * _largest(allowed) + 2 * _largest(rounding) + noise
        self.most_rms = factor * _rms_per_rows(allowed) + 2 * _rms_per_rows(rounding) + noise

    def hold(self, out: torch.Tensor, name: str = "out") -> None:
        """Hold `out` to the rule. A row where torch's own computation gives NaN (nothing to attend
        to) must be exactly 0 in `out`.

        Raises:
            NearMiss: the rule is broken, by little.
            AssertionError: it is broken.
        """
        truth = self.truth
        assert out.shape == truth.shape, (
            f"{name}: shape {tuple(out.shape)}, not {tuple(truth.shape)}"
        )
        if out.numel() == 0:
            return
        out = out.detach().to(truth.device)
        if self.nan is not None and self.beyond is not None:
            assert (out[self.nan] == 0).all(), f"{name}: not 0 in rows where torch gives NaN"
            reached = torch.equal(out[self.beyond].to(self.dtype), self.infinities)
            assert reached, f"{name}: not infinite"
            out = out.masked_fill(self.nan | self.beyond, 0.0)
        error = out.double() - truth
        worst = _largest(error)
        if not math.isfinite(worst):
            raise AssertionError(f"{name}: {(~out.isfinite()).sum()} values are not finite")
        if worst > self.most:
            kind = NearMiss if worst <= NEAR * self.most else AssertionError
            raise kind(f"{name}: max error {worst:.3e} > {self.most:.3e} ({self.dtype})")
        rms = _rms_per_rows(error)
        where = int((rms - self.most_rms).argmax())
        if rms[where] > self.most_rms[where]:
            kind = NearMiss if (rms <= NEAR * self.most_rms).all() else AssertionError
            raise kind(
                f"{name}: rms error {rms[where]:.3e} > {self.most_rms[where]:.3e} in block {where} "
                f"of {ROWS} rows ({self.dtype})"
            )


def assert_close(
    out: torch.Tensor,
    ref64: torch.Tensor,
    same_dtype: torch.Tensor,
    *,
    grad: bool = False,
    name: str = "out",
    noise: float = 0.0,
) -> None:
    """Hold `out` to the rule: `Bound`, made for this one tensor."""
    Bound(ref64, same_dtype, out.dtype, grad=grad, noise=noise).hold(out, name)
