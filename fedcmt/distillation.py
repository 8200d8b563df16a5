"""Learning from the received model while training the local one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fedcmt.data.torch_pipeline import Batch
from fedcmt.lean_network import make_lean
from fedcmt.objective import Objective
from fedcmt.strategies.client_work import DistillationSettings


class Teacher:
    """A frozen copy of the network with the parameters received in a round and the client's decoder of that moment.

    It adds lambda T^2 KL(student || teacher) to the loss, T the temperature, with a coefficient that trusts the teacher
    as far as it is right on the batch,

        lambda = lambda_0 exp(-L_t) L_s / (L_s + L_t),

    L_t and L_s the losses of teacher and student. They count from the smallest possible one, since nnU-Net's Dice loss
    is minus Dice. The coefficient is our own; the published one is unknown. The teacher is evaluated once a batch,
    in evaluation mode and without gradients.

    Args:
        network: The network to copy.
        settings: lambda_0 and T.
        lean: Whether the copy is made lean, for float32 on a CPU; other roundings, less time.
    """

    def __init__(self, network: nn.Module, settings: DistillationSettings, *, lean: bool = False) -> None:
        self._settings = settings
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        if lean:
            make_lean(self.network.to(memory_format=torch.contiguous_format))

    def learn(self, network: nn.Module) -> None:
        """Take parameters and running statistics of a network."""
        with torch.no_grad():
            for own, value in zip(_values(self.network), _values(network), strict=True):
                own.copy_(value)

    def term(self, objective: Objective, student: Any, student_loss: Tensor, batch: Batch) -> Tensor:
        """The term for one batch.

        Args:
            objective: The client's.
            student: Outputs of the network in training.
            student_loss: Their loss.
            batch: What both see.
        """
        with torch.no_grad():
            teacher = objective.outputs(self.network, batch)
            teacher_loss = objective.loss(teacher, batch) - objective.smallest_loss
            own_loss = student_loss.detach() - objective.smallest_loss
            share = own_loss / (own_loss + teacher_loss).clamp_min(1e-12)
            trust = self._settings.weight * torch.exp(-teacher_loss) * share
        temperature = self._settings.temperature
        return trust * temperature**2 * objective.divergence(student, teacher, temperature)


def _values(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
