"""Ways through machine code: its basic blocks, its loops, the cheapest way round a loop.

A kernel's loop holds code that most turns jump over: the mask of a tile at the diagonal, options
that are off, rows past the end. Counting all of it says little about the time of a turn. So a turn
is counted along one way: of all ways from the loop's head back to it, those that pass the most
`wanted` instructions (the products, the copies, what an option is there for), and of these the one
with the fewest instructions; ways through `shunned` ones only where there is no other. A loop
inside the turn counts as often as its constant bounds say (loop_trips.py), and once where they are
not constant.

Loops are natural loops: an edge from u to v closes one when every way to u leads through v
(Lengauer & Tarjan 1979 for the terms; dominators by the iteration of Cooper, Harvey & Kennedy
2001).
"""

import re
from typing import NamedTuple

from csrc import loop_trips

TARGET = re.compile(r"(?:^|[ (`])0x([0-9a-f]+)\)?$")
INDIRECT = {"BRX", "BRXU", "JMX", "JMXU"}


class Block(NamedTuple):
    """Instructions without a jump between them; indices of the blocks that may follow."""

    code: list
    successors: tuple


def jump_target(instruction):
    """Where a branch or call goes to; None for what is neither."""
    if instruction.name in INDIRECT:
        raise ValueError(f"{instruction}: jumps with a target in a register are not followed")
    if instruction.name not in ("BRA", "JMP", "CALL"):
        return None
    return int(TARGET.search(instruction.operands).group(1), 16)


def always(instruction):
    """Whether nothing comes after an instruction: a branch or exit that every thread takes. After a
    call something does, and ptxas leaves loops by calls that are jumps."""
    if instruction.name not in ("BRA", "JMP", "EXIT", "RET"):
        return False
    conditional = re.match(r"!?~?U?(P\d|R\w+)", instruction.operands)
    return not (
        instruction.guard or conditional or re.search(r"\.(DIV|CONV)\b", instruction.mnemonic)
    )


def blocks(code):
    """The basic blocks of one kernel, in the order of their addresses."""
    leaders = {code[0].address}
    for i, following in zip(code, [*code[1:], None], strict=True):
        target = jump_target(i)
        if target is not None:
            leaders.add(target)
        if following and (target is not None or i.name in ("EXIT", "RET")):
            leaders.add(following.address)
    parts = []
    for i in code:
        if i.address in leaders:
            parts.append([])
        parts[-1].append(i)
    index = {part[0].address: n for n, part in enumerate(parts)}
    found = []
    for n, part in enumerate(parts):
        last, successors = part[-1], []
        target = jump_target(last)
        if target is not None:
            successors.append(index[target])
        if not always(last) and n + 1 < len(parts):
            successors.append(n + 1)
        found.append(Block(part, tuple(dict.fromkeys(successors))))
    return found


def reverse_postorder(graph):
    """The blocks that can be reached, each before those that follow it but for jumps back."""
    seen, order, stack = {0}, [], [(0, iter(graph[0].successors))]
    while stack:
        node, rest = stack[-1]
        following = next((s for s in rest if s not in seen), None)
        if following is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(graph[following].successors)))
    return order[::-1]


def dominators(graph, order):
    """{block: its immediate dominator}; the first block's is itself."""
    place = {node: n for n, node in enumerate(order)}
    before = {node: [] for node in order}
    for node in order:
        for s in graph[node].successors:
            before[s].append(node)
    immediate, changed = {order[0]: order[0]}, True
    while changed:
        changed = False
        for node in order[1:]:
            known = [p for p in before[node] if p in immediate]
            best = known[0]
            for other in known[1:]:
                while best != other:
                    while place[best] > place[other]:
                        best = immediate[best]
                    while place[other] > place[best]:
                        other = immediate[other]
            if immediate.get(node) != best:
                immediate[node], changed = best, True
    return immediate


class Paths:
    """The graph of a kernel's blocks and its loops, {head: blocks}."""

    def __init__(self, code):
        self.graph = blocks(code)
        self.order = reverse_postorder(self.graph)
        self.immediate = dominators(self.graph, self.order)
        before = {node: [] for node in self.order}
        self.back = set()
        for node in self.order:
            for s in self.graph[node].successors:
                before[s].append(node)
                if self._dominates(s, node):
                    self.back.add((node, s))
        self.loops = {}
        for end, head in self.back:
            body, stack = self.loops.setdefault(head, {head}), [end]
            while stack:
                node = stack.pop()
                if node not in body:
                    body.add(node)
                    stack += before[node]

        self.trips = {head: self._trips(head) for head in self.loops}
        self.often = {node: 1 for node in self.order}
        for head, turns in self.trips.items():
            for node in self.loops[head]:
                self.often[node] *= turns or 1

    def _dominators(self, node):
        """The blocks that every way to `node` passes, from the first to `node` itself."""
        chain = [node]
        while chain[-1] != self.order[0]:
            chain.append(self.immediate[chain[-1]])
        return chain[::-1]

    def _dominates(self, node, other):
        return node in self._dominators(other)

    def _trips(self, head):
        """A loop's turns where they are constant, else None."""
        ends = [node for node, target in self.back if target == head]
        if len(ends) != 1:
            return None
        chain = self._dominators(ends[0])
        at = chain.index(head)
        before, turn = (
            [i for node in part for i in self.graph[node].code] for part in (chain[:at], chain[at:])
        )
        # A loop is closed by a branch under a condition, or by one without after one that leaves.
        closing = turn[-1]
        leaves = not closing.guard and len(chain) > at + 1
        if leaves:
            *_, closing = self.graph[chain[-2]].code
            leaves = any(s not in self.loops[head] for s in self.graph[chain[-2]].successors)
            if not leaves:
                return None
        return loop_trips.trips(before, turn, closing.guard, leaves)

    def turn(self, wanted, shunned=lambda _: False, least=1 / 2):
        """(instructions of one turn of the main loop, whether there is a loop, and how many
        instructions stand in all of it).

        The main loop is the smallest of those that hold the most wanted instructions and have no
        constant number of turns. Where less than `least` of them stand in it the kernel is passed
        once, from its start to its end. Before anything else a way avoids `shunned` instructions:
        wanted ones may stand beside what few turns do.
        """
        own, avoided = {}, {}
        for node in self.order:
            code, often = self.graph[node].code, self.often[node]
            own[node] = often * sum(map(wanted, code)), -often * len(code)
            avoided[node] = -often * sum(map(shunned, code))

        def total(nodes):
            return tuple(map(sum, zip(*(own[n] for n in nodes), strict=True)))

        whole = set(self.order)
        open_ended = {head: body for head, body in self.loops.items() if self.trips[head] is None}
        head, body = max(open_ended.items(), key=lambda loop: total(loop[1]), default=(0, whole))
        is_loop = bool(open_ended) and total(body)[0] >= least * total(whole)[0]
        if is_loop:
            ends = {n for n in body if (n, head) in self.back}
        else:
            head, body = 0, whole
            ends = {n for n in whole if self.graph[n].code[-1].name == "EXIT"}
        size = sum(len(self.graph[node].code) for node in body)
        worth = {node: (avoided[node], *own[node]) for node in body}
        return self._way(head, body, ends, worth), is_loop, size

    def _way(self, head, body, ends, worth):
        """The instructions on the way of most worth from `head` to one of `ends`."""
        best, came_from = {}, {head: None}
        for node in self.order:
            if node not in body or node not in came_from:
                continue
            before = best.get(came_from[node], (0, 0, 0))
            best[node] = tuple(map(sum, zip(before, worth[node], strict=True)))
            for s in self.graph[node].successors:
                if s not in body or (node, s) in self.back:
                    continue
                if s not in came_from or best[node] > best[came_from[s]]:
                    came_from[s] = node
        node, way = max((n for n in ends if n in best), key=best.get), []
        while node is not None:
            way.append(self.graph[node].code * self.often[node])
            node = came_from[node]
        return [i for part in reversed(way) for i in part]
