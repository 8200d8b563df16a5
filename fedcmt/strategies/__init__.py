"""How updates become the next shared parameters. One strategy a file, chosen by name."""

from __future__ import annotations

import difflib

from fedcmt.config import StrategyConfig, validated
from fedcmt.errors import InputError
from fedcmt.strategies.base import Strategy
from fedcmt.strategies.fedavg import FedAvg
from fedcmt.strategies.fedcmt import FedCMT
from fedcmt.strategies.local import Local

_STRATEGIES: dict[str, type[Strategy]] = {strategy.name: strategy for strategy in (FedAvg, FedCMT, Local)}

__all__ = ["Strategy", "create", "names"]


def names() -> list[str]:
    """The strategies there are."""
    return sorted(_STRATEGIES)


def create(config: StrategyConfig) -> Strategy:
    """Build a strategy from its name and settings.

    Raises:
        InputError: No such strategy, or a setting it does not know.
    """
    if config.name not in _STRATEGIES:
        close = difflib.get_close_matches(config.name, names(), n=1)
        raise InputError(
            f"unknown strategy '{config.name}'",
            field="strategy",
            fix=(f"did you mean '{close[0]}'? " if close else "") + f"use one of {', '.join(names())}",
        )
    strategy = _STRATEGIES[config.name]
    return strategy(validated(strategy.settings_model, config.settings(), "strategy"))
