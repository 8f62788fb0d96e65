"""Builds bertkern._C: the CPU kernels always, the CUDA kernels where an nvcc is found.

Environment:
    BERTKERN_CUDA   1: CUDA is wanted; a build without it fails, saying what is missing. 0: no CUDA.
                    Unset: CUDA where it is found and works, else the build records why not.
    CUDA_HOME       a CUDA toolkit (>= 12.4); else nvcc on PATH; else the PyPI wheels (>= 13)
                    nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-crt, nvidia-cuda-runtime and
                    nvidia-cuda-cccl.
    CXX             the C++ compiler (GCC or Clang).
    BERTKERN_JOBS   compilers at a time; 2 by default.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

# NaN and Inf must propagate: no -ffast-math. Nothing reads errno or exception flags.
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wno-psabi",
]
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
ISA_SOURCES = (
    "cpu/attention_kernels.cpp",
    "cpu/attention_bwd_kernels.cpp",
    "cpu/layer_norm_kernels.cpp",
    "cpu/linear_kernels.cpp",
    "cpu/ffn_kernels.cpp",
)
SOURCES = (
    "cpu/attention.cpp",
    "cpu/layer_norm.cpp",
    "cpu/linear.cpp",
    "cpu/ffn.cpp",
    "cpu/parallel.cpp",
    "cpu/isa.cpp",
    "cpu/fma_rate.cpp",
)
BINDINGS = ("bindings.cpp", "cuda/bindings.cpp", "usual_call.cpp")
CUDA_SOURCES = (
    "cuda/attention.cu",
    "cuda/attention_bwd_sm90.cu",
    "cuda/attention_sm90.cu",
    "cuda/embedding_layer_norm.cu",
    "cuda/layer_norm.cu",
    "cuda/device.cu",
    "cuda/tensor_map.cu",
)

LEAST_CUDA = (12, 4)
CUDA_WHEELS = "nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl"
CUDA_TARGETS = {
    "sm_80": "arch=compute_80,code=sm_80",
    "sm_90a": "arch=compute_90a,code=sm_90a",
    "compute_90 (PTX)": "arch=compute_90,code=compute_90",
}
# wgmma and setmaxnreg are instructions of sm_90a alone.
HOPPER_SOURCES = ("cuda/attention_bwd_sm90.cu", "cuda/attention_sm90.cu")


class Missing(Exception):
    """Something that a CUDA build needs is not there; the message says what."""


class CudaToolkit:
    """An nvcc with its headers and its static runtime library."""

    def __init__(self, nvcc: Path) -> None:
        self.nvcc = nvcc
        # The nvcc of PATH may be a script or a link: its own --dryrun names the toolkit's folder.
        dryrun = self._run("--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)
        top = re.search(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE)
        self.home = Path(top[1]).resolve() if top else nvcc.resolve().parent.parent
        version = re.search(r"release (\d+)\.(\d+)", self._run("--version"))
        if version is None:
            raise Missing(f"{nvcc} --version names no release")
        self.version = (int(version[1]), int(version[2]))
        if self.version < LEAST_CUDA:
            raise Missing(
                f"{nvcc} is of CUDA {self.version[0]}.{self.version[1]}; at least "
                f"{LEAST_CUDA[0]}.{LEAST_CUDA[1]} is needed"
            )
        self.include = self._find("the header cuda_runtime.h", "cuda_runtime.h", "include")
        self._find("the header crt/host_config.h", "crt/host_config.h", "include")
        self._find("the header nv/target", "nv/target", "include", "include/cccl")
        self.library = self._find("libcudart_static.a", "libcudart_static.a", "lib64", "lib")

    def _run(self, *arguments: str) -> str:
        try:
            done = subprocess.run(
                [str(self.nvcc), *arguments], capture_output=True, text=True, timeout=60
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Missing(f"{self.nvcc} does not run: {error}") from error
        return done.stdout + done.stderr

    def _find(self, what: str, name: str, *folders: str) -> Path:
        roots = [self.home, *sorted((self.home / "targets").glob("*-linux"))]
        for root in roots:
            for folder in folders:
                if (root / folder / name).exists():
                    return root / folder
        raise Missing(
            f"{what} is not in {self.home} (in the PyPI wheels it comes with one of: {CUDA_WHEELS})"
        )


def find_cuda() -> CudaToolkit:
    """The first CUDA toolkit of CUDA_HOME, PATH and the PyPI wheels; raises Missing."""
    if platform.system() != "Linux":
        raise Missing(f"CUDA is built on Linux only, not on {platform.system()}")
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc = Path(home) / "bin" / "nvcc"
        if not nvcc.exists():
            raise Missing(f"CUDA_HOME is {home}, but {nvcc} does not exist")
        return CudaToolkit(nvcc)
    reasons = []
    candidates = [Path(found)] if (found := shutil.which("nvcc")) else []
    # In pip's isolated build sys.path is that of the build, sysconfig names the target.
    site = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for folder in dict.fromkeys(map(str, site)):
        candidates += sorted(Path(folder or ".").glob("nvidia/cu*/bin/nvcc"), reverse=True)
    for nvcc in candidates:
        try:
            return CudaToolkit(nvcc)
        except Missing as error:
            reasons.append(str(error))
    raise Missing(
        "; ".join(reasons)
        or "no nvcc: CUDA_HOME is not set, PATH has none, and the PyPI wheels are not installed "
        f"(pip install {CUDA_WHEELS})"
    )


class BuildExtension(build_ext):
    """Compiles each translation unit with its own flags, several at a time, and links them."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles and links `ext`, with CUDA where it is wanted and can be had."""
        self.compiler_command = self._find_compiler()
        self.objects = Path(self.build_temp).resolve() / "bertkern"
        self.objects.mkdir(parents=True, exist_ok=True)
        cuda, reason = self._toolkit()
        jobs = max(1, int(os.environ.get("BERTKERN_JOBS", "2")))
        with ThreadPoolExecutor(jobs) as pool:
            # nvcc takes longest, so its sources start first, one job each.
            cuda_objects = (
                [pool.submit(self._compile_cuda, cuda, source) for source in CUDA_SOURCES]
                if cuda
                else []
            )
            cpu_objects = [pool.submit(self._compile_cpu, *unit) for unit in self._cpu_units()]
            objects = [unit.result() for unit in cpu_objects]
            if cuda is not None:
                try:
                    objects += [unit.result() for unit in cuda_objects]
                except subprocess.CalledProcessError as error:
                    if os.environ.get("BERTKERN_CUDA") == "1":
                        raise SystemExit(
                            f"BERTKERN_CUDA=1, but nvcc failed:\n{error.stderr}"
                        ) from error
                    first = (error.stderr.strip() or "no message").splitlines()[0]
                    cuda, reason = None, f"nvcc failed to compile: {first}"
        print(
            f"bertkern._C: CUDA {'.'.join(map(str, cuda.version)) if cuda else f'absent: {reason}'}"
        )
        facts = {
            "BERTKERN_COMPILER": self._compiler_name(),
            "BERTKERN_CUDA_VERSION": ".".join(map(str, cuda.version)) if cuda else "",
            "BERTKERN_CUDA_REASON": reason or "",
            "BERTKERN_CUDA_TARGETS": ", ".join(CUDA_TARGETS) if cuda else "",
        }
        defines = [f"-D{name}={_c_string(value)}" for name, value in facts.items()]
        sources = BINDINGS if cuda else (*BINDINGS, "cuda/absent.cpp")
        names = [source.replace("/", "_").removesuffix(".cpp") for source in sources]
        with ThreadPoolExecutor(jobs) as pool:
            objects += pool.map(self._compile_cpu, sources, names, [defines] * len(sources))
        self._link(objects, cuda, Path(self.get_ext_fullpath(ext.name)))

    def _find_compiler(self) -> list[str]:
        configured = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
        for command in (shlex.split(configured)[:1], ["c++"], ["g++"], ["clang++"]):
            if command and shutil.which(command[0]):
                return command
        raise SystemExit(
            "bertkern needs a C++17 compiler (GCC or Clang): none of $CXX, c++, g++, clang++"
        )

    def _compiler_name(self) -> str:
        done = subprocess.run([*self.compiler_command, "--version"], capture_output=True, text=True)
        return (done.stdout.splitlines() or ["unknown"])[0]

    def _toolkit(self) -> tuple[CudaToolkit | None, str | None]:
        wanted = os.environ.get("BERTKERN_CUDA", "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"BERTKERN_CUDA={wanted!r}: allowed are 0, 1 and unset")
        if wanted == "0":
            return None, "BERTKERN_CUDA=0 when it was built"
        try:
            return find_cuda(), None
        except Missing as error:
            if wanted == "1":
                raise SystemExit(f"BERTKERN_CUDA=1, but CUDA cannot be built: {error}") from error
            return None, str(error)

    def _isas(self) -> list[str]:
        """Instruction sets of the architecture that is built for."""
        done = subprocess.run(
            [*self.compiler_command, *_arch_flags(), "-dM", "-E", "-x", "c", os.devnull],
            capture_output=True,
            text=True,
        )
        return list(ISA_FLAGS) if "__x86_64__ " in done.stdout else ["baseline"]

    def _cpu_units(self) -> list[tuple[str, str, list[str]]]:
        isas = self._isas()
        units = []
        for isa in reversed(isas):
            for source in ISA_SOURCES:
                names = [f"-DBERTKERN_ISA=isa_{isa}", f"-DBERTKERN_ISA_NAME={_c_string(isa)}"]
                units.append((source, f"{Path(source).stem}_{isa}", [*ISA_FLAGS[isa], *names]))
        has = [f"-DBERTKERN_HAS_{isa.upper()}" for isa in isas]
        units += [(source, f"cpu_{Path(source).stem}", has) for source in SOURCES]
        return units

    def _compile_cpu(self, source: str, name: str, flags: list[str]) -> Path:
        import pybind11

        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        command = [*self.compiler_command, *CXX_FLAGS, *_arch_flags(), f"-I{CSRC}", *flags]
        if source in BINDINGS:
            command += includes
        return self._compile(command, CSRC / source, self.objects / f"{name}.o")

    def _compile_cuda(self, cuda: CudaToolkit, source: str) -> Path:
        targets = ["sm_90a"] if source in HOPPER_SOURCES else CUDA_TARGETS
        targets = [flag for name in targets for flag in ("-gencode", CUDA_TARGETS[name])]
        command = [
            *(str(cuda.nvcc), "-std=c++17", "-O3", "--expt-relaxed-constexpr", "--threads", "2"),
            *("-Xptxas", "-v", "-ccbin", self.compiler_command[0]),
            *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
            *(f"-I{CSRC}", f"-I{cuda.include}", *targets),
        ]
        return self._compile(command, CSRC / source, self.objects / f"cuda_{Path(source).stem}.o")

    def _compile(self, command: list[str], source: Path, target: Path) -> Path:
        """Runs a compiler unless the object is newer than everything that the last run read."""
        dependencies, record = target.with_suffix(".d"), target.with_suffix(".command")
        command = [*command, "-MMD", "-MF", str(dependencies)]
        line = shlex.join(map(str, [*command, "-c", source, "-o", target]))
        if not self.force and _is_fresh(target, dependencies, record, line):
            return target
        print(line, flush=True)
        done = subprocess.run(shlex.split(line), capture_output=True, text=True)
        target.with_suffix(".log").write_text(done.stderr)
        if done.returncode != 0:
            print(done.stderr, file=sys.stderr, flush=True)
            raise subprocess.CalledProcessError(
                done.returncode, line, stderr=done.stdout + done.stderr
            )
        # ptxas prints every kernel's registers; of that only what it warns of is worth seeing.
        said = done.stderr.splitlines()
        if "ptxas info" in done.stderr:
            said = [line for line in said if "(C7" in line or "warning" in line]
        if said:
            print("\n".join(said), file=sys.stderr, flush=True)
        record.write_text(line)
        return target

    def _link(self, objects: list[Path], cuda: CudaToolkit | None, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [*self.compiler_command, *_arch_flags(), "-o", str(target), *map(str, objects)]
        if platform.system() == "Darwin":
            command += ["-bundle", "-undefined", "dynamic_lookup"]
        else:
            command += ["-shared", "-Wl,--exclude-libs,ALL", "-s"]
            command += [str(cuda.library / "libcudart_static.a")] if cuda else []
            command += ["-ldl", "-lpthread", "-lrt"]
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True)


def _is_fresh(target: Path, dependencies: Path, record: Path, line: str) -> bool:
    """Whether an object was made by this command and nothing that it was made from has changed."""
    if not (target.exists() and dependencies.exists() and record.exists()):
        return False
    read = dependencies.read_text().replace("\\\n", " ").partition(": ")[2]
    made = target.stat().st_mtime
    inputs = [Path(name) for name in re.split(r"(?<!\\)\s+", read.strip())]
    return record.read_text() == line and all(
        path.exists() and path.stat().st_mtime < made for path in inputs
    )


def _arch_flags() -> list[str]:
    """The flags by which macOS chooses between its architectures."""
    flags = shlex.split(os.environ.get("ARCHFLAGS", ""))
    return flags if platform.system() == "Darwin" else []


def _c_string(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
    return f'"{escaped}"'


rooms = ("ops", "reference", "nn", "models", "data", "train", "integrations", "cli")
outside = ("kernels", "benchmarks", "benchmarks.tasks")  # rooms at the top level of the repository
setup(
    packages=["bertkern", *(f"bertkern.{room}" for room in (*rooms, *outside))],
    package_dir={
        "bertkern": "bertkern",
        **{f"bertkern.{room}": room.replace(".", "/") for room in outside},
    },
    package_data={"bertkern": ["py.typed", "_C.pyi"], "bertkern.cli": ["attention_map.html"]},
    ext_modules=[Extension("bertkern._C", sources=["csrc/bindings.cpp"])],
    cmdclass={"build_ext": BuildExtension},
    zip_safe=False,
)
