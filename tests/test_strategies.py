"""Weights of the strategies: properties, frozen values, TorchJD as an oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcmt import strategies
from fedcmt.config import StrategyConfig
from fedcmt.errors import InputError
from fedcmt.exchange import ClientDescription
from fedcmt.strategies.conflict_averse import cagrad_weights


def updates_of(seed: int, count: int, dim: int = 40) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, dim)))


def case_shares(seed: int, count: int) -> Tensor:
    cases = torch.from_numpy(np.random.default_rng(seed).integers(1, 20, count)).double()
    return cases / cases.sum()


def describe(name: str, modality: str, channels: int) -> ClientDescription:
    return ClientDescription(name, "segmentation", modality, channels, 1, "t", "l")


def test_names() -> None:
    assert strategies.names() == ["fedavg", "fedcmt", "local"]


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"name": "fedcmtt"}, ["unknown strategy", "did you mean 'fedcmt'"]),
        ({"name": "nothing"}, ["unknown strategy", "fedavg, fedcmt, local"]),
        (
            {"name": "fedcmt", "conflict_aversoin": 0.3},
            ["strategy.conflict_aversoin", "did you mean 'conflict_aversion'"],
        ),
        ({"name": "fedcmt", "conflict_aversion": 1.5}, ["strategy.conflict_aversion", "1.5"]),
        ({"name": "local", "server_momentum": 0.5}, ["unknown key 'server_momentum'"]),
    ],
)
def test_wrong_strategy_settings_are_refused(config: dict, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        strategies.create(StrategyConfig(**config))
    assert all(part in str(caught.value) for part in parts)


def test_fedavg_weights_by_cases() -> None:
    weights = strategies.create(StrategyConfig(name="fedavg")).weights(torch.eye(3), torch.tensor([1, 2, 5]))
    assert torch.allclose(weights, torch.tensor([0.125, 0.25, 0.625], dtype=torch.float64))


def test_adaptor_sharing() -> None:
    ct, mr, mr2 = describe("a", "CT", 1), describe("b", "MR", 1), describe("c", "MR", 2)
    fedcmt = strategies.create(StrategyConfig(name="fedcmt"))
    assert len({fedcmt.adaptor_key(c) for c in (ct, mr, mr2)}) == 3
    fedavg = strategies.create(StrategyConfig(name="fedavg"))
    assert fedavg.adaptor_key(ct) == fedavg.adaptor_key(mr) != fedavg.adaptor_key(mr2)


@given(seed=st.integers(0, 10_000), count=st.integers(2, 8), c=st.floats(0.05, 0.9))
@settings(max_examples=40, deadline=None)
def test_cagrad_solves_its_dual(seed: int, count: int, c: float) -> None:
    """No other point of the simplex is better than the solution, and the step stays in its ball."""
    u, w = updates_of(seed, count), case_shares(seed, count)
    gram = u @ u.T
    mean = w @ u
    step = cagrad_weights(gram, w, c) @ u * (1 + c * c)
    radius = c * mean.norm()
    assert float((step - mean).norm()) == pytest.approx(float(radius), rel=1e-4)
    # The primal: the step maximises the smallest inner product within the ball; compare with random steps in it.
    worst = float((u @ step).min())
    rng = np.random.default_rng(seed + 1)
    for _ in range(30):
        direction = torch.from_numpy(rng.normal(size=count)) @ u
        other = mean + radius * direction / direction.norm()
        assert float((u @ other).min()) <= worst + 1e-3 * abs(worst) + 1e-6


@given(seed=st.integers(0, 10_000), count=st.integers(2, 6), scale=st.floats(1e-6, 1e6))
@settings(max_examples=30, deadline=None)
def test_cagrad_knows_no_order_and_no_scale(seed: int, count: int, scale: float) -> None:
    u, w = updates_of(seed, count), case_shares(seed, count)
    gram = u @ u.T
    weights = cagrad_weights(gram, w, 0.4)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    assert torch.allclose(cagrad_weights(gram[order][:, order], w[order], 0.4), weights[order], atol=1e-4)
    assert torch.allclose(cagrad_weights(gram * scale, w, 0.4), weights, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_cagrad_agrees_with_torchjd(seed: int) -> None:
    from torchjd.aggregation import CAGrad

    u = updates_of(seed, 4).float()
    ours = cagrad_weights((u @ u.T).double(), torch.full((4,), 0.25), 0.4).float() @ u
    assert torch.nn.functional.cosine_similarity(ours, CAGrad(c=0.4)(u), dim=0) > 0.9999


def test_cagrad_leaves_one_update_and_c_zero_alone() -> None:
    u = updates_of(0, 3)
    assert torch.equal(cagrad_weights(u[:1] @ u[:1].T, torch.ones(1), 0.4), torch.ones(1, dtype=torch.float64))
    w = case_shares(0, 3)
    assert torch.equal(cagrad_weights(u @ u.T, w, 0.0), w)


@pytest.mark.parametrize("gram", [torch.zeros(2, 2), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])])
def test_cagrad_is_finite_where_there_is_no_direction(gram: Tensor) -> None:
    assert torch.isfinite(cagrad_weights(gram.double(), torch.tensor([0.5, 0.5]), 0.4)).all()


def test_cagrad_frozen_values() -> None:
    gram = torch.tensor([[4.0, -1.0, 0.5], [-1.0, 1.0, 0.0], [0.5, 0.0, 2.0]], dtype=torch.float64)
    weights = cagrad_weights(gram, torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), 0.4)
    # From a grid search over the simplex: the step leans on the update that the mean opposes, x = (0, 1, 0).
    assert weights.tolist() == pytest.approx([0.4310345, 0.5709574, 0.2155172], abs=1e-6)
