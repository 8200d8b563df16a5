"""The loops of each kernel that touch the updates and the server's state, and what they have to move.

The number of elements that an iteration takes comes from the arithmetic that an element costs, not from the bytes:
otherwise the bytes could not be compared with what they should be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cubins import Kernel
from sass import GLOBAL_LOADS, GLOBAL_STORES, WIDE, Loop, find_loops

SIZES = {"float": 4, "__nv_bfloat16": 2, "__half": 2}
TRIANGLE, RECTANGLE, LAST_COLUMN = range(3)  # enum class TileSet in csrc/cuda/gramian_layout.cuh


@dataclass(frozen=True)
class Part:
    """One loop of a kernel in its steady state: whole and aligned pieces.

    Attributes:
        name: What the loop goes over, where the kernel has several such loops.
        elements: Elements of the flat layout that one warp takes in an iteration.
        read: Bytes that it has to read for each; None where loops inside read what depends on N.
        written: Bytes that it has to write for each.
        tables: Bytes of pointers and weights that each thread of a warp reads alike, from the cache; at most.
    """

    kernel: Kernel
    loop: Loop
    elements: float
    read: int | None
    written: int
    name: str = ""
    tables: int = 0

    @property
    def label(self) -> str:
        return f"{self.kernel.name}{', ' if self.name else ''}{self.name}"

    @property
    def narrow_reads(self) -> int:
        """Bytes that one thread reads in an iteration by accesses below 16 bytes."""
        return narrow_bytes(self.loop, *GLOBAL_LOADS)

    @property
    def narrow_writes(self) -> int:
        return narrow_bytes(self.loop, *GLOBAL_STORES)

    @property
    def read_per_element(self) -> float:
        return 32 * (self.loop.traffic.read - self.tables) / self.elements

    @property
    def written_per_element(self) -> float:
        return 32 * self.loop.traffic.written / self.elements


def parts_of(kernel: Kernel) -> list[Part]:
    """Empty for kernels that touch partial sums and Gram matrices only.

    Raises:
        ValueError: A loop that should be there is not.
    """
    make = PARTS.get(kernel.function)
    return [] if make is None else make(kernel)


def narrow_bytes(loop: Loop, *opcodes: str) -> int:
    return sum(width * count for width, count in loop.widths(*opcodes).items() if width < WIDE)


def count_packets(loop: Loop) -> int:
    return loop.widths(*GLOBAL_LOADS, *GLOBAL_STORES)[WIDE]


def widest(loops: list[Loop], kernel: Kernel) -> Loop:
    """The loop with most 16-byte accesses: its twin for the rest of a piece has fewer or none."""
    if not loops:
        raise ValueError(f"{kernel.name}: a loop over the updates should be there. Got none")
    return max(loops, key=lambda loop: (loop.wide, count_packets(loop), not loop.inner))


def gramian_pairs(kernel: Kernel) -> list[Part]:
    """A thread has elements of its own and one multiplication for each pair of rows."""
    dtype, rows = kernel.arguments[0], int(kernel.arguments[1])
    loop = widest(find_loops(kernel), kernel)
    return [Part(kernel, loop, 32 * loop.count("DFMA") / (rows * (rows + 1) // 2), rows * SIZES[dtype], 0)]


def count_tiles(tile_set: int, blocks: int) -> int:
    """Tiles of 8 x 8 sums; see csrc/cuda/gramian_layout.cuh."""
    return {TRIANGLE: blocks * (blocks + 1) // 2, RECTANGLE: blocks * blocks // 4, LAST_COLUMN: blocks}[tile_set]


def count_tile_products(loop: Loop) -> int:
    """Products of two blocks of 8 rows by 4 elements; DMMA.16x8x4 makes two of them, DMMA.884 and DMMA.8x8x4 one."""
    return loop.count("DMMA") + sum("16x8x4" in instruction.opcode for instruction in loop.instructions)


def gramian_tiles(kernel: Kernel) -> list[Part]:
    """A warp multiplies blocks of 8 rows by 4 elements, one product for each tile."""
    dtype, blocks, tile_set = kernel.arguments[0], int(kernel.arguments[1]), int(kernel.arguments[2])
    loop = widest(find_loops(kernel), kernel)
    elements = 4 * count_tile_products(loop) / count_tiles(tile_set, blocks)
    return [Part(kernel, loop, elements, 8 * blocks * SIZES[dtype], 0)]


def single_step(kernel: Kernel) -> list[Part]:
    """One float64 multiplication for each element: the square of its step."""
    dtype, rows, adaptive = kernel.arguments[0], int(kernel.arguments[1]), kernel.arguments[2] == "true"
    state = 12 if adaptive else 8
    steps = widest([loop for loop in find_loops(kernel) if loop.count("DFMA")], kernel)
    elements = 32 * steps.count("DFMA")
    if rows > 0:
        return [Part(kernel, steps, elements, rows * SIZES[dtype] + state, state)]
    return [row_part(kernel, dtype, 1, 0), Part(kernel, steps, elements, None, state, "all")]


def general_step(kernel: Kernel) -> list[Part]:
    """Pointers and weights come from tables; the state of each target has a loop of its own where there are several."""
    dtype, targets, adaptive = kernel.arguments[0], int(kernel.arguments[1]), kernel.arguments[2] == "true"
    state = 12 if adaptive else 8
    steps = widest([loop for loop in find_loops(kernel) if loop.count("DFMA") and loop.inner == (targets == 1)], kernel)
    elements = 32 * steps.count("DFMA")
    rows = row_part(kernel, dtype, targets, 8 + 4 * targets)
    if targets == 1:
        return [rows, Part(kernel, steps, elements, None, state, "all", tables=steps.traffic.read)]
    tables = min(40, narrow_bytes(steps, *GLOBAL_LOADS))  # pointers, some of them twice
    return [rows, Part(kernel, steps, elements, state, state, "one target", tables)]


def row_part(kernel: Kernel, dtype: str, targets: int, tables_of_row: int) -> Part:
    """The loop over rows: one float32 multiplication for each element, row and target."""
    loops = [loop for loop in find_loops(kernel) if not loop.inner and loop.count("FFMA") and not loop.count("DFMA")]
    loop = widest(loops, kernel)
    size = SIZES[dtype]
    elements = 32 * loop.count("FFMA") / targets
    tables = round(tables_of_row * elements * size / 32 / WIDE)  # a row has 16 bytes in each thread
    return Part(kernel, loop, elements, size, 0, "one row", tables)


def weighted_mean(kernel: Kernel) -> list[Part]:
    """One kernel for all dtypes: the loops of float32 have fewest multiplications, 4 a packet."""
    loops = find_loops(kernel)
    rows = sorted(
        (loop for loop in loops if not loop.inner and count_packets(loop)), key=lambda loop: loop.count("FFMA")
    )
    stores = sorted((loop for loop in loops if loop.inner and loop.wide), key=lambda loop: loop.traffic.written)
    if len(rows) != len(SIZES) or len(stores) != len(SIZES):
        raise ValueError(f"{kernel.name}: one wide loop a dtype should be there. Got {len(rows)}, {len(stores)}")
    parts = []
    for (dtype, size), row, store in zip(SIZES.items(), rows, stores, strict=True):
        elements = 32 * row.count("FFMA")
        tables = 12 * (row.count("FFMA") * size // WIDE)
        parts.append(Part(kernel, row, elements, size, 0, f"one {dtype} row", tables))
        parts.append(Part(kernel, store, 32 * WIDE / size, None, 4, f"all, {dtype}"))
    return parts


def screen(kernel: Kernel) -> list[Part]:
    """One float64 multiplication for each element: its square."""
    source, target = (SIZES[dtype] for dtype in kernel.arguments)
    loop = widest(find_loops(kernel), kernel)
    return [Part(kernel, loop, 32 * loop.count("DFMA"), source, target)]


PARTS: dict[str, Callable[[Kernel], list[Part]]] = {
    "gramian_pairs": gramian_pairs,
    "gramian_tiles": gramian_tiles,
    "single_step_kernel": single_step,
    "general_step_kernel": general_step,
    "weighted_mean_kernel": weighted_mean,
    "screen_kernel": screen,
}
