"""Every way to run fedcmt.ops that this machine has, and data for it; tests import what they use, fixtures too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from simulated_cuda import simulated_cuda
from torch import Tensor

import fedcmt  # noqa: F401 (it sets how OpenMP's threads wait; gpu_check.sh runs these tests without the conftest)
from fedcmt import ops
from fedcmt.ops import _native

BLOCK = 65_536  # elements of a reduction block in csrc/cpu/ops.cpp
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 2.0**-24  # of one rounding to float32
# The simulator runs one thread after the other, so its cases are small.
SMALL_SHAPES = [
    *[(n, p) for n in (1, 2, 3, 5, 8, 9) for p in (0, 1, 7, 1023)],
    *[(n, p) for n in (17, 64, 70) for p in (0, 1, 333)],
]
SHAPES = [
    *[(n, p) for n in (1, 2, 3, 8) for p in (0, 1, 7, 1023, BLOCK, 3 * BLOCK + 77)],
    *[(n, p) for n in (5, 9, 17, 64) for p in (0, 1, 333, BLOCK + 5)],
    (100, 1001),
]


@dataclass(frozen=True)
class Engine:
    """One way to run the operations: a backend on a device, on a CPU path where that matters."""

    device: str
    backend: ops.Backend
    cpu_path: str | None = None
    simulated: bool = False

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Numbers of updates and lengths to test with."""
        return SMALL_SHAPES if self.simulated else SHAPES


def engine_params() -> list[Any]:
    """All engines as parameters of a test, by name."""
    no_gpu = not torch.cuda.is_available() or not _native.has_cuda_kernels()
    cuda = pytest.mark.skipif(no_gpu, reason="needs a GPU and an extension with CUDA kernels")
    return [
        *[pytest.param(Engine("cpu", "native", path), id=f"cpu-{path}") for path in ops.backend_info().cpu_paths],
        pytest.param(Engine("cpu", "reference"), id="cpu-reference"),
        pytest.param(Engine("cpu", "native", simulated=True), id="simulated"),
        pytest.param(Engine("cuda", "native"), id="cuda", marks=cuda),
    ]


def engine_shapes() -> list[Any]:
    """(engine, N, P) for every engine and each of its shapes."""
    return [
        pytest.param(param.values[0], n, length, id=f"{param.id}-{n}x{length}", marks=param.marks)
        for param in engine_params()
        for n, length in param.values[0].shapes
    ]


over_engines = pytest.mark.parametrize("engine", engine_params(), indirect=True)
over_shapes = pytest.mark.parametrize(("engine", "n", "length"), engine_shapes(), indirect=["engine"])
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Makes fedcmt.ops run as the parameter says."""
    chosen: Engine = request.param
    with ExitStack() as stack:
        if chosen.simulated:
            stack.enter_context(simulated_cuda())
        elif chosen.cpu_path is not None:
            extension = _native.extension()
            stack.callback(extension.set_cpu_path, extension.cpu_path())
            extension.set_cpu_path(chosen.cpu_path)
        yield chosen


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """OpenMP threads wait by spinning: on a busy machine two of them make these small cases ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def make_updates(n: int, length: int, dtype: torch.dtype, shift: bool = True) -> tuple[Tensor, ...]:
    """Random rows of different scales; with shift, views that start at odd places."""
    generator = torch.Generator().manual_seed(1000 * n + length)
    rows = []
    for i in range(n):
        start = i % 3 + 1 if shift else 0
        values = torch.randn(start + length, generator=generator) * (0.5 + i % 4)
        rows.append(values.to(dtype)[start:])
    return tuple(rows)


def make_state(length: int, device: str, count: int = 2) -> tuple[Tensor, ...]:
    """Float32 vectors of random values that start at odd places; the third and later ones are positive."""
    generator = torch.Generator().manual_seed(length)
    state = [torch.randn(length + 1, generator=generator)[1:].to(device) for _ in range(count)]
    return tuple(vector if k < 2 else vector.abs_() for k, vector in enumerate(state))


def on_device(updates: Sequence[Tensor], device: str) -> list[Tensor]:
    return [u if device == "cpu" else u.to(device) for u in updates]


@cache
def exact_gramian(n: int, length: int, dtype: torch.dtype) -> Tensor:
    """Gram matrix of `make_updates` in float64."""
    rows = torch.stack(make_updates(n, length, dtype)).double()  # [N, P]
    return rows @ rows.T


def relative_error(gram: Tensor, exact: Tensor) -> float:
    """Largest error relative to sqrt(G_ii G_jj); NaN where either has one."""
    scale = exact.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return float(((gram.cpu() - exact).abs() / (scale[..., None] * scale[..., None, :])).max())


def bounds_for(length: int) -> list[int]:
    """Segments of very different lengths, an empty one among them."""
    return [0, length // 7, length // 7, length // 7 + min(3, length - length // 7), length]
