"""FedCMT: what clients have in common they share, encoders by a conflict-averse step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedcmt import ops
from fedcmt.errors import InputError
from fedcmt.exchange import ClientDescription
from fedcmt.layout import FlatLayout
from fedcmt.settings import Settings
from fedcmt.strategies.base import (
    SHARED,
    AdaptorSharing,
    Combination,
    DecoderRound,
    RoundUpdates,
    ServerOptimizer,
    Strategy,
    adaptor_key,
    by_cases,
)
from fedcmt.strategies.client_work import ClientSettings, ClientWork
from fedcmt.strategies.conflict_averse import cagrad_weights
from fedcmt.strategies.gram import StepLength, lengthened
from fedcmt.strategies.server_rule import RuleSettings
from fedcmt.strategies.stages import stage_bounds


class FedCMTSettings(RuleSettings, ClientSettings):
    """Settings of FedCMT."""

    conflict_aversion: float = Field(
        0.4, ge=0, lt=1, description="c: how far, relative to the mean update, the step may leave it"
    )
    step_length: StepLength = Field("fedexp", description="as elsewhere, and of decoders; default: by FedExP's rule")
    encoders: Literal["shared", "clustered"] = Field(
        "clustered", description="one for the clients of each task and modality, or one for all"
    )
    shared_stages: int = Field(
        0, ge=0, le=16, description="of clustered encoders: first stages that all clients share nevertheless"
    )
    per_stage: bool = Field(False, description="a step of its own for each stage, from the Gram matrix of each")
    decoders: Literal["personal", "same_task"] = Field(
        "same_task",
        description="a round begins from the mean over clients of equal labels, or from the client's own",
    )
    adaptors: AdaptorSharing = Field(
        "group", description="who shares an adaptor: equal modality and channels, equal channels, or nobody"
    )

    @model_validator(mode="after")
    def _stages_are_shared_between_clusters(self) -> FedCMTSettings:
        if self.shared_stages and self.encoders == "shared":
            raise ValueError("shared_stages has no use where encoders is shared")
        return self


class FedCMT(Strategy):
    """theta_k <- theta_k + gamma O(d_k), d_k = CAGrad of the updates in cluster k, O the server's optimizer.

    A cluster is the clients of a task and modality; an adaptor belongs to a modality and number of channels, a decoder
    to a task and its labels.

    The method's overview figure adds the gradient of the updates' inner products to the averaged step; read literally
    that is extra averaging. Here the term is defined in update space, on the updates' Gram matrix. The first stages may
    be shared by all clusters, which start equal and make equal steps there. A cluster that comes later has no momentum
    yet in its shared stages.
    """

    name: ClassVar[str] = "fedcmt"
    settings_model: ClassVar[type[Settings]] = FedCMTSettings
    settings: FedCMTSettings

    def encoder_key(self, client: ClientDescription) -> str:
        """Everybody's, or that of the client's task and modality."""
        if self.settings.encoders == "shared":
            return SHARED
        return f"{client.modality} {client.task} {client.target}"

    def remarks(self, clients: Sequence[ClientDescription]) -> list[str]:
        """Who shares its encoder with nobody."""
        keys = [self.encoder_key(client) for client in clients]
        alone = [client.name for client, key in zip(clients, keys, strict=True) if keys.count(key) == 1]
        if not alone or len(clients) == 1:
            return []
        return [
            f"{', '.join(alone)}: no other client has this modality and task, the encoder is trained alone "
            "(strategy.encoders=shared gives all clients one)"
        ]

    def adaptor_key(self, client: ClientDescription) -> str:
        """By modality and channels, unless set otherwise."""
        return adaptor_key(client, self.settings.adaptors)

    def decoder_key(self, client: ClientDescription) -> str:
        """The client's own, or that of its task and labels, in its order of outputs."""
        if self.settings.decoders == "personal" or client.decoder_layout is None:
            return client.name
        return f"{client.task} {client.target} {client.outputs} {client.decoder_layout.digest()}"

    def sends_decoder(self, client: ClientDescription, clients: Sequence[ClientDescription]) -> bool:
        """Where another client shares it."""
        key = self.decoder_key(client)
        return any(other.name != client.name and self.decoder_key(other) == key for other in clients)

    def server_optimizer(self, round_index: int, rounds: int) -> ServerOptimizer:
        """Momentum, or the chosen rule."""
        return self.settings.rule(round_index, rounds)

    def segments(self, layout: FlatLayout) -> list[int] | None:
        """The stages; the shared and the clusters' own where stages make no steps of their own.

        Raises:
            InputError: All stages would be shared.
        """
        bounds, shared = stage_bounds(layout), self.settings.shared_stages
        if shared >= len(bounds) - 1:
            raise InputError(
                f"the encoder has {len(bounds) - 1} stages, found {shared} shared ones",
                field="strategy.shared_stages",
                fix="use fewer, or encoders: shared",
            )
        if self.settings.per_stage:
            return bounds
        return [0, bounds[shared], layout.size] if shared else None

    def weights(self, updates: RoundUpdates) -> Tensor:
        """CAGrad's weights around the mean by numbers of cases."""
        return self._conflict_averse(updates.total_gram, updates.num_cases)

    def _conflict_averse(self, gram: Tensor, num_cases: Tensor) -> Tensor:
        weights = cagrad_weights(gram, by_cases(num_cases), self.settings.conflict_aversion)
        return lengthened(weights, gram, self.settings.step_length)

    def combine(self, updates: RoundUpdates) -> Combination:
        """Rows of weights for each encoder and segment, over the updates of those who share it."""
        grams = updates.gram.view(-1, *updates.gram.shape[-2:])
        rows = torch.zeros(len(updates.targets), len(grams), len(updates.clients), dtype=torch.float64)
        keys = [self.encoder_key(client) for client in updates.clients]
        for segment, gram in enumerate(grams):
            # Without stages of their own the shared ones are the first segment.
            shared = segment < (self.settings.shared_stages if self.settings.per_stage else len(grams) - 1)
            for row, target in zip(rows, updates.targets, strict=True):
                own = [i for i, key in enumerate(keys) if shared or key == target]
                if own:
                    row[segment, own] = self._conflict_averse(gram[own][:, own], updates.num_cases[own])
        if updates.gram.dim() == 3:
            return Combination(rows)
        return Combination(rows[:, 0] if len(rows) > 1 else rows[0, 0])

    @property
    def client_work(self) -> ClientWork:
        """What the settings ask for."""
        return replace(self.settings.work(), sends_decoder=self.settings.decoders == "same_task")

    def combine_decoders(self, decoders: DecoderRound) -> dict[str, Tensor]:
        """One for clients of equal task and labels: their mean, by cases, the step to it as long as an encoder's."""
        combined: dict[str, Tensor] = {}
        for client in decoders.clients:
            if client.name not in combined:
                key = self.decoder_key(client)
                alike = [other for other in decoders.clients if self.decoder_key(other) == key]
                common = self._common_decoder(alike, decoders)
                combined |= {other.name: common.clone() for other in alike}
        return combined

    def _common_decoder(self, clients: Sequence[ClientDescription], decoders: DecoderRound) -> Tensor:
        weights = by_cases(torch.tensor([client.num_cases for client in clients]))
        common = ops.weighted_mean([decoders.starts[client.name] for client in clients], weights)
        assert isinstance(common, Tensor)
        updates = [decoders.updates[client.name] for client in clients]
        ops.server_step(
            common, None, updates, lengthened(weights, ops.gramian(updates).cpu(), self.settings.step_length), lr=1.0
        )
        return common
