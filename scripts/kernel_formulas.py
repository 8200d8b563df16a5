"""What each kernel has to move for one element of the flat layout, and how many elements an iteration takes.

The number of elements comes from the arithmetic that each element costs, not from the bytes: otherwise loads could
not be compared with what they should be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cubins import Kernel
from sass import FLOAT64, Loop

SIZES = {"float": 4, "__nv_bfloat16": 2, "__half": 2}
TRIANGLE, RECTANGLE, LAST_COLUMN = range(3)  # enum class TileSet in csrc/cuda/gramian_layout.cuh


@dataclass(frozen=True)
class Formula:
    """Of one kernel.

    Attributes:
        read: Bytes an element.
        written: Bytes an element.
        elements: That one warp takes in an iteration of the main loop.
    """

    read: int
    written: int
    elements: float


def count_tiles(tile_set: int, blocks: int) -> int:
    """Tiles of 8 x 8 sums; see csrc/cuda/gramian_layout.cuh."""
    return {TRIANGLE: blocks * (blocks + 1) // 2, RECTANGLE: blocks * blocks // 4, LAST_COLUMN: blocks}[tile_set]


def gramian_pairs(kernel: Kernel, loop: Loop) -> Formula:
    """A thread has elements of its own and one multiplication for each pair of rows."""
    dtype, rows = kernel.arguments[0], int(kernel.arguments[1])
    pairs = rows * (rows + 1) // 2
    return Formula(rows * SIZES[dtype], 0, 32 * loop.count(*FLOAT64) / pairs)


def gramian_tiles(kernel: Kernel, loop: Loop) -> Formula:
    """A warp multiplies blocks of 8 rows by 4 elements, one instruction for each tile."""
    dtype, blocks, tile_set = kernel.arguments[0], int(kernel.arguments[1]), int(kernel.arguments[2])
    return Formula(8 * blocks * SIZES[dtype], 0, 4 * loop.count("DMMA") / count_tiles(tile_set, blocks))


FORMULAS: dict[str, Callable[[Kernel, Loop], Formula]] = {
    "gramian_pairs": gramian_pairs,
    "gramian_tiles": gramian_tiles,
}


def formula_of(kernel: Kernel, loop: Loop) -> Formula | None:
    """None for kernels that do not read the updates."""
    make = FORMULAS.get(kernel.function)
    return None if make is None else make(kernel, loop)
