"""How updates become the next shared parameters. One strategy a file, chosen by name."""

from __future__ import annotations

import difflib

from fedcmt.config import StrategyConfig
from fedcmt.errors import InputError
from fedcmt.settings import validated
from fedcmt.strategies.affinity import AffinityStrategy
from fedcmt.strategies.asymfedavg import AsymFedAvg
from fedcmt.strategies.base import Strategy
from fedcmt.strategies.cagrad import CAGrad
from fedcmt.strategies.conflict_free import ConFIG
from fedcmt.strategies.ditto import Ditto
from fedcmt.strategies.fedavg import FedAvg
from fedcmt.strategies.fedbn import FedBN
from fedcmt.strategies.fedcmt import FedCMT
from fedcmt.strategies.fedcmt_paper import FedCMTPaper
from fedcmt.strategies.fedhca2 import FedHCA2
from fedcmt.strategies.fedopt import FedOpt
from fedcmt.strategies.fedper import FedPer
from fedcmt.strategies.fedprox import FedProx
from fedcmt.strategies.joint import Joint
from fedcmt.strategies.local import Local
from fedcmt.strategies.mgda import MGDA
from fedcmt.strategies.pcgrad import PCGrad
from fedcmt.strategies.tuned_weights import TunedWeights
from fedcmt.strategies.upgrad import UPGrad

_ALL: tuple[type[Strategy], ...] = (
    AffinityStrategy,
    AsymFedAvg,
    CAGrad,
    ConFIG,
    Ditto,
    FedAvg,
    FedBN,
    FedCMT,
    FedCMTPaper,
    FedHCA2,
    FedOpt,
    FedPer,
    FedProx,
    Joint,
    Local,
    MGDA,
    PCGrad,
    TunedWeights,
    UPGrad,
)
_STRATEGIES: dict[str, type[Strategy]] = {strategy.name: strategy for strategy in _ALL}

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
