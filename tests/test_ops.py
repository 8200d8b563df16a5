"""Both operations on every path this machine has, against float64 arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcmt import ops
from fedcmt.ops import _native, reference

BLOCK = 65_536  # elements of a reduction block in csrc/cpu/ops.cpp
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    *[(n, p) for n in (1, 2, 3, 8) for p in (0, 1, 7, 1023, BLOCK, 3 * BLOCK + 77)],
    *[(n, p) for n in (17, 64) for p in (0, 1, 333, BLOCK + 5)],
    (100, 1001),
]
FLOAT32_EPS = 2.0**-24  # of one rounding


@dataclass(frozen=True)
class Engine:
    """One way to run the operations: a backend on a device, on a CPU path where that matters."""

    device: str
    backend: ops.Backend
    cpu_path: str | None = None


def engine_params() -> list[Any]:
    no_gpu = not torch.cuda.is_available() or not _native.has_cuda_kernels()
    cuda = pytest.mark.skipif(no_gpu, reason="needs a GPU and an extension with CUDA kernels")
    return [
        *[pytest.param(Engine("cpu", "native", path), id=f"cpu-{path}") for path in ops.backend_info().cpu_paths],
        pytest.param(Engine("cpu", "reference"), id="cpu-reference"),
        pytest.param(Engine("cuda", "native"), id="cuda", marks=cuda),
    ]


@pytest.fixture(params=engine_params())
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    chosen: Engine = request.param
    if chosen.cpu_path is None:
        yield chosen
        return
    extension = _native.extension()
    before = extension.cpu_path()
    extension.set_cpu_path(chosen.cpu_path)
    yield chosen
    extension.set_cpu_path(before)


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


@cache
def exact_gramian(n: int, length: int, dtype: torch.dtype) -> Tensor:
    rows = torch.stack(make_updates(n, length, dtype)).double()  # [N, P]
    return rows @ rows.T


def relative_error(gram: Tensor, exact: Tensor) -> float:
    """Largest error relative to sqrt(G_ii G_jj); NaN where either has one."""
    scale = exact.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return float(((gram.cpu() - exact).abs() / torch.outer(scale, scale)).max())


def on_device(updates: Sequence[Tensor], device: str) -> list[Tensor]:
    return [u if device == "cpu" else u.to(device) for u in updates]


def make_state(length: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    params, momentum = torch.randn(2, length + 1, generator=generator).unbind()
    return params[1:].to(device), momentum[1:].to(device)


def test_native_extension_is_built() -> None:
    info = ops.backend_info()
    assert info.import_error is None
    assert info.native
    assert info.cpu_paths[-1] == "plain"
    assert info.cpu_path in info.cpu_paths
    assert info.openmp_max_threads >= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "length"), SHAPES)
def test_gramian_matches_float64(engine: Engine, n: int, length: int, dtype: torch.dtype) -> None:
    updates = on_device(make_updates(n, length, dtype), engine.device)
    gram = ops.gramian(updates, backend=engine.backend)
    assert gram.dtype == torch.float64
    assert gram.shape == (n, n)
    assert gram.device == updates[0].device
    assert torch.equal(gram, gram.T)
    # Float32 products or sums would miss this by five orders of magnitude.
    assert relative_error(gram, exact_gramian(n, length, dtype)) <= 1e-12


def test_gramian_of_equal_values_has_no_bias(engine: Engine) -> None:
    # 0.1 squared rounds the same way every time: float32 errors would add up, not cancel.
    row = torch.full((BLOCK + 1,), 0.1, device=engine.device)
    gram = ops.gramian([row, row], backend=engine.backend)
    exact = (BLOCK + 1) * row[0].double().item() ** 2
    assert gram.cpu().flatten().tolist() == pytest.approx([exact] * 4, rel=1e-12, abs=0)


def test_gramian_with_more_blocks_than_partial_sums(engine: Engine) -> None:
    row = torch.ones(514 * BLOCK + 3, dtype=torch.bfloat16, device=engine.device)
    assert ops.gramian([row], backend=engine.backend).item() == row.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beta", [None, 0.0, 0.6])
@pytest.mark.parametrize(("n", "length"), SHAPES)
def test_server_step_matches_float64(
    engine: Engine, n: int, length: int, beta: float | None, dtype: torch.dtype
) -> None:
    updates = on_device(make_updates(n, length, dtype), engine.device)
    params, momentum = make_state(length, engine.device)
    weights = torch.linspace(-0.3, 1.0, n, dtype=torch.float64).float()
    rows = torch.stack(make_updates(n, length, dtype)).double()  # [N, P]
    before, lr = params.double().cpu(), -0.7
    old = (beta or 0.0) * momentum.double().cpu()
    exact_m = weights.double() @ rows + old
    scale = weights.double().abs() @ rows.abs() + old.abs()

    given_momentum = None if beta is None else momentum
    stats = ops.server_step(params, given_momentum, updates, weights, lr=lr, beta=beta or 0.0, backend=engine.backend)
    bound = (n + 4) * FLOAT32_EPS * (scale + before.abs())
    assert ((params.double().cpu() - (before + lr * exact_m)).abs() <= bound).all()
    if beta is None:
        assert stats.norm == pytest.approx(abs(lr) * exact_m.norm().item(), rel=1e-6)
    else:
        assert ((momentum.double().cpu() - exact_m).abs() <= bound).all()
        assert stats.norm == pytest.approx(abs(lr) * momentum.double().norm().item(), rel=1e-12)
    assert stats.nonfinite == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_of_a_16_bit_type_is_read_exactly(engine: Engine, dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype if dtype != torch.float32 else torch.float16).to(dtype)
    values = values[values.isfinite()].to(engine.device)
    params = torch.zeros(values.numel(), device=engine.device)
    ops.server_step(params, None, [values], [1.0], lr=1.0, backend=engine.backend)
    assert torch.equal(params, values.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_values_are_counted(engine: Engine, dtype: torch.dtype) -> None:
    length = BLOCK + 9
    updates = [u.clone() for u in make_updates(3, length, dtype)]
    bad = [0, 130, BLOCK - 1, BLOCK, length - 1]
    for place, value in zip(bad, ["nan", "inf", "-inf", "nan", "inf"], strict=True):
        updates[1][place] = float(value)
    updates = on_device(updates, engine.device)
    params, momentum = make_state(length, engine.device)
    stats = ops.server_step(params, momentum, updates, [0.2, 0.3, 0.5], lr=1.0, beta=0.5, backend=engine.backend)
    assert stats.nonfinite == len(bad)
    assert not params[bad].isfinite().any()
    assert int((~params.isfinite()).sum()) == len(bad)
    assert not torch.tensor(stats.norm).isfinite()


def test_nonfinite_rows_of_the_gramian_stay_apart(engine: Engine) -> None:
    updates = [u.clone() for u in make_updates(5, 1023, torch.float32)]
    updates[1][1022], updates[3][17] = float("nan"), float("inf")
    gram = ops.gramian(on_device(updates, engine.device), backend=engine.backend).cpu()
    good = [0, 2, 4]
    assert gram[1].isnan().all()
    assert gram[3, 3] == float("inf")
    assert not gram[3].isfinite().any()
    assert gram[good][:, good].isfinite().all()


def test_beta_zero_does_not_read_the_momentum(engine: Engine) -> None:
    updates = on_device(make_updates(2, 1023, torch.float32), engine.device)
    params, momentum = make_state(1023, engine.device)
    momentum.fill_(float("nan"))
    stats = ops.server_step(params, momentum, updates, [0.5, 0.5], lr=1.0, backend=engine.backend)
    assert stats.nonfinite == 0
    assert momentum.isfinite().all()
    assert params.isfinite().all()


def test_norm_of_huge_steps_does_not_overflow(engine: Engine) -> None:
    update = torch.full((100,), 3e37, device=engine.device)
    params = torch.zeros(100, device=engine.device)
    stats = ops.server_step(params, None, [update], [1.0], lr=1.0, backend=engine.backend)
    assert stats.norm == pytest.approx(3e38, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 3, 8, 17])
def test_results_are_bitwise_repeatable(engine: Engine, n: int, dtype: torch.dtype) -> None:
    if engine.backend == "reference":
        pytest.skip("torch promises no bitwise equality between numbers of threads")
    length = 5 * BLOCK + 13
    updates = on_device(make_updates(n, length, dtype), engine.device)
    weights = torch.linspace(0.1, 1.0, n)
    results = []
    for threads in (1, 2, 1, 3):
        torch.set_num_threads(threads)
        params, momentum = make_state(length, engine.device)
        gram = ops.gramian(updates, backend="native")
        stats = ops.server_step(params, momentum, updates, weights, lr=0.3, beta=0.9, backend="native")
        results.append((gram, params, momentum, stats))
    for gram, params, momentum, stats in results[1:]:
        assert torch.equal(gram, results[0][0])
        assert torch.equal(params, results[0][1])
        assert torch.equal(momentum, results[0][2])
        assert stats == results[0][3]


def test_alignment_does_not_change_the_result(engine: Engine) -> None:
    updates = make_updates(4, 2 * BLOCK + 3, torch.bfloat16)
    shifted = ops.gramian(on_device(updates, engine.device), backend=engine.backend)
    aligned = [u.clone() for u in on_device(updates, engine.device)]
    assert torch.equal(shifted, ops.gramian(aligned, backend=engine.backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_matches_reference(engine: Engine, dtype: torch.dtype) -> None:
    updates = on_device(make_updates(8, 4099, dtype, shift=False), engine.device)
    params, momentum = make_state(4099, engine.device)
    other_params, other_momentum = params.clone(), momentum.clone()
    weights = [0.1 * (i + 1) for i in range(8)]
    stats = ops.server_step(params, momentum, updates, weights, lr=0.5, beta=0.9, backend=engine.backend)
    norm, nonfinite = reference.server_step(other_params, other_momentum, updates, weights, lr=0.5, beta=0.9)
    torch.testing.assert_close(params, other_params, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(momentum, other_momentum, rtol=1e-5, atol=1e-5)
    assert stats.norm == pytest.approx(norm, rel=1e-6)
    assert stats.nonfinite == nonfinite
    gram = ops.gramian(updates, backend=engine.backend)
    torch.testing.assert_close(gram, reference.gramian(updates), rtol=1e-12, atol=1e-9)


properties = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@properties
@given(data=st.data(), n=st.integers(1, 12), length=st.integers(0, 700))
def test_gramian_follows_permutations(engine: Engine, data: st.DataObject, n: int, length: int) -> None:
    order = data.draw(st.permutations(range(n)))
    updates = on_device(make_updates(n, length, torch.float32), engine.device)
    gram = ops.gramian(updates, backend=engine.backend)
    permuted = ops.gramian([updates[i] for i in order], backend=engine.backend)
    assert relative_error(permuted, gram.cpu()[order][:, order]) <= 1e-12


@properties
@given(
    n=st.integers(1, 12),
    length=st.integers(1, 700),
    scales=st.tuples(st.floats(-4, 4), st.floats(-4, 4)),
    seed=st.integers(0, 2**16),
)
def test_server_step_is_linear_in_the_weights(
    engine: Engine, n: int, length: int, scales: tuple[float, float], seed: int
) -> None:
    updates = on_device(make_updates(n, length, torch.float32), engine.device)
    first, second = torch.randn(2, n, generator=torch.Generator().manual_seed(seed)).double()

    def step(weights: Tensor) -> Tensor:
        params = torch.zeros(length, device=engine.device)
        ops.server_step(params, None, updates, weights, lr=1.0, backend=engine.backend)
        return params.double().cpu()

    combined = step(scales[0] * first + scales[1] * second)
    separate = scales[0] * step(first) + scales[1] * step(second)
    weight = abs(scales[0]) * first.abs() + abs(scales[1]) * second.abs()  # [N]
    size = weight @ torch.stack([u.double().cpu().abs() for u in updates])  # [P]
    assert ((combined - separate).abs() <= (2 * n + 4) * FLOAT32_EPS * size + 1e-30).all()
