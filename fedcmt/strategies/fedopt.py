"""FedOpt: a server optimizer on the mean update (Reddi et al., ICLR 2021, arXiv 2003.00295, algorithm 2)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedcmt.ops import Optimizer
from fedcmt.settings import Settings
from fedcmt.strategies.base import ServerOptimizer
from fedcmt.strategies.fedavg import AveragingSettings, FedAvg
from fedcmt.strategies.server_rule import RuleSettings


class FedOptSettings(RuleSettings, AveragingSettings):
    """Settings of FedOpt."""

    optimizer: Optimizer = Field("adam", description="sgd (FedAvgM), adam, yogi or adagrad")
    server_momentum: float = Field(0.9, ge=0, lt=1, description="beta_1")


class FedOpt(FedAvg):
    """theta <- theta + lr m / (sqrt(v) + tau), with m and v of the mean update; sgd: theta <- theta + lr m."""

    name: ClassVar[str] = "fedopt"
    settings_model: ClassVar[type[Settings]] = FedOptSettings
    settings: FedOptSettings

    def server_optimizer(self, round_index: int, rounds: int) -> ServerOptimizer:
        """The chosen optimizer."""
        return self.settings.rule(round_index, rounds)
