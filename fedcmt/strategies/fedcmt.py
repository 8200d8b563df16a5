"""FedCMT: adaptors shared within modality groups, a conflict-averse step for the encoder."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedcmt.config import Settings
from fedcmt.exchange import ClientDescription
from fedcmt.strategies.base import SHARED, Combination, RoundUpdates, StepSettings, Strategy, by_cases
from fedcmt.strategies.client_work import ClientSettings, ClientWork
from fedcmt.strategies.conflict_averse import cagrad_weights
from fedcmt.strategies.gram import lengthened


class FedCMTSettings(StepSettings, ClientSettings):
    """Settings of FedCMT."""

    conflict_aversion: float = Field(
        0.4, ge=0, lt=1, description="c: how far, relative to the mean update, the step may leave it"
    )
    encoders: Literal["shared", "clustered"] = Field(
        "shared", description="one for all clients, or one for the clients of each task and modality"
    )


class FedCMT(Strategy):
    """theta <- theta + gamma O(d), d = CAGrad of the clients' updates, O the server's momentum.

    The method's overview figure adds the gradient of the updates' inner products to the averaged step; read literally
    that is extra averaging. Here the term is defined in update space, on the updates' Gram matrix. With clustered
    encoders each cluster makes a step of its own from its own updates.
    """

    name: ClassVar[str] = "fedcmt"
    settings_model: ClassVar[type[Settings]] = FedCMTSettings
    settings: FedCMTSettings

    def encoder_key(self, client: ClientDescription) -> str:
        """Everybody's, or that of the client's task and modality."""
        if self.settings.encoders == "shared":
            return SHARED
        return f"{client.modality} {client.task} {client.target}"

    def weights(self, updates: RoundUpdates) -> Tensor:
        """CAGrad's weights around the mean by numbers of cases."""
        return self._conflict_averse(updates.total_gram, updates.num_cases)

    def _conflict_averse(self, gram: Tensor, num_cases: Tensor) -> Tensor:
        weights = cagrad_weights(gram, by_cases(num_cases), self.settings.conflict_aversion)
        return lengthened(weights, gram, self.settings.step_length)

    def combine(self, updates: RoundUpdates) -> Combination:
        """A row of weights for each encoder, over the updates of those who share it."""
        rows = torch.zeros(len(updates.targets), len(updates.clients), dtype=torch.float64)
        keys = [self.encoder_key(client) for client in updates.clients]
        for row, target in zip(rows, updates.targets, strict=True):
            own = [i for i, key in enumerate(keys) if key == target]
            if own:
                row[own] = self._conflict_averse(updates.total_gram[own][:, own], updates.num_cases[own])
        return Combination(rows if len(rows) > 1 else rows[0])

    @property
    def client_work(self) -> ClientWork:
        """Distillation and adoption, where asked for."""
        return ClientWork(distillation=self.settings.distillation, adoption=self.settings.adoption)
