"""What holds for any updates and weights, on every engine."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops_engines import (
    EPS,
    Engine,
    engine,  # noqa: F401 (fixture)
    make_updates,
    on_device,
    one_thread,  # noqa: F401 (fixture)
    over_engines,
    relative_error,
)
from torch import Tensor

from fedcmt import ops

properties = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@over_engines
@properties
@given(data=st.data(), n=st.integers(1, 12), length=st.integers(0, 700))
def test_gramian_follows_permutations(engine: Engine, data: st.DataObject, n: int, length: int) -> None:  # noqa: F811
    order = data.draw(st.permutations(range(n)))
    updates = on_device(make_updates(n, length, torch.float32), engine.device)
    gram = ops.gramian(updates, backend=engine.backend)
    permuted = ops.gramian([updates[i] for i in order], backend=engine.backend)
    assert relative_error(permuted, gram.cpu()[order][:, order]) <= 1e-12


@over_engines
@properties
@given(data=st.data(), n=st.integers(1, 12), length=st.integers(0, 700))
def test_any_segments_add_up(engine: Engine, data: st.DataObject, n: int, length: int) -> None:  # noqa: F811
    inner = sorted(data.draw(st.lists(st.integers(0, length), max_size=6)))
    updates = on_device(make_updates(n, length, torch.bfloat16), engine.device)
    parts = ops.gramian(updates, segments=[0, *inner, length], backend=engine.backend)
    whole = ops.gramian(updates, backend=engine.backend)
    assert relative_error(parts.sum(0), whole.cpu()) <= 1e-12


@over_engines
@properties
@given(
    n=st.integers(1, 12),
    length=st.integers(1, 700),
    scales=st.tuples(st.floats(-4, 4), st.floats(-4, 4)),
    seed=st.integers(0, 2**16),
)
def test_server_step_is_linear_in_the_weights(
    engine: Engine,  # noqa: F811
    n: int,
    length: int,
    scales: tuple[float, float],
    seed: int,
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
    assert ((combined - separate).abs() <= (2 * n + 4) * EPS * size + 1e-30).all()


@over_engines
@properties
@given(n=st.integers(1, 10), seed=st.integers(0, 2**16))
def test_projected_updates_do_not_conflict_with_their_last_partner(
    engine: Engine,  # noqa: F811
    n: int,
    seed: int,
) -> None:
    rows = torch.randn(n, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = (rows @ rows.T).to(engine.device)
    factors = ops.project_conflicts(gram, backend=engine.backend)
    inner = (factors @ gram).cpu()  # of projected update i with update j
    last = torch.tensor([n - 1 if i < n - 1 else max(n - 2, 0) for i in range(n)])
    assert (inner[torch.arange(n), last] >= -1e-9 * gram.diagonal().max().item()).all()
