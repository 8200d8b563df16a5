"""FedOpt: a server optimizer on the mean update (Reddi et al., ICLR 2021, arXiv 2003.00295, algorithm 2)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from fedcmt.config import Settings
from fedcmt.ops import Optimizer
from fedcmt.strategies.base import ServerOptimizer
from fedcmt.strategies.fedavg import AveragingSettings, FedAvg
from fedcmt.strategies.schedule import cosine


class FedOptSettings(AveragingSettings):
    """Settings of FedOpt."""

    optimizer: Optimizer = Field("adam", description="sgd (FedAvgM), adam, yogi or adagrad")
    server_learning_rate: float | None = Field(  # type: ignore[assignment]
        None, gt=0, le=100, description="default: 1 for sgd, 0.01 for the others"
    )
    server_momentum: float = Field(0.9, ge=0, lt=1, description="beta_1")
    beta2: float = Field(0.99, ge=0, lt=1)
    epsilon: float = Field(1e-3, gt=0, le=1, description="tau, the degree of adaptivity")

    @model_validator(mode="after")
    def _second_moment_is_there(self) -> FedOptSettings:
        useless = {"beta2", "epsilon"} & self.model_fields_set
        if self.optimizer == "sgd" and useless:
            raise ValueError(f"{min(useless)} has no use where optimizer is sgd")
        return self


class FedOpt(FedAvg):
    """theta <- theta + lr m / (sqrt(v) + tau), with m and v of the mean update; sgd: theta <- theta + lr m."""

    name: ClassVar[str] = "fedopt"
    settings_model: ClassVar[type[Settings]] = FedOptSettings
    settings: FedOptSettings

    def server_optimizer(self, round_index: int, rounds: int) -> ServerOptimizer:
        """The chosen optimizer."""
        settings = self.settings
        rate = settings.server_learning_rate or (1.0 if settings.optimizer == "sgd" else 0.01)
        return ServerOptimizer(
            lr=cosine(rate, settings.server_learning_rate_end, round_index, rounds),
            beta=settings.server_momentum,
            optimizer=settings.optimizer,
            beta2=settings.beta2,
            epsilon=settings.epsilon,
            max_norm=settings.server_max_norm,
        )
