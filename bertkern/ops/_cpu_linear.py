"""The backend "cpu" of linear and ffn: torch's products and one pass of a kernel around them.

The matrix products are torch's own (oneDNN, MKL or what torch is built with), but for those of at
most FEW_ROWS rows in float32, as a sentence or two or a step of decoding have: there the
extension's own is faster (docs/decisions.md says by how much). What stands around them, bias,
activation, dropout, residual and column sums, is one pass of the extension.
Functions, arguments and equations are those of `bertkern/reference/linear.py` and `ffn.py`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bertkern import _C

from ._cpu import DTYPES, address, dropout_options, dtype_or, parameter

FEW_ROWS = 256

_ACTIVATIONS = {
    "": _C.Activation.NONE,
    "gelu": _C.Activation.GELU,
    "gelu_tanh": _C.Activation.GELU_TANH,
    "relu": _C.Activation.RELU,
}


def _epilogue(
    x: Tensor,
    b: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
    y: Tensor,
    z: Tensor | None,
) -> None:
    """z = x + b, y = residual + dropout(act(z)); y or z may be x's own memory, z may be
    unwanted."""
    b = parameter(b)
    _C.cpu_bias_act_fwd(
        address(x),
        address(b),
        address(residual),
        address(y),
        address(z),
        address(dropout_rows),
        x.stride(0),
        0 if residual is None else residual.stride(0),
        x.shape[0],
        x.shape[1],
        DTYPES[x.dtype],
        dtype_or(b, x),
        _ACTIVATIONS[activation],
        *dropout_options(dropout_p, dropout_seed),
        torch.get_num_threads(),
    )


def _epilogue_bwd(
    dy: Tensor,
    z: Tensor | None,
    b: Tensor | None,
    activation: str,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """(dz, db): dz = dropout'(dy) · act'(z), dy itself where there is neither."""
    unchanged = not activation and dropout_seed is None
    if unchanged and b is None:
        return dy, None
    dz = None if unchanged else torch.empty(dy.shape, dtype=dy.dtype)
    db = None if b is None else torch.empty(b.shape, dtype=b.dtype)
    _C.cpu_act_bwd(
        address(dy),
        address(z if activation else None),
        address(dz),
        address(db),
        address(dropout_rows),
        dy.stride(0),
        dy.shape[1] if z is None else z.stride(0),
        dy.shape[0],
        dy.shape[1],
        DTYPES[dy.dtype],
        dtype_or(b, dy),
        _ACTIVATIONS[activation],
        *dropout_options(dropout_p, dropout_seed),
        torch.get_num_threads(),
    )
    return dy if dz is None else dz, db


def _has_few_rows(x: Tensor) -> bool:
    """Whether the extension computes the product."""
    return 0 < x.shape[0] <= FEW_ROWS and x.dtype == torch.float32 and x.shape[1] > 0


def _few_rows_product(
    x: Tensor, w: Tensor, b: Tensor | None, activation: str, z: Tensor | None
) -> Tensor:
    """act(x wᵀ + b); z, where it is wanted, becomes x wᵀ + b."""
    b = parameter(b)
    (rows, depth), cols = x.shape, w.shape[0]
    y = x.new_empty((rows, cols))
    _C.cpu_linear_fwd(
        address(x),
        address(w),
        address(b),
        address(y),
        address(z),
        x.stride(0),
        w.stride(0),
        rows,
        cols,
        depth,
        _ACTIVATIONS[activation],
        torch.get_num_threads(),
    )
    return y


def _product(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(x wᵀ, the bias that is still to be added).

    In half precision the bias joins before the one rounding: rounding twice can change the sign of
    a small z, and with it relu's derivative.
    """
    if _has_few_rows(x):
        return _few_rows_product(x, w, None, "", None), b
    if b is None or x.dtype == torch.float32:
        return F.linear(x, w), b
    return F.linear(x, w, b.to(x.dtype)), None


def linear_fwd(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
    save_preact: bool,
) -> tuple[Tensor, Tensor]:
    """(y, z); z is empty unless it was asked for and there is an activation."""
    if residual is None and dropout_seed is None:
        if _has_few_rows(x):
            z = x.new_empty((x.shape[0], w.shape[0])) if save_preact and activation else None
            y = _few_rows_product(x, w, b, activation, z)
            return y, x.new_empty(0) if z is None else z
        if not activation:
            return F.linear(x, w, None if b is None else b.to(x.dtype)), x.new_empty(0)
    product, b = _product(x, w, b)
    z = product if save_preact and activation else None
    y = product if z is None else torch.empty_like(product)
    _epilogue(product, b, residual, activation, dropout_p, dropout_seed, dropout_rows, y, z)
    return y, x.new_empty(0) if z is None else z


def _preactivation(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """z as linear_fwd would have saved it."""
    z, b = _product(x, w, b)
    if b is not None:
        _epilogue(z, b, None, "", 0.0, None, None, z, None)
    return z


def linear_bwd(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    z: Tensor,
    activation: str,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx, dw, db); z is empty where it was not saved."""
    if activation and z.dim() == 1:
        z = _preactivation(x, w, b)
    dz, db = _epilogue_bwd(dy, z, b, activation, dropout_p, dropout_seed, dropout_rows)
    return dz @ w, dz.t() @ x, db


def ffn_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
    save_preact: bool,
) -> tuple[Tensor, Tensor]:
    """(y, z); z is empty unless it was asked for."""
    h, z = linear_fwd(x, w1, b1, None, activation, 0.0, None, None, save_preact)
    y, _ = linear_fwd(h, w2, b2, None, "", dropout_p, dropout_seed, dropout_rows, False)
    return y, z


def ffn_bwd(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    z: Tensor,
    activation: str,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """(dx, dw1, db1, dw2, db2); z is empty where it was not saved."""
    if z.dim() == 1:
        z = _preactivation(x, w1, b1)
    g, db2 = _epilogue_bwd(dy, None, b2, "", dropout_p, dropout_seed, dropout_rows)
    dz, db1 = _epilogue_bwd(g @ w2, z, b1, activation, 0.0, None, None)
    h = torch.empty_like(z)
    _epilogue(z, None, None, activation, 0.0, None, None, h, None)
    return dz @ w1, dz.t() @ x, db1, g.t() @ h, db2
