"""What every strategy states. The server does the rest: Gram matrix, fused step, adaptors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedcmt.exchange import ClientDescription
from fedcmt.layout import FlatLayout
from fedcmt.ops import Optimizer
from fedcmt.settings import Settings
from fedcmt.strategies.client_work import ClientWork
from fedcmt.strategies.gram import StepLength, lengthened
from fedcmt.strategies.schedule import cosine

SHARED = "shared"  # the key of the one encoder that all clients share


class ServerSettings(Settings):
    """Settings of the server's step, theta <- theta + lr m with m <- beta m + d."""

    server_learning_rate: float = Field(1.0, gt=0, le=100)
    server_learning_rate_end: float | None = Field(
        None, gt=0, le=100, description="in the last round, along a cosine; default: constant"
    )
    server_momentum: float = Field(0.0, ge=0, lt=1)
    server_max_norm: float | None = Field(None, gt=0, description="largest Euclidean norm of d; default: none")


class StepSettings(ServerSettings):
    """Settings of a step with one vector of weights."""

    step_length: StepLength = Field(
        "plain",
        description="of d: plain; restored to the updates' mean length; or by FedExP's rule, never shorter than plain",
    )


@dataclass(frozen=True)
class ServerOptimizer:
    """The server's optimizer in one round: the arguments of :func:`fedcmt.ops.server_step` of the same names."""

    lr: float = 1.0
    beta: float = 0.0
    optimizer: Optimizer = "sgd"
    beta2: float = 0.99
    epsilon: float = 1e-3
    max_norm: float | None = None

    @property
    def has_second_moment(self) -> bool:
        """Whether it keeps a second moment."""
        return self.optimizer != "sgd"


@dataclass(frozen=True)
class RoundUpdates:
    """What is known when a round's updates are combined.

    Attributes:
        seed: The federation's.
        round_index: 1 for the first.
        clients: Those whose updates count, N, in the order of their names.
        members: All clients of the federation in this round, in the order of their names.
        targets: Keys of the members' encoders, M, in order.
        gram: Inner products of the updates, float64  # [N, N] or, for a strategy with segments, [S, N, N]
        along_kept: Inner products with the direction kept in the round before, float64  # [N]
    """

    seed: int
    round_index: int
    clients: tuple[ClientDescription, ...]
    members: tuple[ClientDescription, ...]
    targets: tuple[str, ...]
    gram: Tensor
    along_kept: Tensor | None = None

    @property
    def num_cases(self) -> Tensor:
        """Training cases of each client, `[N]`."""
        return torch.tensor([client.num_cases for client in self.clients])

    @property
    def total_gram(self) -> Tensor:
        """Over all segments, `[N, N]`."""
        return self.gram.sum(0) if self.gram.dim() == 3 else self.gram


@dataclass(frozen=True)
class Combination:
    """How updates become the next encoders.

    Attributes:
        weights: Factors of the updates in each encoder's step d  # [N] for one encoder; [M, N]; with segments [M, S, N]
        mixing: Each encoder first becomes this mean of all encoders; rows sum to 1  # [M, M] or [M, S, M]
        kept: Factors of the updates in a direction whose inner products are wanted next round  # [N]
    """

    weights: Tensor
    mixing: Tensor | None = None
    kept: Tensor | None = None


@dataclass(frozen=True)
class DecoderRound:
    """Decoders of a round, where they travel.

    Attributes:
        clients: Those whose decoders count, in the order of their names.
        starts: Where they began  # name -> [D]
        updates: What local training changed  # name -> [D]
    """

    clients: tuple[ClientDescription, ...]
    starts: Mapping[str, Tensor]
    updates: Mapping[str, Tensor]

    @property
    def values(self) -> dict[str, Tensor]:
        """After local training, name -> `[D]`."""
        return {name: start + self.updates[name] for name, start in self.starts.items()}

    @property
    def layouts(self) -> dict[str, FlatLayout]:
        """Of the decoders, by client."""
        return {c.name: c.decoder_layout for c in self.clients if c.decoder_layout is not None}


class Strategy(ABC):
    """How updates become encoders, who shares an adaptor, and what clients do besides."""

    name: ClassVar[str]
    settings_model: ClassVar[type[Settings]]
    federated: ClassVar[bool] = True  # False: nothing is exchanged after the common start
    pooled: ClassVar[bool] = False  # all clients' data train one model, which only a single process can do
    matches_adaptors: ClassVar[bool] = False  # average adaptors' tensors of equal name and shape across keys too

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def server_optimizer(self, round_index: int, rounds: int) -> ServerOptimizer:
        """The server's optimizer in a round.

        Args:
            round_index: 1 for the first.
            rounds: Of the whole federation.
        """
        if not isinstance(self.settings, ServerSettings):
            return ServerOptimizer()
        settings = self.settings
        rate = cosine(settings.server_learning_rate, settings.server_learning_rate_end, round_index, rounds)
        return ServerOptimizer(lr=rate, beta=settings.server_momentum, max_norm=settings.server_max_norm)

    @abstractmethod
    def weights(self, updates: RoundUpdates) -> Tensor:
        """Factors of the updates in the combined encoder step d = sum_i weights_i Delta_i, `[N]` float64."""

    def combine(self, updates: RoundUpdates) -> Combination:
        """How the updates become the next encoders; one encoder from :meth:`weights` unless a strategy says more."""
        rule: StepLength = self.settings.step_length if isinstance(self.settings, StepSettings) else "plain"
        return Combination(lengthened(self.weights(updates), updates.total_gram, rule))

    def encoder_key(self, client: ClientDescription) -> str:
        """Clients of equal key share an encoder."""
        return SHARED

    def adaptor_key(self, client: ClientDescription) -> str:
        """Clients of equal key share an adaptor."""
        return client.group

    def decoder_key(self, client: ClientDescription) -> str:
        """Where decoders travel, clients of equal key go on from the same one."""
        return client.name

    def segments(self, layout: FlatLayout) -> list[int] | None:
        """Bounds of parts of the encoder with weights of their own; None for none."""
        return None

    def check(self, clients: Sequence[str]) -> None:  # noqa: B027 (most have nothing to check)
        """Look whether the settings fit the clients of these names.

        Raises:
            InputError: They do not.
        """

    def remarks(self, clients: Sequence[ClientDescription]) -> list[str]:
        """What whoever runs a federation of these clients should know, in lines."""
        return []

    @property
    def client_work(self) -> ClientWork:
        """What clients do besides plain local training."""
        return ClientWork()

    def sends_decoder(self, client: ClientDescription, clients: Sequence[ClientDescription]) -> bool:
        """Whether a client's decoder travels.

        Args:
            client: The client.
            clients: All of the federation, later ones too.
        """
        return self.client_work.sends_decoder

    def combine_decoders(self, decoders: DecoderRound) -> dict[str, Tensor]:
        """The decoders that clients get, by client; only where decoders travel."""
        raise NotImplementedError(f"strategy '{self.name}' exchanges no decoders")

    def state(self) -> dict[str, Tensor]:
        """What it must remember across rounds."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 (most remember nothing)
        """Continue from what :meth:`state` returned."""


def by_cases(num_cases: Tensor) -> Tensor:
    """w_i = |D_i| / sum_j |D_j|, `[N]` float64."""
    return num_cases.double() / num_cases.sum()


AdaptorSharing = Literal["channels", "group", "none"]


def adaptor_key(client: ClientDescription, sharing: AdaptorSharing) -> str:
    """Key of an adaptor shared by equal channels, by equal modality as well, or by nobody."""
    keys: dict[str, Any] = {"channels": f"{client.channels}-channel", "group": client.group, "none": client.name}
    return str(keys[sharing])
