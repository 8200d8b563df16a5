"""The server's optimizer as settings: momentum, Adam, Yogi or Adagrad on the combined step."""

from __future__ import annotations

from pydantic import Field, model_validator

from fedcmt.ops import Optimizer
from fedcmt.strategies.base import ServerOptimizer, StepSettings
from fedcmt.strategies.schedule import cosine


class RuleSettings(StepSettings):
    """Settings of theta <- theta + lr m / (sqrt(v) + epsilon), or with sgd theta <- theta + lr m."""

    optimizer: Optimizer = Field("sgd", description="sgd with momentum, adam, yogi or adagrad")
    server_learning_rate: float | None = Field(  # type: ignore[assignment]
        None, gt=0, le=100, description="default: 1 for sgd, 0.01 for the others"
    )
    beta2: float = Field(0.99, ge=0, lt=1)
    epsilon: float = Field(1e-3, gt=0, le=1, description="tau, the degree of adaptivity")

    @model_validator(mode="after")
    def _second_moment_is_there(self) -> RuleSettings:
        useless = {"beta2", "epsilon"} & self.model_fields_set
        if self.optimizer == "sgd" and useless:
            raise ValueError(f"{min(useless)} has no use where optimizer is sgd")
        return self

    def rule(self, round_index: int, rounds: int) -> ServerOptimizer:
        """The optimizer in a round."""
        rate = self.server_learning_rate or (1.0 if self.optimizer == "sgd" else 0.01)
        return ServerOptimizer(
            lr=cosine(rate, self.server_learning_rate_end, round_index, rounds),
            beta=self.server_momentum,
            optimizer=self.optimizer,
            beta2=self.beta2,
            epsilon=self.epsilon,
            max_norm=self.server_max_norm,
        )
