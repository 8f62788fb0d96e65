"""Finds the call sites of the CUDA kernels that can be wrong, and makes one wrong variant of each.

The text of the *.cuh in csrc/cuda is searched by the rules of RULES: a rule finds places of one
kind and says what could stand there instead. What the compiler decides (template parameters,
static_assert, if constexpr, loops of constant length) and host functions are no sites, nor is what
only tells it something (ptx::hold, of_warp, registers) or the memory (ptx::tma_prefetch).
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ROOT / "csrc" / "cuda"


@dataclass(frozen=True)
class Mutant:
    """One text of a kernel's source and what replaces it.

    Attributes:
        kind: the rule that found it.
        file: in csrc/cuda.
        start: where `before` begins in the file's text.
        line: counted from 1.
        before, after: the text and its replacement.
        source: the whole line that `before` begins in.
        ordinal: counts mutants of a file that the other fields but `start` and `line` share.
    """

    kind: str
    file: str
    start: int
    line: int
    before: str
    after: str
    source: str
    ordinal: int

    @property
    def name(self) -> str:
        """The same for the same text, wherever in its file it moves."""
        before, wrong = (
            re.sub(r"\s+", " ", text) for text in (self.before, self.after or "nothing")
        )
        number = f" #{self.ordinal}" if self.ordinal > 1 else ""
        return f"{self.file}: `{self.source}`: `{before}` -> `{wrong}`{number}"


Found = Iterator[tuple[int, str, list[str]]]  # where, what stands there, what could instead

_CONSTANT = re.compile(r"(?:[\d\s+*/%()-]|\bk[A-Z]\w*|\bTile::k\w+|\bRaw<T>::k\w+|\bptx::k\w+)+")


def _blank(match: re.Match) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def code_of(text: str) -> str:
    """The text with everything blanked that is no site's: comments, what is decided at compile
    time, host functions. Positions stay."""
    text = re.sub(r"//[^\n]*", _blank, text)
    text = re.sub(r"^#[^\n]*", _blank, text, flags=re.M)
    text = re.sub(r"\btemplate <[^;{]*?>(?=\s*\n)", _blank, text)
    text = re.sub(r"\bstatic_assert\([^;]*;", _blank, text)
    text = re.sub(r"\bconstexpr (?!\()[^;{}]*;", _blank, text)
    host = r"^(?:inline|constexpr) [^;={]*\{.*?(?:^\}| \}$)"
    text = re.sub(host, _blank, text, flags=re.M | re.S)
    text = re.sub(r"\bif constexpr \([^;{]*?\)(?= [{\w])", _blank, text)
    return re.sub(r"\bk\w+ % k\w+ [!=]= 0 (?:&&|\|\|) ", _blank, text)


def closing(code: str, start: int) -> int:
    """Where the parenthesis or bracket at `start` is closed."""
    depth = 0
    for at in range(start, len(code)):
        depth += (code[at] in "([{") - (code[at] in ")]}")
        if depth == 0:
            return at
    raise ValueError(f"nothing closes {code[start : start + 40]!r}")


def arguments(code: str, start: int) -> list[tuple[int, str]]:
    """Of the call whose parenthesis is at `start`: where each argument begins, and its text."""
    end, depth, first, found = closing(code, start), 0, start + 1, []
    for at in range(start + 1, end + 1):
        depth += (code[at] in "([{") - (code[at] in ")]}")
        if at == end or (depth == 0 and code[at] == ","):
            argument = code[first:at]
            lead = len(argument) - len(argument.lstrip())
            found.append((first + lead, argument.strip()))
            first = at + 1
    return found


def _operand_start(code: str, at: int) -> int:
    """Where the operand that ends at `at` begins."""
    depth = 0
    while at > 0:
        c = code[at - 1]
        depth += (c in ")]}") - (c in "([{")
        colons = "::" in code[at - 2 : at + 1]
        if depth < 0 or (depth == 0 and c in ",;?:=&|!" and not colons):
            break
        if depth == 0 and code[at - 7 : at] == "return ":
            break
        at -= 1
    while code[at].isspace():
        at += 1
    return at


def _operand_end(code: str, at: int) -> int:
    """Where the operand that begins at `at` ends."""
    depth, start = 0, at
    while at < len(code):
        c = code[at]
        depth += (c in "([{") - (c in ")]}")
        colons = "::" in code[at - 1 : at + 2]
        if depth < 0 or (depth == 0 and c in ",;?:=&|" and not colons):
            break
        at += 1
    return start + len(code[start:at].rstrip())


def calls(*names: str) -> re.Pattern:
    """Calls of these functions, with their parenthesis as the last character."""
    return re.compile(rf"\b(?:{'|'.join(names)})(?:<[\w:, ]+>)?\(")


def _statements(pattern: str, *others: Callable[[re.Match], str]) -> Callable[[str], Found]:
    """Removed, and replaced by what `others` make of the match."""

    def find(code: str) -> Found:
        for match in re.finditer(pattern, code):
            yield match.start(), match[0], [";", *(other(match) for other in others)]

    return find


def _texts(pattern: str, *others: str) -> Callable[[str], Found]:
    """Replaced by these, in which \\1 stands for a group of the pattern."""

    def find(code: str) -> Found:
        for match in re.finditer(pattern, code):
            yield match.start(), match[0], [match.expand(other) for other in others]

    return find


def _argument(name: str, index: int, *others: str) -> Callable[[str], Found]:
    """An argument of every call of a function (-1: the last), {} in `others`."""

    def find(code: str) -> Found:
        for match in calls(name).finditer(code):
            before = code[max(0, match.start() - 60) : match.start()]
            if re.search(r"BERTKERN_DEVICE [\w:&* ]*$|\.$", before):
                continue  # the definition, or a member
            given = arguments(code, match.end() - 1)
            if index < len(given):
                at, text = given[index]
                yield at, text, [other.format(text) for other in others]

    return find


def _whole_calls(name: str) -> Callable[[str], Found]:
    """Calls as statements, whatever stands in their parentheses: removed."""

    def find(code: str) -> Found:
        for match in calls(name).finditer(code):
            end = closing(code, match.end() - 1) + 1
            if code[end] == ";":  # not the definition
                yield match.start(), code[match.start() : end + 1], [";"]

    return find


def _swizzles(code: str) -> Found:
    """Of each call of chunk_offset alone, so that writer and reader disagree: no swizzle, the
    neighbouring row, the neighbouring chunk."""
    for match in re.finditer(r"\bchunk_offset<([\w:, ]+)>\(", code):
        (_, row), (_, chunk) = arguments(code, match.end() - 1)
        end = closing(code, match.end() - 1) + 1
        call, tile = code[match.start() : end], match[1]
        plain = [] if "," in tile else [f"(({row}) * {tile} * 2 + (({chunk}) << 4))"]
        others = [f"chunk_offset<{tile}>(({row}) ^ 1, {chunk})"]
        yield match.start(), call, [*plain, *others, f"chunk_offset<{tile}>({row}, ({chunk}) ^ 1)"]


def _in_for_header(code: str, at: int) -> bool:
    """Whether `at` is in the parentheses of a for."""
    begin = code.rfind("for (", 0, at)
    return begin >= 0 and closing(code, begin + 4) > at


_NEXT = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}


def _removals(code: str, start: int, end: int) -> list[str]:
    """What a condition becomes when it is left out: in a chain it does not decide any more, before
    a return or the like it never holds, before a statement always; else both."""
    before, after = code[:start].rstrip(), code[end:].lstrip()
    if before.endswith("&&") or after.startswith("&&"):
        return ["true"]
    if before.endswith("||") or after.startswith("||"):
        return ["false"]
    if before.endswith("if (") and after.startswith(")"):
        leaves = re.match(r"\)\s*\{?\s*(return|continue|break)\b", after)
        return ["false"] if leaves else ["true"]
    return ["true", "false"]


def _is_smaller_or_greater(code: str, end: int, left: str, right: str) -> bool:
    """Whether a comparison that ends at `end` chooses the smaller, or the greater, of its sides:
    where these are equal it does not matter which."""
    choice = re.match(r"\s*\?\s*((?:[^?:;]|::)*?)\s*:\s(.*?);", code[end:], re.S)
    return choice is not None and {choice[1], choice[2]} == {left, right}


def _bounds(code: str) -> Found:
    """Comparisons: off by one and, but for a loop's, left out."""
    for match in re.finditer(r" (<|<=|>|>=) ", code):
        start, end = _operand_start(code, match.start()), _operand_end(code, match.end())
        left, operator = code[start : match.start()].rstrip(), match[1]
        right = code[match.end() : end].strip()
        loop = _in_for_header(code, match.start())
        if loop and _CONSTANT.fullmatch(right):
            continue
        others = []
        if not _is_smaller_or_greater(code, end, left, right):
            others.append(f"{left} {_NEXT[operator]} {right}")
        if not loop:
            others += _removals(code, start, end)
        if operator == "<" and others[-1] != "true":
            others.append(f"{left} + 1 < {right}")
        yield start, code[start:end], others


def _guards(code: str) -> Found:
    """Comparisons for equality: left out."""
    for match in re.finditer(r" (==|!=) ", code):
        start, end = _operand_start(code, match.start()), _operand_end(code, match.end())
        if not _CONSTANT.fullmatch(code[start : match.start()]):  # of what the compiler decides
            yield start, code[start:end], _removals(code, start, end)


def _updates(code: str) -> Found:
    """x += y and the like: left out."""
    lvalue = r"(?:\*this|[A-Za-z_][\w.]*)(?:\[(?:[^\[\]]|\[[^\]]*\])*\])*"
    for match in re.finditer(rf"(?<![\w.\]]){lvalue} [-+*/^]= ([^;{{]*);", code):
        if not _in_for_header(code, match.start()):
            yield match.start(), match[0], [";"]


def _conditions(code: str) -> Found:
    """Of a choice by a name: as if it held; of a statement's, also as if it did not."""
    named = r"(?:valid|inside|seen|wanted|clear|keep(?:\[\w+\]\[\w+\])?|next|odd|capped)"
    for match in re.finditer(rf"\b({named}) \? ", code):
        yield match.start(), match[1], ["true"]
    for match in re.finditer(rf"(?<=[( ])!(?:{named}|whole|all_keys|any)(?=[); ])", code):
        yield match.start(), match[0], ["false"]
    for match in re.finditer(r"(?<=\bif \()(?!k[A-Z])[a-z][\w.]*(?=\))", code):
        yield match.start(), match[0], ["false", "true"]


_N_PLUS_1 = (lambda m: f"ptx::copy_async_wait<{int(m[1]) + 1}>();",)

_CALL = r"\([^;]*\);"  # of a statement

RULES: dict[str, tuple[Callable[[str], Found], ...]] = {
    "barrier": (
        _statements(r"\bptx::block_barrier\(\);"),
        _statements(r"\bptx::warp_barrier\(\);"),
        _statements(rf"\bptx::named_barrier_(?:sync|arrive){_CALL}"),
        _statements(rf"(?<!void )\b(?:ptx::barrier_arrive|arrive_as_warp){_CALL}"),
        _argument("ptx::barrier_init", 1, "({}) + 1", "({}) - 1"),
        _texts(r"(?<=\()1 \+ group\b", "2 - group"),
        _texts(r"(?<=\()2 - group\b", "1 + group"),
    ),
    "wait": (
        _statements(r"\bptx::copy_async_wait<(\d+)>\(\);", *_N_PLUS_1),
        _statements(rf"\bptx::barrier_wait{_CALL}"),
        _statements(rf"\bptx::wgmma_wait<\d+>{_CALL}"),
    ),
    "commit": (
        _statements(r"\bptx::copy_async_commit\(\);"),
        _statements(r"\bptx::wgmma_commit\(\);"),
    ),
    "fence": (
        _statements(rf"\bptx::wgmma_fence{_CALL}"),
        _statements(r"\bptx::fence_async_shared\(\);"),
        _statements(r"\bptx::barrier_init_fence\(\);"),
    ),
    "phase": (
        _texts(r"\b(\w*stage\.parity) \^ 1\b", r"\1"),
        _texts(r"\b\w*stage\.parity\b(?! \^)", r"(\g<0> ^ 1)"),
        _texts(r"(?<=, )landed(?=\);)", "landed ^ 1"),
        _texts(r"\(\w*parities >> \w*stage\.index\) & 1(?=\);)", r"(\g<0>) ^ 1"),
    ),
    "copy": (
        _argument("ptx::barrier_arrive_expect_bytes", 1, "({}) - 16", "({}) + 16"),
        _argument("ptx::barrier_expect_bytes", 1, "({}) - 16", "({}) + 16"),
        *(_argument("load_tile", index, "({}) + 1") for index in (2, 3, 4)),
        _texts(r"\bpart \* Tile::kSpan\b(?=, head)", "0"),
        _argument("store_rows", 2, "0"),
        _argument("store_rows", -3, "({}) + 1"),
        _argument("store_rows", -2, "({}) + 1"),
        _argument("store_rows", -1, "({}) + 8"),
    ),
    "operand": (
        _argument("advance", -1, "({}) + 32"),
        _texts(r"\b(?:k|step) > 0(?=,\s*T\{)", "true"),
        _texts(r"\bgroup \* 64 \* Tile::kSpanBytes\b", "0"),
    ),
    "shuffle": (
        _argument("ptx::shuffle_xor", 1, "{0} == 1 ? 2 : {0} / 2"),
        _argument("ptx::shuffle_index", 1, "({}) ^ 1"),
        _texts(r"(?<=int mask = )4(?=;)", "8"),
        _texts(r"\bmask < 32\b", "mask < 16"),
        _texts(r"(?<=\bmask = )ptx::kWarpThreads / 2\b", "ptx::kWarpThreads / 4"),
        _texts(r"\bmask > 0\b", "mask > 1"),
        _texts(r"(?<!!)\bptx::vote_any\((\w+)\)", r"\1"),
        _texts(r"!ptx::vote_any\((\w+)\)", r"!\1", "true"),
    ),
    "stage": (
        _texts(r"\b\w+ % Tile::kStages\b", "0"),
        _texts(r"\bcopy_(keys|queries)\((tile|step) \+ 1\)", r"copy_\1(\2)"),
        _texts(r"\bturn \* 2\b", "0"),
        _texts(r"\b\w*stage\.advance\(\)", "(void)0"),
    ),
    "swizzle": (_swizzles,),
    "bound": (_bounds,),
    "mask": (
        _conditions,
        _whole_calls("clear_rows"),
        _texts(r"\bcounts\(first \+ row\)", "true"),
        _texts(r"(?<=, )valid(?=\);)", "true"),
        _texts(r"(?<=\bKeptKeys\{)kept(?=\})", "nullptr"),
        _texts(r"(\bcopy_rows<[^;]*, )sees_some\);", r"\1AllRows{});"),
        _texts(r"(?<=[&(:] )sees\(s, kept, i, j\)|(?<=\| )sees\(s, kept, i, j\)", "true"),
        _texts(r"(?<!bool )\bsees_all\([^;]*\)(?=;)", "true", "false"),
        _texts(r"(?<=!)is_read\([^;&|]*?\)(?=\)?;)", "true", "false"),
        _texts(r"!exist\b", "false"),
        _texts(r"\bnearest_row\((id), [^;]*?\)(?=;)", r"static_cast<int>(\1)"),
    ),
    "guard": (_guards, _texts(r"\bptx::elect_one\(\)", "true")),
    "dropout": (
        _texts(r"\bhigh \? kHashMulC : kHashMulB\b", "kHashMulB", "kHashMulC"),
        _texts(r"\(\(product << 16\) \^ product\)", "(product << 16)", "product"),
        _texts(r"\bkeep\[(high|next)\]\[(\w+)\]", r"keep[1 - \1][\2]", r"keep[\1][1 - (\2)]"),
        _argument("kept_scores", 1, "{} + 1"),
        _argument("is_kept", 1, "{} ^ 8"),
        _argument("is_kept", 2, "{} + 1"),
        _argument("dropout_row", 1, "{} + 1", "{} ^ 8u"),
        _argument("hidden_row", 2, "{} + 1"),
        _argument("drop_vector", 2, "{} + 8"),
        _argument("dropout_stream_of", 1, "{} + 1"),
        _argument("dropout_stream_of", 2, "{} + 1"),
        _texts(r"\ba\.sequence_offset\b", "0"),
        _texts(r"\b(a\.dropout_scale|dropout\.scale)\b", "1.0f"),
        _texts(r"\(column & 8\) != 0", "(column & 8) == 0"),
    ),
    "update": (_updates,),
}

# What no source may call where no mutant is made of it.
WATCHED = (
    *("named_barrier_sync", "named_barrier_arrive", "barrier_wait", "barrier_arrive"),
    *("barrier_expect_bytes", "barrier_arrive_expect_bytes", "arrive_as_warp", "wgmma_fence"),
    *("wgmma_commit", "wgmma_wait", "fence_async_shared", "barrier_init_fence", "load_tile"),
    *("block_barrier", "warp_barrier", "copy_async_wait", "copy_async_commit", "copy_async_16"),
    *("shuffle_xor", "shuffle_index", "chunk_offset", "sees", "sees_all", "kept_scores"),
    *("dropout_row", "hidden_row", "drop_vector", "KeptKeys", "counts", "is_read", "vote_any"),
    *("clear_rows", "store_rows", "elect_one", "advance"),
)


def sources() -> list[str]:
    """The files that mutants are made of."""
    return sorted(path.relative_to(SOURCES).as_posix() for path in SOURCES.rglob("*.cuh"))


def mutants() -> list[Mutant]:
    """All mutants, by file and place; ValueError where a rule finds nothing any more."""
    found: list[Mutant] = []
    unused = {(kind, i) for kind, rules in RULES.items() for i in range(len(rules))}
    for file in sources():
        text = (SOURCES / file).read_text()
        code, seen, taken = code_of(text), {}, set()
        places = []
        for kind, rules in RULES.items():
            for i, rule in enumerate(rules):
                for start, before, others in rule(code):
                    unused.discard((kind, i))
                    places += [(start, kind, before, after) for after in others]
        for start, kind, before, after in sorted(places):
            if before == after or (start, before, after) in taken:
                continue
            taken.add((start, before, after))
            line = text.count("\n", 0, start) + 1
            source = text.splitlines()[line - 1].partition("//")[0].strip()
            same = (kind, source, before, after)
            seen[same] = seen.get(same, 0) + 1
            found.append(Mutant(kind, file, start, line, before, after, source, seen[same]))
    if unused:
        rules = ", ".join(f"{kind} ({i})" for kind, i in sorted(unused))
        raise ValueError(f"these rules find nothing any more: {rules}; sites.py must follow")
    return found
