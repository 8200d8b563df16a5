"""Weighted means and screening on every engine, against the torch reference; arrays of other libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ops_engines import (
    DTYPES,
    Engine,
    engine,  # noqa: F401 (fixture)
    make_state,
    make_updates,
    on_device,
    one_thread,  # noqa: F401 (fixture)
    over_dtypes,
    over_engines,
    over_shapes,
)

from fedcmt import ops
from fedcmt.ops import reference


@over_dtypes
@over_shapes
def test_mean_matches_float64(engine: Engine, n: int, length: int, dtype: torch.dtype) -> None:  # noqa: F811
    updates = on_device(make_updates(n, length, dtype), engine.device)
    weights = torch.linspace(1, 30, n, dtype=torch.float64)
    mean = ops.weighted_mean(updates, weights, backend=engine.backend)
    exact = (weights / weights.sum()) @ torch.stack(make_updates(n, length, dtype)).double()
    assert isinstance(mean, torch.Tensor)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double().cpu(), exact, rtol=1e-5, atol=1e-6)


@over_dtypes
@over_engines
def test_groups_of_different_lengths_in_one_call(engine: Engine, dtype: torch.dtype) -> None:  # noqa: F811
    lengths = [1023, 5, 1023, 5, 0, 300, 1023]
    updates = [make_updates(7, length, dtype)[i] for i, length in enumerate(lengths)]
    # The poisoned update is in no group.
    updates[6] = torch.full_like(updates[6], float("nan"))
    masks = torch.tensor([[lengths[i] == length and i < 6 for i in range(7)] for length in (1023, 5, 0, 300)])
    weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    means = ops.weighted_mean(on_device(updates, engine.device), weights, masks, backend=engine.backend)
    expected = reference.weighted_mean(updates, weights, masks)
    assert [mean.numel() for mean in means] == [1023, 5, 0, 300]
    for mean, wanted in zip(means, expected, strict=True):
        torch.testing.assert_close(mean.cpu(), wanted, rtol=1e-5, atol=1e-6)


def wide_values(length: int, dtype: torch.dtype) -> torch.Tensor:
    """Values from the subnormals to the largest, with three that are not finite."""
    generator = torch.Generator().manual_seed(length)
    exponents = torch.rand(length, generator=generator) * 80 - 40
    values = (torch.randn(length, generator=generator) * 2.0**exponents).to(dtype)
    for place, value in zip((3, 700, length - 1), ("nan", "inf", "-inf"), strict=True):
        if length > 1000:
            values[place] = float(value)
    return values


@over_dtypes
@pytest.mark.parametrize("stored", [None, *DTYPES], ids=str)
@over_engines
def test_screening_measures_what_is_stored(
    engine: Engine,  # noqa: F811
    stored: torch.dtype | None,
    dtype: torch.dtype,
) -> None:
    for length in (0, 1, 17, 1023, 4099):
        update = wide_values(length, dtype).to(engine.device)
        into = None if stored is None else torch.full((length + 1,), 5.0, dtype=stored, device=engine.device)[1:]
        stats = ops.screen(update, into=into, backend=engine.backend)
        kept = update if stored is None else update.to(stored)
        finite = kept[kept.isfinite()].double()
        assert stats.nonfinite == length - finite.numel()
        assert stats.norm == pytest.approx(finite.norm().item(), rel=1e-12)
        assert stats.largest == (finite.abs().max().item() if finite.numel() else 0.0)
        if into is not None:
            assert torch.equal(into.isnan(), kept.isnan())
            assert torch.equal(into[~kept.isnan()], kept[~kept.isnan()])


@over_engines
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_every_tie_is_rounded_to_even(engine: Engine, stored: torch.dtype) -> None:  # noqa: F811
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(stored).float()
    values = values[values.isfinite()].sort().values
    update = torch.cat([values, values[1:] / 2 + values[:-1] / 2]).to(engine.device)
    into = torch.empty_like(update, dtype=stored)
    stats = ops.screen(update, into=into, backend=engine.backend)
    assert stats.nonfinite == 0
    assert torch.equal(into, update.to(stored))


@over_engines
def test_parts_add_up(engine: Engine) -> None:  # noqa: F811
    update = wide_values(4099, torch.float32).to(engine.device)
    into = torch.empty(4099, dtype=torch.bfloat16, device=engine.device)
    parts = [ops.screen(update[a:b], into=into[a:b], backend=engine.backend) for a, b in ((0, 1000), (1000, 4099))]
    total, whole = parts[0] + parts[1], ops.screen(into, backend=engine.backend)
    assert (total.nonfinite, total.largest) == (whole.nonfinite, whole.largest)
    assert math.isclose(total.norm, whole.norm, rel_tol=1e-12)


def test_numpy_arrays_are_used_in_place() -> None:
    rows = [np.linspace(-1, 1 + i, 1001, dtype=np.float32) for i in range(3)]
    rows[1].flags.writeable = False
    gram = ops.gramian(rows, backend="native")
    torch.testing.assert_close(gram.numpy(), np.stack(rows).astype(np.float64) @ np.stack(rows).T, rtol=1e-12, atol=0)
    params, momentum = np.zeros(1001, np.float32), np.zeros(1001, np.float32)
    ops.server_step(params, momentum, rows, np.array([0.5, 0.25, 0.25]), lr=1.0, beta=0.9, backend="native")
    np.testing.assert_allclose(params, 0.5 * rows[0] + 0.25 * rows[1] + 0.25 * rows[2], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(params, momentum)
    half = np.zeros(1001, np.float16)
    assert ops.screen(rows[0], into=half).nonfinite == 0
    np.testing.assert_array_equal(half, rows[0].astype(np.float16))
    with pytest.raises(ValueError, match=r"`params` should be writable\. Got a read-only array"):
        ops.server_step(rows[1], None, rows[:1], [1.0], lr=1.0)
    with pytest.raises(TypeError, match=r"`updates\[0\]` should be float32, bfloat16 or float16. Got torch.float64"):
        ops.gramian([np.zeros(3)])


def test_dlpack_exporters_are_used_in_place() -> None:
    class Exporter:
        """An array of a library that fedcmt has never heard of."""

        def __init__(self, values: torch.Tensor) -> None:
            self.values = values

        def __dlpack__(self, **options: object) -> object:
            return self.values.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.values.__dlpack_device__()

    rows = [Exporter(row.clone()) for row in make_updates(3, 333, torch.bfloat16)]
    expected = ops.gramian([row.values for row in rows])
    assert torch.equal(ops.gramian(rows), expected)
    params, _ = make_state(333, "cpu")
    before = params.clone()
    ops.server_step(Exporter(params), None, rows, [1.0, 0.0, 0.0], lr=1.0)  # type: ignore[call-overload]
    torch.testing.assert_close(params, before + rows[0].values.float())


def test_cupy_arrays_are_used_in_place() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    cupy = pytest.importorskip("cupy", reason="needs CuPy")
    rows = [cupy.linspace(-1, 1 + i, 1001, dtype=cupy.float32) for i in range(3)]
    gram = ops.gramian(rows, backend="native")
    exact = cupy.stack(rows).astype(cupy.float64)
    torch.testing.assert_close(gram, torch.as_tensor(exact @ exact.T, device="cuda"), rtol=1e-12, atol=0)
    params = cupy.zeros(1001, dtype=cupy.float32)
    ops.server_step(params, None, rows, [1.0, 0.0, 0.0], lr=1.0, backend="native")
    cupy.testing.assert_array_equal(params, rows[0])
