"""The server's operations against torch, other libraries and the machine's own limits.

    pytest benchmarks/bench_ops.py --elements 31000000 --benchmark-columns=min,median

All contenders of a group are measured together, one call of each in every cycle; pytest-benchmark, which would run
them one after the other, is handed the seconds that were measured, through a timer that replays them. Ours are always
native: without the extension these benchmarks fail. `report.py` makes a table and a plot of them.
"""

from __future__ import annotations

import accuracy
import measure
import pytest
import torch
from cases import BF16, F32, all_groups
from measure import Contender, Group, Timings
from pytest_benchmark.fixture import BenchmarkFixture

from fedcmt import ops


class Replay:
    """A clock that shows seconds measured before."""

    def __init__(self) -> None:
        self._now = 0.0
        self._seconds: list[float] = []

    def __call__(self) -> float:
        return self._now

    def load(self, seconds: list[float]) -> None:
        self._seconds = list(seconds)

    def advance(self) -> None:
        """Stands for the call that took the next of the seconds."""
        self._now += self._seconds.pop(0)


REPLAY = Replay()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" in metafunc.fixturenames:
        option = metafunc.config.getoption
        pairs = [(g, c) for g in all_groups(option("elements"), option("mapped_full")) for c in g.contenders]
        names = [f"{group.name}: {contender.label}" for group, contender in pairs]
        metafunc.parametrize(("group", "contender"), pairs, ids=names)


@pytest.fixture(scope="session")
def measured() -> dict[str, dict[str, Timings]]:
    """Timings of the groups that were measured, by name of the group and label of the contender."""
    return {}


@pytest.mark.benchmark(timer=REPLAY)
def test_speed(
    benchmark: BenchmarkFixture,
    measured: dict[str, dict[str, Timings]],
    group: Group,
    contender: Contender,
    pytestconfig: pytest.Config,
) -> None:
    if contender.missing:
        pytest.skip(f"not installed: {', '.join(contender.missing)}")
    if group.name not in measured:
        measured[group.name] = measure.measure(group, pytestconfig.getoption("cycles"))
    results = measured[group.name]
    benchmark.group = group.name
    benchmark.extra_info.update(measure.facts(group, results, contender))
    REPLAY.load(results[contender.label].wall)
    benchmark.pedantic(REPLAY.advance, rounds=len(results[contender.label].wall))


@pytest.mark.benchmark(group="accuracy of gramian")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=measure.short)
@pytest.mark.parametrize("kind", accuracy.KINDS)
def test_accuracy(benchmark: BenchmarkFixture, pytestconfig: pytest.Config, kind: str, dtype: torch.dtype) -> None:
    """The Gram matrix is within 1e-9 of the exact one, relative to sqrt(G_ii G_jj)."""
    length = pytestconfig.getoption("elements")
    rows = accuracy.made_rows(kind, length, dtype)
    gram = benchmark.pedantic(lambda: ops.gramian(rows, backend="native"))
    exact = accuracy.exact_gram(rows)
    stacked = torch.stack(rows).float()
    error = accuracy.error(gram, exact)
    benchmark.extra_info.update(
        kind=kind,
        dtype=measure.short(dtype),
        D=length,
        error=error,
        float32_mm=accuracy.error(stacked @ stacked.T, exact),
    )
    assert error < accuracy.LIMIT
