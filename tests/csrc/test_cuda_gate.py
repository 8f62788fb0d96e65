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


@pytest.mark.parametrize("bf16", ["13__nv_bfloat16", "NS_3ptx8bfloat16E"])
def test_names_of_hopper_kernels_say_so(bf16):
    symbol = (
        f"_ZN8bertkern4sm9025attention_bwd_keys_kernelI{bf16}NS_13WarpgroupTileILi64ELi2ELi128ELi4E"
        "LNS_7SwizzleE128ELi32EEELNS_16AttentionVariantE0ELb1EEEvNS0_21AttentionBwdArgumentsE"
    )
    name = cuda_binary.name_of(symbol)
    tile = "WarpgroupTile<64, 2, 128, 4, 128, 32>"
    assert str(name) == f"attention_bwd_keys<bf16, {tile}, plain, true>"
    assert name.numbers("WarpgroupTile") == (64, 2, 128, 4, 128, 32)
    assert name.room == "sm90"


def test_constants_are_those_of_the_sources():
    text = (cuda_gate.CSRC / "common" / "dropout.h").read_text()
    multiplier = re.search(r"kHashMulA = (0x\w+)u;", text).group(1)
    assert multiplier.lower() == cuda_binary.HASH_MULTIPLIER
    text = (cuda_gate.CSRC / "common" / "attention_params.h").read_text()
    assert "kAttentionSharedLimit = 99 * 1024" in text
    assert "kHopperSharedLimit = 227 * 1024" in text
    assert cuda_gate.SHARED_LIMIT == {"sm80": 99 * 1024, "sm90": 227 * 1024}
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
HOPPER = cuda_binary.Name(
    "attention_fwd", ("bf16", "WarpgroupTile<32, 2, 32, 2, 64, 40>", "dropout"), "sm90"
)
# 2 products of 128 x 32 scores at head dim 32: 2 of 64 x 32 x 16 for each by 2 warpgroups. Of 4096
# scores a thread has 16: 4 draws.
STEP = code_of(
    "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT",
    "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR16], R24, gsb0",
    "HGMMA.64x32x16.F32.BF16 R40, R56, gdesc[UR16].tnspB, R40, UP0",
    "HGMMA.64x32x16.F32.BF16 R40, R60, gdesc[UR16].tnspB, R40, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x1",
    *["MUFU.EX2 R24, R24"] * 16,
    *["IMAD R4, R4, 0x7feb352d, RZ"] * 4,
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
)
AROUND = code_of(
    "SYNCS.EXCH.64 URZ, [UR10+0x2c000], UR4",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3+URZ], R2",
    "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R2+URZ], RZ",
    "USETMAXREG.DEALLOC.CTAPOOL 0x28",
    "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8",
    "UTMALDG.4D [UR8], [UR6], desc[UR16]",
    "STSM.16.M88.4 [R1], R12",
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


def hopper(turn=STEP, name=HOPPER, launch=None, **change):
    change = {"setmaxnreg": (40, 232), "registers": 168} | change
    launch = launch or Launch("attention_fwd", 384, 200 * 1024)
    made = kernel(name, turn, launch, serial=cuda_binary.serial_products(turn), **change)
    mnemonics = Counter(i.mnemonic for i in [*AROUND, *turn])
    return made._replace(code=made.code._replace(mnemonics=mnemonics))


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


def alone(turn):
    """A turn as ptxas makes it where it gives up on letting products run."""
    wait = turn[-1]
    return [
        part
        for i in turn
        for part in (
            [i._replace(operands=f"{i.operands.removesuffix(', gsb0')}, gsb0"), wait]
            if i.name == "HGMMA"
            else [i]
        )
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"stack": 8}, ["spills"]),
        ({"launch": Launch("attention_fwd", 384, 227 * 1024 + 1)}, ["shared memory", "not fit"]),
        ({"turn": STEP[2:]}, ["multiply-accumulates"]),
        ({"turn": STEP[:1] + STEP}, ["multiply-accumulates"]),
        ({"is_loop": False}, ["multiply-accumulates"]),
        ({"turn": [i for i in STEP if i.name != "IMAD"]}, ["too few"]),
        ({"turn": alone(STEP)}, ["4 products are serialized", "0% of the exponentials"]),
        ({"turn": STEP[:4] + STEP[-1:] + STEP[4:]}, ["0% of the exponentials"]),
        ({"setmaxnreg": ()}, ["setmaxnreg to ()"]),
        ({"setmaxnreg": (40, 240)}, ["setmaxnreg to (40, 240)"]),
        ({"setmaxnreg": (176, 232)}, ["setmaxnreg to (176, 232)"]),
        ({"registers": 80, "setmaxnreg": (40, 96), "launch": Launch("attention_fwd", 384, 1024)},
         ["2 CTAs"]),
    ],
)  # fmt: skip
def test_every_fault_of_a_hopper_kernel_is_found(change, words):
    found = cuda_gate.faults(hopper(**change))
    assert len(found) == len(words)
    assert all(word in fault for word, fault in zip(words, found, strict=True))


@pytest.mark.parametrize(
    "lacking",
    ["HGMMA", "UTMALDG", "SYNCS.EXCH", "SYNCS.ARRIVE", "SYNCS.PHASECHK", "USETMAXREG.DEALLOC",
     "USETMAXREG.TRY_ALLOC", "MUFU.EX2", "STSM.16.M88"],
)  # fmt: skip
def test_every_instruction_of_hopper_is_missed(lacking):
    made = hopper()
    mnemonics = {m: n for m, n in made.code.mnemonics.items() if not m.startswith(lacking)}
    found = cuda_gate.faults(made._replace(code=made.code._replace(mnemonics=Counter(mnemonics))))
    assert found[0] == f"no {lacking}"
    assert found[1:] == (["products of another type"] if lacking == "HGMMA" else [])


def test_a_type_of_hopper_products_is_a_fault():
    made = hopper()
    name = HOPPER._replace(arguments=("fp16", *HOPPER.arguments[1:]))
    found = cuda_gate.faults(made._replace(code=made.code._replace(name=name)))
    assert found == ["products of another type"]


@pytest.mark.parametrize(
    ("head_dim", "span", "products"), [(32, 64, 6), (64, 64, 5), (96, 64, 5 + 1 / 3)]
)
def test_warpgroups_share_out_parts_of_dq(head_dim, span, products):
    name = HOPPER._replace(
        arguments=("bf16", f"WarpgroupTile<{head_dim}, 2, 64, 2, {span}, 40>", "plain", "true")
    )
    keys = kernel(
        name._replace(function="attention_bwd_keys"), STEP, Launch("attention_bwd_short", 384, 0)
    )
    assert cuda_gate._products(keys)[0] == pytest.approx(products * head_dim * 128 * 64)
    # By square tiles each warpgroup has queries of its own, and their dq.
    square = keys.code.name._replace(function="attention_bwd_short")
    short = keys._replace(code=keys.code._replace(name=square))
    assert cuda_gate._products(short)[0] == 5 * head_dim * 128 * 64


def test_products_that_run_are_seen_across_turns():
    group = "HGMMA.64x32x16.F32 R24, gdesc[UR16], R24, gsb0"
    turn = code_of("FADD R1, R1, R1", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MUFU.EX2 R1, R1", group)
    assert cuda_binary.running(turn) == [True, False, False, True]
    first = code_of(group.removesuffix(", gsb0"), "FADD R1, R1, R1", group)
    assert cuda_binary.running(first) == [True] * 3
    one_left = code_of(group, group, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MUFU.EX2 R1, R1")
    assert cuda_binary.running(one_left) == [True] * 4


@pytest.mark.parametrize("lacking", ["LDG.E.128", "STG.E.128", "SHFL.BFLY"])
def test_layer_norm_without_wide_accesses_or_shuffles_is_a_fault(lacking):
    assert not cuda_gate.faults(norm())
    mnemonics = Counter(i.mnemonic for i in ROW if i.mnemonic != lacking)
    assert cuda_gate.faults(norm(mnemonics=mnemonics)) == [f"no {lacking}"]


def test_every_difference_between_launched_and_compiled_is_found(tmp_path, monkeypatch):
    source = tmp_path / "cuda" / "sm80" / "a.cuh"
    source.parent.mkdir(parents=True)
    monkeypatch.setattr(cuda_gate, "CSRC", tmp_path)
    source.write_text("BERTKERN_KERNEL(Tile::kThreads)\nattention_fwd_kernel(const A a) {\n")
    codes = [kernel(target=target).code for target in ("sm_80", "sm_90a")]
    launched = {ATTENTION: Launch("attention_fwd", 128, 0)}
    assert cuda_gate.unmatched(codes, launched) == []
    (fault,) = cuda_gate.unmatched(codes[:1], launched)
    assert "not compiled for sm_90a" in fault
    assert "not launched" in cuda_gate.unmatched([*codes, norm().code], launched)[0]
    (fault,) = cuda_gate.unmatched([*codes, kernel(target="sm_75").code], launched)
    assert "compiled for sm_75, but not launched" in fault
    both = {**launched, HOPPER: Launch("attention_fwd", 384, 0)}
    (tmp_path / "cuda" / "sm90").mkdir()
    (tmp_path / "cuda" / "sm90" / "a.cuh").write_text(source.read_text())
    assert cuda_gate.unmatched([*codes, hopper().code], both) == []
    (fault,) = cuda_gate.unmatched(codes, both)
    assert f"{HOPPER} is not compiled for sm_90a" in fault
    (fault,) = cuda_gate.unmatched([*codes, hopper().code, hopper(target="sm_80").code], both)
    assert f"{HOPPER} is compiled for sm_80, but not launched" in fault
    (tmp_path / "cuda" / "sm90" / "a.cuh").unlink()
    source.write_text("BERTKERN_KERNEL(kThreads)\nother_kernel(const A a) {\n")
    assert [fault.split()[0] for fault in cuda_gate.unmatched(codes, launched)] == [
        "sm80/attention_fwd_kernel",
        "sm80/other_kernel",
    ]


def test_slots_and_clocks_are_those_of_a_turn():
    attention, row = kernel(), norm()
    assert attention.work == 64 * 16
    assert attention.slots(sass.mix(TURN))["tensor"] == 8 * 128 / 1024
    assert attention.clocks()["tensor"] == 2 * 32 * 1024 / 2048
    # Of Hopper's kernels the threads that compute are counted.
    assert hopper().work == 128 * 32
    assert hopper().slots(sass.mix(STEP))["mufu"] == 1.0
    assert hopper().clocks()["MUFU"] == 128 * 32 / 16
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
        hopper(),
    ]
    text = cuda_gate_document.document(kernels, "V1.2.3")
    version, figures = cuda_gate_document.figures(text)
    assert version == "V1.2.3"
    assert figures == dict(map(cuda_gate_document.figures_of, kernels))
    assert figures[str(ATTENTION), "sm_80"] == (128, 8, 48 * 1024)
    assert f"Registers are spilled in: {kernels[1]}." in text
    assert "4 / 4 / 16" in text  # CTAs of the attention kernel by registers, shared memory, threads
    assert "## sm80/layer_norm_bwd" in text
    assert "No wgmma is serialized." in text
    (row,) = re.findall(rf"^\| `{re.escape(str(HOPPER))}` \|.*", text, re.M)
    assert "| 40 / 232 |" in row
    assert row.endswith("| 95 % | 100 % |")
    serial = cuda_gate_document.document([hopper(alone(STEP))], "V1.2.3")
    assert f"wgmma is serialized in: {hopper()}." in serial


def test_the_document_sets_the_forward_beside_its_goal():
    tile = "WarpgroupTile<64, 2, 32, 2, 128, 40>"
    variants = ("plain", "dropout", "general")
    kernels = [
        hopper(name=HOPPER._replace(arguments=("bf16", tile, variant))) for variant in variants
    ]
    text = cuda_gate_document.document([*kernels, hopper()], "V1.2.3")
    section = text.split("## The forward on Hopper beside its goal\n")[1].split("\n## ")[0]
    # 22 instructions that are no products for 16 scores.
    assert re.findall(r"(\w+)>` \| ([\d.]+) \| ([\d.]+) \|", section) == [
        ("dropout", "11.0", "1.38"),
        ("plain", "6.5", "1.38"),
    ]
