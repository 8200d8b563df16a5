"""Joint training: who shares what, that pooling equals one client with all the data, resuming, and who refuses it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from phantoms import federation
from test_membership import CONTRACT, described, lines_of, run_cut_after
from torch import Tensor

from fedcmt import federation as engine
from fedcmt import joint, run_federation, strategies
from fedcmt.client import Client
from fedcmt.config import StrategyConfig, load_config
from fedcmt.data import patches
from fedcmt.errors import InputError
from fedcmt.federation import prepare_clients
from fedcmt.files import read_tensors
from fedcmt.plans import ClientPlan
from fedcmt.seeding import sample_generator
from fedcmt.server import Server

BATCH_SIZE = 2  # of every client here


def settings_of(raw: Path, preprocessed: Path, workspace: Path, datasets: list[int], **changes: object) -> dict:
    settings = federation(raw, preprocessed, workspace, strategy="joint", **changes)
    by_number = {client["dataset"]: client for client in settings["clients"]}
    settings["clients"] = [{**by_number[number], "name": f"site_{i}"} for i, number in enumerate(datasets)]
    return settings


def last_of(workspace: Path, client: str) -> dict[str, Tensor]:
    return read_tensors(workspace / "clients" / client / "last.safetensors")[0]


@pytest.fixture
def without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    for ending in ("_score", "_present"):
        monkeypatch.setattr(engine, ending, lambda *_: {})


@pytest.fixture(scope="module")
def pooled(raw_datasets: Path, preprocessed: Path) -> list[Client]:
    """Two plain CT clients, one with regions, one MR segmentation and one MR classification."""
    config = load_config(settings_of(raw_datasets, preprocessed, Path("none"), [801, 801, 802, 803, 804]))
    plans = prepare_clients(config)
    clients = [Client(c, config, plans[c.name], None, torch.device("cpu")) for c in config.clients]
    joint.pool(clients)
    return clients


def owners(clients: list[Client], prefix: str) -> list[int]:
    """For each client the index of the first one that holds the same tensors of a part."""
    held = [
        [p.data_ptr() for name, p in client.trainer.network.named_parameters() if name.startswith(prefix)]
        for client in clients
    ]
    return [held.index(pointers) for pointers in held]


def test_tensors_are_really_shared(pooled: list[Client]) -> None:
    assert owners(pooled, "encoder.") == [0, 0, 0, 0, 0]
    assert owners(pooled, "adaptor.") == [0, 0, 0, 3, 4]
    assert owners(pooled, "decoder.") == [0, 0, 2, 0, 4]  # the same organs, in CT and in MR
    assert len({client.trainer.encoder.data_ptr() for client in pooled}) == 1
    pooled[4].trainer.encoder.fill_(0.25)
    assert all(bool((p == 0.25).all()) for n, p in pooled[1].trainer.network.named_parameters() if n[:8] == "encoder.")
    # Modules that stand in two places of the network compute with the shared parameters in both.
    assert all(
        bool((value == 0.25).all()) for key, value in pooled[1].trainer.network.state_dict().items()
        if key.startswith("encoder.")
    )  # fmt: skip


def test_one_optimizer_steps_every_tensor_once(pooled: list[Client]) -> None:
    assert len({id(client.trainer.optimizer) for client in pooled}) == 1
    held = [id(p) for group in pooled[0].trainer.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for client in pooled for p in client.trainer.network.parameters()}


def job(client: Client, **dataset: object) -> tuple:
    plan = client.plan
    changed = ClientPlan(**{**vars(plan), "dataset": replace(plan.dataset, **dataset)})
    double = Client.__new__(Client)
    double.__dict__ = {**vars(client), "plan": changed}
    return joint._job(double)


def test_outputs_that_mean_something_else_share_no_decoder(pooled: list[Client]) -> None:
    same = job(pooled[0], labels={"organ": 1, "background": 0, "lesion": 2, "ignore": 3})
    assert same == joint._job(pooled[0])
    assert job(pooled[0], labels={"background": 0, "organ": 2, "lesion": 1}) != same
    assert job(pooled[4], class_names=("tumour", "healthy")) != joint._job(pooled[4])
    regions = {"background": 0, "organ": (1, 2), "lesion": (2,)}
    assert job(pooled[2], labels=regions)[-1] == (1, 0)  # regions are outputs in the order in which they stand
    assert job(pooled[2], labels={"background": 0, "lesion": (2,), "organ": (1, 2)})[-1] == (0, 1)


def draws_of_either(
    run: str, seed: int, *, client: str, purpose: str, round_index: int, index: int
) -> np.random.Generator:
    """The same for both clients of two; one client alone sees them in the order in which two take turns."""
    if run == "one" and purpose == "training patches":
        turns = joint.order([2, 2], seed, round_index)
        batch, place = divmod(index, BATCH_SIZE)
        index = turns[:batch].count(turns[batch]) * BATCH_SIZE + place
    return sample_generator(seed, client="either", purpose=purpose, round_index=round_index, index=index)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kept", ["keep", "reset"])
def test_two_clients_with_the_same_data_are_one_with_twice_the_steps(
    optimizer: str, kept: str, raw_datasets: Path, preprocessed: Path, tmp_path: Path, without_reports: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, datasets, steps in (("one", [801], 4), ("two", [801, 801], 2)):
        monkeypatch.setattr(patches, "sample_generator", partial(draws_of_either, name))
        settings = settings_of(raw_datasets, preprocessed, tmp_path / name, datasets)
        settings["training"] = {
            **settings["training"], "local_steps": steps, "optimizer": optimizer, "optimizer_state": kept
        }  # fmt: skip
        run_federation(settings)
    one, two, other = last_of(tmp_path / "one", "site_0"), *(last_of(tmp_path / "two", f"site_{i}") for i in (0, 1))
    assert all(torch.equal(one[key], two[key]) and torch.equal(one[key], other[key]) for key in one)
    start = one["encoder.stages.0.0.convs.0.conv.weight"]
    assert float(start.abs().max()) > 0
    clients = [line for line in lines_of(tmp_path / "two") if line["kind"] == "client"]
    assert {line["local_steps"] for line in clients} == {2}
    assert all("aggregated" not in line and line["update_norm"] > 0 for line in clients)


def test_it_goes_on_bit_for_bit(
    raw_datasets: Path, preprocessed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = [801, 804, 801]
    whole = run_federation(settings_of(raw_datasets, preprocessed, tmp_path / "whole", datasets))
    assert [entry["client"] for entry in whole.results["clients"]] == ["site_0", "site_1", "site_2"]
    assert whole.results["strategy"] == "joint"
    again = settings_of(raw_datasets, preprocessed, tmp_path / "cut", datasets)
    run_cut_after(1, again, monkeypatch)
    run_federation(again)
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "cut")
    for client in ("site_0", "site_1"):
        files = [tmp_path / run / "clients" / client / "last.safetensors" for run in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes()
    first, other, same = (last_of(tmp_path / "whole", f"site_{i}") for i in range(3))
    assert all(torch.equal(first[key], same[key]) for key in first)
    shared = [key for key in first if key.startswith("encoder.")]
    assert shared
    assert all(torch.equal(first[key], other[key]) for key in shared)


def test_visits_are_spread_evenly_over_a_round() -> None:
    found = joint.order([4, 8, 2], seed=1, round_index=3)
    assert [found.count(i) for i in range(3)] == [4, 8, 2]
    for part in (found[:7], found[7:]):
        assert all(abs(part.count(i) - half) <= 1 for i, half in enumerate((2, 4, 1)))
    assert found != joint.order([4, 8, 2], seed=1, round_index=4)
    assert {tuple(joint.order([1, 1], seed=s, round_index=1)) for s in range(20)} == {(0, 1), (1, 0)}


def test_other_engines_refuse_it() -> None:
    strategy = strategies.create(StrategyConfig(name="joint"))
    with pytest.raises(InputError, match="pools all clients' data"):
        Server(strategy, CONTRACT, described(), seed=1, rounds=2, device=torch.device("cpu"))


def test_nobody_joins_later(raw_datasets: Path, preprocessed: Path, tmp_path: Path) -> None:
    settings = settings_of(raw_datasets, preprocessed, tmp_path / "run", [801, 802])
    settings["clients"][1]["joins_at_round"] = 2
    with pytest.raises(InputError, match=r"client 'site_1', field 'joins_at_round'.*from the first round"):
        run_federation(settings)
    assert not (tmp_path / "run").exists()
