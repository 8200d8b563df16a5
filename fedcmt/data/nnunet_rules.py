"""nnU-Net's rules for one plan: patches, augmentation, targets, losses and mirroring."""

from __future__ import annotations

from typing import Any

import numpy as np
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from fedcmt.data.sampling import PatchRules, Size
from fedcmt.data.targets import TargetRules
from fedcmt.nnunet_trainer import scales_of_patch
from fedcmt.plans import ClientPlan


class NnunetRules(nnUNetTrainer):
    """nnU-Net's rules for one plan.

    The trainer's constructor creates folders and log files and is left out on purpose; only the methods that read the
    plan are used.
    """

    def __init__(self, plan: ClientPlan, *, deep_supervision: bool) -> None:
        self.plans_manager = plan.plans_manager
        self.configuration_manager = plan.configuration
        self.label_manager = self.plans_manager.get_label_manager(plan.dataset_json)
        self.enable_deep_supervision = deep_supervision
        self.is_ddp = False
        self.is_cascaded = False
        self._channels = len(plan.dataset.channel_names)

    def print_to_log_file(self, *args: Any, **kwargs: Any) -> None:
        """nnU-Net's remarks have no reader here."""

    def _do_i_compile(self) -> bool:
        return False

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        return scales_of_patch(super()._get_deep_supervision_scales(), len(self.configuration_manager.patch_size))

    def loss(self) -> nn.Module:
        """Dice and cross-entropy, or Dice and binary cross-entropy for regions; weighted over stages."""
        return self._build_loss()

    def mirror_axes(self) -> tuple[int, ...]:
        """Axes along which training mirrors, and prediction may."""
        return self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3]

    def patches(self, oversample_foreground: float, *, augment: bool) -> PatchRules:
        """What patches undergo.

        Args:
            oversample_foreground: Share of each batch that must hold foreground.
            augment: False for validation.
        """
        geometry = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        rotation, dummy_2d, initial_size, mirror_axes = geometry
        size = self.configuration_manager.patch_size
        slices, labels = len(size) == 2, self.label_manager
        return PatchRules(
            patch_size=_volume(size),
            initial_size=_volume(initial_size if augment else size),
            channels=self._channels,
            batch_size=self.configuration_manager.batch_size,
            oversample_foreground=oversample_foreground,
            annotated=(-1, *labels.all_labels) if labels.has_ignore_label else None,
            augment=augment,
            slices=slices,
            in_plane=slices or bool(dummy_2d),
            rotation=float(max(np.abs(rotation))),
            mirror_axes=tuple(axis + 1 if slices else axis for axis in mirror_axes),
        )

    def targets(self) -> TargetRules:
        """How label maps become targets."""
        size, labels = self.configuration_manager.patch_size, self.label_manager
        scales = self._get_deep_supervision_scales()
        sizes = (
            [size] if scales is None else [[round(n * s) for n, s in zip(size, scale, strict=True)] for scale in scales]
        )
        regions = None
        if labels.has_regions:
            # The ignored voxels are a region of their own, which the loss leaves out.
            ignored = [labels.ignore_label] if labels.has_ignore_label else []
            regions = tuple(r if isinstance(r, int) else tuple(r) for r in [*labels.foreground_regions, *ignored])
        masked = self.configuration_manager.use_mask_for_norm
        return TargetRules(
            sizes=tuple(_volume(each) for each in sizes),
            several=scales is not None,
            regions=regions,
            masked_channels=tuple(channel for channel, used in enumerate(masked) if used),
        )


def _volume(size: Any) -> Size:
    """`[H, W]` or `[D, H, W]` -> `(D, H, W)`."""
    depth, height, width = (1,) * (3 - len(size)) + tuple(int(extent) for extent in size)
    return depth, height, width
