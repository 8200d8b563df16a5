"""What a strategy asks clients to do besides plain local training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from fedcmt.config import Settings

Adoption = Literal["always", "safeguard", "mixed"]


class DistillationSettings(Settings):
    """Learning from the received model; see :mod:`fedcmt.distillation`."""

    weight: float = Field(0.0, ge=0, le=100, description="lambda_0 of the coefficient; 0 is off")
    temperature: float = Field(2.0, gt=0, le=100)


class ClientSettings(Settings):
    """Settings of what clients do, for the strategies that offer them."""

    distillation: DistillationSettings = DistillationSettings()
    adoption: Adoption = Field(
        "always",
        description="of the server's model: always; only where its hold-out score is not below the client's own; or as "
        "the best mean of both",
    )


@dataclass(frozen=True)
class ClientWork:
    """What clients do.

    Attributes:
        proximal: mu of the term mu/2 |w - received|^2 over encoder and adaptor.
        personal: lambda of a personal model beside the shared one, drawn to it by lambda/2 |v - received|^2; None for
            no such model.
        personal_steps: Its steps a round; None for the client's local steps.
        distillation: Learning from the received model.
        adoption: When the server's model is taken.
        stays_local: Parameters whose names contain one of these never leave the client.
        sends_decoder: Whether the decoder travels.
    """

    proximal: float = 0.0
    personal: float | None = None
    personal_steps: int | None = None
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    adoption: Adoption = "always"
    stays_local: tuple[str, ...] = ()
    sends_decoder: bool = False
