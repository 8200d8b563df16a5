"""Weights of the strategies: properties, frozen values, TorchJD as an oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcmt import ops, strategies
from fedcmt.config import StrategyConfig
from fedcmt.errors import InputError
from fedcmt.exchange import ClientDescription
from fedcmt.strategies import Strategy
from fedcmt.strategies.base import RoundUpdates
from fedcmt.strategies.conflict_averse import cagrad_weights
from fedcmt.strategies.gram import lengthened, smallest_mean


def updates_of(seed: int, count: int, dim: int = 40) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, dim)))


def case_shares(seed: int, count: int) -> Tensor:
    cases = torch.from_numpy(np.random.default_rng(seed).integers(1, 20, count)).double()
    return cases / cases.sum()


def describe(name: str, modality: str, channels: int, target: str = "organ") -> ClientDescription:
    return ClientDescription(name, "segmentation", modality, channels, 1, "t", "l", target)


def make(name: str, **settings: object) -> Strategy:
    return strategies.create(StrategyConfig(name=name, **settings))


def of_round(
    gram: Tensor,
    clients: Sequence[ClientDescription] | None = None,
    members: Sequence[ClientDescription] | None = None,
    strategy: Strategy | None = None,
    **facts: object,
) -> RoundUpdates:
    """What a strategy sees; clients a, b, c, ... of one modality unless given."""
    clients = tuple(clients or (describe(chr(97 + i), "CT", 1) for i in range(gram.shape[-1])))
    members = tuple(members or clients)
    keys = {"shared"} if strategy is None else {strategy.encoder_key(member) for member in members}
    facts = {"seed": 1, "round_index": 1, **facts}
    return RoundUpdates(clients=clients, members=members, targets=tuple(sorted(keys)), gram=gram, **facts)


def test_names() -> None:
    assert strategies.names() == [
        "affinity", "asymfedavg", "cagrad", "config", "ditto", "fedavg", "fedbn", "fedcmt", "fedcmt-paper", "fedhca2",
        "fedopt", "fedper", "fedprox", "joint", "local", "mgda", "pcgrad", "tuned-weights", "upgrad",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"name": "fedcmtt"}, ["unknown strategy", "did you mean 'fedcmt'"]),
        ({"name": "nothing"}, ["unknown strategy", "affinity, asymfedavg, cagrad"]),
        (
            {"name": "fedcmt", "conflict_aversoin": 0.3},
            ["strategy.conflict_aversoin", "did you mean 'conflict_aversion'"],
        ),
        ({"name": "fedcmt", "conflict_aversion": 1.5}, ["strategy.conflict_aversion", "1.5"]),
        ({"name": "fedcmt", "distillation": {"wieght": 1}}, ["distillation.wieght", "did you mean 'weight'"]),
        ({"name": "affinity", "similarity": "measured", "other": 0.1}, ["other has no use"]),
        ({"name": "affinity", "sharpness": 2}, ["sharpness has no use"]),
        ({"name": "affinity", "step_length": "fedexp"}, ["unknown key 'step_length'"]),
        ({"name": "fedopt", "optimizer": "sgd", "beta2": 0.9}, ["beta2 has no use"]),
        ({"name": "local", "server_momentum": 0.5}, ["unknown key 'server_momentum'"]),
    ],
)
def test_wrong_strategy_settings_are_refused(config: dict, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        strategies.create(StrategyConfig(**config))
    assert all(part in str(caught.value) for part in parts)


def test_fedavg_weights_by_cases() -> None:
    clients = [replace(describe(name, "CT", 1), num_cases=n) for name, n in (("a", 1), ("b", 2), ("c", 5))]
    weights = make("fedavg").weights(of_round(torch.eye(3).double(), clients))
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


SHARED = ["cagrad", "config", "fedavg", "fedbn", "fedcmt", "fedcmt-paper", "fedopt", "mgda", "pcgrad", "upgrad"]


def combined(name: str, updates: Tensor, cases: Sequence[int], order: Sequence[int] | None = None) -> Tensor:
    """The step d of a strategy that shares one encoder, `[P]`."""
    order = list(range(len(updates)) if order is None else order)
    clients = [replace(describe(f"c{i}", "CT", 1), num_cases=cases[i]) for i in order]
    u = updates[order]
    strategy = make(name)
    return strategy.combine(of_round(u @ u.T, clients, strategy=strategy)).weights @ u


@pytest.mark.parametrize("name", [name for name in SHARED if name != "pcgrad"])  # whose order is drawn
@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_clients_does_not_matter(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    u, cases = updates_of(seed, 5), rng.integers(1, 9, 5).tolist()
    once, again = combined(name, u, cases), combined(name, u, cases, rng.permutation(5).tolist())
    assert torch.allclose(once, again, atol=1e-4 * float(once.norm()))


@pytest.mark.parametrize("name", SHARED)
def test_scaled_updates_give_a_scaled_step(name: str) -> None:
    u = updates_of(3, 4)
    step = combined(name, u, [1, 2, 3, 4])
    for scale in (1e-5, 1e4):
        assert torch.allclose(combined(name, u * scale, [1, 2, 3, 4]) / scale, step, atol=1e-4 * float(step.norm()))


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_equal_updates_give_the_update(name: str, count: int) -> None:
    u = updates_of(0, 1).expand(count, -1)
    # CAGrad goes c |g| beyond the mean, divided by 1 + c^2, as published.
    factor = 1.4 / 1.16 if name in ("cagrad", "fedcmt", "fedcmt-paper") and count > 1 else 1.0
    assert torch.allclose(combined(name, u, [1] * count), factor * u[0], atol=1e-6)


@pytest.mark.parametrize("name", ["config", "mgda", "upgrad"])
@pytest.mark.parametrize("seed", range(6))
def test_promised_steps_oppose_no_update(name: str, seed: int) -> None:
    u = updates_of(seed, 5, 8)
    u[1] = -u[0] + 0.1 * u[1]
    step = combined(name, u, [1, 5, 1, 1, 2])
    mean = u.mean(0)
    assert float((u @ mean).min()) < 0  # or this would test nothing
    assert float((u @ step).min()) >= -1e-9 * float(u.norm() * step.norm())


@pytest.mark.parametrize("seed", range(4))
def test_directions_agree_with_torchjd(seed: int) -> None:
    from torchjd.aggregation import MGDA, ConFIG, UPGrad

    u = updates_of(seed, 4, 12)
    u[1] -= u[0]
    for name, expected in (("config", ConFIG()(u) / 4), ("upgrad", UPGrad()(u))):
        assert torch.allclose(combined(name, u, [1] * 4), expected, atol=2e-3 * float(expected.norm())), name
    # Its Frank-Wolfe steps only approach the minimum, which ours is.
    ours, theirs = combined("mgda", u, [1] * 4), MGDA(epsilon=1e-8, max_iters=5000)(u)
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.999
    assert float(ours.norm()) <= float(theirs.norm()) <= 1.01 * float(ours.norm())


def test_pcgrad_agrees_with_torchjd_for_two() -> None:
    """With more, the order that it draws decides."""
    from torchjd.aggregation import PCGrad

    u = updates_of(1, 2, 6)
    u[1] -= u[0]
    assert torch.allclose(combined("pcgrad", u, [1, 1]), PCGrad()(u) / 2, atol=1e-9)


def test_pcgrad_draws_the_order_from_seed_and_round() -> None:
    u = updates_of(2, 5, 6)
    u[1:] -= u[0]
    gram = u @ u.T
    one, same, other = (make("pcgrad").weights(of_round(gram, round_index=r)) for r in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    orders = [torch.stack([torch.randperm(5) for _ in range(5)]) for _ in range(3)]
    assert all(torch.isfinite(ops.project_conflicts(gram, order=order)).all() for order in orders)


@given(seed=st.integers(0, 1000), count=st.integers(2, 7))
@settings(max_examples=25, deadline=None)
def test_no_mean_is_shorter_than_the_smallest(seed: int, count: int) -> None:
    u = updates_of(seed, count, 5)
    x = smallest_mean(u @ u.T)
    assert float(x.sum()) == pytest.approx(1)
    assert float(x.min()) >= 0
    # Optimality: no update's inner product with the mean is below its squared length.
    mean = x @ u
    assert float((u @ mean).min()) >= float(mean @ mean) - 1e-8


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("gram", [torch.zeros(2, 2), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])])
def test_steps_are_finite_where_there_is_no_direction(name: str, gram: Tensor) -> None:
    assert torch.isfinite(make(name).combine(of_round(gram.double())).weights).all()


def test_step_lengths() -> None:
    u = torch.eye(4, dtype=torch.float64) * 3  # orthogonal, of length 3; their mean has length 1.5
    gram, weights = u @ u.T, torch.full((4,), 0.25, dtype=torch.float64)
    assert float((lengthened(weights, gram, "plain") @ u).norm()) == pytest.approx(1.5)
    assert float((lengthened(weights, gram, "restored") @ u).norm()) == pytest.approx(3)
    # FedExP: 9 / (2 * 2.25) = 2
    assert float((lengthened(weights, gram, "fedexp") @ u).norm()) == pytest.approx(3)
    equal = torch.ones(4, 4, dtype=torch.float64)
    assert all(torch.allclose(lengthened(weights, equal, rule), weights) for rule in ("restored", "fedexp"))


def test_server_optimizers() -> None:
    adam = make("fedopt").server_optimizer(1, 10)
    assert (adam.optimizer, adam.lr, adam.beta, adam.beta2, adam.epsilon) == ("adam", 0.01, 0.9, 0.99, 1e-3)
    assert make("fedopt", optimizer="sgd").server_optimizer(1, 10).lr == 1.0
    paper = make("fedcmt-paper")
    rates = [paper.server_optimizer(r, 11).lr for r in (1, 6, 11)]
    assert rates == pytest.approx([1.0, 0.95, 0.9])
    assert paper.server_optimizer(1, 1).lr == 1.0
    assert make("fedavg", server_max_norm=2.0).server_optimizer(1, 1).max_norm == 2.0


def test_what_clients_do_besides() -> None:
    assert make("fedprox", proximal=0.3).client_work.proximal == 0.3
    assert make("ditto", personal=0.2, personal_steps=7).client_work.personal_steps == 7
    assert make("fedbn").client_work.stays_local == (".norm.",)
    assert make("fedcmt").client_work.distillation.weight == 0
    assert make("fedcmt-paper").client_work.distillation.weight == 0.5
    assert make("fedcmt", adoption="safeguard").client_work.adoption == "safeguard"
    assert make("fedper").adaptor_key(describe("a", "CT", 1)) == "a"


def test_tuned_weights() -> None:
    strategy = make("tuned-weights", client_weights={"a": 3})
    gram = torch.eye(2).double()
    assert strategy.weights(of_round(gram)).tolist() == [0.75, 0.25]
    with pytest.raises(InputError, match=r"strategy.client_weights.*no client 'zed'.*use a"):
        make("tuned-weights", client_weights={"zed": 1}).check(["a"])
    with pytest.raises(InputError, match="every client has weight 0"):
        make("tuned-weights", client_weights={"a": 0}).check(["a"])
    alone = make("tuned-weights", client_weights={"a": 0})
    assert alone.weights(of_round(gram[:1, :1])).tolist() == [0.0]


def test_fedcmt_clusters_make_steps_of_their_own() -> None:
    clients = [describe("a", "CT", 1), describe("b", "MR", 1), describe("c", "CT", 1), describe("d", "CT", 1, "lesion")]
    u = updates_of(5, 4)
    strategy = make("fedcmt", encoders="clustered", step_length="restored", conflict_aversion=0)
    weights = strategy.combine(of_round(u @ u.T, clients, strategy=strategy)).weights
    assert weights.shape == (3, 4)
    rows = zip([clients[3], clients[0], clients[1]], weights, strict=True)
    steps = {strategy.encoder_key(client): row @ u for client, row in rows}
    mean = (u[0] + u[2]) / 2
    factor = min(float((u[0].norm() + u[2].norm()) / 2 / mean.norm()), 2**0.5)
    assert torch.allclose(steps[strategy.encoder_key(clients[2])], factor * mean)
    assert torch.allclose(steps[strategy.encoder_key(clients[1])], u[1])
