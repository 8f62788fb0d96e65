"""A pytest plugin of the child processes of run.py: bertkern.kernels comes from another folder.

`python -m pytest -p mutants.load` with BERTKERN_MUTANT_KERNELS naming a copy of `kernels/`. What
was loaded from there and the failures are written as JSON to BERTKERN_MUTANT_REPORT.
"""

import importlib.util
import json
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

PACKAGE = "bertkern.kernels"
FOLDER = Path(os.environ["BERTKERN_MUTANT_KERNELS"])


class CopyFinder:
    """Finds the package in FOLDER, before any other finder (of an installation in place, say)."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == PACKAGE:
            return importlib.util.spec_from_file_location(
                name, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
            )
        if name.startswith(PACKAGE + "."):
            return PathFinder.find_spec(name, [str(FOLDER)])
        return None


assert PACKAGE not in sys.modules
sys.meta_path.insert(0, CopyFinder)

_failures: list[dict[str, str]] = []


def pytest_runtest_logreport(report) -> None:
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else str(report.longrepr)
        _failures.append({"test": report.nodeid, "when": report.when, "message": message})


def pytest_sessionfinish(session) -> None:
    modules = {n: m for n, m in sys.modules.items() if n.startswith(PACKAGE + ".")}
    files = [getattr(m, "__file__", None) for m in modules.values()]
    report = {
        "loaded": [Path(f).name for f in files if f and Path(f).parent == FOLDER],
        "elsewhere": [f for f in files if f and Path(f).parent != FOLDER],
        "ran": session.testscollected,
        "failures": _failures,
    }
    Path(os.environ["BERTKERN_MUTANT_REPORT"]).write_text(json.dumps(report))
