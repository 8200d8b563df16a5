"""The server's step on every engine, against float64 arithmetic and the torch reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops_engines import (
    BLOCK,
    EPS,
    Engine,
    bounds_for,
    engine,  # noqa: F401 (fixture)
    make_state,
    make_updates,
    on_device,
    one_thread,  # noqa: F401 (fixture)
    over_dtypes,
    over_engines,
    over_shapes,
)
from simulated_cuda import simulated_cuda
from torch import Tensor

from fedcmt import ops
from fedcmt.ops import reference

ADAPTIVE = ["adam", "yogi", "adagrad"]


@over_dtypes
@pytest.mark.parametrize("beta", [None, 0.0, 0.6])
@over_shapes
def test_sgd_matches_float64(engine: Engine, n: int, length: int, beta: float | None, dtype: torch.dtype) -> None:  # noqa: F811
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
    bound = (n + 4) * EPS * (scale + before.abs())
    assert ((params.double().cpu() - (before + lr * exact_m)).abs() <= bound).all()
    if beta is None:
        assert stats.norm == pytest.approx(abs(lr) * exact_m.norm().item(), rel=1e-6, abs=bound.norm().item())
    else:
        assert ((momentum.double().cpu() - exact_m).abs() <= bound).all()
        assert stats.norm == pytest.approx(abs(lr) * momentum.double().norm().item(), rel=1e-12)
    assert stats.nonfinite == 0
    assert stats.clipping == 1.0


def exact_step(
    optimizer: str, d: Tensor, params: Tensor, momentum: Tensor, second: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """FedOpt, algorithm 2, written out in float64 with beta 0.7, beta2 0.9, epsilon 0.01, lr 0.3."""
    m = 0.7 * momentum + 0.3 * d
    if optimizer == "adam":
        v = 0.9 * second + 0.1 * d**2
    elif optimizer == "yogi":
        v = second - 0.1 * d**2 * torch.sign(second - d**2)
    else:
        v = second + d**2
    return params + 0.3 * m / (v.sqrt() + 0.01), m, v


@over_dtypes
@pytest.mark.parametrize("optimizer", ADAPTIVE)
@over_engines
def test_adaptive_optimizers_match_float64(engine: Engine, optimizer: Any, dtype: torch.dtype) -> None:  # noqa: F811
    for n, length in ((1, 1), (3, 1023), (9, 333)):
        rows = torch.stack(make_updates(n, length, dtype)).double()
        state = make_state(length, engine.device, 3)
        weights = torch.linspace(0.1, 0.4, n).double()
        exact = exact_step(optimizer, weights @ rows, *(vector.double().cpu() for vector in state))
        params, momentum, second = state
        stats = ops.server_step(
            params, momentum, on_device(make_updates(n, length, dtype), engine.device), weights,
            lr=0.3, beta=0.7, optimizer=optimizer, second=second, beta2=0.9, epsilon=0.01, backend=engine.backend,
        )  # fmt: skip
        for found, expected in zip((params, momentum, second), exact, strict=True):
            torch.testing.assert_close(found.double().cpu(), expected, rtol=3e-5, atol=3e-6)
        step = 0.3 * exact[1] / (exact[2].sqrt() + 0.01)
        assert stats.norm == pytest.approx(step.norm().item(), rel=1e-4)


@over_engines
def test_dampening(engine: Engine) -> None:  # noqa: F811
    updates = on_device(make_updates(2, 1023, torch.float32), engine.device)
    params, momentum = make_state(1023, engine.device)
    expected = 0.9 * momentum + 0.25 * (0.5 * updates[0] + 0.5 * updates[1])
    ops.server_step(params, momentum, updates, [0.5, 0.5], lr=1.0, beta=0.9, dampening=0.75, backend=engine.backend)
    torch.testing.assert_close(momentum, expected, rtol=1e-6, atol=1e-6)


@over_dtypes
@pytest.mark.parametrize("optimizer", ["sgd", *ADAPTIVE])
@pytest.mark.parametrize("targets", [1, 3])
@over_engines
def test_targets_and_segments_match_the_reference(
    engine: Engine,  # noqa: F811
    targets: int,
    optimizer: Any,
    dtype: torch.dtype,
) -> None:
    for n, length in ((1, 7), (5, 1023), (12, 400), (20, 61)):
        updates, bounds = on_device(make_updates(n, length, dtype), engine.device), bounds_for(length)
        vectors = make_state(length, engine.device, 3 * targets)
        second = None if optimizer == "sgd" else [v.abs() for v in vectors[2 * targets :]]
        state = [list(vectors[:targets]), list(vectors[targets : 2 * targets]), second]
        other = [None if column is None else [v.clone() for v in column] for column in state]
        weights = torch.randn(targets, 4, n, generator=torch.Generator().manual_seed(n)) / n
        options: dict[str, Any] = {"lr": 0.3, "beta": 0.7, "optimizer": optimizer, "segments": bounds}
        stats = ops.server_step(
            state[0], state[1], updates, weights, second=state[2], backend=engine.backend, **options
        )
        expected = reference.server_step(other[0], other[1], updates, weights, second=other[2], **options)
        for found, wanted in zip(state, other, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=3e-6)
        assert isinstance(expected, list)
        assert [s.norm for s in stats] == pytest.approx([s.norm for s in expected], rel=1e-5)


@over_engines
def test_each_target_is_as_if_alone(engine: Engine) -> None:  # noqa: F811
    updates = on_device(make_updates(9, 1023, torch.bfloat16), engine.device)
    weights = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    params, momentum = list(make_state(1023, engine.device, 4)), list(make_state(1023, engine.device, 8)[4:])
    alone = [(p.clone(), m.clone()) for p, m in zip(params, momentum, strict=True)]
    stats = ops.server_step(params, momentum, updates, weights, lr=0.5, beta=0.9, backend=engine.backend)
    for m, (one_params, one_momentum) in enumerate(alone):
        one = ops.server_step(one_params, one_momentum, updates, weights[m], lr=0.5, beta=0.9, backend=engine.backend)
        assert torch.equal(params[m], one_params)
        assert torch.equal(momentum[m], one_momentum)
        assert stats[m].norm == pytest.approx(one.norm, rel=1e-12)


@over_engines
@pytest.mark.parametrize("segments", [None, bounds_for(1023)])
def test_clipping_keeps_the_combined_update_short(engine: Engine, segments: list[int] | None) -> None:  # noqa: F811
    updates = on_device(make_updates(3, 1023, torch.float32), engine.device)
    weights = [[0.5, 0.1, 0.2]] * 4 if segments else [0.5, 0.1, 0.2]
    given = ops.gramian(updates, segments=segments, backend=engine.backend)
    for gram in (None, given):
        params = torch.zeros(1023, device=engine.device)
        stats = ops.server_step(
            params, None, updates, weights, lr=1.0, max_norm=0.75, gram=gram, segments=segments, backend=engine.backend
        )
        assert params.double().norm().item() == pytest.approx(0.75, rel=1e-6)
        assert stats.norm == pytest.approx(0.75, rel=1e-6)
        assert 0 < stats.clipping < 1
    unclipped = ops.server_step(params, None, updates, weights, lr=1.0, max_norm=1e6, segments=segments)
    assert unclipped.clipping == 1.0


@over_engines
@over_dtypes
def test_every_value_of_a_16_bit_type_is_read_exactly(engine: Engine, dtype: torch.dtype) -> None:  # noqa: F811
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype if dtype != torch.float32 else torch.float16).to(dtype)
    values = values[values.isfinite()].to(engine.device)
    params = torch.zeros(values.numel(), device=engine.device)
    ops.server_step(params, None, [values], [1.0], lr=1.0, backend=engine.backend)
    assert torch.equal(params, values.float())


@over_engines
@over_dtypes
def test_nonfinite_values_are_counted(engine: Engine, dtype: torch.dtype) -> None:  # noqa: F811
    length = 2057 if engine.simulated else BLOCK + 9
    updates = [u.clone() for u in make_updates(3, length, dtype)]
    bad = [0, 130, length - 10, length - 9, length - 1]
    for place, value in zip(bad, ["nan", "inf", "-inf", "nan", "inf"], strict=True):
        updates[1][place] = float(value)
    updates = on_device(updates, engine.device)
    params, momentum = make_state(length, engine.device)
    stats = ops.server_step(params, momentum, updates, [0.2, 0.3, 0.5], lr=1.0, beta=0.5, backend=engine.backend)
    assert stats.nonfinite == len(bad)
    assert not params[bad].isfinite().any()
    assert int((~params.isfinite()).sum()) == len(bad)
    assert not torch.tensor(stats.norm).isfinite()


@over_engines
def test_beta_zero_does_not_read_the_momentum(engine: Engine) -> None:  # noqa: F811
    updates = on_device(make_updates(2, 1023, torch.float32), engine.device)
    params, momentum = make_state(1023, engine.device)
    momentum.fill_(float("nan"))
    stats = ops.server_step(params, momentum, updates, [0.5, 0.5], lr=1.0, backend=engine.backend)
    assert stats.nonfinite == 0
    assert momentum.isfinite().all()
    assert params.isfinite().all()


@over_engines
def test_norm_of_huge_steps_does_not_overflow(engine: Engine) -> None:  # noqa: F811
    update = torch.full((100,), 3e37, device=engine.device)
    params = torch.zeros(100, device=engine.device)
    stats = ops.server_step(params, None, [update], [1.0], lr=1.0, backend=engine.backend)
    assert stats.norm == pytest.approx(3e38, rel=1e-6)


@over_engines
@over_dtypes
@pytest.mark.parametrize("n", [1, 3, 8, 17])
def test_repeated_on_any_number_of_threads(engine: Engine, n: int, dtype: torch.dtype) -> None:  # noqa: F811
    if engine.backend == "reference":
        pytest.skip("torch promises no bitwise equality between numbers of threads")
    length = 1023 if engine.simulated else 5 * BLOCK + 13
    updates = on_device(make_updates(n, length, dtype), engine.device)
    weights = torch.linspace(0.1, 1.0, n)
    results = []
    for threads in (1, 2, 1, 3):
        torch.set_num_threads(threads)
        params, momentum, second = make_state(length, engine.device, 3)
        stats = ops.server_step(
            params, momentum, updates, weights, lr=0.3, beta=0.9, optimizer="adam", second=second, backend="native"
        )
        results.append((stats, params, momentum, second))
    for stats, *vectors in results[1:]:
        assert stats == results[0][0]
        assert all(torch.equal(a, b) for a, b in zip(vectors, results[0][1:], strict=True))


@pytest.mark.parametrize("n", [2, 8])
def test_a_server_step_takes_three_launches_at_most(n: int) -> None:
    updates = list(make_updates(n, 4099, torch.float32))
    params, momentum = make_state(4099, "cpu")
    with simulated_cuda() as extension:
        extension.take_launch_count()
        ops.gramian(updates, backend="native")
        ops.server_step(params, momentum, updates, [1 / n] * n, lr=1.0, beta=0.9, backend="native")
        assert 0 < extension.take_launch_count() <= 3
