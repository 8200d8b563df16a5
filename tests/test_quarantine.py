"""Updates out of all proportion are set aside; large and small ones in proportion are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_server import CONTRACT, clients, state, update_for

from fedcmt import strategies
from fedcmt.config import StrategyConfig
from fedcmt.errors import RunError
from fedcmt.server import Server


def make_server(strategy: str = "fedcmt", ratio: float | None = 1000) -> Server:
    return Server(
        strategies.create(StrategyConfig(name=strategy)),
        CONTRACT,
        clients(),
        seed=1,
        rounds=10,
        device=torch.device("cpu"),
        quarantine_ratio=ratio,
    )


def scaled(server: Server, client: str, encoder: float = 1.0, adaptor: float = 1.0, round_index: int = 1):
    update = update_for(server, client, ord(client[-1]), round_index)
    return replace(update, encoder=update.encoder * encoder, adaptor=update.adaptor * adaptor)


@pytest.mark.parametrize("strategy", ["fedcmt", "fedavg", "affinity", "fedhca2"])
@pytest.mark.parametrize("part", ["encoder", "adaptor"])
def test_an_outsized_update_changes_no_bit(strategy: str, part: str) -> None:
    with_it, without = make_server(strategy), make_server(strategy)
    for server in (with_it, without):
        server.begin(1)
        for name in ("ct_a", "mr_a"):
            server.accept(scaled(server, name, 1.0))
    assert with_it.accept(scaled(with_it, "ct_b", **{part: 1e6})) is None
    lines = [server.finish() for server in (with_it, without)]
    assert lines[0]["clients"] == ["ct_a", "mr_a"]
    assert lines[0]["refused"]["ct_b"].startswith(f"{part} update is ")
    assert "times the others' median" in lines[0]["refused"]["ct_b"]
    after = [state(server) for server in (with_it, without)]
    assert all(torch.equal(after[0][key], after[1][key]) for key in after[0])


def test_updates_in_proportion_are_used() -> None:
    server = make_server()
    server.begin(1)
    for name, factor in (("ct_a", 1.0), ("ct_b", 300.0), ("mr_a", 0.5)):
        server.accept(scaled(server, name, factor))
    assert server.finish()["refused"] == {}


def test_no_limit_where_none_is_set() -> None:
    server = make_server(ratio=None)
    server.begin(1)
    for name, factor in (("ct_a", 1.0), ("ct_b", 1e6)):
        server.accept(scaled(server, name, factor))
    assert server.finish()["refused"] == {}


def test_a_client_alone_is_compared_with_the_round_before(tmp_path: Path) -> None:
    server = make_server()
    server.begin(1)
    server.accept(scaled(server, "ct_a", 1.0))
    server.finish()
    server.save(tmp_path / "state.safetensors")
    resumed = make_server()
    resumed.restore(tmp_path / "state.safetensors")
    for one in (server, resumed):
        one.begin(2)
        one.accept(scaled(one, "mr_a", 1e6, round_index=2))
        with pytest.raises(RunError, match="mr_a: encoder update is"):
            one.finish()


def test_zero_updates_are_no_measure() -> None:
    server = make_server()
    server.begin(1)
    server.accept(scaled(server, "ct_a", 0.0))
    server.accept(scaled(server, "ct_b", 1.0))
    assert server.finish()["refused"] == {}


def test_bfloat16_updates_are_taken() -> None:
    server = make_server()
    server.begin(1)
    for name in ("ct_a", "ct_b"):
        update = scaled(server, name, 1.0)
        assert server.accept(replace(update, encoder=update.encoder.bfloat16())) is None
    assert "bfloat16" in str(server.accept(scaled(server, "mr_a", 1.0)))  # those of a round are of one type
    assert server.finish()["clients"] == ["ct_a", "ct_b"]
