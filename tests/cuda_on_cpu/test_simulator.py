"""The simulator itself: collectives, memory, launches, and the faults that it reports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from builds import FOLDER, PLAIN, Builder, run_program

FAULTS = {
    "outside_mask": r"thread 16 calls __shfl_sync at \S+check_simulator.cu:\d+, but is not in its mask 0000ffff",
    "source_outside_mask": r"__shfl_sync at \S+check_simulator.cu:\d+ reads lane 20, which is not in its mask 0000ffff",
    "exit_before_barrier": r"deadlock: not all threads reach the same __syncthreads(.|\n)*thread 7 has returned",
    "different_votes": r"deadlock: lanes of a warp operation never arrive(.|\n)*thread 9 waits in __all_sync",
    "large_array": "49160 bytes of static shared memory",
}


@pytest.fixture(scope="module")
def program(builder: Builder) -> Path:
    return builder.engine_program(PLAIN, FOLDER / "check_simulator.cu")


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_results_are_those_of_cuda(program: Path, order: str) -> None:
    done = run_program(program, PLAIN, order=order)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_reported(program: Path, fault: str) -> None:
    done = run_program(program, PLAIN, fault)
    assert done.returncode != 0
    assert re.search(FAULTS[fault], done.stdout), done.stdout


def test_unknown_order_is_refused(program: Path) -> None:
    done = run_program(program, PLAIN, order="backwards")
    assert "CUDA_ON_CPU_ORDER should be forward, reverse or random. Got 'backwards'" in done.stdout
