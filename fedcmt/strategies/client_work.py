"""What a strategy asks clients to do besides plain local training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field, model_validator

from fedcmt.settings import Count, Settings

Adoption = Literal["always", "safeguard", "mixed", "learned"]


class DistillationSettings(Settings):
    """Learning from the received model; see :mod:`fedcmt.distillation`."""

    weight: float = Field(0.0, ge=0, le=100, description="lambda_0 of the coefficient; 0 is off")
    temperature: float = Field(2.0, gt=0, le=100)


class ClientSettings(Settings):
    """Settings of what clients do, for the strategies that offer them."""

    distillation: DistillationSettings = DistillationSettings()
    adoption: Adoption = Field(
        "always",
        description="of the server's model: always; only where its hold-out score is not below the client's own; as "
        "the best mean of both; or as a mean whose share is learned over the rounds",
    )
    personal: float | None = Field(
        None, ge=0, le=1000, description="lambda of a personal model beside, lambda/2 |v - received|^2; default: none"
    )
    personal_steps: Count | None = Field(None, description="of the personal model a round; default: the local steps")
    decoder_steps: int = Field(
        0, ge=0, le=1_000_000, description="first local steps of a round, which train the decoder on what was received"
    )
    normalisation: Literal["shared", "local"] = Field("shared", description="its scales and offsets")

    @model_validator(mode="after")
    def _one_model_to_end_with(self) -> ClientSettings:
        if self.personal is None and self.personal_steps is not None:
            raise ValueError("personal_steps has no use without personal")
        if self.personal is not None and self.adoption != "always":
            raise ValueError("adoption should be always with a personal model, which is the one that the client uses")
        return self

    def work(self) -> ClientWork:
        """What they ask for."""
        return ClientWork(
            personal=self.personal,
            personal_steps=self.personal_steps,
            distillation=self.distillation,
            adoption=self.adoption,
            stays_local=NORMALISATION if self.normalisation == "local" else (),
            decoder_steps=self.decoder_steps,
        )


NORMALISATION = (".norm.",)  # names of its parameters


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
        decoder_steps: First local steps of a round, which change the decoder alone.
    """

    proximal: float = 0.0
    personal: float | None = None
    personal_steps: int | None = None
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    adoption: Adoption = "always"
    stays_local: tuple[str, ...] = ()
    sends_decoder: bool = False
    decoder_steps: int = 0
