"""FedCMT's steps by stage and by cluster, its server rule and adaptors."""

from __future__ import annotations

import pytest
import torch
from test_membership import ALL, play, server_of
from test_personal_encoders import CLIENTS
from test_strategies import describe, make, of_round, updates_of

from fedcmt.errors import InputError
from fedcmt.strategies.base import by_cases
from fedcmt.strategies.conflict_averse import cagrad_weights
from fedcmt.strategies.gram import lengthened
from fedcmt.strategies.stages import stage_bounds


def expected(gram: torch.Tensor, own: list[int]) -> torch.Tensor:
    row = torch.zeros(len(gram), dtype=torch.float64)
    inner = gram[own][:, own]
    row[own] = lengthened(cagrad_weights(inner, by_cases(torch.ones(len(own))), 0.4), inner, "restored")
    return row


def test_first_stages_are_everybodys_and_the_others_the_clusters() -> None:
    strategy = make("fedcmt", encoders="clustered", shared_stages=1, step_length="restored")
    grams = torch.stack([u @ u.T for u in (updates_of(1, 5), updates_of(2, 5))])
    here = of_round(grams, CLIENTS, strategy=strategy)
    weights = strategy.combine(here).weights
    assert weights.shape == (4, 2, 5)  # encoders, segments, updates
    for row, target in zip(weights, here.targets, strict=True):
        own = [i for i, client in enumerate(CLIENTS) if strategy.encoder_key(client) == target]
        assert torch.allclose(row[0], expected(grams[0], [0, 1, 2, 3, 4]))
        assert torch.allclose(row[1], expected(grams[1], own))
    # Who misses a round still takes what all learn in the shared stages.
    away = strategy.combine(of_round(grams[:, :1, :1], CLIENTS[:1], CLIENTS, strategy=strategy))
    mine = here.targets.index(strategy.encoder_key(CLIENTS[0]))
    assert away.weights[:, 0, 0].tolist() == [1, 1, 1, 1]
    assert away.weights[:, 1, 0].tolist() == [float(row == mine) for row in range(4)]


def test_each_stage_makes_a_step_of_its_own() -> None:
    strategy = make("fedcmt", per_stage=True, step_length="restored")
    grams = torch.stack([u @ u.T for u in (updates_of(1, 3), updates_of(2, 3) * 5, updates_of(3, 3))])
    weights = strategy.combine(of_round(grams, strategy=strategy)).weights
    assert weights.shape == (1, 3, 3)
    for row, gram in zip(weights[0], grams, strict=True):
        assert torch.allclose(row, expected(gram, [0, 1, 2]))


@pytest.mark.parametrize("per_stage", [False, True])
def test_shared_stages_stay_equal_in_the_server(per_stage: bool) -> None:
    server = server_of("fedcmt", encoders="clustered", shared_stages=2, per_stage=per_stage, server_momentum=0.5)
    bounds = stage_bounds(server._shared.layout)
    for round_index in (1, 2):
        line = play(server, round_index, ALL if round_index == 1 else ALL[:2])
    ct, mr = server.outgoing("ct_a").encoder, server.outgoing("mr_a").encoder
    assert torch.equal(ct[: bounds[2]], mr[: bounds[2]])
    assert not torch.equal(ct[bounds[2] :], mr[bounds[2] :])
    assert len(line["weights_by_encoder"]) == 2
    with pytest.raises(InputError, match="the encoder has 3 stages, found 3 shared ones"):
        server_of("fedcmt", encoders="clustered", shared_stages=3)


def test_one_encoder_by_stage_in_the_server() -> None:
    server = server_of("fedcmt", encoders="shared", per_stage=True)
    line = play(server, 1, ALL)
    assert len(line["weights_by_encoder"]["shared"]) == 3


def test_who_shares_its_encoder_with_nobody_is_named() -> None:
    clients = [describe("a", "CT", 1), describe("b", "CT", 1), describe("c", "CT", 1, "lesion"), describe("d", "MR", 1)]
    (remark,) = make("fedcmt").remarks(clients)
    assert remark.startswith("c, d: no other client has this modality and task")
    assert make("fedcmt").remarks(clients[:2]) == make("fedcmt").remarks(clients[:1]) == []
    assert make("fedcmt", encoders="shared").remarks(clients) == []


def test_adaptors_and_the_servers_rule() -> None:
    ct, mr = describe("a", "CT", 1), describe("b", "MR", 1)
    for sharing, same in (("group", False), ("channels", True), ("none", False)):
        chosen = make("fedcmt", adaptors=sharing)
        assert (chosen.adaptor_key(ct) == chosen.adaptor_key(mr)) == same
    plain = make("fedcmt", server_learning_rate_end=0.5).server_optimizer(10, 10)
    assert (plain.lr, plain.beta, plain.optimizer) == (0.5, 0.0, "sgd")
    adam = make("fedcmt", optimizer="adam", server_momentum=0.9, beta2=0.95).server_optimizer(1, 10)
    other = make("fedopt", beta2=0.95).server_optimizer(1, 10)
    assert adam == other
    line = play(server_of("fedcmt", optimizer="yogi", encoders="clustered"), 1, ALL)
    assert line["server_learning_rate"] == 0.01
    assert line["step_norm"] > 0
