"""The wheel and the sdist: what is in them, and that the wheel works in another environment.

Both are built offline from a copy of the sources, the wheel from the sdist, so that what the sdist
lacks shows here. The new environment sees the packages of this one, but not its bertkern.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    *("bertkern", "kernels", "benchmarks", "csrc"),
    *("pyproject.toml", "setup.py", "MANIFEST.in", "README.md"),
)
ROOMS = ("ops", "reference", "nn", "models", "data", "train", "integrations", "cli")


def run(command, **options):
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    assert result.returncode == 0, f"{command}:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """(copied sources, sdist, wheel), built without what takes minutes: the CUDA part, and the
    compiler's optimiser."""
    source = tmp_path_factory.mktemp("source")
    for part in (*PARTS, "LICENSE"):
        path = ROOT / part
        if path.is_dir():
            shutil.copytree(
                path, source / part, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
            )
        elif path.exists():
            shutil.copy(path, source / part)
    setup = (source / "setup.py").read_text(encoding="utf-8")
    assert '    "-O3",' in setup
    (source / "setup.py").write_text(setup.replace('    "-O3",', '    "-O0",'), encoding="utf-8")
    environment = {**os.environ, "BERTKERN_CUDA": "0"}
    run([sys.executable, "-m", "build", "--no-isolation", source], env=environment)
    (sdist,) = (source / "dist").glob("*.tar.gz")
    (wheel,) = (source / "dist").glob("*.whl")
    return source, sdist, wheel


def test_sdist_holds_every_source(distributions):
    source, sdist, _ = distributions
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {
        path.relative_to(source).as_posix()
        for folder in ("bertkern", "kernels", "benchmarks", "csrc")
        for path in (source / folder).rglob("*")
        if path.is_file()
    }
    wanted |= {"setup.py", "pyproject.toml", "README.md", "LICENSE"}
    assert not wanted - names, sorted(wanted - names)


def test_wheel_holds_every_module_and_the_extension(distributions):
    source, _, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {
        path.relative_to(source).as_posix()
        for path in (source / "bertkern").rglob("*")
        if path.suffix in (".py", ".pyi") or path.name == "py.typed"
    }
    wanted |= {
        f"bertkern/{room}/" + path.relative_to(source / room).as_posix()
        for room in ("kernels", "benchmarks")
        for path in (source / room).rglob("*.py")
    }
    wanted |= {"bertkern/py.typed", "bertkern/_C.pyi", "bertkern/kernels/__init__.py"}
    wanted.add("bertkern/_C" + sysconfig.get_config_var("EXT_SUFFIX"))
    wanted |= {f"bertkern/{room}/__init__.py" for room in ROOMS}
    assert not wanted - names, sorted(wanted - names)


def test_wheel_holds_nothing_else(distributions):
    with zipfile.ZipFile(distributions[2]) as archive:
        tops = {name.split("/", 1)[0] for name in archive.namelist()}
        metadata = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    assert {top for top in tops if not top.endswith(".dist-info")} == {"bertkern"}
    assert "License-Expression: Apache-2.0" in text
    assert any(line.startswith("Requires-Dist: torch>=") for line in text.splitlines())


@pytest.fixture(scope="module")
def new_environment(distributions, tmp_path_factory):
    """Folder of the executables of an environment with the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(folder)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    # The .pth files of a path that a .pth adds are not read: an editable bertkern stays unseen.
    shared = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    (site / "shared.pth").write_text("\n".join(dict.fromkeys(shared)) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    command += ["install", "--no-index", "--no-deps", "--no-compile"]
    run([*command, distributions[2]], env=clean_environment())
    return scripts


def clean_environment():
    return {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "BERTKERN", "TRITON"))
    }


def test_installed_command_works_from_another_folder(new_environment, tmp_path):
    text = run([new_environment / "bertkern", "info"], cwd=tmp_path, env=clean_environment())
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    assert ["cpu", "usable on cpu"] in lines, text  # so the wheel's extension was imported
    assert ["cuda", "absent: BERTKERN_CUDA=0 when it was built"] in lines, text


def test_every_module_imports(new_environment, tmp_path):
    code = (
        "import importlib, pkgutil, bertkern, bertkern._C\n"
        "print(bertkern.__file__)\n"
        "for module in pkgutil.walk_packages(bertkern.__path__, 'bertkern.'):\n"
        "    importlib.import_module(module.name)\n"
        "    print(module.name)\n"
    )
    lines = run(
        [new_environment / "python", "-c", code], cwd=tmp_path, env=clean_environment()
    ).splitlines()
    assert Path(lines[0]).is_relative_to(new_environment.parent), lines[0]
    assert {f"bertkern.{room}" for room in (*ROOMS, "kernels")} <= set(lines)
