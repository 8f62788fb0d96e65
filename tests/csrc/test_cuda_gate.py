"""The compile gate of the CUDA kernels: the compiled extension has no fault and is what its
document says; and the reading of code, names and launches that this rests on."""

import re
from collections import Counter

import pytest

from csrc import cuda_binary, cuda_gate, cuda_gate_document, cuda_launches, fabricated_code

sass, Launch, code_of = cuda_gate.sass, cuda_launches.Launch, fabricated_code.code_of


@pytest.fixture(scope="module")
def gate():
    """(kernels, faults of the whole, the assembler's version) of the extension at hand."""
    try:
        return cuda_gate.read()
    except cuda_binary.Missing as error:
        pytest.skip(str(error))


def test_no_kernel_has_a_fault(gate):
    kernels, *_ = gate
    found = {str(kernel): cuda_gate.faults(kernel) for kernel in kernels}
    assert not {name: faults for name, faults in found.items() if faults}


def test_what_is_compiled_is_what_is_launched(gate):
    kernels, found, _ = gate
    assert not found, "\n".join(["is the extension older than its sources?", *found])
    assert {kernel.launch.what for kernel in kernels} >= {*cuda_gate.PRODUCTS, *cuda_gate.MATRICES}


def test_the_document_is_of_this_extension(gate):
    kernels, _, version = gate
    written, figures = cuda_gate_document.figures(cuda_gate.DOCUMENT.read_text(encoding="utf-8"))
    if written != version:
        pytest.skip(f"the document is of ptxas {written}, the extension of {version}")
    now = dict(map(cuda_gate_document.figures_of, kernels))
    stale = {
        key: (figures.get(key), now.get(key))
        for key in figures | now
        if figures.get(key) != now.get(key)
    }
    assert not stale, (
        f"run make sass: {cuda_gate.DOCUMENT.name} has other figures than the extension"
    )


@pytest.mark.parametrize("half", ["6__half", "NS_3ptx4halfE"])
def test_names_are_alike_for_both_compilers(half):
    symbol = (
        f"_ZN8bertkern4sm8020attention_fwd_kernelI{half}NS_13AttentionTileILi64ELi4ELi2ELi32EEE"
        "LNS_16AttentionVariantE2EEEvNS_24AttentionKernelArgumentsE"
    )
    name = cuda_binary.name_of(symbol)
    assert str(name) == "attention_fwd<fp16, AttentionTile<64, 4, 2, 32>, general>"
    assert name.numbers("AttentionTile") == (64, 4, 2, 32)
    assert str(cuda_binary.name_of("_ZN8bertkern4sm803fooEv")) == "foo"


def test_constants_are_those_of_the_sources():
    text = (cuda_gate.CSRC / "common" / "dropout.h").read_text()
    multiplier = re.search(r"kHashMulA = (0x\w+)u;", text).group(1)
    assert multiplier.lower() == cuda_binary.HASH_MULTIPLIER
    text = (cuda_gate.CSRC / "common" / "attention_params.h").read_text()
    assert "kAttentionSharedLimit = 99 * 1024" in text
    assert re.search(r"enum class AttentionVariant : int \{ kPlain, kDropout, kGeneral \}", text)


ATTENTION = cuda_binary.Name("attention_fwd", ("bf16", "AttentionTile<32, 4, 1, 16>", "dropout"))
# Two tiles of 16 x 32: a copy of 16 bytes by each thread for both of them (and half do none).
# 2 products of 64 x 16 scores at head dim 32: 2 · 2 · 2 of 16 x 8 x 16 by each of 4 warps.
TURN = code_of(
    *["HMMA.16816.F32.BF16 R4, R4, R6, R8"] * 8,
    *["IMAD R4, R4, 0x7feb352d, RZ"] * 2,
    *["MUFU.EX2 R4, R5"] * 8,
    *["LDSM.16.M88.4 R4, [R2]", "LDSM.16.MT88.4 R4, [R2]", "SHFL.BFLY PT, R1, R2, 0x1, 0x1f"],
    *["LDGSTS.E.BYPASS.128.ZFILL [R10], [R18.64], P1"] * 2,
)
NORM = cuda_binary.Name("layer_norm_bwd", ("fp16", "NormTile<3, true>"))
ROW = code_of(
    *["LDG.E.128 R4, [R2]"] * 9,
    *["STG.E.128 [R2], R4"] * 6,
    *["FFMA R1, R2, R3, R4"] * 24,
    *["IMAD R4, R4, 0x7feb352d, RZ", "SHFL.BFLY PT, R1, R2, 0x1, 0x1f"],
)


def kernel(name=ATTENTION, turn=TURN, launch=None, **change):
    code = cuda_binary.Code(
        name, "sm_90a", 128, 0, 0, Counter(i.mnemonic for i in turn), turn, turn[:-1], True, 99
    )
    launch = launch or Launch("attention_fwd", 128, 48 * 1024)
    return cuda_gate.Kernel(code._replace(**change), launch)


def norm(**change):
    return kernel(NORM, ROW, Launch("layer_norm_bwd", 256, 1024), **change)


def without(prefix):
    return Counter({i.mnemonic: 1 for i in TURN if not i.mnemonic.startswith(prefix)})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, None),
        ({"stack": 8}, "spills"),
        ({"mnemonics": Counter(i.mnemonic for i in TURN) + Counter({"STL.64": 1})}, "spills"),
        ({"static_shared": 16}, "no launch asks"),
        ({"launch": Launch("attention_fwd", 128, 99 * 1024 + 1)}, "shared memory"),
        ({"registers": 1000}, "does not fit"),
        ({"mnemonics": without("LDSM.16.M88")}, "no LDSM.16.M88"),
        ({"mnemonics": without("LDSM.16.MT88")}, "no LDSM.16.MT88"),
        ({"mnemonics": without("LDGSTS")}, "no LDGSTS"),
        ({"mnemonics": without("MUFU")}, "no MUFU"),
        ({"turn": TURN[1:]}, "multiply-accumulates"),
        ({"turn": TURN[:1] + TURN}, "multiply-accumulates"),
        ({"is_loop": False}, "multiply-accumulates"),
        ({"turn": TURN[:9] + TURN[10:]}, "too few"),
        ({"turn": TURN[:-1]}, "copies"),
        ({"turn": TURN + TURN[-1:] * 3}, "copies"),
        ({"name": ATTENTION._replace(arguments=("fp16", *ATTENTION.arguments[1:]))}, "type"),
    ],
)
def test_every_fault_is_found(change, word):
    launch = change.pop("launch", None)
    found = cuda_gate.faults(kernel(launch=launch)._replace(code=kernel(**change).code))
    assert [word in fault for fault in found] == ([True] if word else [])


@pytest.mark.parametrize("lacking", ["LDG.E.128", "STG.E.128", "SHFL.BFLY"])
def test_layer_norm_without_wide_accesses_or_shuffles_is_a_fault(lacking):
    assert not cuda_gate.faults(norm())
    mnemonics = Counter(i.mnemonic for i in ROW if i.mnemonic != lacking)
    assert cuda_gate.faults(norm(mnemonics=mnemonics)) == [f"no {lacking}"]


def test_every_difference_between_launched_and_compiled_is_found(tmp_path, monkeypatch):
    source = tmp_path / "cuda" / "a.cuh"
    source.parent.mkdir()
    monkeypatch.setattr(cuda_gate, "CSRC", tmp_path)
    source.write_text("BERTKERN_KERNEL(Tile::kThreads)\nattention_fwd_kernel(const A a) {\n")
    codes = [kernel(target=target).code for target in cuda_gate.TARGETS]
    launched = {ATTENTION: Launch("attention_fwd", 128, 0)}
    assert cuda_gate.unmatched(codes, launched) == []
    (fault,) = cuda_gate.unmatched(codes[:1], launched)
    assert "not compiled for sm_90a" in fault
    assert "not launched" in cuda_gate.unmatched([*codes, norm().code], launched)[0]
    assert "compiled for sm_75" in cuda_gate.unmatched(
        [*codes, kernel(target="sm_75").code], launched
    )
    source.write_text("BERTKERN_KERNEL(kThreads)\nother_kernel(const A a) {\n")
    assert [fault.split()[0] for fault in cuda_gate.unmatched(codes, launched)] == [
        "attention_fwd_kernel",
        "other_kernel",
    ]


def test_slots_and_clocks_are_those_of_a_turn():
    attention, row = kernel(), norm()
    assert attention.work == 64 * 16
    assert attention.slots(sass.mix(TURN))["tensor"] == 8 * 128 / 1024
    assert attention.clocks()["tensor"] == 2 * 32 * 1024 / 2048
    assert row.work == 256 * 24
    assert row.slots(sass.mix(ROW))["fma"] == 1.0
    # dy, dz and z in, dx and dresidual out: 10 bytes an element.
    assert row.clocks()["memory"] == pytest.approx(10 * 256 * 24 / 13.87, rel=1e-3)
    words = kernel(NORM, ROW, Launch("layer_norm_bwd_sum", 256, 0))
    assert words.work == 256 * 9 * 4


def test_the_document_names_every_kernel_and_gives_its_figures_back():
    kernels = [
        kernel(),
        kernel(target="sm_80", stack=8),
        norm(),
        norm(is_loop=False, target="sm_80"),
    ]
    text = cuda_gate_document.document(kernels, "V1.2.3")
    version, figures = cuda_gate_document.figures(text)
    assert version == "V1.2.3"
    assert figures == dict(map(cuda_gate_document.figures_of, kernels))
    assert figures[str(ATTENTION), "sm_80"] == (128, 8, 48 * 1024)
    assert f"Registers are spilled in: {kernels[1]}." in text
    assert "4 / 4 / 16" in text  # CTAs of the attention kernel by registers, shared memory, threads
    assert "## layer_norm_bwd" in text
