"""How often a loop of machine code is passed, where a counter with constant bounds decides that.

The predicate that closes the loop is followed turn by turn: of what stands before the loop and in
it, the instructions that compute with constants are executed, everything else gives an unknown
value. A loop whose predicate depends on an unknown value has no constant number of turns.
"""

import re
import struct

MOST = 4096  # turns; a loop that has not ended by then is not counted
MOST_NAMES = 8  # registers of a counter; where more are involved no constants decide
WORD = 1 << 32


def operands(instruction):
    """An instruction's operands, without marks of the register cache."""
    return [part.strip().split(".reuse")[0] for part in instruction.operands.split(",")]


def constant(text):
    """The value of an operand that is no register, None for what is not known here."""
    if text in ("RZ", "URZ", "SRZ"):
        return 0
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        return int(text, 16) % WORD
    return None


def computed(instruction, value_of):
    """What an instruction writes to its first operand, from value_of(operand); None: unknown."""
    if instruction.guard:
        return None
    sources = operands(instruction)[1:]
    if instruction.name.startswith("HFMA2") and sources[:2] == ["-RZ", "RZ"]:
        # A move of constants: two halves as they stand.
        high, low = (struct.unpack("<H", struct.pack("<e", float(x)))[0] for x in sources[2:4])
        return high << 16 | low
    values = [value_of(source) for source in sources]
    if None in values:
        return None
    if instruction.name in ("MOV", "UMOV", "CS2R"):
        return values[0]
    if instruction.name in ("IADD3", "UIADD3", "VIADD"):
        return sum(values) % WORD
    if instruction.name in ("IMAD", "UIMAD") and "HI" not in instruction.mnemonic:
        return (values[0] * values[1] + values[2]) % WORD
    return None


def compared(instruction, value_of):
    """What ISETP writes to its predicate; None: unknown."""
    _, _, left, right, *rest = operands(instruction)
    left, right = value_of(left), value_of(right)
    _, relation, *kinds = instruction.mnemonic.split(".")
    if (
        instruction.guard
        or rest not in (["PT"], ["UPT"])
        or "AND" not in kinds
        or None in (left, right)
    ):
        return None
    if "U32" not in kinds:
        left, right = ((x + WORD // 2) % WORD for x in (left, right))  # the order of signed numbers
    return {
        "EQ": left == right, "NE": left != right, "LT": left < right,
        "LE": left <= right, "GT": left > right, "GE": left >= right,
    }[relation]  # fmt: skip


def trips(before, turn, guard, leaves):
    """Turns of a loop; None where no constants decide.

    Args:
        before: the instructions that every way to the loop passes, in order.
        turn: those that every turn passes.
        guard: of the branch at the turn's end.
        leaves: whether that branch, when it is taken, leaves the loop; else it closes it.
    """
    deciding = re.fullmatch(r"@(!?)(U?P\d)", guard)
    if deciding is None:
        return None
    turn, names = _counter(deciding.group(2), turn)
    if len(names) > MOST_NAMES:
        return None
    before = [i for i in before if _target(i) in names]
    state = {}

    def value_of(operand):
        known = constant(operand)
        return state.get(operand) if known is None else known

    def execute(instruction):
        target = operands(instruction)[0]
        if instruction.name in ("ISETP", "UISETP"):
            state[target] = compared(instruction, value_of)
        elif re.fullmatch(r"U?R\d+", target):
            state[target] = computed(instruction, value_of)
        elif re.fullmatch(r"U?P\d", target):
            state[target] = None

    for instruction in before:
        execute(instruction)
    for count in range(1, MOST):
        for instruction in turn:
            execute(instruction)
        predicate = state.get(deciding.group(2))
        if predicate is None:
            return None
        taken = predicate != bool(deciding.group(1))
        if taken == leaves:
            return count
    return None


def _counter(predicate, turn):
    """(the instructions of a turn that a predicate at its end depends on, the registers that they
    have from the turn before)."""
    targets = [_target(i) for i in turn]
    chosen, names, new = set(), set(), {predicate}
    while new and len(names) <= MOST_NAMES:
        names |= new
        for n in reversed(range(len(turn))):
            if targets[n] in new:
                chosen.add(n)
                new.remove(targets[n])
                new.update(
                    o
                    for o in operands(turn[n])[1:]
                    if constant(o) is None and o not in ("PT", "UPT")
                )
        new -= names
    return [turn[n] for n in sorted(chosen)], names


def _target(instruction):
    return instruction.operands.partition(",")[0]
