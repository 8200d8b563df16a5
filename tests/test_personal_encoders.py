"""Strategies with an encoder for each client: affinity and FedHCA2 against float64 references."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_strategies import describe, make, of_round, updates_of
from torch import Tensor

from fedcmt.config import TopologyConfig
from fedcmt.layout import FlatLayout, Segment
from fedcmt.network import build_network, parameters_of
from fedcmt.strategies.base import DecoderRound
from fedcmt.strategies.conflict_averse import cagrad_weights
from fedcmt.strategies.gram import lengthened
from fedcmt.strategies.matching import matched_mean, part
from fedcmt.strategies.stages import stage_bounds
from fedcmt.topology import TopologyContract

CLIENTS = [
    describe("a", "CT", 1),
    describe("b", "CT", 1),
    describe("c", "CT", 1, "lesion"),
    describe("d", "MR", 1),
    describe("e", "MR", 1, "vessel"),
]


def rule_b(table: Tensor, updates: Tensor) -> Tensor:
    """D_i s_i of the design, row by row, straight from the formulas."""
    steps = []
    for row in table / table.sum(1, keepdim=True):
        mixed = row @ updates
        factor = float((row * updates.norm(dim=1)).sum() / mixed.norm())
        steps.append(min(factor, math.sqrt(int((row > 0).sum()))) * mixed)
    return torch.stack(steps)


def test_clustered_is_rule_b() -> None:
    u = updates_of(1, 5)
    strategy = make("affinity", preset="clustered")
    result = strategy.combine(of_round(u @ u.T, CLIENTS, strategy=strategy))
    table = torch.eye(5, dtype=torch.float64)
    table[0, 1] = table[1, 0] = 1.0
    assert torch.allclose(result.weights @ u, rule_b(table, u))
    assert torch.allclose(result.mixing, table / table.sum(1, keepdim=True))
    # A lone client reduces to its own encoder and update.
    assert torch.allclose(result.weights[2:] @ u, u[2:])


def test_spread_weighs_by_task_and_modality() -> None:
    u = updates_of(2, 5)
    strategy = make("affinity")
    result = strategy.combine(of_round(u @ u.T, CLIENTS, strategy=strategy))
    first = torch.tensor([1.0, 1.0, 0.1, 0.3, 0.05], dtype=torch.float64)
    assert torch.allclose(result.mixing[0], first / first.sum())
    assert torch.allclose(result.mixing.sum(1), torch.ones(5, dtype=torch.float64))
    plain = make("affinity", restore_norms=False, same_task=0.0)
    weights = plain.combine(of_round(u @ u.T, CLIENTS, strategy=plain)).weights
    assert float(weights[0, 3]) == 0
    assert torch.allclose(weights.sum(1), torch.ones(5, dtype=torch.float64))


def test_an_absent_clients_encoder_takes_what_its_partners_learn() -> None:
    u = updates_of(3, 4)
    strategy = make("affinity", preset="clustered")
    here = [CLIENTS[0], *CLIENTS[2:]]
    result = strategy.combine(of_round(u @ u.T, here, CLIENTS, strategy=strategy))
    assert result.weights.shape == (5, 4)
    assert result.mixing.shape == (5, 5)
    assert torch.allclose(result.weights[1] @ u, u[0])
    away = strategy.combine(of_round(u[:1] @ u[:1].T, CLIENTS[:1], CLIENTS, strategy=strategy))
    assert torch.equal(away.weights[2:], torch.zeros(3, 1, dtype=torch.float64))


def test_measured_similarity_by_segment_and_its_memory() -> None:
    strategy = make("affinity", similarity="measured", sharpness=2.0, memory=0.25, restore_norms=False, per_layer=True)
    grams = torch.stack([torch.tensor([[4.0, 2.0], [2.0, 1.0]]), torch.tensor([[1.0, -0.5], [-0.5, 1.0]])]).double()
    first = strategy.combine(of_round(grams, CLIENTS[:2], strategy=strategy))
    assert first.weights.shape == (2, 2, 2)  # encoders, segments, updates
    assert first.weights[0, 0].tolist() == [0.5, 0.5]
    assert first.weights[0, 1].tolist() == [1.0, 0.0]  # opposing updates share nothing
    other = make("affinity", **strategy.settings.model_dump(exclude_unset=True))
    other.restore({key: value.clone() for key, value in strategy.state().items()})
    uncorrelated = grams * torch.eye(2)
    again = other.combine(of_round(uncorrelated, CLIENTS[:2], strategy=other))
    share = 0.25**2 / (1 + 0.25**2)  # a quarter of the cosine 1 is left, squared
    assert float(again.weights[0, 0, 1]) == pytest.approx(share)


def test_stages_cover_the_encoder() -> None:
    contract = TopologyContract.of(TopologyConfig(features=[4, 8, 16], adaptor_width=4))
    network = build_network(contract.architecture("segmentation"), 1, 2)
    layout = FlatLayout.of(parameters_of(network, "encoder").items())
    bounds = stage_bounds(layout)
    assert len(bounds) == 4
    assert (bounds[0], bounds[-1]) == (0, layout.size)
    starts = [s.offset for s in layout.segments if s.name.endswith(".0.convs.0.conv.weight")]
    assert bounds[:-1] == starts
    with pytest.raises(ValueError, match="should belong to a stage"):
        stage_bounds(FlatLayout((Segment("head.weight", (2,), 0),), 16))


def test_fedhca2_rows_and_learned_shares() -> None:
    u = updates_of(4, 3)
    strategy = make("fedhca2", encoder_share=0.2, share_learning_rate=0.5)
    clients = CLIENTS[:3]
    first = strategy.combine(of_round(u @ u.T, clients, strategy=strategy))
    common = cagrad_weights(u @ u.T, torch.full((3,), 1 / 3, dtype=torch.float64), 0.4)
    alike = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]], dtype=torch.float64)
    assert torch.allclose(first.weights, alike + 0.2 * common)
    assert torch.equal(first.kept, common)
    gain = torch.tensor([0.4, -5.0, 5.0], dtype=torch.float64)
    second = strategy.combine(of_round(u @ u.T, clients, strategy=strategy, along_kept=gain))
    # 0.2 + 0.5 * 0.4; the others are cut to [0, 1].
    expected = alike + torch.tensor([0.4, 0.0, 1.0], dtype=torch.float64)[:, None] * common
    assert torch.allclose(second.weights, expected)


def layouts() -> dict[str, FlatLayout]:
    shared, wide, narrow = ("up.weight", (4, 3)), ("out.weight", (2, 4)), ("out.weight", (3, 4))

    def layout(*parts: tuple[str, tuple[int, ...]]) -> FlatLayout:
        return FlatLayout(tuple(Segment(name, shape, 16 * i) for i, (name, shape) in enumerate(parts)), 16 * len(parts))

    return {"a": layout(shared, wide), "b": layout(shared, wide), "c": layout(shared, narrow)}


def test_tensors_of_equal_name_and_shape_are_averaged() -> None:
    values = {name: torch.randn(32, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("abc")}
    result = matched_mean(values, layouts(), {"a": 3, "b": 1, "c": 0})
    up = 0.75 * values["a"][:12] + 0.25 * values["b"][:12]
    assert all(torch.allclose(result[name][:12], up) for name in "abc")
    assert torch.allclose(result["a"][16:24], 0.75 * values["a"][16:24] + 0.25 * values["b"][16:24])
    assert torch.equal(result["c"][16:], values["c"][16:])
    untouched = matched_mean(values, layouts(), {"a": 0, "b": 0, "c": 0})
    assert all(torch.equal(untouched[name], values[name]) for name in "abc")


def test_clients_of_the_same_labels_go_on_from_the_mean_of_their_decoders() -> None:
    flats = layouts()
    clients = tuple(
        replace(describe(name, modality, 1, target), decoder_layout=flats[name], num_cases=cases)
        for name, modality, target, cases in (
            ("a", "CT", "organ", 3),
            ("b", "MR", "organ", 1),
            ("c", "CT", "lesion", 1),
        )
    )
    values = {name: torch.randn(32, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("abc")}
    strategy = make("fedcmt", step_length="plain")
    starts = {name: torch.full((32,), 0.5) for name in "abc"} | {"b": torch.full((32,), 0.7)}
    updates = {name: value - starts[name] for name, value in values.items()}
    decoders = DecoderRound(clients, starts, updates)
    result = strategy.combine_decoders(decoders)
    mean = 0.75 * values["a"] + 0.25 * values["b"]
    for name in "ab":
        assert all(torch.allclose(part(result[name], s), part(mean, s)) for s in flats[name].segments)
    assert torch.allclose(result["c"], values["c"])
    # The step is as long as an encoder's.
    longer = make("fedcmt", step_length="restored")
    deltas = torch.stack([updates[name] for name in "ab"]).double()
    weights = lengthened(torch.tensor([0.75, 0.25], dtype=torch.float64), deltas @ deltas.T, "restored")
    assert float(weights.sum()) > 1.05
    result = longer.combine_decoders(decoders)
    assert all(torch.allclose(result[name].double(), 0.55 + weights @ deltas, atol=1e-5) for name in "ab")
    assert torch.allclose(result["c"], values["c"])
    # Only decoders that somebody shares travel, and none is shared where outputs come in another order.
    assert [strategy.sends_decoder(client, clients) for client in clients] == [True, True, False]
    assert not make("fedcmt", decoders="personal").sends_decoder(clients[0], clients)
    swapped = (replace(clients[0], outputs=(0, 1)), replace(clients[1], outputs=(1, 0)))
    assert not strategy.sends_decoder(swapped[0], swapped)
    apart = strategy.combine_decoders(DecoderRound((*swapped, clients[2]), starts, updates))
    assert all(torch.allclose(apart[name], values[name]) for name in "abc")


def test_fedhca2_decoders_attend_over_matching_tensors() -> None:
    strategy = make("fedhca2", decoder_share=0.5, share_learning_rate=0.1)
    flats = layouts()
    clients = tuple(describe(name, "CT", 1) for name in "abc")
    clients = tuple(type(c)(**{**vars(c), "decoder_layout": flats[c.name]}) for c in clients)
    start = {name: torch.zeros(32) for name in "abc"}
    deltas = {name: torch.randn(32, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("abc")}
    for delta in deltas.values():
        delta[12:16] = delta[28:] = 0  # gaps
        delta[24:28] = 0
    first = strategy.combine_decoders(DecoderRound(clients, start, deltas))
    rows = torch.stack([deltas[name][:12] for name in "abc"]).double()
    attention = torch.softmax(rows @ rows.T / math.sqrt(12), 1) @ rows
    assert torch.allclose(first["a"][:12].double(), rows[0] + 0.5 * attention[0], atol=1e-6)
    second = strategy.combine_decoders(DecoderRound(clients, start, deltas))
    beta = 0.5 + 0.1 * float(rows[0] @ attention[0])
    assert float(strategy.state()["beta/a/up"]) == pytest.approx(beta, rel=1e-5)
    assert torch.allclose(second["a"][:12].double(), rows[0] + min(max(beta, 0), 1) * attention[0], atol=1e-5)
