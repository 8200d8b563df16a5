"""The documents name every setting and command there is."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from fedcmt import strategies
from fedcmt.config import (
    ClientConfig,
    DataConfig,
    FederationConfig,
    InferenceConfig,
    StrategyConfig,
    TopologyConfig,
    TrainingConfig,
    load_config,
)

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "model", [FederationConfig, ClientConfig, TopologyConfig, TrainingConfig, DataConfig, InferenceConfig]
)
def test_every_setting_is_documented(model: type[BaseModel]) -> None:
    text = (ROOT / "docs" / "config.md").read_text()
    missing = [name for name in model.model_fields if f"`{name}`" not in text and f"## {name}" not in text]
    assert not missing


def test_every_strategy_is_documented() -> None:
    for document in ("config.md", "strategies.md"):
        text = (ROOT / "docs" / document).read_text()
        assert [name for name in strategies.names() if f"`{name}`" not in text] == [], document


def test_every_setting_of_a_strategy_is_documented() -> None:
    text = (ROOT / "docs" / "strategies.md").read_text()
    for name in strategies.names():
        model = type(strategies.create(StrategyConfig(name=name))).settings_model
        missing = [key for key in model.model_fields if f"`{key}`" not in text and f"`{key}." not in text]
        assert not missing, name


def test_documented_defaults_are_the_real_ones() -> None:
    rows = [line.split("|") for line in (ROOT / "docs" / "config.md").read_text().splitlines() if line.count("|") == 4]
    documented = {row[1].strip().strip("`"): row[2].strip().strip("`") for row in rows}
    for model in (TopologyConfig, TrainingConfig, DataConfig, InferenceConfig):
        for name, field in model.model_fields.items():
            if field.default is not None:
                shown = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
                assert documented[name] in (shown, f"{field.default:.5f}" if field.default == 1e-5 else shown), name


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    config = load_config(path)
    assert strategies.create(config.strategy).name == config.strategy.name


def test_the_readmes_config_is_valid() -> None:
    import textwrap

    import yaml

    text = (ROOT / "README.md").read_text()
    block = text.split("docs/config.md](docs/config.md) has every setting:")[1].split("3. Check it")[0]
    assert len(load_config(yaml.safe_load(textwrap.dedent(block))).clients) == 3
