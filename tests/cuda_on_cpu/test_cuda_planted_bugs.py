"""Bugs put into copies of csrc/cuda, each of which has to be caught: the other tests of this folder can fail."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from builds import ADDRESS, CSRC, PLAIN, THREAD, Builder, Flavour, run_program


@dataclass(frozen=True)
class Bug:
    """One replacement in one file, and who has to notice."""

    name: str
    file: str
    before: str
    after: str
    flavour: Flavour
    report: str  # a regular expression
    kernel: str = "screen"
    order: str = "forward"


BARRIER = "  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;\n  __syncthreads();\n"
NO_BARRIER = BARRIER.replace("  __syncthreads();\n", "")
LAST_BLOCK = "if (finished[0] != gridDim.x) return false;"
TICKET = "finished[0] = atomicAdd(counter, 1u) + 1;"

BUGS = [
    Bug("missing-barrier-values", "reduce.cuh", BARRIER, NO_BARRIER, PLAIN, "^FAILED screen"),
    Bug("missing-barrier-race", "reduce.cuh", BARRIER, NO_BARRIER, THREAD, "data race"),
    Bug("missing-fence", "reduce.cuh", f"__threadfence();\n    {TICKET}", TICKET, THREAD, "data race"),
    Bug("counter-without-atomic", "reduce.cuh", TICKET, "finished[0] = ++*counter;", THREAD, "data race"),
    Bug(
        "last-block-by-index",
        "reduce.cuh",
        LAST_BLOCK,
        "if (blockIdx.x + 1 != gridDim.x) return false;",
        PLAIN,
        "^FAILED screen",
        order="reverse",
    ),
    Bug(
        "divergent-exit-before-shuffle",
        "reduce.cuh",
        LAST_BLOCK,
        "if (finished[0] != gridDim.x || threadIdx.x >= gridDim.x) return false;",
        PLAIN,
        r"deadlock: lanes of a warp operation never arrive(.|\n)*waits in __shfl_down_sync at \S+\.cuh?:\d+",
    ),
    Bug(
        "divergent-exit-before-barrier",
        "reduce.cuh",
        BARRIER,
        BARRIER.replace("  __sync", "  if (threadIdx.x == 40) return value;\n  __sync"),
        PLAIN,
        r"threads wait at different __syncthreads(.|\n)*thread 40 waits in __syncthreads at \S+reduce\.cuh:\d+",
    ),
    Bug(
        "shared-array-too-short",
        "reduce.cuh",
        "FEDCMT_SHARED(A, warp_totals, [kWarps]);",
        "FEDCMT_SHARED(A, warp_totals, [kWarps - 1]);",
        PLAIN,
        "shared array warp_totals of 168 bytes: a write at byte 168 lies outside",
    ),
    Bug(
        "shared-array-too-short-line",
        "reduce.cuh",
        "FEDCMT_SHARED(A, warp_totals, [kWarps]);",
        "FEDCMT_SHARED(A, warp_totals, [kWarps - 1]);",
        ADDRESS,
        r"use-after-poison(.|\n)*reduce\.cuh:\d+",
    ),
    Bug(
        "wide-load-beyond-the-end",
        "screen.cu",
        "for (; begin + kStep <= length; begin += stride)",
        "for (; begin < length; begin += stride)",
        ADDRESS,
        r"heap-buffer-overflow(.|\n)*load_row<true",
    ),
    Bug(
        "alignment-not-checked",
        "screen.cu",
        "is_aligned(arguments.from) && is_aligned(arguments.to)",
        "true",
        ADDRESS,
        "runtime error: .* misaligned address .* requires 16 byte alignment",
    ),
    Bug(
        "fragment-index-swapped",
        "gramian_kernels.cuh",
        "rows.pointer[b * kTileSide + threadIdx.x % 32 / 4]",
        "rows.pointer[b * kTileSide + threadIdx.x % 32 % 8]",
        PLAIN,
        "^FAILED gramian",
        kernel="gramian",
    ),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_caught(builder: Builder, tmp_path: Path, bug: Bug) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    path = csrc / "cuda" / bug.file
    text = path.read_text()
    assert text.count(bug.before) == 1, f"{bug.file} no longer has this once, plant the bug elsewhere:\n{bug.before}"
    path.write_text(text.replace(bug.before, bug.after))
    program = builder.changed_program(bug.flavour, csrc, f"{bug.kernel}.cu", tmp_path)
    effort = "tiny" if bug.flavour is THREAD else "small"
    done = run_program(program, bug.flavour, effort, bug.kernel, order=bug.order)
    assert done.returncode != 0
    assert re.search(bug.report, done.stdout, re.MULTILINE), done.stdout[-3000:]
