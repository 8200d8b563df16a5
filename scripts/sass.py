"""Finds the loops of a kernel in its SASS and counts what one iteration moves and computes.

A loop here is a natural loop of the control-flow graph, so blocks that the compiler moved behind the kernel's end are
part of it and jumps back out of a slow path are not mistaken for one. An iteration may take several paths, of which
those for the last, incomplete elements read value by value. The steady state is therefore looked for among the paths
that touch global memory in 16-byte accesses only, where there are any.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cubins import Instruction, Kernel

# LDGSTS copies to shared memory (cp.async); LD and ST go through pointers of which the compiler does not know that
# they are global.
GLOBAL_LOADS = ("LDG", "LDGSTS", "LD")
GLOBAL_STORES = ("STG", "ST")
FLOAT64 = ("DFMA", "DADD", "DMUL")
FLOAT32 = ("FFMA", "FADD", "FMUL")
WIDE = 16


@dataclass(frozen=True)
class Traffic:
    """Bytes that one thread reads from and writes to global memory."""

    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Loop:
    """One loop of a kernel.

    Attributes:
        paths: What an iteration may move, with the instructions of the shortest path that moves it.
        wide: Whether these paths access global memory 16 bytes at a time.
        inner: Whether there are loops inside; an iteration passes through each of those at most once here.
    """

    paths: dict[Traffic, tuple[Instruction, ...]]
    wide: bool
    inner: bool

    @property
    def traffic(self) -> Traffic:
        """Of the path that moves most: where streams are optional, all of them are there."""
        return max(self.paths, key=lambda traffic: (traffic.total, traffic.read))

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        return self.paths[self.traffic]

    def count(self, *opcodes: str) -> int:
        return sum(base(instruction) in opcodes for instruction in self.instructions)

    def widths(self, *opcodes: str) -> Counter[int]:
        """How many accesses of which width in bytes."""
        return Counter(width(instruction) for instruction in self.instructions if base(instruction) in opcodes)


def base(instruction: Instruction) -> str:
    return instruction.opcode.split(".")[0]


def width(instruction: Instruction) -> int:
    """Bytes that one thread moves in a load or store."""
    modifiers = instruction.opcode.split(".")
    for name, size in {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}.items():
        if name in modifiers:
            return size
    return 4


def traffic_of(instructions: Iterable[Instruction]) -> Traffic:
    read = written = 0
    for instruction in instructions:
        if base(instruction) in GLOBAL_LOADS:
            read += width(instruction)
        elif base(instruction) in GLOBAL_STORES:
            written += width(instruction)
    return Traffic(read, written)


def find_loops(kernel: Kernel) -> list[Loop]:
    """All natural loops, in the order of their headers."""
    blocks = Blocks(kernel)
    loops = []
    for header, latches in sorted(blocks.back_edges().items()):
        body = blocks.loop_body(header, latches)
        inner = any(other != header and other in body for other in blocks.back_edges())
        wide_body = {block for block in body if all(map(is_wide, blocks.instructions(block)))}
        paths = blocks.paths(header, latches, wide_body)
        wide = bool(paths) and max(traffic.total for traffic in paths) > 0
        loops.append(Loop(paths if wide else blocks.paths(header, latches, body), wide, inner))
    return loops


def is_wide(instruction: Instruction) -> bool:
    return base(instruction) not in (*GLOBAL_LOADS, *GLOBAL_STORES) or width(instruction) >= WIDE


class Blocks:
    """Basic blocks of a kernel, named by the index of their first instruction."""

    def __init__(self, kernel: Kernel) -> None:
        self._code = kernel.instructions
        self._labels = kernel.labels
        jumps = [i + 1 for i, instruction in enumerate(self._code) if is_jump(instruction)]
        starts = {0, *kernel.labels.values(), *jumps}
        self._starts = sorted(start for start in starts if start < len(self._code))
        ends = [*self._starts[1:], len(self._code)]
        self._end = dict(zip(self._starts, ends, strict=True))
        self._successors = {block: tuple(self._find_successors(block)) for block in self._starts}
        self._order = self._find_order()

    def instructions(self, block: int) -> tuple[Instruction, ...]:
        return self._code[block : self._end[block]]

    def back_edges(self) -> dict[int, list[int]]:
        """Loop headers and the blocks that jump back to each."""
        dominators = self._find_dominators()
        found: dict[int, list[int]] = {}
        for block in self._order:
            for successor in self._successors[block]:
                if successor in dominators[block]:
                    found.setdefault(successor, []).append(block)
        return found

    def loop_body(self, header: int, latches: list[int]) -> set[int]:
        predecessors: dict[int, list[int]] = {}
        for block in self._order:
            for successor in self._successors[block]:
                predecessors.setdefault(successor, []).append(block)
        body, waiting = {header}, list(latches)
        while waiting:
            block = waiting.pop()
            if block not in body:
                body.add(block)
                waiting += predecessors.get(block, [])
        return body

    def paths(self, header: int, latches: list[int], body: set[int]) -> dict[Traffic, tuple[Instruction, ...]]:
        """Traffic of the paths from the header to a latch inside body; of equal ones the shortest."""
        if header not in body:
            return {}
        rank = {block: place for place, block in enumerate(self._order)}
        reached: dict[int, dict[Traffic, tuple[Instruction, ...]]] = {header: {Traffic(0, 0): ()}}
        complete: dict[Traffic, tuple[Instruction, ...]] = {}
        for block in sorted(body, key=rank.__getitem__):
            own = self.instructions(block)
            moved = traffic_of(own)
            for before, code in reached.get(block, {}).items():
                after = Traffic(before.read + moved.read, before.written + moved.written)
                targets = [reached.setdefault(s, {}) for s in self._successors[block] if rank[s] > rank[block]]
                for target in [*targets, *([complete] if block in latches else [])]:
                    if after not in target or len(target[after]) > len(code) + len(own):
                        target[after] = code + own
        return complete

    def _find_successors(self, block: int) -> Iterator[int]:
        last = self._code[self._end[block] - 1]
        target = re.search(r"`\((\S+?)\)", last.operands)
        if base(last) == "BRA" and target and self._labels.get(target[1], len(self._code)) < len(self._code):
            yield self._labels[target[1]]
        if not (is_jump(last) and is_unconditional(last)) and self._end[block] in self._end:
            yield self._end[block]

    def _find_order(self) -> list[int]:
        """Reverse postorder from the entry; what cannot be reached is left out."""
        order: list[int] = []
        seen = {0}
        stack = [(0, iter(self._successors[0]))]
        while stack:
            block, successors = stack[-1]
            following = next((s for s in successors if s not in seen), None)
            if following is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self._successors[following])))
        return order[::-1]

    def _find_dominators(self) -> dict[int, set[int]]:
        dominators = {block: set(self._order) for block in self._order}
        dominators[0] = {0}
        changed = True
        while changed:
            changed = False
            for block in self._order:
                before = [dominators[p] for p in self._order if block in self._successors[p]]
                if block == 0 or not before:
                    continue
                found = set.intersection(*before) | {block}
                changed = changed or found != dominators[block]
                dominators[block] = found
        return dominators


def is_jump(instruction: Instruction) -> bool:
    return base(instruction) in ("BRA", "EXIT", "RET", "BRX", "JMP", "JMX", "BPT")


def is_unconditional(instruction: Instruction) -> bool:
    """Conditions stand before the instruction, or before the target: `BRA P1, ...`, `BRA.DIV UR4, ...`."""
    return instruction.predicate == "" and (base(instruction) != "BRA" or instruction.operands.startswith("`("))
