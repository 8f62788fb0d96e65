"""csrc/ptx: what ptx_probes.cu becomes in machine code, what does not compile, and tensor maps.

Needs an nvcc and no GPU: each function of csrc/ptx must become the instruction that it stands for.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    wheels = (p for folder in sys.path for p in Path(folder or ".").glob("nvidia/cu*/bin/nvcc"))
    candidates = [f"{home}/bin/nvcc" if home else None, shutil.which("nvcc"), *map(str, wheels)]
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


NVCC = _nvcc()
pytestmark = pytest.mark.skipif(
    NVCC is None, reason="no nvcc in CUDA_HOME, on PATH or in the PyPI wheels"
)


def compile_cuda(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [NVCC, "-std=c++17", "--expt-relaxed-constexpr", f"-I{CSRC}", *map(str, arguments)],
        capture_output=True,
        text=True,
    )


def _cuobjdump() -> str:
    """The disassembler beside nvcc, or the one that Triton's wheel carries."""
    beside = Path(NVCC).resolve().parent / "cuobjdump"
    if beside.exists():
        return str(beside)
    triton = pytest.importorskip("triton", reason="no cuobjdump: neither by nvcc nor in Triton")
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


class Machine:
    """The probes for one architecture: the compiler's log, each kernel's instructions."""

    def __init__(self, arch: str, folder: Path) -> None:
        cubin = folder / f"probes_{arch}.cubin"
        target = f"arch=compute_{arch},code=sm_{arch}"
        done = compile_cuda(
            "-cubin", "-Xptxas", "-v", "-gencode", target, HERE / "ptx_probes.cu", "-o", cubin
        )
        assert done.returncode == 0, done.stdout + done.stderr
        self.log = done.stdout + done.stderr
        dump = subprocess.run(
            [_cuobjdump(), "-sass", cubin], check=True, capture_output=True, text=True
        ).stdout
        self.kernels = {}
        for part in dump.split("Function : ")[1:]:
            name, _, body = part.partition("\n")
            lines = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", body, re.MULTILINE)
            self.kernels[name.strip()] = "\n".join(map(str.strip, lines))

    def code(self, kernel: str) -> str:
        """The instructions of the one kernel whose mangled name contains `kernel`."""
        (code,) = [code for name, code in self.kernels.items() if kernel in name]
        assert len(code.splitlines()) > 10, "nothing was disassembled"
        return code


@pytest.fixture(scope="module")
def sm90(tmp_path_factory) -> Machine:
    return Machine("90a", tmp_path_factory.mktemp("sm90"))


@pytest.fixture(scope="module")
def sm80(tmp_path_factory) -> Machine:
    return Machine("80", tmp_path_factory.mktemp("sm80"))


def assert_contains(code: str, patterns) -> None:
    missing = [p for p in patterns if not re.search(p, code, re.MULTILINE)]
    assert not missing, f"missing: {missing} in\n{code}"


def after(first: str, second: str) -> str:
    """The second instruction, at most a few after the first."""
    return rf"{first}.*\n(?:.*\n){{0,8}}?(?:@\S+ )?{second}"


RELEASE = r"MEMBAR\.ALL\.GPU"
ACQUIRE = r"CCTL\.IVALL"
MMA = [
    *(r"LDGSTS\.E\.BYPASS\.(LTC\S*\.)?128", r"LDGDEPBAR", r"DEPBAR\.LE SB0, 0x0", r"LDG\.E\.128"),
    *(r"LDSM\.16\.M88\.4", r"LDSM\.16\.MT88\.4", r"LDSM\.16\.MT88\.2", r"STG\.E\.128"),
]
SM80 = {
    "probe_threads": [
        *(r"S2R \w+, SR_TID\.X", r"SR_CTAID\.X", r"SHFL\.BFLY", r"SHFL\.IDX", r"VOTE\.ANY"),
        *(r"BAR\.SYNC\S* 0x0", r"BAR\.ARV 0x1, 0x80", r"BAR\.SYNC\S* 0x1, 0x80"),
    ],
    "probe_math": [
        *(r"MUFU\.EX2", r"MUFU\.LG2", r"MUFU\.RCP", r"MUFU\.RSQ"),
        *(r"FMNMX ", r"FMNMX\.NAN", r"FFMA"),
    ],
    "probe_mma_half": [*MMA, r"HMMA\.16816\.F32 ", r"F2FP\.(F16\.F32\.)?PACK_AB"],
    "probe_mma_bfloat16": [*MMA, r"HMMA\.16816\.F32\.BF16", r"F2FP\.BF16\S*PACK_AB"],
}
SM90 = {
    "probe_mbarrier": [
        r"SYNCS\.EXCH\.64",  # init
        r"SYNCS\.ARRIVE\.TRANS64 ",  # arrive.expect_tx
        r"SYNCS\.ARRIVE\.TRANS64\.A1T0 ",  # arrive
        r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT",
        r"NANOSLEEP\.SYNCS 0x989680",  # the wait's suspend-time hint
        r"SYNCS\.CCTL\.IV",  # inval
        r"UBLKCP\.S\.G",
    ],
    "probe_cluster": [
        *(after(RELEASE, r"UCGABAR_ARV"), after(r"UCGABAR_WAIT", ACQUIRE)),
        r"PRMT \w+, \w+, 0x654, \w+",  # mapa: the block's rank goes into the top byte
        *(r"ST\.E\.128 ", r"ST\.E ", r"ST\.E\.U16 ", r"LD\.E\.128 ", r"LD\.E ", r"LD\.E\.U16 "),
        after(RELEASE, r"SYNCS\.ARRIVE\.TRANS64\.RED\.A1T0"),  # arrive at another block's barrier
        r"SYNCS\.ARRIVE\.TRANS64\.RED\.A0TR",  # expect_tx
        rf"SYNCS\.PHASECHK.* (P\d), .*\n@\1 {ACQUIRE}",  # wait_cluster
        *(r"ELECT ", r"UBLKCP\.S\.S"),
    ],
    "probe_work": [r"ATOMG\.E\.ADD(\.S32)?\.STRONG\.GPU", r"LDG\.E\.STRONG\.GPU"],
    "probe_grid": [
        *(r"PREEXIT", r"ACQBULK", r"LDG\.E\.STRONG\.GPU"),
        *(after(r"LDG\.E\.STRONG\.GPU", ACQUIRE), after(RELEASE, r"STG\.E\.STRONG\.GPU")),
        after(RELEASE, r"ATOMG\.E\.ADD(\.S32)?\.STRONG\.GPU"),
        after(r"ATOMG\.E\.ADD(\.S32)?\.STRONG\.GPU", ACQUIRE),
    ],
    **{
        f"probe_tmaILi{rank}E": [
            *(rf"UTMALDG\.{rank}D \[UR\d+\], \[UR\d+\], desc\[UR\d+\]", rf"UTMASTG\.{rank}D"),
            *(r"UTMACCTL\.PF", r"UTMACMDFLUSH"),
            *(r"DEPBAR\.LE SB0, 0x0\n(?!CCTL)", rf"DEPBAR\.LE SB0, 0x0\n{ACQUIRE}"),  # read; done
            {2: "0x120", 3: "0x140"}.get(rank, "0x160"),  # evict first, last, normally
            after(RELEASE, r"FENCE\.VIEW\.ASYNC"),  # fence_async
            r"FENCE\.VIEW\.ASYNC\.S\nBAR\.SYNC",  # what threads wrote, before the store reads it
        ]
        for rank in (2, 3, 4, 5)
    },
    "probe_pipeline": [
        r"USETMAXREG\.DEALLOC\.CTAPOOL 0x18",
        r"USETMAXREG\.TRY_ALLOC\.CTAPOOL UP\d, 0xf0",
        *(r"UTMALDG\.4D", r"UTMASTG\.4D", r"HGMMA\.64x128x16\.F32\.BF16"),
        r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1",  # one product is waited for while the next one runs
        *(r"STSM\.16\.M88\.4", r"STSM\.16\.MT88\.4", r"FENCE\.VIEW\.ASYNC\.S\nBAR\.SYNC"),
    ],
}


@pytest.mark.parametrize("kernel", SM80)
def test_instructions_of_sm80(sm80, kernel):
    assert_contains(sm80.code(kernel), SM80[kernel])


@pytest.mark.parametrize("kernel", SM90)
def test_instructions_of_sm90(sm90, kernel):
    assert_contains(sm90.code(kernel), SM90[kernel])


def test_transposed_matrices_are_told_from_others(sm80, sm90):
    mma, pipeline = sm80.code("probe_mma_half"), sm90.code("probe_pipeline")
    assert mma.count("LDSM.16.M88.4") == 2
    assert mma.count("LDSM.16.MT88.4") == 1
    assert pipeline.count("STSM.16.M88.4") == 1
    assert pipeline.count("STSM.16.MT88.4") == 3


def test_relaxed_accesses_order_nothing(sm90):
    assert not re.search(f"{RELEASE}|{ACQUIRE}", sm90.code("probe_work"))


def test_waits_inside_a_block_leave_the_cache_alone(sm90):
    assert "CCTL.IVALL" not in sm90.code("probe_mbarrier")


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize(("copy", "first"), [("UTMALDG", 2), ("UTMASTG", 1)])
def test_coordinates_are_in_order(sm90, rank, copy, first):
    """The probe's coordinates are 1001, 1002, …; the copy takes them from consecutive registers."""
    code = sm90.code(f"probe_tmaILi{rank}E")
    register = int(re.search(rf"{copy}\.{rank}D \[UR(\d+)\]", code)[1]) + first
    assert_contains(code, [rf"UMOV UR{register + i}, {hex(1001 + i)}$" for i in range(rank)])


@pytest.mark.parametrize("n", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize(("mangled", "type_"), [("6__half", ""), ("13__nv_bfloat16", ".BF16")])
def test_products(sm90, n, mangled, type_):
    """The five kinds of a product in their order, and every operand where the probe put it."""
    code = sm90.code(f"probe_productsILi{n}E{mangled}")
    names, operands = zip(*re.findall(r"^(HGMMA\S+) (.*)$", code, re.MULTILINE), strict=True)
    assert set(names) == {f"HGMMA.64x{n}x16.F32{type_}"}
    forms = [re.sub(r"(U?[RP])\d+", r"\1", text) for text in operands]
    assert forms == [
        *("R, gdesc[UR], R, UP", "R, gdesc[UR].tnspA, R", "R, gdesc[UR].tnspB, R"),
        *("R, R, gdesc[UR], R", "R, R, gdesc[UR].tnspB, R, gsb0"),
    ]
    assert_contains(code, [r"WARPGROUP\.ARRIVE", r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0"])
    # High words of the descriptors of the first product: 128-byte swizzle, stride 1024; 64, 512.
    descriptor = int(re.search(r"gdesc\[UR(\d+)\]", operands[0])[1])
    high = {descriptor + 1: "0x40000040", descriptor + 3: "0x80000020"}
    assert_contains(code, [rf"MOV UR{r}, {value}$" for r, value in high.items()])
    # Register i of d is loaded from and stored to row i of `out`, register j of a from row j of in.
    d = int(re.match(r"R(\d+)", operands[0])[1])
    left = [int(re.match(r"R\d+, R(\d+)", text)[1]) for text in operands[3:]]
    loaded, stored = rows_of(code, "LDG"), rows_of(code, "STG")
    assert stored == [(i, d + i) for i in range(n // 2)]
    assert sorted(loaded) == sorted(
        [*stored, *((4 * k + j, r + j) for k, r in enumerate(left) for j in range(4))]
    )


def rows_of(code: str, access: str) -> list[tuple[int, int]]:
    """(row of 512 bytes, register) of each access."""
    found = re.findall(
        rf"^{access}\.E (?:R(\d+), )?desc\[UR\d+\]\[R\d+\.64(?:\+(\w+))?\](?:, R(\d+))?$",
        code,
        re.MULTILINE,
    )
    return [(int(offset or "0", 16) // 512, int(load or store)) for load, offset, store in found]


def test_products_of_a_group_are_not_waited_for_one_by_one(sm90):
    """All four of q kᵀ and all eight of p v follow each other: the accumulators stay where they
    are, and nothing else reads or writes them in between. The first of q kᵀ overwrites."""
    code = re.findall(
        r"^(?:HGMMA\.64x(128|64)x16.* (?:(RZ), !UPT|R\d+)(?:, gsb0)?|WARPGROUP\.(DEPBAR)\S* .*)$",
        sm90.code("probe_pipeline"),
        re.MULTILINE,
    )
    keys, values, wait = ["128 RZ", "128", "128", "128"], ["64"] * 8, "DEPBAR"
    assert [" ".join(filter(None, found)) for found in code] == [
        *(*keys, wait, *keys, *values, wait, wait, *values, wait),
    ]


def test_an_elected_thread_needs_no_loop(sm90):
    """Without elect.sync the compiler loops over the lanes that may be active at a copy."""
    assert "BRA.U.ANY" in sm90.code("probe_tmaILi4E")  # under `thread == 0`
    assert "BRA.U.ANY" not in sm90.code("probe_pipeline")


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_nothing_spills_and_nothing_is_warned_of(arch, request):
    machine = request.getfixturevalue(arch)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", machine.log)
    assert len(spills) == len(machine.kernels) >= len(SM80)
    assert set(spills) == {("0", "0")}
    assert set(re.findall(r"(\d+) bytes stack frame", machine.log)) == {"0"}
    # C7508 to C7519: setmaxnreg ignored, wgmma serialized, fences and waits injected.
    assert not re.search(r"warning|serializ|ignored|C75\d\d", machine.log, re.IGNORECASE)


def test_every_function_is_probed():
    probes = (HERE / "ptx_probes.cu").read_text()
    headers = {path.name: path.read_text() for path in (CSRC / "ptx").glob("*.cuh")}
    definition = re.compile(r"BERTKERN_DEVICE\s+(?:static\s+)?[\w:*&]+\s*\*?\s+(\w+)\(")
    functions = {name for text in headers.values() for name in definition.findall(text)}
    assert len(functions) > 50
    # A function may be probed through another of csrc/ptx.
    everything = probes + definition.sub("", "".join(headers.values()))
    assert not {name for name in functions if not re.search(rf"\b{name}\b *[(<]", everything)}


ILLEGAL = {
    "ptx::wgmma<false, false>(d48, tile, tile, true, ptx::half{});": "N is one of 32, 64",
    "ptx::wgmma<false, false>(d64, tile, tile, true, 1.0f);": "N is one of 32, 64",
    "ptx::wgmma<false>(d48, words, tile, true, ptx::bfloat16{});": "N is one of 32, 64",
    "ptx::wgmma_wait<8>();": "takes 0 to 7",
    "ptx::lower_registers<16>();": "multiples of 8 from 24 to 256",
    "ptx::lower_registers<100>();": "multiples of 8 from 24 to 256",
    "ptx::raise_registers<264>();": "multiples of 8 from 24 to 256",
    "ptx::tma_load(shared, map, {1}, barrier, policy);": "copied by bulk_load",
    "ptx::tma_store(map, {1, 2, 3, 4, 5, 6}, shared);": "2 to 5 dimensions",
    "ptx::bulk_wait<-1>();": "a number of groups",
    "ptx::bulk_wait_read<-1>();": "a number of groups",
    "ptx::load_cluster<double>(ptx::cluster_address(shared, 0));": "b16, b32 or v4.b32",
    "ptx::describe_tile<Swizzle::k128, 16, 1032>(shared);": "14 bits in units of 16 bytes",
    "ptx::describe_tile<Swizzle::k128, 1 << 18, 1024>(shared);": "14 bits in units of 16 bytes",
}
LEGAL = """
    ptx::wgmma<false, false>(d64, tile, tile, true, ptx::half{});
    ptx::wgmma<false>(d64, words, tile, true, ptx::bfloat16{});
    ptx::wgmma_wait<7>(d64);
    ptx::lower_registers<24>();
    ptx::raise_registers<256>();
    ptx::tma_store(map, {1, 2, 3, 4, 5}, shared);
    ptx::bulk_wait<0>();
    ptx::load_cluster<float>(ptx::cluster_address(shared, 0));
    ptx::describe_tile<Swizzle::k128, 16, 1024>(shared);
"""
FRAME = """
#include "ptx/registers.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
using namespace bertkern;
BERTKERN_KERNEL(128) probe(BERTKERN_GRID_CONSTANT TensorMap map) {
  char* shared = ptx::shared_memory();
  auto* barrier = reinterpret_cast<ptx::Barrier*>(shared);
  float d48[6][4] = {}, d64[8][4] = {};
  uint32_t words[4] = {};
  MatrixDescriptor tile{};
  ptx::CachePolicy policy{};
#line 1
BODY
}
"""


def compile_body(body: str, folder: Path, output: str = "cubin") -> subprocess.CompletedProcess:
    source = folder / "body.cu"
    source.write_text(FRAME.replace("BODY", body))
    target = f"arch=compute_90a,code={'compute' if output == 'ptx' else 'sm'}_90a"
    return compile_cuda(f"-{output}", "-gencode", target, source, "-o", folder / f"body.{output}")


def test_fences_and_waits_hold_arithmetic(tmp_path):
    """A compiler would compute the factors where they are used, in the branch behind the fence, and
    the sums, the same each time around, before the loop and its wait."""
    body = """
    auto* memory = reinterpret_cast<float*>(shared);
    const float factor = memory[40], more = memory[41], steps = memory[42];
    for (int i = 0; i < 32; ++i) d64[i / 4][i % 4] = memory[i] * factor;
    ptx::wgmma_fence(d64);
    if (steps > 0.0f) {
      ptx::wgmma<false, false>(d64, tile, tile, true, ptx::half{});
      ptx::wgmma_commit();
      for (int step = 0; step < steps; ++step) {
        ptx::wgmma_wait<0>(d64);
        for (int i = 0; i < 32; ++i) memory[step * 64 + i] = d64[i / 4][i % 4] + more;
      }
    }
    """
    done = compile_body(body, tmp_path, "ptx")
    assert done.returncode == 0, done.stdout + done.stderr
    ptx = (tmp_path / "body.ptx").read_text()
    places = [
        [found.start() for found in re.finditer(instruction, ptx)]
        for instruction in ("mul.f32", "wgmma.fence", "wgmma.mma_async", "wgmma.wait_", "add.f32")
    ]
    assert [len(place) for place in places] == [32, 1, 1, 1, 32]
    in_order = [place for found in places for place in found]
    assert in_order == sorted(in_order)


def test_the_legal_compiles(tmp_path):
    done = compile_body(LEGAL, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_illegal_does_not_compile(tmp_path):
    """One compilation for all: each line has its own error, with the range that is allowed."""
    done = compile_body("\n".join(ILLEGAL), tmp_path)
    assert done.returncode != 0
    errors = re.split(r"^(?=\S+\(\d+\): error)", done.stdout + done.stderr, flags=re.MULTILINE)
    for line, (statement, message) in enumerate(ILLEGAL.items(), 1):
        own = [e for e in errors if re.search(rf"at line {line} of |body.cu\({line}\)", e)]
        assert any(message in e for e in own), f"{statement}\n{own}"


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """What make_tensor_map asks of the driver for these arguments, or what it throws."""
    program = tmp_path_factory.mktemp("tensor_map") / "probe"
    done = compile_cuda(
        *("-gencode", "arch=compute_90a,code=sm_90a", "-Xlinker", "--allow-multiple-definition"),
        *(CSRC / "cuda/tensor_map.cu", HERE / "tensor_map_probe.cu", "-o", program),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "libcuda" not in subprocess.run(["ldd", program], capture_output=True, text=True).stdout

    def run(data=4096, dtype=2, swizzle=128, environment=(), **dimensions):
        sizes = dimensions.get("sizes", (64, 300, 12, 8))
        strides = dimensions.get("strides", (1, 2304, 64, 691200))
        box = dimensions.get("box", (64, 128, 1, 1))
        numbers = (data, dtype, swizzle, len(sizes), *sizes, *strides, *box)
        return subprocess.run(
            [program, *map(str, numbers)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, **dict.fromkeys(environment, "1")},
        ).stdout

    return run


def test_tensor_map(ask):
    """[B, S, H, D] inside a packed [B, S, 3 H, D]; strides become bytes, the first one goes."""
    assert ask() == (
        "bf16 at 0x1000 sizes 64 300 12 8 strides 4608 128 1382400 box 64 128 1 1 steps 1 1 1 1 "
        "swizzle 3 interleave 0 fill 0"
    )


def test_tensor_map_of_two_and_five_dimensions(ask):
    assert ask(dtype=1, swizzle=64, sizes=(24, 7), strides=(1, 32), box=(32, 256)) == (
        "fp16 at 0x1000 sizes 24 7 strides 64 box 32 256 steps 1 1 swizzle 2 interleave 0 fill 0"
    )
    five = {"sizes": (8, 1 << 32, 2, 2, 2), "strides": (1, 8, 0, 16, 24), "box": (256, 1, 1, 1, 1)}
    assert ask(swizzle=16, **five) == (
        "bf16 at 0x1000 sizes 8 4294967296 2 2 2 strides 16 0 32 48 box 256 1 1 1 1 "
        "steps 1 1 1 1 1 swizzle 0 interleave 0 fill 0"
    )


def test_tensor_map_ignores_the_stride_of_a_single_element(ask):
    """It is that of a dense tensor there: whatever the driver asks of strides, these have it."""
    assert " strides 4608 128 1536 box" in ask(sizes=(64, 300, 12, 1), strides=(1, 2304, 64, 5))
    assert " strides 80 128 4608 box" in ask(sizes=(40, 1, 12, 8), strides=(1, 5, 64, 2304))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": 0}, "dtype is 0; allowed: FLOAT16 (1) and BFLOAT16 (2)"),
        ({"sizes": (64,), "strides": (1,), "box": (64,)}, "rank is 1; allowed: 2 to 5"),
        ({"sizes": (64,) * 6, "strides": (1,) * 6, "box": (64,) * 6}, "rank is 6; allowed: 2 to 5"),
        ({"data": 4104}, "data is 4104; allowed: multiples of 16"),
        ({"strides": (2, 2304, 64, 691200)}, "strides[0] is 2; allowed: 1"),
        ({"strides": (1, 2300, 64, 691200)}, "strides[1] is 2300; allowed: multiples of 8"),
        ({"strides": (1, 2304, -64, 691200)}, "strides[2] is -64; allowed: multiples of 8"),
        ({"strides": (1, 2304, 64, 1 << 39)}, "strides[3] is 549755813888; allowed: multiples of"),
        ({"sizes": (64, 0, 12, 8)}, "sizes[1] is 0; allowed: 1 to 2^32"),
        ({"sizes": (64, 300, 12, (1 << 32) + 1)}, "sizes[3] is 4294967297; allowed: 1 to 2^32"),
        ({"box": (64, 257, 1, 1)}, "box[1] is 257; allowed: 1 to 256"),
        ({"box": (64, 128, 1, 0)}, "box[3] is 0; allowed: 1 to 256"),
        ({"box": (36, 128, 1, 1)}, "box[0] is 36; allowed: multiples of 8"),
        ({"box": (72, 128, 1, 1)}, "box[0] is 72; allowed: up to 64, the swizzle's 128 bytes"),
        ({"swizzle": 64}, "box[0] is 64; allowed: up to 32, the swizzle's 64 bytes"),
        ({"swizzle": 32}, "box[0] is 64; allowed: up to 16, the swizzle's 32 bytes"),
    ],
)
def test_tensor_map_names_what_is_allowed(ask, arguments, message):
    assert ask(**arguments).startswith(f"invalid_argument keys: {message}")


def test_tensor_map_without_a_driver_that_makes_them(ask):
    assert ask(environment=["NO_DRIVER"]).startswith("runtime_error cuTensorMapEncodeTiled: CUDA d")
    assert ask(environment=["OLD_DRIVER"]).startswith("runtime_error cuTensorMapEncodeTiled: the d")
    answer = ask(sizes=(99, 300, 12, 8))
    assert answer == "runtime_error keys: cuTensorMapEncodeTiled answers CUresult 1"
