"""Strategies' state, and clients that join, warm up and leave, on the server alone; then in the real loop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from phantoms import federation
from test_server import CONTRACT, clients, layout_digest

from fedcmt import federation as engine
from fedcmt import run_federation, strategies
from fedcmt.config import StrategyConfig, load_config
from fedcmt.errors import InputError, RunError
from fedcmt.exchange import ClientDescription, ClientUpdate, Membership
from fedcmt.files import read_tensors
from fedcmt.layout import FlatLayout
from fedcmt.network import build_network, parameters_of
from fedcmt.server import Server
from fedcmt.strategies.matching import part


def decoder_layout(heads: int) -> FlatLayout:
    network = build_network(CONTRACT.architecture("segmentation"), 1, heads)
    return FlatLayout.of(parameters_of(network, "decoder").items())


def described(**memberships: Membership) -> list[ClientDescription]:
    return [
        replace(
            client,
            membership=memberships.get(client.name, Membership()),
            target=f"{2 + i // 2} labels",
            decoder_layout=decoder_layout(2 + i // 2),
        )
        for i, client in enumerate(clients())
    ]


def server_of(strategy: str = "fedcmt", members: list[ClientDescription] | None = None, **settings: object) -> Server:
    chosen = strategies.create(StrategyConfig(name=strategy, **settings))
    return Server(chosen, CONTRACT, members or described(), seed=1, rounds=6, device=torch.device("cpu"))


def play(server: Server, round_index: int, names: list[str], *, frozen: list[str] | None = None) -> dict:
    """A round with made-up updates that depend on client and round alone."""
    server.begin(round_index)
    for name in names:
        out, description = server.outgoing(name), server._clients[name]
        generator = torch.Generator().manual_seed(round_index * 100 + sum(map(ord, name)))
        encoder = torch.randn(out.encoder.shape, generator=generator) * (0 if name in (frozen or []) else 1)
        adaptor = torch.randn(out.adaptor.shape, generator=generator)
        decoder = torch.randn(description.decoder_layout.size, generator=generator) if out.sends_decoder else None
        start = torch.zeros_like(decoder) if out.sends_decoder and out.decoder is None else None
        update = ClientUpdate(name, round_index, description.num_cases, encoder, adaptor, decoder, start)
        assert server.accept(update) is None
    return server.finish()


ALL = ["ct_a", "ct_b", "mr_a"]
VARIANTS = [
    *[{"name": name} for name in strategies.names() if name not in ("joint", "local")],
    {"name": "fedopt", "optimizer": "yogi"},
    {"name": "affinity", "similarity": "measured", "per_layer": True, "server_momentum": 0.5},
    {"name": "fedcmt", "encoders": "clustered", "server_momentum": 0.6, "server_max_norm": 1.0},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda s: "-".join(map(str, s.values())))
def test_a_restored_server_goes_on_bit_for_bit_whatever_order_updates_arrive_in(settings: dict, tmp_path: Path) -> None:
    running, other = (server_of(settings["name"], **{k: v for k, v in settings.items() if k != "name"}) for _ in "ab")
    for round_index, names in ((1, ALL), (2, ["ct_a", "mr_a"])):
        play(running, round_index, names)
    running.save(tmp_path / "state.safetensors")
    other.restore(tmp_path / "state.safetensors")
    lines = [play(server, 3, order) for server, order in ((running, ALL), (other, ALL[::-1]))]
    assert {k: v for k, v in lines[0].items() if k != "seconds"} == {
        k: v for k, v in lines[1].items() if k != "seconds"
    }
    saved = [server._shared.tensors() for server in (running, other)]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
    assert all(torch.isfinite(tensor).all() for tensor in saved[0].values())


def test_adaptors_of_other_channels_share_what_fits_under_asymfedavg() -> None:
    server = server_of("asymfedavg")
    play(server, 1, ALL)
    one, two = server.outgoing("ct_a").adaptor, server.outgoing("mr_a").adaptor
    assert one.numel() != two.numel()
    # Bias, scale and offset of 4 channels stand last, each in 16 elements; the convolutions before them differ.
    for start in (-48, -32, -16):
        assert torch.equal(one[start : start + 4], two[start : start + 4])
    assert not torch.equal(one[:100], two[:100])
    a, b, c = (server.outgoing(name).decoder for name in ALL)
    segments = {name: server._clients[name].decoder_layout.segments for name in ALL}
    for left, right in zip(segments["ct_a"], segments["mr_a"], strict=True):
        alike = left.shape == right.shape
        assert alike == ("seg_layers" not in left.name)
        assert torch.equal(part(a, left), part(b, left))
        assert not alike or torch.equal(part(a, left), part(c, right)), left.name


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_newcomer_begins_with_the_decoder_that_it_will_share(warmup: int) -> None:
    members = described(ct_b=Membership(2, warmup_rounds=warmup))
    server = server_of(members=members)
    play(server, 1, ["ct_a", "mr_a"])
    server.begin(2)
    common = server.outgoing("ct_a").decoder.clone()
    assert torch.equal(server.outgoing("ct_b").decoder, common)
    server.round_index = 1
    play(server, 2, ALL)
    own = server.outgoing("ct_b").decoder
    if warmup:  # it goes on from what it learned while it warmed up
        assert not torch.equal(own, server.outgoing("ct_a").decoder)
        play(server, 3, ALL)
        own = server.outgoing("ct_b").decoder
    assert not torch.equal(own, common)
    assert torch.equal(own, server.outgoing("ct_a").decoder)
    # Who misses a round finds the others' when it is back.
    play(server, 3 + warmup, ["ct_b", "mr_a"])
    assert not torch.equal(server.outgoing("ct_a").decoder, own)
    assert torch.equal(server.outgoing("ct_a").decoder, server.outgoing("ct_b").decoder)


def test_a_missing_decoder_is_refused_where_decoders_travel() -> None:
    server = server_of("asymfedavg")
    server.begin(1)
    out, size = server.outgoing("ct_a"), server._clients["ct_a"].decoder_layout.size
    update = ClientUpdate("ct_a", 1, 3, torch.zeros_like(out.encoder), torch.zeros_like(out.adaptor))
    assert "decoder update is missing" in server.accept(update)
    update = replace(update, decoder=torch.zeros(size))
    assert "decoder_start update is missing" in server.accept(update)
    assert server.accept(replace(update, decoder_start=torch.zeros(size))) is None


def test_a_decoder_that_nobody_shares_is_not_asked_for() -> None:
    server = server_of()
    server.begin(1)
    assert [server.outgoing(name).sends_decoder for name in ALL] == [True, True, False]
    out, size = server.outgoing("mr_a"), server._clients["mr_a"].decoder_layout.size
    update = ClientUpdate("mr_a", 1, 3, torch.zeros_like(out.encoder), torch.zeros_like(out.adaptor))
    assert server.accept(replace(update, decoder=torch.zeros(size))) == "decoder update was not asked for"
    assert server.accept(update) is None


def test_a_decoder_out_of_all_proportion_is_refused() -> None:
    chosen = strategies.create(StrategyConfig(name="fedcmt"))
    server = Server(chosen, CONTRACT, described(), seed=1, rounds=6, device=torch.device("cpu"), quarantine_ratio=1000)
    play(server, 1, ALL)
    server.begin(2)
    for name in ("ct_a", "ct_b"):
        out, scale = server.outgoing(name), 1e5 if name == "ct_b" else 1.0
        ones = [torch.ones_like(tensor) for tensor in (out.encoder, out.adaptor, out.decoder)]
        update = ClientUpdate(name, 2, 3, ones[0], ones[1], scale * ones[2])
        assert server.accept(update) is None
    before = server.outgoing("ct_b").decoder.clone()
    line = server.finish()
    assert "decoder update is 1e+05 times the others' median" in line["refused"]["ct_b"]
    assert torch.allclose(server.outgoing("ct_b").decoder, before + 1)


def test_a_warming_client_changes_no_encoder_and_its_groups_adaptor_only_if_it_is_new() -> None:
    members = described(ct_b=Membership(2, warmup_rounds=2), mr_a=Membership(2, warmup_rounds=1))
    server = server_of(members=members)
    server.begin(1)
    assert "takes no part in round 1" in server.accept(ClientUpdate("ct_b", 1, 1, torch.ones(3), torch.ones(3)))
    server = server_of(members=members)
    play(server, 1, ["ct_a"])
    ct, mr = server.outgoing("ct_b").adaptor.clone(), server.outgoing("mr_a").adaptor.clone()
    before = server.outgoing("ct_a").encoder.clone()
    server.begin(2)
    assert server.outgoing("ct_a").trained == ("adaptor", "encoder", "decoder")
    assert server.outgoing("ct_b").trained == ("decoder",)
    assert server.outgoing("mr_a").trained == ("adaptor", "decoder")
    server.round_index = 1
    line = play(server, 2, ["ct_b", "mr_a"], frozen=["ct_b", "mr_a"])
    assert line["clients"] == []
    assert line["warming_up"] == ["ct_b", "mr_a"]
    assert line["members"] == ALL
    assert torch.equal(server.outgoing("ct_a").encoder, before)
    assert torch.equal(server.outgoing("ct_b").adaptor, ct)
    assert not torch.equal(server.outgoing("mr_a").adaptor, mr)
    line = play(server, 3, ALL)
    assert line["clients"] == ["ct_a", "mr_a"]
    assert line["warming_up"] == ["ct_b"]
    assert play(server, 4, ALL)["clients"] == ALL


def test_who_has_left_is_no_member() -> None:
    server = server_of(members=described(ct_a=Membership(leaves_after_round=1)))
    play(server, 1, ALL)
    line = play(server, 2, ALL[1:])
    assert line["members"] == line["clients"] == ALL[1:]
    server.begin(3)
    with pytest.raises(RunError, match="no update was accepted"):
        server.finish()


def newcomer(modality: str, start: str) -> list[ClientDescription]:
    common = {"topology": CONTRACT.digest(), "encoder_layout": layout_digest(), "task": "segmentation", "num_cases": 2}
    late = Membership(2, starting_adaptor=start)
    new = ClientDescription(
        name="new", modality=modality, channels=1, decoder_layout=decoder_layout(2), membership=late, **common
    )
    return [*described(), new]


def test_a_newcomer_starts_from_its_groups_adaptor_the_nearest_or_a_fresh_one() -> None:
    for modality, start, expected in (("CT", "fresh", "ct_a"), ("PET", "nearest", "ct_a"), ("PET", "fresh", None)):
        server = server_of(members=newcomer(modality, start))
        fresh = server.outgoing("new").adaptor.clone()
        play(server, 1, ALL)
        server.begin(2)
        other = fresh if expected is None else server.outgoing(expected).adaptor
        assert torch.equal(server.outgoing("new").adaptor, other), (modality, start)


def test_a_newcomers_personal_encoder_starts_as_the_mean_of_the_others() -> None:
    server = server_of("affinity", members=newcomer("CT", "nearest"))
    play(server, 1, ALL)
    mean = torch.stack([server.outgoing(name).encoder for name in ALL]).mean(0)
    server.begin(2)
    assert torch.allclose(server.outgoing("new").encoder, mean, atol=1e-6)


def test_a_state_without_the_newcomer_is_taken(tmp_path: Path) -> None:
    for strategy in ("fedcmt", "affinity", "fedopt"):
        server = server_of(strategy)
        play(server, 1, ALL)
        server.save(tmp_path / "state.safetensors")
        larger = server_of(strategy, members=newcomer("PET", "nearest"))
        larger.restore(tmp_path / "state.safetensors")
        assert play(larger, 2, [*ALL, "new"])["clients"] == [*ALL, "new"]
    play(server := server_of(), 1, ALL)
    server.save(tmp_path / "state.safetensors")
    early = server_of(members=[replace(c, membership=Membership()) for c in newcomer("PET", "nearest")])
    with pytest.raises(InputError, match="one side only"):
        early.restore(tmp_path / "state.safetensors")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"joins_at_round": 3, "leaves_after_round": 2}, ["leaves_after_round", "found 2"]),
        ({"joins_at_round": 2}, ["every round", "none in round 1"]),
        ({"leaves_after_round": 1}, ["every round", "none in round 2"]),
        ({"warmup_rounds": -1}, ["warmup_rounds"]),
    ],
)
def test_impossible_memberships_are_refused(changes: dict, parts: list[str]) -> None:
    one = {"name": "alone", "dataset": 801, "modality": "CT", **changes}
    with pytest.raises(InputError) as caught:
        load_config({"name": "f", "rounds": 3, "clients": [one]})
    assert all(part in str(caught.value) for part in parts), str(caught.value)


class Cut(Exception):
    """Stands for a power cut between two rounds."""


def run_cut_after(round_index: int, settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = engine.commit

    def cut(workspace, server, *rest) -> None:
        commit(workspace, server, *rest)
        if server.round_index == round_index:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(engine, "commit", cut)
        with pytest.raises(Cut):
            run_federation(settings)


def lines_of(workspace: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workspace / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_joining_leaving_and_resuming_across_both(
    raw_datasets: Path, preprocessed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run as planned; one that is cut off, gets its newcomer only then, and ends the same."""
    planned = federation(raw_datasets, preprocessed, tmp_path / "planned", rounds=4)
    planned["training"] = {**planned["training"], "local_steps": 1, "learning_rate_schedule": "constant"}
    a, b, c = ({**client} for client in planned["clients"][:3])
    planned["clients"] = [{**a, "leaves_after_round": 2}, b, {**c, "joins_at_round": 3, "warmup_rounds": 1}]
    # A decoder that travels for the sake of a newcomer does so from the start only where the newcomer is planned.
    planned["strategy"] = {"name": "fedcmt", "decoders": "personal"}
    run_federation(planned)
    lines = lines_of(tmp_path / "planned")
    servers = {line["round"]: line for line in lines if line["kind"] == "server"}
    assert [servers[r]["members"] for r in (2, 3)] == [["ct_plain", "ct_regions"], ["ct_regions", "mr_two"]]
    assert servers[3]["clients"] == ["ct_regions"]
    assert servers[4]["clients"] == ["ct_regions", "mr_two"]
    late = [line for line in lines if line.get("client") == "mr_two"]
    assert [(line["round"], line["phase"], line["participated"]) for line in late] == [
        (3, "warm-up", False),
        (4, "training", True),
    ]
    assert late[0]["update_norm"] == 0
    assert [line["round"] for line in lines if line.get("client") == "ct_plain"] == [1, 2]

    changed = {**planned, "workspace": str(tmp_path / "changed"), "clients": [a, b]}
    run_cut_after(2, changed, monkeypatch)
    with pytest.raises(InputError, match="another 'clients'"):
        run_federation({**changed, "clients": [a, {**b, "local_steps": 2}]})
    with pytest.raises(InputError, match=r"client 'mr_two', field 'joins_at_round': round 2 is over.*round 3 or later"):
        run_federation({**changed, "clients": [a, b, {**c, "joins_at_round": 2}]})
    run_cut_after(3, {**changed, "clients": planned["clients"]}, monkeypatch)
    result = run_federation({**changed, "clients": planned["clients"]})
    assert lines_of(tmp_path / "changed") == lines
    for name in ("server/round-0004", "clients/mr_two/last", "clients/ct_plain/best"):
        files = [(tmp_path / which / f"{name}.safetensors").read_bytes() for which in ("planned", "changed")]
        assert files[0] == files[1], name
    assert [entry["client"] for entry in result.results["clients"]] == ["ct_plain", "ct_regions", "mr_two"]


def test_a_newcomer_costs_the_others_nothing(
    raw_datasets: Path, preprocessed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = federation(raw_datasets, preprocessed, tmp_path, rounds=8)
    settings["training"] = {**settings["training"], "local_steps": 20}
    settings["seed"] = 2  # with some seeds ct_regions misses one region altogether for all these rounds
    a, b, c = settings["clients"][:3]
    settings["clients"] = [a, b, {**c, "joins_at_round": 5, "warmup_rounds": 1}]
    for ending in ("_score", "_present"):
        monkeypatch.setattr(engine, ending, lambda *_: {})
    run_federation(settings)
    scores = {
        (line["client"], line["round"]): line["aggregated"]["score"]
        for line in lines_of(tmp_path)
        if "aggregated" in line
    }
    # From round 6 on the newcomer's updates count.
    for name in ("ct_plain", "ct_regions"):
        assert scores[name, 5] > 0.5
        assert min(scores[name, later] for later in (6, 7, 8)) > scores[name, 5] - 0.03, name


def test_a_client_that_never_came_has_no_model(raw_datasets: Path, preprocessed: Path, tmp_path: Path) -> None:
    settings = federation(raw_datasets, preprocessed, tmp_path / "run", rounds=1)
    one, other = settings["clients"][:2]
    settings["clients"] = [one, {**other, "joins_at_round": 5}]
    results = run_federation(settings).results
    assert [entry["client"] for entry in results["clients"]] == ["ct_plain"]
    assert not (tmp_path / "run" / "clients" / "ct_regions" / "best.safetensors").exists()


@pytest.mark.parametrize("strategy", strategies.names())
def test_every_strategy_runs_two_rounds(
    strategy: str, raw_datasets: Path, preprocessed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = federation(raw_datasets, preprocessed, tmp_path, strategy=strategy)
    settings["training"] = {**settings["training"], "local_steps": 1}
    settings["clients"] = [settings["clients"][i] for i in (0, 2)]
    for ending in ("_score", "_present"):  # predicting and reporting depend on no strategy
        monkeypatch.setattr(engine, ending, lambda *_: {})
    run_federation(settings)
    lines = lines_of(tmp_path)
    assert [line["round"] for line in lines if line["kind"] == "server"] == [1, 2]
    for line in (line for line in lines if line["kind"] == "client"):
        assert ("aggregated" in line) == (strategy not in ("joint", "local"))
        assert ("personal" in line) == (strategy == "ditto")
    models = [read_tensors(tmp_path / "clients" / n / "last.safetensors")[0] for n in ("ct_plain", "mr_two")]
    first = [model["encoder.stages.0.0.convs.0.conv.weight"] for model in models]
    personal = strategy in ("local", "ditto", "affinity", "fedcmt", "fedhca2")
    assert torch.equal(*first) != personal
    norms = [model["encoder.stages.0.0.convs.0.norm.weight"] for model in models]
    assert torch.equal(*norms) != (personal or strategy == "fedbn")
    transposed = [model["decoder.transpconvs.0.weight"] for model in models]
    assert torch.equal(*transposed) == (strategy in ("asymfedavg", "fedcmt", "joint"))
