"""Tables of the compiled CUDA kernels and of the time they should take, for docs/kernels.md.

usage: python scripts/kernel_report.py            prints both tables, all kernels
       python scripts/kernel_report.py --write    replaces those in docs/kernels.md
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cubins import ARCHITECTURES, ROOT, Kernel, compile_kernels, missing_tools
from kernel_parts import Part, parts_of
from sass import FLOAT32, FLOAT64

DOCUMENT = ROOT / "docs" / "kernels.md"
COMMAND = "python scripts/kernel_report.py --write"


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA C++ Programming Guide, compute capabilities 8.0 and 9.0)."""

    shared: int
    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    reserved_shared: int = 1024  # of each block


MULTIPROCESSORS = {80: Multiprocessor(shared=164 * 1024), 90: Multiprocessor(shared=228 * 1024)}


def blocks_per_multiprocessor(kernel: Kernel) -> int:
    """Blocks of the largest size that one multiprocessor runs at a time."""
    limits = MULTIPROCESSORS[kernel.architecture]
    warps = -(-kernel.threads // 32)
    registers = -(-kernel.registers * 32 // 256) * 256  # of a warp; handed out in units of 256
    shared = -(-(kernel.shared + limits.reserved_shared) // 128) * 128
    return min(limits.blocks, limits.warps // warps, limits.registers // registers // warps, limits.shared // shared)


def occupancy(kernel: Kernel) -> float:
    warps = blocks_per_multiprocessor(kernel) * -(-kernel.threads // 32)
    return warps / MULTIPROCESSORS[kernel.architecture].warps


@dataclass(frozen=True)
class Machine:
    """Peak rates from the vendor's data sheets."""

    name: str
    bandwidth: float  # bytes/s
    float64: float  # operations/s
    float64_tensor: float


MACHINES = (
    Machine("A100 80GB", 2.0e12, 9.7e12, 19.5e12),
    Machine("H100 SXM", 3.35e12, 34e12, 67e12),
)
LENGTH = 31_000_000


@dataclass(frozen=True)
class Work:
    """What one call has to move and to compute in float64."""

    label: str
    dtype: str
    count: int
    moved: int
    operations: int
    tensor: bool

    def bound(self, machine: Machine) -> tuple[float, str]:
        """Milliseconds, and what takes them."""
        moving = self.moved / machine.bandwidth * 1e3
        computing = self.operations / (machine.float64_tensor if self.tensor else machine.float64) * 1e3
        return max((moving, "memory"), (computing, "FP64 tensor" if self.tensor else "FP64"))


MAX_PAIR_ROWS = 4  # kMaxRegisterRows in csrc/cuda/gramian_kernels.cuh


def gramian_work(dtype: str, size: int, count: int) -> Work:
    """Tiles of 8 x 8 sums are computed in full, on and above the diagonal, from 5 rows on."""
    tensor = count > MAX_PAIR_ROWS
    blocks = -(-count // 8)
    sums = 64 * blocks * (blocks + 1) // 2 if tensor else count * (count + 1) // 2
    return Work("gramian", dtype, count, count * size * LENGTH, 2 * sums * LENGTH, tensor)


def step_work(dtype: str, size: int, count: int) -> Work:
    """SGD with momentum: parameters and momentum are read and written; the squares of the step are float64."""
    return Work("server_step sgd", dtype, count, (count * size + 16) * LENGTH, 2 * LENGTH, False)


def roofline_lines() -> Iterator[str]:
    names = " | ".join(f"{machine.name}, ms | bound" for machine in MACHINES)
    yield f"| operation | updates | N | GB moved | {names} |"
    yield "|---|---|---|---|" + "---|---|" * len(MACHINES)
    for work_of in (gramian_work, step_work):
        for dtype, size in (("float32", 4), ("bfloat16", 2)):
            for count in (2, 8, 64):
                work = work_of(dtype, size, count)
                bounds = [work.bound(machine) for machine in MACHINES]
                cells = " | ".join(f"{milliseconds:.2f} | {cause}" for milliseconds, cause in bounds)
                yield f"| {work.label} | {dtype} | {count} | {work.moved / 1e9:.2f} | {cells} |"


HEADER = (
    "kernel",
    "registers",
    "occupancy",
    "shared, KiB",
    "B read",
    "B written",
    "DMMA + FP64 + FP32",
    "instructions / 16 B",
    "KiB in flight",
)


def bytes_in_flight(part: Part) -> int:
    """Of one multiprocessor, when each of its threads has issued the loads of one iteration."""
    return blocks_per_multiprocessor(part.kernel) * part.kernel.threads * (part.loop.traffic.read - part.tables)


def resource_cells(kernel: Kernel) -> list[str]:
    return [str(kernel.registers), f"{occupancy(kernel):.0%}", f"{kernel.shared / 1024:.1f}"]


def part_cells(part: Part) -> list[str]:
    counts = (part.loop.count("DMMA"), part.loop.count(*FLOAT64), part.loop.count(*FLOAT32))
    return [
        *resource_cells(part.kernel),
        "-" if part.read is None else f"{part.read_per_element:g}",
        f"{part.written_per_element:g}",
        " + ".join(str(count) for count in counts),
        f"{len(part.loop.instructions) / (part.loop.traffic.total / 16):.1f}",
        "-" if part.read is None else f"{bytes_in_flight(part) / 1024:.0f}",
    ]


def kernel_lines(kernels: Sequence[Kernel]) -> Iterator[str]:
    """One row a kernel, or one for each of its loops; `a / b` where the architectures differ."""
    yield f"| {' | '.join(HEADER)} |"
    yield "|" + "---|" * len(HEADER)
    rows: dict[str, list[list[str]]] = {}
    for kernel in sorted(kernels, key=lambda kernel: kernel.name):
        parts = [part for part in parts_of(kernel) if "__half" not in part.label or "__half" in kernel.name]
        for part in parts:
            rows.setdefault(f"`{kernel.name}`{part.name and ' '}{part.name}", []).append(part_cells(part))
        if not parts:
            rows.setdefault(f"`{kernel.name}`", []).append([*resource_cells(kernel), *["-"] * 5])
    for name, both in rows.items():
        cells = [" / ".join(dict.fromkeys(column)) for column in zip(*both, strict=True)]
        yield f"| {name} | {' | '.join(cells)} |"


# Numbers of rows, or of blocks of 8 rows, that the document shows; all of the kernels that are not named here.
SHOWN_COUNTS = {"gramian_pairs": (1, 4), "gramian_tiles": (1, 2, 8), "single_step_kernel": (0, 2, 8)}


def is_shown(kernel: Kernel) -> bool:
    """In the document: float16 differs from bfloat16 in its conversions only, and not every N is there."""
    counts = SHOWN_COUNTS.get(kernel.function)
    return "__half" not in kernel.arguments and (counts is None or int(kernel.arguments[1]) in counts)


def write_tables(path: Path, tables: Mapping[str, Sequence[str]]) -> None:
    """Replaces what stands between `<!-- table: NAME -->` and `<!-- end -->`."""
    text = path.read_text()
    for name, lines in tables.items():
        pattern = rf"(?<=<!-- table: {name} -->\n).*?(?=<!-- end -->)"
        # The tables hold no backslash, which a replacement would take for a group.
        text, found = re.subn(pattern, "\n".join([*lines, ""]), text, flags=re.S)
        if found != 1:
            raise ValueError(f"{path} should have one place for the table {name!r}. Got {found}")
    path.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description="Tables of the compiled CUDA kernels.")
    parser.add_argument("--write", action="store_true", help="into docs/kernels.md instead of the screen")
    arguments = parser.parse_args()
    if missing := missing_tools():
        print(f"error: not found: {', '.join(missing)}; see scripts/cubins.py", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        kernels = compile_kernels(Path(folder), ARCHITECTURES)
    shown = [kernel for kernel in kernels if is_shown(kernel)] if arguments.write else kernels
    tables = {"kernels": list(kernel_lines(shown)), "roofline": list(roofline_lines())}
    if arguments.write:
        write_tables(DOCUMENT, tables)
    else:
        print("\n\n".join("\n".join(lines) for lines in tables.values()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
