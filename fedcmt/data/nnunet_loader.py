"""Patches from nnU-Net's own loader and augmentation, and its rules for losses and mirroring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from fedcmt.nnunet_trainer import scales_of_patch
from fedcmt.plans import ClientPlan


class NnunetRules(nnUNetTrainer):
    """nnU-Net's rules for one plan: augmentation, loss, mirroring.

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

    def training_loader(self, folder: str, cases: Sequence[str], oversample_foreground: float) -> nnUNetDataLoader:
        """Augmented patches of the given preprocessed cases."""
        rotation, flat, initial_size, mirror_axes = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        patch_size, labels = self.configuration_manager.patch_size, self.label_manager
        transforms = self.get_training_transforms(
            patch_size,
            rotation,
            self._get_deep_supervision_scales(),
            mirror_axes,
            flat,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
            foreground_labels=labels.foreground_labels,
            regions=labels.foreground_regions if labels.has_regions else None,
            ignore_label=labels.ignore_label,
        )
        _fix_algorithms(transforms)
        return self._loader(folder, cases, initial_size, transforms, oversample_foreground)

    def validation_loader(self, folder: str, cases: Sequence[str], oversample_foreground: float) -> nnUNetDataLoader:
        """Patches as they are."""
        labels = self.label_manager
        transforms = self.get_validation_transforms(
            self._get_deep_supervision_scales(),
            foreground_labels=labels.foreground_labels,
            regions=labels.foreground_regions if labels.has_regions else None,
            ignore_label=labels.ignore_label,
        )
        return self._loader(folder, cases, self.configuration_manager.patch_size, transforms, oversample_foreground)

    def _loader(
        self,
        folder: str,
        cases: Sequence[str],
        size: Sequence[int],
        transforms: BasicTransform,
        oversample_foreground: float,
    ) -> nnUNetDataLoader:
        return nnUNetDataLoader(
            nnUNetDatasetBlosc2(folder, list(cases)),
            self.configuration_manager.batch_size,
            size,
            self.configuration_manager.patch_size,
            self.label_manager,
            oversample_foreground_percent=oversample_foreground,
            transforms=transforms,
        )


def next_batch(loader: nnUNetDataLoader) -> dict[str, Any]:
    """The loader's next batch: ``data`` `[B, C, D, H, W]`, ``target`` (a list with deep supervision) and ``keys``.

    ``next(loader)`` would reseed NumPy's generator from the operating system at its first call.
    """
    return loader.generate_train_batch()


def _fix_algorithms(transform: BasicTransform) -> None:
    """Blurring times two algorithms at run time and takes the faster: the choice, and so the result, would vary."""
    if isinstance(transform, GaussianBlurTransform):
        transform.benchmark = False
    elif isinstance(transform, RandomTransform):
        _fix_algorithms(transform.transform)
    elif isinstance(transform, ComposeTransforms):
        for part in transform.transforms:
            _fix_algorithms(part)
