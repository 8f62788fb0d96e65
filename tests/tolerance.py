"""The tolerance rule of the house: as exact as torch's own arithmetic in the same dtype, and no
looser.

    max|out - ref64| <= k * max|same_dtype - ref64| + 2 * max|(ref + 0.3) - 0.3 - ref|,   k = 2 (3
    for gradients)

and the same with the root mean square over every 64 consecutive rows of every matrix in place of
the maximum, so that large rows do not excuse small ones. `same_dtype` is the plain computation in
the tested dtype; `(ref + 0.3) - 0.3 - ref`, in that dtype, is one rounding of a value of size ~0.3.
"""

import torch

ROWS = 64


def _rms_per_rows(error: torch.Tensor) -> torch.Tensor:
    """Root mean square of `error` [..., rows, cols] over every ROWS consecutive rows -> [n, 1]."""
    matrix = error.reshape(-1, *error.shape[-2:]) if error.dim() >= 2 else error.reshape(1, -1, 1)
    return torch.cat(
        [part.square().mean(dim=(1, 2)).sqrt() for part in matrix.split(ROWS, dim=1)], dim=0
    )


def assert_close(
    out: torch.Tensor,
    ref64: torch.Tensor,
    same_dtype: torch.Tensor,
    *,
    grad: bool = False,
    name: str = "out",
) -> None:
    """Hold `out` to the rule. Matrices are the last two dimensions: put rows (queries, tokens)
    second to last.

    A row where torch's own computation gives NaN (nothing to attend to) must be exactly 0 in `out`.
    """
    assert out.shape == ref64.shape, f"{name}: shape {tuple(out.shape)}, not {tuple(ref64.shape)}"
    if out.numel() == 0:
        return
    dtype = out.dtype
    out64, same64 = out.detach().double().cpu(), same_dtype.detach().double().cpu()
    ref64 = ref64.detach().double().cpu()
    undefined = ref64.isnan() | same64.isnan()
    assert (out64[undefined] == 0).all(), f"{name}: not 0 in rows where torch gives NaN"
    out64, same64, ref64 = (t.masked_fill(undefined, 0.0) for t in (out64, same64, ref64))
    assert out64.isfinite().all(), f"{name}: {(~out64.isfinite()).sum()} values are not finite"
    ref_rounded = ref64.to(dtype)
    rounding = ((ref_rounded + 0.3) - 0.3 - ref_rounded).double()
    factor = 3.0 if grad else 2.0
    error, allowed = out64 - ref64, same64 - ref64
    worst = error.abs().max().item()
    bound = factor * allowed.abs().max().item() + 2 * rounding.abs().max().item()
    assert worst <= bound, f"{name}: max error {worst:.3e} > {bound:.3e} ({dtype})"
    rms, rms_bound = (
        _rms_per_rows(error),
        factor * _rms_per_rows(allowed) + 2 * _rms_per_rows(rounding),
    )
    excess = (rms - rms_bound).max().item()
    where = int((rms - rms_bound).argmax())
    assert excess <= 0, (
        f"{name}: rms error {rms[where]:.3e} > {rms_bound[where]:.3e} in block {where} of {ROWS} "
        "rows "
        f"({dtype})"
    )
