"""bertkern tune: measures tile sizes, and backends of attention, on this machine's GPU and keeps
what is faster."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .console import CommandError, err, out, pick_device

if TYPE_CHECKING:
    import torch

_BYTES = {"all": 0, "16": 2, "32": 4}


def tune(
    op: Annotated[
        list[str] | None,
        typer.Option(
            "--op", help="Only this op; may be given again. Without it: all that have tiles."
        ),
    ] = None,
    bits: Annotated[str, typer.Option("--bits", help="16, 32 or all.")] = "all",
    limit: Annotated[
        int, typer.Option("--head-dim", "--columns", min=0, help="Only this row's size; 0 is all.")
    ] = 0,
    device: Annotated[str, typer.Option(help="auto, cuda or cuda:N.")] = "auto",
    show: Annotated[bool, typer.Option("--show", help="Print what is stored and stop.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Remove what is stored and stop.")] = False,
) -> None:
    """Measure tile sizes on this machine's GPU and keep those that are faster than the shipped.

    A few tiles around each shipped one are timed; the winners go to a file in the cache folder
    (BERTKERN_CACHE, else XDG_CACHE_HOME/bertkern, else ~/.cache/bertkern), which the ops read at
    their first call. Then attention in 16 bits is timed with Triton's kernels and with the compiled
    CUDA ones, and each pass and head dim goes to the faster of the two. Some seconds a tile, most
    of it compiling. Ctrl-C keeps what is there.

    Example: bertkern tune --op attention --bits 16 --head-dim 64
    """
    if bits not in _BYTES:
        raise CommandError(f"--bits {bits}: use 16, 32 or all")
    if importlib.util.find_spec("triton") is None:
        raise CommandError("bertkern tune chooses tiles of Triton kernels, and triton is missing")
    from bertkern.ops import _tuning

    if unknown := [name for name in op or () if name not in _tuning.OPS]:
        raise CommandError(f"--op {unknown[0]}: use {', '.join(_tuning.OPS)}")
    if clear:
        _clear(_tuning.files())
    elif show:
        _show(_tuning.files())
    else:
        _tune(tuple(op or _tuning.OPS), _BYTES[bits], limit, pick_device(device))


def _clear(files: list[Path]) -> None:
    for path in files:
        path.unlink()
        err.print(f"removed {path}", markup=False)
    if not files:
        err.print("nothing is stored", markup=False)


def _show(files: list[Path]) -> None:
    from bertkern.ops import _tuning

    if not files:
        err.print("nothing is stored: the shipped tiles are used", markup=False)
    for path in files:
        out.print(str(path), markup=False, soft_wrap=True)
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
            table = Table("row", "chosen", "µs", "instead of", "µs", "measured")
            for key, row in rows.items():
                table.add_row(key, *map(_text, _tuning.as_shown(row)))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CommandError(f"{path} is damaged: bertkern tune --clear removes it") from error
        out.print(table)


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _tune(ops: tuple[str, ...], itemsize: int, limit: int, device: "torch.device") -> None:
    from bertkern.ops import _tuning

    gpu, architecture = _tuning.this_gpu(device)
    chosen = _tuning.rows(ops, architecture, itemsize, limit)
    stored, path, store = _tuning.stored(gpu)
    err.print(f"{gpu}: {len(chosen)} rows -> {path}", markup=False)
    wins = 0
    rows = _tuning.tune(chosen, _tuning.OnGpu(device), stored, store)
    for count, row in enumerate(rows, start=1):
        wins += row.wins
        result = f"{_text(list(row.shipped[:-1]))} stays, {row.shipped_us:.1f} µs"
        if row.wins:
            result = (
                f"{_text(list(row.best[:-1]))}, {row.best_us:.1f} µs instead of "
                f"{row.shipped_us:.1f} with {_text(list(row.shipped[:-1]))}"
            )
        rejected = f", {row.rejected} of them unusable" if row.rejected else ""
        out.print(
            f"{count}/{len(chosen)} {row.key}: {result} ({row.tried} tried{rejected})",
            markup=False,
            soft_wrap=True,
        )
    err.print(f"{wins} of {len(chosen)} rows are faster with another tile", markup=False)
    if "attention" in ops:
        _choose_backends(itemsize, limit, device, stored, store)


def _choose_backends(
    itemsize: int,
    limit: int,
    device: "torch.device",
    stored: dict[str, Any],
    store: Callable[[], None],
) -> None:
    from bertkern.ops import _tuning

    measure = _tuning.BackendsOnGpu(device)
    for direction, head_dim in _tuning.backend_rows(itemsize, limit, device):
        # Said before: a kernel that hangs is then known.
        err.print(f"attention_{direction}, head dim {head_dim}: triton and cuda", markup=False)
        for choice in _tuning.choose_backends([(direction, head_dim)], measure, stored, store):
            cuda = choice.refused or f"{choice.cuda_us:.1f} µs"
            out.print(
                f"{choice.row}: {choice.backend} (triton {choice.triton_us:.1f} µs, cuda {cuda})",
                markup=False,
                soft_wrap=True,
            )
