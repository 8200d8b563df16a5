"""``nnUNetv2_train -tr nnUNetTrainerFedCMT``: one client alone, with FedCMT's network inside stock nnU-Net."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from fedcmt.config import TopologyConfig, TrainingConfig
from fedcmt.device import trains_in_bfloat16
from fedcmt.errors import InputError
from fedcmt.topology import TopologyContract


class nnUNetTrainerFedCMT(nnUNetTrainer):
    """FedCMT's network (adaptor, encoder, decoder) and its local training, in nnU-Net's loop; segmentation.

    Stages, features, kernels, strides and encoder are those of the nnU-Net plan, plain or residual, 2D or 3D. Losses,
    augmentation, patches and epochs are nnU-Net's; optimizer and clipping are the defaults of FedCMT's ``training``.
    The plans.json beside the result names FedCMT's network.
    """

    # nnU-Net reads the arguments' names from this signature.
    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008
    ) -> None:
        super().__init__(with_fedcmt_network(plans, configuration), configuration, fold, dataset_json, device)
        self._settings = TrainingConfig()
        self.initial_lr = self._settings.learning_rate
        self.weight_decay = self._settings.weight_decay
        self.oversample_foreground_percent = self._settings.oversample_foreground

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """AdamW, and nnU-Net's decay over epochs."""
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        return scales_of_patch(super()._get_deep_supervision_scales(), len(self.configuration_manager.patch_size))

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One step, in bfloat16 where that is fast."""
        data = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"]
        on_device: list[Tensor] | Tensor = (
            [entry.to(self.device, non_blocking=True) for entry in target]
            if isinstance(target, list)
            else target.to(self.device, non_blocking=True)
        )
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=trains_in_bfloat16(self.device)):
            loss = self.loss(self.network(data), on_device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self._settings.clip_norm)
        self.optimizer.step()
        return {"loss": loss.detach().cpu().numpy()}


def with_fedcmt_network(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """The plans with FedCMT's network in one configuration.

    Raises:
        InputError: The configuration describes no network, or one that FedCMT does not know.
    """
    plans = deepcopy(plans)
    entry = plans["configurations"][configuration]
    if "architecture" not in entry:
        raise InputError(
            f"{configuration} describes no network of its own",
            field="configuration",
            fix="train 2d, 3d_fullres or 3d_lowres",
        )
    if not str(entry["architecture"]["network_class_name"]).startswith("fedcmt."):
        width = TopologyConfig().adaptor_width
        entry["architecture"] = TopologyContract.of_nnunet(entry["architecture"], width).architecture("segmentation")
    return plans


def scales_of_patch(scales: list[list[float]] | None, dimensions: int) -> list[list[float]] | None:
    """Deep supervision's scales for patches of 2 or 3 dimensions; strides are those of the 3D network."""
    return None if scales is None else [scale[-dimensions:] for scale in scales]
