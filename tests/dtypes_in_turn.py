"""Which cases of a grid of backends, cases and dtypes `make test` runs.

A test marked `dtypes_in_turn(op)` has the parameters `backend` and `dtype`. Each of its other
cases runs on each backend in one of the dtypes that the backend computes `op` in: the one that the
case and the backend have had least. Where it computes it in none, one is left, which says why.
With BERTKERN_DTYPES=all (`make test-all`), and on a GPU, all of them run.
"""

import os
from collections import Counter
from typing import Any

import pytest
import torch

from bertkern.ops import _backend, _cuda_attention

ALL = os.environ.get("BERTKERN_DTYPES") == "all" or torch.cuda.is_available()
MARKER = "dtypes_in_turn(op): each case on each backend in one of the dtypes that it computes"


def _computes(op: str, backend: str, dtype: torch.dtype) -> bool:
    """Whether an op with a head dim of 16, if it has one, is computed; "cuda" on the emulator."""
    if backend != "cuda":
        return _backend.cannot(backend, op, dtype, torch.device("cpu"), head_dim=16) is None
    if op not in _backend._OPS[backend]:
        return False
    return op != "attention" or _cuda_attention.cannot_attention(dtype, 16, True) is None


def taken(items: list[pytest.Item]) -> list[pytest.Item]:
    """Those of the items, all of marked tests, that `make test` runs."""
    cells: dict[tuple[Any, ...], list[pytest.Item]] = {}
    for item in items:
        given = dict(item.callspec.params)
        (backend, capability), _ = given.pop("backend"), given.pop("dtype")
        cell = item.nodeid.split("[")[0], backend, capability, repr(given)
        cells.setdefault(cell, []).append(item)
    had: Counter[tuple[Any, ...]] = Counter()
    chosen = []
    for (test, backend, capability, case), every in cells.items():
        op = every[0].get_closest_marker("dtypes_in_turn").args[0]
        where = (test, case), (test, backend, capability)
        dtypes = {item.callspec.params["dtype"]: item for item in every}
        computed = [dtype for dtype in dtypes if _computes(op, backend, dtype)]
        if not computed:
            chosen.append(every[0])
            continue
        dtype = min(computed, key=lambda dtype: sum(had[place, dtype] for place in where))
        had.update((place, dtype) for place in where)
        chosen.append(dtypes[dtype])
    return chosen


def choose(items: list[pytest.Item]) -> list[pytest.Item]:
    """Takes the others out of `items` and returns them."""
    marked = [item for item in items if item.get_closest_marker("dtypes_in_turn")]
    if ALL or not marked:
        return []
    kept = {id(item) for item in taken(marked)}
    left_out = [item for item in marked if id(item) not in kept]
    gone = {id(item) for item in left_out}
    items[:] = [item for item in items if id(item) not in gone]
    return left_out
