"""The two operations against torch doing the same work, and against reading the data once.

    pytest benchmarks/bench_ops.py --elements 31000000 --benchmark-columns=min,median

`native` never falls back here: without the extension these benchmarks fail.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fedcmt import ops

LR, BETA = 0.5, 0.9


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def updates(request: pytest.FixtureRequest) -> list[Tensor]:
    option = request.config.getoption
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(option("elements"), generator=generator) for _ in range(option("clients"))]
    return [row.to(option("device"), request.param) for row in rows]


def measure(benchmark: BenchmarkFixture, updates: list[Tensor], work: Callable[[], object]) -> None:
    """Times work with the device's queue empty before and after."""
    on_cuda = updates[0].is_cuda

    def synchronised() -> None:
        work()
        if on_cuda:
            torch.cuda.synchronize()

    benchmark.extra_info["bytes"] = sum(u.numel() * u.element_size() for u in updates)
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(synchronised, rounds=15, warmup_rounds=2)


def read_once(tensors: list[Tensor]) -> None:
    """The floor: torch's sum over the same bytes, taken as float32 values."""
    for tensor in tensors:
        tensor.view(torch.float32).sum()


@pytest.mark.benchmark(group="gramian")
def test_gramian_native(benchmark: BenchmarkFixture, updates: list[Tensor]) -> None:
    measure(benchmark, updates, lambda: ops.gramian(updates, backend="native"))


@pytest.mark.benchmark(group="gramian")
def test_gramian_torch_float32(benchmark: BenchmarkFixture, updates: list[Tensor]) -> None:
    def work() -> Tensor:
        rows = torch.stack(updates).float()  # [N, P]
        return rows @ rows.T

    measure(benchmark, updates, work)


@pytest.mark.benchmark(group="gramian")
def test_gramian_torch_float64(benchmark: BenchmarkFixture, updates: list[Tensor]) -> None:
    measure(benchmark, updates, lambda: ops.gramian(updates, backend="reference"))


@pytest.mark.benchmark(group="gramian")
def test_gramian_read_floor(benchmark: BenchmarkFixture, updates: list[Tensor]) -> None:
    measure(benchmark, updates, lambda: read_once(updates))


def make_state(updates: list[Tensor]) -> tuple[Tensor, Tensor, list[float]]:
    params, momentum = torch.zeros(2, updates[0].numel(), device=updates[0].device)
    return params, momentum, [1.0 / len(updates)] * len(updates)


@pytest.mark.benchmark(group="server_step")
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_server_step(benchmark: BenchmarkFixture, updates: list[Tensor], backend: ops.Backend) -> None:
    params, momentum, weights = make_state(updates)

    def work() -> ops.StepStats:
        return ops.server_step(params, momentum, updates, weights, lr=LR, beta=BETA, backend=backend)

    measure(benchmark, updates, work)


@pytest.mark.benchmark(group="server_step")
def test_server_step_read_floor(benchmark: BenchmarkFixture, updates: list[Tensor]) -> None:
    params, momentum, _ = make_state(updates)
    measure(benchmark, updates, lambda: read_once([*updates, params, momentum]))
