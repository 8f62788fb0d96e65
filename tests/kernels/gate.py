"""Compile gate: what the Triton kernels become for sm_80 and sm_90, read from their machine code.

    python tests/kernels/gate.py            compile the sample with the Triton at hand
    python tests/kernels/gate.py --all      every case
    python tests/kernels/gate.py --only TEXT        those whose name contains TEXT
    python tests/kernels/gate.py --every-triton     all cases with the oldest and the newest Triton
                                                    (make gate), then writes docs/machine-code.md

No GPU is needed: Triton's wheel carries ptxas and cuobjdump. The interpreter accepts much that the
compiler refuses, and neither says whether a tile fits the registers; this does.

The cases come from the tuning table: every row of it x the architecture that the row is for x its
dtypes (16-bit; fp32 as IEEE and as tf32) x the variants in gate_cases.py, so a new row is a new
case. Each prints one JSON object, with its faults: spilled registers, too much shared memory, no
matrix instruction of the kind that the tile is for. Triton's own cache holds what was compiled
(build/gate/cache), so a second run reads it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import gate_cases
import sass

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gate"
TRITONS = ("3.6.0", "3.9.0")  # the oldest and the newest that are supported
PROCESSES = 2
# Bytes that a CTA may have. The rows of sm80 serve Ada and GA10x too, which have 99 KB.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}


def compile_case(case):
    """Registers, spills, shared memory, the loop's instructions and the faults of one case."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    start = time.perf_counter()
    kernel, signature, constants, attributes, options = gate_cases.source(case)
    try:
        compiled = triton.compile(
            ASTSource(kernel, signature, constants, attributes),
            target=GPUTarget("cuda", case.arch, 32),
            options=options,
        )
    except Exception as error:  # whatever the compiler's reason is, it is this case's fault
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        return {**case.about(), "faults": [f"does not compile: {lines[-1].strip()[:300]}"]}
    code, usage = disassemble(compiled.asm["cubin"])
    loop, is_loop = sass.main_loop(code)
    warps, registers = options["num_warps"], int(re.search(r"REG:(\d+)", usage).group(1))
    tf32 = case.precision == "tf32"
    result = {
        **case.about(),
        "triton": triton.__version__,
        "warps": warps,
        "registers": registers,
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "shared": compiled.metadata.shared,
        "ctas": sass.occupancy(registers, compiled.metadata.shared, warps, case.arch),
        "instructions": sass.mix(code),
        "matrix": sorted({i.name for i in code if i.name in ("HGMMA", "HMMA")}),
        "is_loop": is_loop,
        "loop": sass.mix(loop),
        "macs": sass.macs(loop, warps) or sass.fmas(loop) * 32 * warps,
        "clocks": {k: round(v, 1) for k, v in sass.clocks(loop, warps, case.arch, tf32).items()},
        "seconds": round(time.perf_counter() - start, 2),
    }
    result["faults"] = faults(result, case)
    return result


def disassemble(cubin):
    """(instructions, resource usage) of a compiled kernel."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text, usage = (
            subprocess.run(
                [cuobjdump, flag, file.name], check=True, capture_output=True, text=True
            ).stdout
            for flag in ("-sass", "-res-usage")
        )
    return sass.instructions(text), usage


def faults(result, case):
    """What is wrong with a compiled case, in words; nothing if all is well."""
    found, counts = [], result["instructions"]
    if result["stack"] or counts["spill"]:
        found.append(f"spills: {result['stack']} bytes of stack, {counts['spill']} accesses")
    limit = SHARED_LIMIT[case.arch]
    if result["shared"] > limit:
        found.append(f"shared memory: {result['shared']} > {limit} bytes")
    expected = case.expect
    if expected == ("FFMA",):
        if result["matrix"] or not counts["fma"]:
            found.append(f"fp32 products on {result['matrix'] or 'nothing'} instead of FFMA")
    elif expected and result["matrix"] != sorted(expected):
        found.append(f"products on {result['matrix'] or 'no tensor core'}, not on {expected}")
    return found


def run(cases, file=None):
    """Compile on two processes, the long ones first; prints and returns the results."""
    results = []
    with ProcessPoolExecutor(PROCESSES) as pool:
        for result in pool.map(
            compile_case, sorted(cases, key=lambda case: case.weight, reverse=True)
        ):
            results.append(result)
            print(json.dumps(result), file=file or sys.stdout, flush=True)
            if file:
                tell(f"{len(results)}/{len(cases)} {result['name']} {result['faults'] or ''}")
    return results


def tell(text):
    """Progress and faults, for a person."""
    print(text, file=sys.stderr, flush=True)


def triton_folder(version):
    """A folder with nothing but this Triton, to stand before the installed one on the path."""
    folder = BUILD / f"triton-{version}"
    if not (folder / "triton").is_dir():
        tell(f"installing triton {version} in {folder.relative_to(ROOT)}")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--target", folder, f"triton=={version}"], check=True)
    return folder


def every_triton():
    """All cases with each Triton in a process of its own, then the document; the exit code."""
    import machine_code_document

    failed, results = False, {}
    for version in TRITONS:
        tell(f"== triton {version}")
        path = BUILD / f"results-{version}.jsonl"
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(triton_folder(version)), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        start = time.perf_counter()
        command = [sys.executable, "-W", "ignore", __file__, "--all", "--results", path]
        failed |= subprocess.run(command, env=environment, check=False).returncode != 0
        results[version] = [json.loads(line) for line in path.read_text().splitlines()]
        seconds = time.perf_counter() - start
        bad = [r for r in results[version] if r["faults"]]
        tell(f"triton {version}: {len(results[version])} cases, {len(bad)} bad, {seconds:.0f} s")
    if failed:
        tell("gate: failed; docs/machine-code.md is as it was")
        return 1
    path = ROOT / "docs" / "machine-code.md"
    path.write_text(machine_code_document.document(results), encoding="utf-8")
    tell(f"gate: passed; wrote {path.relative_to(ROOT)}")
    return 0


def main():
    """Compile what is asked for; exit code 1 where a case has a fault."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", metavar="TEXT", default="")
    parser.add_argument("--every-triton", action="store_true")
    parser.add_argument(
        "--results", type=Path, help="write the JSON lines here, progress to stderr"
    )
    given = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(BUILD / "cache"))
    if given.every_triton:
        sys.exit(every_triton())
    cases = list(gate_cases.cases())
    if given.only:
        cases = [case for case in cases if given.only in case.name]
    elif not given.all:
        cases = [case for case in cases if case.sample]
    if given.results:
        given.results.parent.mkdir(parents=True, exist_ok=True)
        with given.results.open("w", encoding="utf-8") as file:
            results = run(cases, file)
    else:
        results = run(cases)
    for result in results:
        if result["faults"]:
            tell(f"{result['name']}: {'; '.join(result['faults'])}")
    sys.exit(not results or any(result["faults"] for result in results))


if __name__ == "__main__":
    main()
