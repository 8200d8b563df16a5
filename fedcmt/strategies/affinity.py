"""Personal encoders, mixed by how alike clients are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedcmt import ops
from fedcmt.exchange import ClientDescription
from fedcmt.layout import FlatLayout
from fedcmt.settings import Settings
from fedcmt.strategies.base import Combination, RoundUpdates, ServerSettings, Strategy
from fedcmt.strategies.client_work import ClientSettings, ClientWork
from fedcmt.strategies.gram import cosines
from fedcmt.strategies.stages import stage_bounds

Affinity = Annotated[float, Field(ge=0, le=1)]
# Affinity to clients of the same task and modality, of the same task, of the same modality, and to others.
_KINDS = ("same_task_and_modality", "same_task", "same_modality", "other")
_PRESETS = {"spread": (1.0, 0.3, 0.1, 0.05), "clustered": (1.0, 0.0, 0.0, 0.0)}


class AffinitySettings(ServerSettings, ClientSettings):
    """Settings of affinity."""

    preset: Literal["spread", "clustered"] = Field("spread", description="defaults of the four affinities")
    same_task_and_modality: Affinity | None = None
    same_task: Affinity | None = None
    same_modality: Affinity | None = None
    other: Affinity | None = None
    similarity: Literal["metadata", "measured"] = Field(
        "metadata", description="the affinities above, or the updates' cosines instead"
    )
    sharpness: float = Field(1.0, gt=0, le=100, description="exponent of measured cosines")
    memory: float = Field(0.5, ge=0, lt=1, description="share of the past in the running mean of measured cosines")
    per_layer: bool = Field(False, description="weights of their own for each stage of the encoder")
    restore_norms: bool = Field(True, description="give mixed updates their mean length")
    by_cases: bool = Field(False, description="multiply weights by numbers of cases")

    @model_validator(mode="after")
    def _settings_of_the_chosen_similarity(self) -> AffinitySettings:
        other = {"measured": ("preset", *_KINDS), "metadata": ("sharpness", "memory")}[self.similarity]
        useless = [name for name in other if name in self.model_fields_set]
        if useless:
            raise ValueError(f"{useless[0]} has no use where similarity is {self.similarity}")
        return self

    def affinities(self) -> tuple[float, float, float, float]:
        """Of the preset, unless set."""
        own = [getattr(self, kind) for kind in _KINDS]
        chosen = [preset if value is None else value for value, preset in zip(own, _PRESETS[self.preset], strict=True)]
        return chosen[0], chosen[1], chosen[2], chosen[3]


class AffinityStrategy(Strategy):
    """phi_i <- sum_j W_ij phi_j + s_i D_i with D_i = sum_j W_ij Delta_j, one encoder phi_i a client.

    W is row-stochastic, from metadata or from measured cosines; s_i restores the updates' mean length,
    s_i = sum_j W_ij |Delta_j| / |D_i|, at most the square root of the number of updates mixed. The preset ``clustered``
    averages inside groups of equal task and modality. Where a client's update is missing, its encoder takes the others'
    all the same. Our own.
    """

    name: ClassVar[str] = "affinity"
    settings_model: ClassVar[type[Settings]] = AffinitySettings
    settings: AffinitySettings

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._measured: dict[str, Tensor] = {}  # "first/second" -> running mean of cosines, [S]

    def encoder_key(self, client: ClientDescription) -> str:
        """The client's own."""
        return client.name

    def segments(self, layout: FlatLayout) -> list[int] | None:
        """The encoder's stages."""
        return stage_bounds(layout) if self.settings.per_layer else None

    def weights(self, updates: RoundUpdates) -> Tensor:
        """Never asked for: there are weights for each encoder."""
        raise NotImplementedError("strategy 'affinity' has weights for each encoder; use combine")

    def combine(self, updates: RoundUpdates) -> Combination:
        """W for the encoders, and W over those whose updates count, norms restored, for the updates."""
        if self.settings.similarity == "measured":
            self._measure(updates)
        table = self._table(updates)  # [S, M, M]
        if self.settings.by_cases:
            table = table * torch.tensor([member.num_cases for member in updates.members], dtype=torch.float64)
        mixing = table / table.sum(-1, keepdim=True)
        names = [member.name for member in updates.members]
        present = table[..., [names.index(client.name) for client in updates.clients]]  # [S, M, N]
        totals = present.sum(-1, keepdim=True)
        weights = torch.where(totals > 0, present / totals, torch.zeros_like(present)).movedim(0, 1)  # [M, S, N]
        if self.settings.restore_norms:
            weights = restored(weights, updates.gram)
        mixing = mixing.movedim(0, 1)
        if updates.gram.dim() == 2:
            weights, mixing = weights[:, 0], mixing[:, 0]
        return Combination(weights, mixing)

    def _table(self, updates: RoundUpdates) -> Tensor:
        """Affinities of the members before normalisation, `[S, M, M]`; 1 to oneself."""
        parts = 1 if updates.gram.dim() == 2 else len(updates.gram)
        table = torch.zeros(parts, len(updates.members), len(updates.members), dtype=torch.float64)
        for i, one in enumerate(updates.members):
            for j, other in enumerate(updates.members):
                table[:, i, j] = 1.0 if i == j else self._affinity(one, other)
        return table

    def _affinity(self, one: ClientDescription, other: ClientDescription) -> Tensor | float:
        if self.settings.similarity == "measured":
            # Unmeasured pairs share nothing yet.
            cosine = self._measured.get(_pair(one.name, other.name))
            return 0.0 if cosine is None else cosine.clamp_min(0) ** self.settings.sharpness
        both, task, modality, others = self.settings.affinities()
        if one.same_task(other):
            return both if one.modality == other.modality else task
        return modality if one.modality == other.modality else others

    def _measure(self, updates: RoundUpdates) -> None:
        table = cosines(updates.gram).view(-1, len(updates.clients), len(updates.clients))
        for i, one in enumerate(updates.clients):
            for j in range(i + 1, len(updates.clients)):
                pair, now = _pair(one.name, updates.clients[j].name), table[:, i, j].clone()
                before = self._measured.get(pair)
                kept = self.settings.memory
                self._measured[pair] = now if before is None else kept * before + (1 - kept) * now

    @property
    def client_work(self) -> ClientWork:
        """What the settings ask for."""
        return self.settings.work()

    def state(self) -> dict[str, Tensor]:
        """Running means of the cosines."""
        return dict(self._measured)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue with them."""
        self._measured = {pair: cosine.cpu() for pair, cosine in state.items()}


def restored(weights: Tensor, gram: Tensor) -> Tensor:
    """Rows of weights `[M, S, N]` scaled to the updates' mean length, at most by the root of the number mixed."""
    grams = gram.view(-1, *gram.shape[-2:])
    result = weights.clone()
    for m in range(weights.shape[0]):
        for s in range(weights.shape[1]):
            limit = math.sqrt(int((weights[m, s] > 0).sum()))
            result[m, s] = ops.restore_norms(weights[m : m + 1, s], grams[s], limit=limit)[0]
    return result


def _pair(one: str, other: str) -> str:
    return "/".join(sorted((one, other)))
