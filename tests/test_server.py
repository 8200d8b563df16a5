"""The server's protocol: what it accepts, what it refuses, and the step it makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedcmt import strategies
from fedcmt.config import StrategyConfig, TopologyConfig
from fedcmt.errors import InputError, RunError
from fedcmt.exchange import ClientDescription, ClientUpdate
from fedcmt.layout import FlatLayout
from fedcmt.network import build_network, parameters_of
from fedcmt.plans import TopologyContract
from fedcmt.server import Server
from fedcmt.strategies.conflict_averse import cagrad_weights

CONTRACT = TopologyContract.of(TopologyConfig(features=[4, 8, 16], adaptor_width=4))


def layout_digest() -> str:
    network = build_network(CONTRACT.architecture("segmentation"), 1, 2)
    return FlatLayout.of(parameters_of(network, "encoder").items()).digest()


def clients() -> list[ClientDescription]:
    common = {"topology": CONTRACT.digest(), "encoder_layout": layout_digest(), "task": "segmentation"}
    return [
        ClientDescription(name="ct_a", modality="CT", channels=1, num_cases=3, **common),
        ClientDescription(name="ct_b", modality="CT", channels=1, num_cases=1, **common),
        ClientDescription(name="mr_a", modality="MR", channels=2, num_cases=4, **common),
    ]


def make_server(strategy: str = "fedcmt", **settings: float | str) -> Server:
    return Server(
        strategies.create(StrategyConfig(name=strategy, **settings)),
        CONTRACT,
        clients(),
        seed=1,
        rounds=10,
        device=torch.device("cpu"),
    )


def update_for(server: Server, client: str, seed: int, round_index: int = 1) -> ClientUpdate:
    outgoing = server.outgoing(client)
    generator = torch.Generator().manual_seed(seed)
    cases = {c.name: c.num_cases for c in clients()}[client]
    return ClientUpdate(
        client,
        round_index,
        cases,
        torch.randn(outgoing.encoder.shape, generator=generator),
        torch.randn(outgoing.adaptor.shape, generator=generator),
    )


def state(server: Server) -> dict[str, torch.Tensor]:
    sent = {client.name: server.outgoing(client.name) for client in clients()}
    return {
        f"{name}.{part}": getattr(out, part).clone() for name, out in sent.items() for part in ("encoder", "adaptor")
    }


def test_a_round_makes_the_conflict_averse_step_and_averages_adaptors_in_groups() -> None:
    server = make_server(conflict_aversion=0.3, encoders="shared", step_length="plain")
    before = state(server)
    server.begin(1)
    updates = {name: update_for(server, name, i) for i, name in enumerate(["mr_a", "ct_a", "ct_b"])}
    assert [server.accept(update) for update in updates.values()] == [None] * 3
    line = server.finish()
    deltas = torch.stack([updates[name].encoder for name in ("ct_a", "ct_b", "mr_a")]).double()
    weights = cagrad_weights(deltas @ deltas.T, torch.tensor([3, 1, 4]) / 8, 0.3)
    after = state(server)
    assert line["clients"] == ["ct_a", "ct_b", "mr_a"]
    assert torch.allclose(after["ct_a.encoder"], (before["ct_a.encoder"] + weights @ deltas).float(), atol=1e-5)
    ct = 0.75 * updates["ct_a"].adaptor + 0.25 * updates["ct_b"].adaptor
    assert torch.allclose(after["ct_b.adaptor"], before["ct_a.adaptor"] + ct, atol=1e-5)
    assert torch.allclose(after["mr_a.adaptor"], before["mr_a.adaptor"] + updates["mr_a"].adaptor, atol=1e-5)
    assert line["groups"] == {"CT-1": ["ct_a", "ct_b"], "MR-2": ["mr_a"]}
    assert line["step_norm"] == pytest.approx(float((weights @ deltas).norm()), rel=1e-4)


def test_updates_are_taken_to_the_servers_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they come over a network, to a server with a GPU. Here the device without memory stands for one of them."""
    full = ClientUpdate("ct_a", 1, 3, *(torch.zeros(size) for size in (2, 3, 4, 5)))
    moved = full.to(torch.device("meta"))
    parts = (moved.encoder, moved.adaptor, moved.decoder, moved.decoder_start)
    assert [(part.device.type, len(part)) for part in parts if part is not None] == [
        ("meta", 2), ("meta", 3), ("meta", 4), ("meta", 5)
    ]  # fmt: skip
    assert full.to(torch.device("cpu")).encoder is full.encoder
    assert ClientUpdate("ct_a", 1, 3, full.encoder, full.adaptor).to(torch.device("meta")).decoder is None

    server, sent = make_server(), []
    server.begin(1)
    update = update_for(server, "ct_a", 1)
    there = update.to(torch.device("meta"))

    def to(self: ClientUpdate, device: torch.device) -> ClientUpdate:
        sent.append(device)
        return update

    monkeypatch.setattr(ClientUpdate, "to", to)
    assert server.accept(there) is None
    assert sent == [torch.device("cpu")]


def test_the_order_of_arrival_changes_no_bit() -> None:
    results = []
    for order in (["ct_a", "ct_b", "mr_a"], ["mr_a", "ct_b", "ct_a"]):
        server = make_server(server_momentum=0.6)
        server.begin(1)
        for name in order:
            server.accept(update_for(server, name, len(name) + ord(name[-1])))
        server.finish()
        results.append(state(server))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_adaptors_of_all_groups_begin_alike_channel_by_channel() -> None:
    network = build_network(CONTRACT.architecture("segmentation"), 2, 2)
    layout = FlatLayout.of(parameters_of(network, "adaptor").items())
    one = FlatLayout.of(parameters_of(build_network(CONTRACT.architecture("segmentation"), 1, 2), "adaptor").items())
    server = make_server()
    ct, mr = server.outgoing("ct_a").adaptor, server.outgoing("mr_a").adaptor
    assert layout.segments[0].shape[:2] == (4, 2)
    for single, double in zip(one.segments, layout.segments, strict=True):
        first, both = single.view(ct), double.view(mr)
        if first.dim() > 1:
            torch.testing.assert_close(both[:, 0] * 2**0.5, first[:, 0])
            assert 0.5 < float(both[:, 1].std() / both[:, 0].std()) < 2
            assert abs(float(torch.corrcoef(torch.stack([both[:, 0].flatten(), both[:, 1].flatten()]))[0, 1])) < 0.5
        else:
            assert torch.equal(first, both)


def test_momentum_carries_over() -> None:
    server = make_server("fedavg", server_momentum=0.5, server_learning_rate=0.5)
    start = server.outgoing("ct_a").encoder.clone()
    delta = None
    for round_index in (1, 2):
        server.begin(round_index)
        update = update_for(server, "ct_a", 7, round_index)
        delta = update.encoder
        server.accept(update)
        server.finish()
    # m1 = d, m2 = 1.5 d; theta = start + 0.5 (d + 1.5 d)
    assert torch.allclose(server.outgoing("ct_a").encoder, start + 1.25 * delta, atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda u: replace(u, round_index=4), "round 4 in round 1"),
        (lambda u: replace(u, client="stranger"), "not a client"),
        (lambda u: replace(u, encoder=u.encoder[:-1]), "expected"),
        (lambda u: replace(u, encoder=u.encoder.double()), "float64"),
        (lambda u: replace(u, adaptor=u.adaptor[:3]), "adaptor"),
        (lambda u: replace(u, encoder=u.encoder.index_fill(0, torch.tensor([5]), float("nan"))), "not finite"),
        (lambda u: replace(u, adaptor=u.adaptor.index_fill(0, torch.tensor([0]), float("inf"))), "not finite"),
    ],
)
def test_unfit_updates_are_refused_by_name_and_change_nothing(spoil, reason: str) -> None:
    server = make_server()
    server.begin(1)
    before = state(server)
    assert reason in server.accept(spoil(update_for(server, "ct_a", 1)))
    server.accept(update_for(server, "mr_a", 2))
    line = server.finish()
    assert line["clients"] == ["mr_a"]
    assert any(reason in why for why in line["refused"].values())
    assert torch.equal(state(server)["ct_a.adaptor"], before["ct_a.adaptor"])


def test_a_second_update_is_counted_once() -> None:
    server = make_server("fedavg")
    server.begin(1)
    first = update_for(server, "ct_a", 1)
    assert server.accept(first) is None
    assert "second update" in server.accept(update_for(server, "ct_a", 2))
    before = server.outgoing("ct_a").encoder.clone()
    line = server.finish()
    assert torch.allclose(server.outgoing("ct_a").encoder, before + first.encoder, atol=1e-6)
    assert line["refused"] == {}


def test_a_round_without_updates_is_no_success() -> None:
    server = make_server()
    server.begin(1)
    server.accept(replace(update_for(server, "ct_a", 1), round_index=9))
    with pytest.raises(RunError, match="no update was accepted"):
        server.finish()


def test_rounds_come_in_order() -> None:
    with pytest.raises(ValueError, match="round should be 1"):
        make_server().begin(2)


def test_local_strategy_exchanges_the_start_only() -> None:
    server = make_server("local")
    server.begin(1)
    assert server.outgoing("ct_a") is not None
    server.accept(update_for(server, "ct_a", 1))
    before = state_of_encoder(server)
    line = server.finish()
    assert line["weights"] is None
    assert server.outgoing("ct_a") is None
    assert torch.equal(state_of_encoder(server), before)


def state_of_encoder(server: Server) -> torch.Tensor:
    return server._shared.encoder("ct_a").clone()


def test_another_topology_is_refused() -> None:
    odd = [replace(clients()[0], topology="0" * 64)]
    with pytest.raises(InputError, match="client 'ct_a', field 'topology'"):
        Server(strategies.create(StrategyConfig()), CONTRACT, odd, seed=1, rounds=1, device=torch.device("cpu"))


def test_saved_state_is_exact_and_foreign_state_is_refused(tmp_path: Path) -> None:
    server = make_server(server_momentum=0.6)
    for round_index in (1, 2):
        server.begin(round_index)
        server.accept(update_for(server, "ct_a", round_index, round_index))
        server.finish()
    server.save(tmp_path / "state.safetensors")
    other = make_server(server_momentum=0.6)
    other.restore(tmp_path / "state.safetensors")
    assert other.round_index == 2
    for running in (server, other):
        running.begin(3)
        running.accept(update_for(running, "mr_a", 3, 3))
        running.finish()
    assert all(torch.equal(state(server)[key], state(other)[key]) for key in state(server))
    contract = TopologyContract.of(TopologyConfig(features=[4, 8, 32], adaptor_width=4))
    foreign = Server(strategies.create(StrategyConfig()), contract, [], seed=1, rounds=1, device=torch.device("cpu"))
    with pytest.raises(InputError, match="another topology"):
        foreign.restore(tmp_path / "state.safetensors")
