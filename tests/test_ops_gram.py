"""Gram matrices on every engine, against float64 arithmetic."""

from __future__ import annotations

import pytest
import torch
from ops_engines import (
    BLOCK,
    Engine,
    bounds_for,
    engine,  # noqa: F401 (fixture)
    exact_gramian,
    make_updates,
    on_device,
    one_thread,  # noqa: F401 (fixture)
    over_dtypes,
    over_engines,
    over_shapes,
    relative_error,
)
from torch import Tensor

from fedcmt import ops


def test_native_extension_is_built() -> None:
    info = ops.backend_info()
    assert info.import_error is None
    assert info.native
    assert info.cpu_paths[-1] == "plain"
    assert info.cpu_path in info.cpu_paths
    assert info.openmp_max_threads >= 1


@over_dtypes
@over_shapes
def test_gramian_matches_float64(engine: Engine, n: int, length: int, dtype: torch.dtype) -> None:  # noqa: F811
    updates = on_device(make_updates(n, length, dtype), engine.device)
    gram = ops.gramian(updates, backend=engine.backend)
    assert gram.dtype == torch.float64
    assert gram.shape == (n, n)
    assert gram.device == updates[0].device
    assert torch.equal(gram, gram.T)
    # Float32 products or sums would miss this by five orders of magnitude.
    assert relative_error(gram, exact_gramian(n, length, dtype)) <= 1e-12


@over_dtypes
@over_shapes
def test_segments_have_matrices_of_their_own(engine: Engine, n: int, length: int, dtype: torch.dtype) -> None:  # noqa: F811
    updates, bounds = make_updates(n, length, dtype), bounds_for(length)
    grams = ops.gramian(on_device(updates, engine.device), segments=bounds, backend=engine.backend)
    assert grams.shape == (4, n, n)
    rows = torch.stack(updates).double()
    for gram, begin, end in zip(grams, bounds, bounds[1:], strict=False):
        assert relative_error(gram, rows[:, begin:end] @ rows[:, begin:end].T) <= 1e-12
    assert relative_error(grams.sum(0), exact_gramian(n, length, dtype)) <= 1e-12


@over_dtypes
@over_shapes
def test_appending_rows_gives_the_whole_matrix(engine: Engine, n: int, length: int, dtype: torch.dtype) -> None:  # noqa: F811
    updates = on_device(make_updates(n, length, dtype), engine.device)
    gram: Tensor | None = None
    for i, update in enumerate(updates[-12:]):
        gram = ops.gramian_append(gram, updates[-12:][:i], update, backend=engine.backend)
    assert gram is not None
    whole = ops.gramian(updates[-12:], backend=engine.backend)
    assert relative_error(gram, whole.cpu()) <= 1e-12
    if engine.cpu_path is not None:
        assert torch.equal(gram, whole)


@over_engines
def test_appending_by_segments(engine: Engine) -> None:  # noqa: F811
    updates, bounds = on_device(make_updates(3, 1023, torch.bfloat16), engine.device), bounds_for(1023)
    gram = ops.gramian(updates[:2], segments=bounds, backend=engine.backend)
    grown = ops.gramian_append(gram, updates[:2], updates[2], segments=bounds, backend=engine.backend)
    whole = ops.gramian(updates, segments=bounds, backend=engine.backend)
    assert relative_error(grown, whole.cpu()) <= 1e-12


@over_engines
def test_equal_values_have_no_bias(engine: Engine) -> None:  # noqa: F811
    # 0.1 squared rounds the same way every time: float32 errors would add up, not cancel.
    length = 4097 if engine.simulated else BLOCK + 1
    row = torch.full((length,), 0.1, device=engine.device)
    gram = ops.gramian([row, row], backend=engine.backend)
    exact = length * row[0].double().item() ** 2
    assert gram.cpu().flatten().tolist() == pytest.approx([exact] * 4, rel=1e-12, abs=0)


@over_engines
@pytest.mark.parametrize("n", [2, 8, 12])
def test_small_values_beside_large_ones_count(engine: Engine, n: int) -> None:  # noqa: F811
    # Sums in float32, or in bfloat16's own tensor cores, would lose every small product here.
    row = torch.ones(4096, dtype=torch.bfloat16, device=engine.device)
    row[1::2] = 2.0**-13
    gram = ops.gramian([row] * n, backend=engine.backend)
    assert gram.cpu().flatten().tolist() == [2048 * (1 + 2.0**-26)] * (n * n)


@over_engines
def test_more_blocks_than_partial_sums(engine: Engine) -> None:  # noqa: F811
    if engine.simulated:
        pytest.skip("33 million elements are too many for the simulator")
    row = torch.ones(514 * BLOCK + 3, dtype=torch.bfloat16, device=engine.device)
    assert ops.gramian([row], backend=engine.backend).item() == row.numel()


@over_engines
def test_nonfinite_rows_stay_apart(engine: Engine) -> None:  # noqa: F811
    for n in (5, 12):
        updates = [u.clone() for u in make_updates(n, 1023, torch.float32)]
        updates[1][1022], updates[3][17] = float("nan"), float("inf")
        gram = ops.gramian(on_device(updates, engine.device), backend=engine.backend).cpu()
        good = [i for i in range(n) if i not in (1, 3)]
        assert gram[1].isnan().all()
        assert gram[3, 3] == float("inf")
        assert not gram[3].isfinite().any()
        assert gram[good][:, good].isfinite().all()


@over_engines
def test_alignment_does_not_change_the_result(engine: Engine) -> None:  # noqa: F811
    length = 4099 if engine.simulated else 2 * BLOCK + 3
    for n in (4, 11):
        updates = on_device(make_updates(n, length, torch.bfloat16), engine.device)
        aligned = [u.clone() for u in updates]
        shifted = ops.gramian(updates, backend=engine.backend)
        assert torch.equal(shifted, ops.gramian(aligned, backend=engine.backend))


@over_engines
@over_dtypes
@pytest.mark.parametrize("n", [1, 3, 8, 17])
def test_repeated_on_any_number_of_threads(engine: Engine, n: int, dtype: torch.dtype) -> None:  # noqa: F811
    if engine.backend == "reference":
        pytest.skip("torch promises no bitwise equality between numbers of threads")
    length = 1023 if engine.simulated else 5 * BLOCK + 13
    updates = on_device(make_updates(n, length, dtype), engine.device)
    results = []
    for threads in (1, 2, 1, 3):
        torch.set_num_threads(threads)
        results.append(ops.gramian(updates, segments=bounds_for(length), backend="native"))
    assert all(torch.equal(result, results[0]) for result in results)


def pcgrad(rows: Tensor, order: Tensor) -> Tensor:
    """PCGrad's algorithm 1 as published, on the vectors themselves  # [N, P]"""
    projected = rows.clone()
    for i, row in enumerate(projected):
        for j in order[i].tolist():
            inner = row @ rows[j]
            if j != i and inner < 0:
                row -= inner / (rows[j] @ rows[j]) * rows[j]
    return projected


@over_engines
@pytest.mark.parametrize("n", [1, 2, 5, 33])
def test_projections_are_those_of_the_vectors(engine: Engine, n: int) -> None:  # noqa: F811
    generator = torch.Generator().manual_seed(n)
    rows = torch.randn(n, 40, generator=generator, dtype=torch.float64)
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(n)])
    gram = (rows @ rows.T).to(engine.device)
    factors = ops.project_conflicts(gram, order=order, backend=engine.backend)
    torch.testing.assert_close(factors.cpu() @ rows, pcgrad(rows, order), rtol=1e-9, atol=1e-9)


@over_engines
def test_projections_by_segment_and_of_zero_updates(engine: Engine) -> None:  # noqa: F811
    grams = torch.tensor([[[1.0, -1.0], [-1.0, 4.0]], [[0.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    factors = ops.project_conflicts(grams.to(engine.device), backend=engine.backend).cpu()
    assert factors.tolist() == [[[1.0, 0.25], [1.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]]


def test_restored_norms_are_those_of_the_updates() -> None:
    rows = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.tensor([[0.2] * 5, [1.0, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0]], dtype=torch.float64)
    restored = ops.restore_norms(weights, rows @ rows.T)
    torch.testing.assert_close((restored @ rows).norm(dim=1), weights @ rows.norm(dim=1))
    torch.testing.assert_close(restored[1], weights[1])
    limited = ops.restore_norms(weights, rows @ rows.T, limit=1.2)
    torch.testing.assert_close(limited[0], 1.2 * weights[0])


def test_restored_norms_by_segment_and_of_zero_updates() -> None:
    grams = torch.zeros(2, 3, 3, dtype=torch.float64)
    grams[1] = torch.eye(3)
    weights = torch.full((1, 2, 3), 1 / 3, dtype=torch.float64)
    restored = ops.restore_norms(weights, grams)
    assert torch.equal(restored[0, 0], weights[0, 0])
    torch.testing.assert_close(restored[0, 1], weights[0, 1] * 3**0.5)
