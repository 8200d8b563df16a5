"""What clients and server say to each other, whatever carries it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedcmt.layout import FlatLayout
from fedcmt.membership import Membership

PARTS = ("adaptor", "encoder", "decoder")


@dataclass(frozen=True)
class ShapeSummary:
    """All that a client tells before the topology is chosen (``topology: auto``). Nothing per case, no intensities.

    Attributes:
        num_cases: Training cases.
        spacing: Target voxel spacing of the client's plan in mm, lowest resolution first; two numbers for 2D.
        median_shape: Median shape of the training cases at that spacing, in multiples of 8 voxels where above 8.
    """

    num_cases: int
    spacing: tuple[float, ...]
    median_shape: tuple[int, ...]


@dataclass(frozen=True)
class ClientDescription:
    """What a client tells about itself on joining. Nothing per case, no intensities."""

    name: str
    task: str
    modality: str
    channels: int
    num_cases: int
    topology: str  # digest of the topology contract
    encoder_layout: str  # digest of the encoder's flat layout
    target: str = ""  # what is predicted: clients of equal task and target do the same job
    outputs: tuple[int, ...] = ()  # place of each output's name in the order of names: outputs that mean the same
    decoder_layout: FlatLayout | None = None  # only where decoders may travel
    membership: Membership = field(default_factory=Membership)

    @property
    def group(self) -> str:
        """Adaptor group: clients of equal modality and number of channels."""
        return f"{self.modality}-{self.channels}"

    def same_task(self, other: ClientDescription) -> bool:
        """Whether both predict the same."""
        return (self.task, self.target) == (other.task, other.target)


@dataclass(frozen=True)
class Outgoing:
    """What the server sends one client. Buffers are the server's own: read, never write."""

    round_index: int
    encoder: Tensor  # [P]
    adaptor: Tensor  # [A]
    decoder: Tensor | None = None  # [D], only where it travels and the server has one
    trained: tuple[str, ...] = PARTS  # parts that the client trains this round; the others stay as received
    sends_decoder: bool = False  # whether its decoder travels


@dataclass(frozen=True)
class ClientUpdate:
    """What a client returns after local training."""

    client: str
    round_index: int
    num_cases: int
    encoder: Tensor  # [P], local minus received
    adaptor: Tensor  # [A], local minus received
    decoder: Tensor | None = None  # [D], local minus where it began; only where it travels
    decoder_start: Tensor | None = None  # [D], where it began, if the server sent no decoder

    def to(self, device: torch.device) -> ClientUpdate:
        """The same with all tensors on a device; those that are there already are not copied."""
        tensors = {part: tensor for part in (*PARTS, "decoder_start") if (tensor := getattr(self, part)) is not None}
        return replace(self, **{part: tensor.to(device) for part, tensor in tensors.items()})
