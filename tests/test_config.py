"""Settings: defaults, overrides, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fedcmt.config import FederationConfig, StrategyConfig, dump_config, load_config
from fedcmt.errors import InputError

CLIENT = {"name": "ct_a", "dataset": 901, "modality": "CT"}
FEDERATION = {"name": "study", "clients": [CLIENT]}


def test_defaults_are_the_documented_ones() -> None:
    config = load_config(FEDERATION)
    assert config.topology.adaptor_width == 32
    assert config.topology.norm == "instance"
    assert config.strategy.name == "fedcmt"
    assert config.training.optimizer == "adamw"
    assert config.workspace_folder() == Path("workspace/study")


def test_an_override_may_name_every_client_and_leaves_the_source_alone() -> None:
    data = {**FEDERATION, "clients": [{**CLIENT}, {**CLIENT, "name": "b"}]}
    found = load_config(data, ["clients.*.warmup_rounds=2", "clients.b.local_steps=3"])
    assert [(client.warmup_rounds, client.local_steps) for client in found.clients] == [(2, None), (2, 3)]
    assert load_config(data).clients[0].warmup_rounds == 0
    with pytest.raises(InputError, match="unknown key 'warm_up'"):
        load_config(data, ["clients.*.warm_up=2"])


def test_resolved_config_reads_back_equal() -> None:
    config = load_config({**FEDERATION, "strategy": {"name": "fedcmt", "conflict_aversion": 0.2}})
    assert load_config(yaml.safe_load(dump_config(config))) == config


def test_overrides_reach_every_level() -> None:
    config = load_config(
        {**FEDERATION, "strategy": "fedavg"},
        [
            "rounds=7",
            "training.learning_rate=0.1",
            "clients.ct_a.local_steps=3",
            "clients.0.fold=all",
            "strategy.server_momentum=0.5",
            "training.mixed_precision=off",
        ],
    )
    assert (config.rounds, config.training.learning_rate, config.training.mixed_precision) == (7, 0.1, "off")
    assert (config.clients[0].local_steps, config.clients[0].fold) == (3, "all")
    assert config.strategy == StrategyConfig(name="fedavg", server_momentum=0.5)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"rouds": 3}, ["'rouds'", "did you mean 'rounds'"]),
        ({"training": {"local_step": 3}}, ["training.local_step", "did you mean 'local_steps'"]),
        ({"clients": [{**CLIENT, "pach_size": [1, 1, 1]}]}, ["client 'ct_a'", "did you mean 'patch_size'"]),
        ({"rounds": -1}, ["rounds", "-1"]),
        ({"rounds": "many"}, ["rounds", "many"]),
        ({"clients": []}, ["clients"]),
        ({"clients": [CLIENT, {**CLIENT, "name": "CT_A"}]}, ["distinct names", "ct_a"]),
        ({"clients": [{**CLIENT, "name": "../x"}]}, ["../x", "letters"]),
        ({"clients": [{**CLIENT, "name": "a\0b"}]}, ["letters"]),
        ({"clients": [{**CLIENT, "name": "a" * 300}]}, ["1 to 64"]),
        ({"clients": [{**CLIENT, "patch_size": [16, 16]}]}, ["client 'ct_a'", "patch_size"]),
        ({"name": "a/b"}, ["name", "letters"]),
        ({"device": "tpu"}, ["device", "tpu"]),
        ({"topology": {"features": [8, 16, 32], "strides": [[1, 1, 1]]}}, ["strides", "3", "found 1"]),
        ({"topology": {"features": [8, 16, 32], "kernel_sizes": [[2, 3, 3]] * 3}}, ["kernel_sizes", "odd"]),
        ({"topology": {"features": [8, 16]}}, ["features"]),
        ({"topology": {"features": [8, 16, 32], "strides": [[2, 2, 2]] * 3}}, ["strides", "[1, 1, 1]"]),
        ({"topology": {"features": [8, 16, 10**9]}}, ["features", "4096"]),
        ({"training": {"learning_rate": float("inf")}}, ["learning_rate", "finite"]),
        ({"training": {"weight_decay": float("nan")}}, ["weight_decay"]),
        ({"clients": [{**CLIENT, "spacing": [0, 1, 1]}]}, ["client 'ct_a'", "spacing", "0.01"]),
        ({"clients": [{**CLIENT, "patch_size": [16, 16, 10**9]}]}, ["client 'ct_a'", "patch_size", "1024"]),
        ({"rounds": 10**30}, ["rounds", "1000000"]),
    ],
)
def test_a_mistake_is_one_line_with_the_field(change: dict, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_config({**FEDERATION, **change})
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("override", ["rounds", "=3", "clients.nobody.fold=1", "rounds.deep=1", "rounds=[", "name.x=1"])
def test_wrong_overrides_are_refused(override: str) -> None:
    with pytest.raises(InputError):
        load_config(FEDERATION, [override])


@pytest.mark.parametrize("text", ["[1, 2", "- a\n- b\n", "just words"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="config"):
        load_config(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        load_config(tmp_path / "none.yaml")


def test_raw_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FederationConfig.model_validate(FEDERATION)
    monkeypatch.delenv("nnUNet_raw", raising=False)
    with pytest.raises(InputError, match="nnUNet_raw"):
        config.folder("raw")
    monkeypatch.setenv("nnUNet_raw", "somewhere")
    assert config.folder("raw") == Path("somewhere")
