"""FedHCA2: personal encoders and decoders with learned shares of the others' (CVPR 2024, arXiv 2311.13250)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedcmt.exchange import ClientDescription
from fedcmt.settings import Settings
from fedcmt.strategies.base import Combination, DecoderRound, RoundUpdates, ServerSettings, Strategy
from fedcmt.strategies.client_work import ClientWork
from fedcmt.strategies.conflict_averse import cagrad_weights
from fedcmt.strategies.matching import matches, part


class FedHCA2Settings(ServerSettings):
    """Settings of FedHCA2."""

    conflict_aversion: float = Field(0.4, ge=0, lt=1, description="c of CAGrad")
    encoder_share: float = Field(0.1, ge=0, le=1, description="alpha at the start")
    decoder_share: float = Field(0.1, ge=0, le=1, description="beta at the start")
    share_learning_rate: float = Field(0.01, ge=0, le=100, description="of alpha and beta")


class FedHCA2(Strategy):
    """theta_i <- theta_i + mean of Delta_j over clients like i + alpha_i U, U = CAGrad of all updates, unweighted.

    Alike means equal task and modality. Decoders travel: u_i <- u_i + Delta_i + beta_i A_i, A_i the cross-attention of
    i's update over those of all clients, tensor by tensor where name and shape agree; beta is one number a layer. Both
    are learned by the chain rule: the next round's update of the client is a descent direction of its loss at its new
    parameters, so alpha_i <- alpha_i + eta <Delta_i', U>, and beta likewise; they act cut to [0, 1].

    Differs from the paper in that adaptors are shared by modality and channels.
    """

    name: ClassVar[str] = "fedhca2"
    settings_model: ClassVar[type[Settings]] = FedHCA2Settings
    settings: FedHCA2Settings

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._shares: dict[str, Tensor] = {}  # "alpha/client" and "beta/client/layer" -> one number
        self._mixed: set[str] = set()  # clients whose encoders had a share of the last round's U
        self._attention: dict[str, Tensor] = {}  # client -> A of the last round, [D]

    def encoder_key(self, client: ClientDescription) -> str:
        """The client's own."""
        return client.name

    def weights(self, updates: RoundUpdates) -> Tensor:
        """Of U."""
        count = len(updates.clients)
        equal = torch.full((count,), 1 / count, dtype=torch.float64)
        return cagrad_weights(updates.total_gram, equal, self.settings.conflict_aversion)

    def combine(self, updates: RoundUpdates) -> Combination:
        """A row for each encoder: the mean over clients alike, and alpha_i times U."""
        common = self.weights(updates)
        rows = torch.zeros(len(updates.targets), len(updates.clients), dtype=torch.float64)
        for i, client in enumerate(updates.clients):
            key = f"alpha/{client.name}"
            if updates.along_kept is not None and client.name in self._mixed:
                self._learn(key, float(updates.along_kept[i]))
            alpha = self._share(key, self.settings.encoder_share)
            alike = torch.tensor([_alike(client, other) for other in updates.clients], dtype=torch.float64)
            rows[updates.targets.index(client.name)] = alike / alike.sum() + alpha * common
        self._mixed = {client.name for client in updates.clients}
        return Combination(rows if len(rows) > 1 else rows[0], kept=common)

    def _share(self, key: str, start: float) -> float:
        self._shares.setdefault(key, torch.tensor([start], dtype=torch.float64))
        return float(self._shares[key].clamp(0, 1))

    def _learn(self, key: str, gain: float) -> None:
        self._shares[key] = self._shares[key] + self.settings.share_learning_rate * gain

    def combine_decoders(self, decoders: DecoderRound) -> dict[str, Tensor]:
        """Each decoder and the attention of its update over the others'."""
        layouts, updates, result = decoders.layouts, decoders.updates, decoders.values
        attention = {name: torch.zeros_like(delta) for name, delta in updates.items()}
        gains: dict[str, float] = {}
        for (tensor, _), owners in matches(layouts).items():
            rows = torch.stack([part(updates[name], segment) for name, segment in owners]).double()  # [K, n]
            mixed = torch.softmax(rows @ rows.T / rows.shape[1] ** 0.5, dim=1) @ rows
            for (name, segment), row, mix in zip(owners, rows, mixed, strict=True):
                part(attention[name], segment).copy_(mix)
                key = f"beta/{name}/{tensor.rsplit('.', 1)[0]}"
                if name in self._attention:
                    gains[key] = gains.get(key, 0.0) + float(row @ part(self._attention[name], segment).double())
        for key, gain in gains.items():
            self._learn(key, gain)
        for name, layout in layouts.items():
            for segment in layout.segments:
                beta = self._share(f"beta/{name}/{segment.name.rsplit('.', 1)[0]}", self.settings.decoder_share)
                part(result[name], segment).add_(part(attention[name], segment), alpha=beta)
        self._attention = attention
        return result

    @property
    def client_work(self) -> ClientWork:
        """Decoders travel."""
        return ClientWork(sends_decoder=True)

    def state(self) -> dict[str, Tensor]:
        """Shares, who had one, and the last round's attention."""
        mixed = {f"mixed/{name}": torch.ones(1) for name in sorted(self._mixed)}
        return self._shares | mixed | {f"attention/{name}": value for name, value in self._attention.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue with them."""
        self._shares = {key: value.cpu() for key, value in state.items() if key.startswith(("alpha/", "beta/"))}
        self._mixed = {key.removeprefix("mixed/") for key in state if key.startswith("mixed/")}
        self._attention = {k.removeprefix("attention/"): v for k, v in state.items() if k.startswith("attention/")}


def _alike(one: ClientDescription, other: ClientDescription) -> bool:
    return one.modality == other.modality and one.same_task(other)
