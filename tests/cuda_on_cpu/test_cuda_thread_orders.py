"""The CUDA operations give the same bits in whatever order threads and blocks run, and the right ones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from builds import MAX_JOBS, PLAIN, Builder, run_program

ORDERS = [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2), ("random", 3)]


@pytest.fixture(scope="module")
def reports(builder: Builder) -> dict[tuple[str, int], tuple[int, str]]:
    """Exit status and report of each order."""
    program = builder.program(PLAIN)

    def run(order: tuple[str, int]) -> tuple[int, str]:
        done = run_program(program, PLAIN, "full", order=order[0], seed=order[1])
        return done.returncode, done.stdout

    with ThreadPoolExecutor(MAX_JOBS) as pool:
        return dict(zip(ORDERS, pool.map(run, ORDERS), strict=True))


def test_every_operation_matches_float64(reports: dict[tuple[str, int], tuple[int, str]]) -> None:
    status, report = reports["forward", 0]
    lines = report.splitlines()
    assert status == 0, [line for line in lines if not line.startswith("ok ")][:20]
    operations = {line.split()[1] for line in lines}
    updates = {"gramian", "server_step", "weighted_mean", "screen", "project_conflicts"}
    assert operations == updates | {"warp_patch", "change_intensities"}
    assert len(lines) > 1000


@pytest.mark.parametrize(("order", "seed"), ORDERS[1:])
def test_order_of_threads_changes_no_bit(
    reports: dict[tuple[str, int], tuple[int, str]], order: str, seed: int
) -> None:
    forward = reports["forward", 0][1].splitlines()
    other = reports[order, seed][1].splitlines()
    assert [pair for pair in zip(forward, other, strict=True) if pair[0] != pair[1]] == []
