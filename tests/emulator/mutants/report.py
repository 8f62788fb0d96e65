"""What docs/cuda-mutants.md says of a run of all mutants."""

from collections import Counter

from .equivalent import argument_of
from .sites import RULES, Mutant, sources

HEAD = """# Deliberately wrong CUDA kernels, and what finds them

Written by `make mutants` from the kernels in `csrc/cuda/`; not edited by hand. Every call site of
the kinds below was made wrong, one at a time (`tests/emulator/mutants/sites.py`), and run on the
emulator with small calls of every option (`attention_cases.py`, `norm_cases.py` beside it) until
the first failed. The same calls pass on the sources as they are. A mutant is caught because

- **tolerance**: an output or a gradient is not what plain torch in fp64 gives, or
- the machine reports a **race**, an access **out of bounds**, a read of **uninitialised** memory or
  a **misaligned** one, threads that wait for ever (**deadlock**), or another fault (**report**), or
- the process **crashed**, or did not end in **time**.
"""

KINDS = {
    "barrier": "a barrier or an arrival removed, one more or one fewer expected, another's turn",
    "wait": "a wait for copies, products or a barrier's phase removed, or for one group fewer",
    "commit": "a commit of copies or of products removed",
    "fence": "a fence removed: of registers, between the proxies, of barriers' initialisation",
    "phase": "a barrier's other phase waited for",
    "copy": "a tile's copy from or to the row, head or sequence beside, bytes miscounted",
    "operand": "a product of what lies beside, or of another's rows; not started anew",
    "shuffle": "a shuffle with another lane, a step of a reduction missing, a vote of one lane",
    "stage": "the wrong stage of shared memory, the wrong tile copied",
    "swizzle": "one access to a tile without its swizzle, or a row or chunk beside",
    "bound": "a comparison off by one, or left out",
    "mask": "a mask of scores, copies, rows or columns left out",
    "guard": "a comparison for equality left out, a lane's task done by all",
    "dropout": "another row's, column's or head's bits, the scale missing",
    "update": "a term of a sum, or a factor, missing",
}

HOWS = ("race", "out of bounds", "uninitialised", "misaligned", "deadlock", "report")


def _table(title: str, rows: dict[str, list], columns: list[str]) -> list[str]:
    """One row for each kind or file: how many mutants were caught by what."""
    lines = [f"| {title} | mutants | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    total = [row for row_of in rows.values() for row in row_of]
    for name, found in (*rows.items(), ("all", total)):
        counts = Counter(found)
        cells = [str(counts[column] or "") for column in columns]
        lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
    return lines


def report(results: list[tuple[Mutant, str]]) -> str:
    """The file's text.

    Args:
        results: each mutant and how it was caught.
    """
    order = {how: i for i, how in enumerate(("tolerance", *HOWS, "crash", "time"))}
    others = ("equivalent", "survived")
    hows = [(m, others[argument_of(m) is None] if how == "survived" else how) for m, how in results]
    columns = [how for how in (*order, *others) if any(h == how for _, h in hows)]
    kinds = {f"{k}: {KINDS[k]}": [h for m, h in hows if m.kind == k] for k in RULES}
    files = {f"`{f}`": [h for m, h in hows if m.file == f] for f in sources()}
    lines = [HEAD, *_table("kind", kinds, columns), "", *_table("file", files, columns)]
    equivalent: dict[str, list[str]] = {}
    for mutant, how in hows:
        if how == "equivalent":
            equivalent.setdefault(argument_of(mutant) or "", []).append(mutant.name)
    lines += ["", "## Equivalent mutants", "", "They compute what the sources compute:"]
    for argument, names in equivalent.items():
        lines += ["", f"{argument}", ""]
        lines += [f"- {name}" for name in names]
    if survivors := [mutant.name for mutant, how in hows if how == "survived"]:
        lines += ["", "## Not caught", "", *(f"- {name}" for name in survivors)]
    return "\n".join(lines) + "\n"
