"""Stock nnU-Net model folders with made-up weights, and scans for them.

Untrained networks, as most are here, are the harder test: their logits lie close together everywhere, so every
rounding shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch

RESAMPLING = "resample_data_or_seg_to_shape"


def architecture(dimensions: int, features: Sequence[int]) -> dict[str, Any]:
    """The ``architecture`` block of a plain U-Net."""
    stages = len(features)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": list(features),
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": [[3] * dimensions] * stages,
            "strides": [[1] * dimensions] + [[2] * dimensions] * (stages - 1),
            "n_conv_per_stage": [2] * stages,
            "n_conv_per_stage_decoder": [2] * (stages - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def model_plans(
    *,
    spacing: Sequence[float],
    patch_size: Sequence[int],
    channels: int,
    normalization: str,
    features: Sequence[int],
    transpose: Sequence[int],
) -> dict[str, Any]:
    """The plans of one configuration, ``3d_fullres``, or ``2d`` for a spacing of two numbers."""
    statistics = {"mean": 60.0, "std": 90.0, "percentile_00_5": -150.0, "percentile_99_5": 320.0}
    kwargs = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "made_up",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch_size),
        "spacing": list(spacing),
        "normalization_schemes": [normalization] * channels,
        "use_mask_for_norm": [normalization == "ZScoreNormalization"] * channels,
        "resampling_fn_data": RESAMPLING,
        "resampling_fn_data_kwargs": kwargs,
        "resampling_fn_seg": RESAMPLING,
        "resampling_fn_seg_kwargs": kwargs | {"is_seg": True, "order": 1},
        "resampling_fn_probabilities": RESAMPLING,
        "resampling_fn_probabilities_kwargs": kwargs | {"order": 1},
        "architecture": architecture(len(spacing), features),
        "batch_dice": False,
    }
    return {
        "dataset_name": "Dataset001_MadeUp",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(transpose),
        "transpose_backward": [int(axis) for axis in np.argsort(transpose)],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(channel): statistics for channel in range(channels)},
        "configurations": {"3d_fullres" if len(spacing) == 3 else "2d": configuration},
    }


def write_model(
    folder: Path,
    *,
    spacing: Sequence[float] = (2.0, 2.0, 2.0),
    patch_size: Sequence[int] = (16, 16, 16),
    channels: int = 1,
    normalization: str = "ZScoreNormalization",
    labels: Mapping[str, Any] | None = None,
    regions_class_order: Sequence[int] | None = None,
    features: Sequence[int] = (4, 8),
    folds: Sequence[int | str] = (0,),
    transpose: Sequence[int] = (0, 1, 2),
    seed: int = 0,
    train: Callable[[torch.nn.Module], None] | None = None,
) -> Path:
    """A model folder as nnU-Net's trainer leaves it, checkpoints written by the trainer's own code.

    Args:
        train: Called with each fold's network before it is saved.
    """
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = model_plans(
        spacing=spacing, patch_size=patch_size, channels=channels, normalization=normalization, features=features,
        transpose=transpose,
    )  # fmt: skip
    document: dict[str, Any] = {
        "channel_names": {str(channel): f"MR{channel}" for channel in range(channels)},
        "labels": dict(labels or {"background": 0, "organ": 1, "lesion": 2}),
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    if regions_class_order:
        document["regions_class_order"] = list(regions_class_order)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(document))
    ((name, configuration),) = plans["configurations"].items()
    heads = PlansManager(deepcopy(plans)).get_label_manager(document).num_segmentation_heads
    block = configuration["architecture"]
    for fold in folds:
        with torch.random.fork_rng():
            torch.manual_seed(seed + hash(str(fold)) % 1000 if isinstance(fold, str) else seed + fold)
            network = get_network_from_plans(
                block["network_class_name"], block["arch_kwargs"], block["_kw_requires_import"], channels, heads,
                deep_supervision=False,
            )  # fmt: skip
        if train is not None:
            train(network)
        arguments = {
            "plans": plans, "configuration": name, "fold": fold, "dataset_json": document,
            "device": torch.device("cpu"),
        }  # fmt: skip
        (folder / f"fold_{fold}").mkdir(exist_ok=True)
        _save_checkpoint(network, arguments, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


def _save_checkpoint(network: torch.nn.Module, arguments: dict[str, Any], path: Path) -> None:
    """What nnU-Net's trainer saves after an epoch: its own method, on as much of a trainer as that needs."""
    from nnunetv2.training.logging.nnunet_logger import LocalLogger
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    logger = LocalLogger()
    for key in ("mean_fg_dice", "train_losses", "val_losses", "lrs", "epoch_start_timestamps", "epoch_end_timestamps"):
        logger.log(key, np.float32(0.5) if key == "train_losses" else np.float64(0.25), 0)
    logger.log("dice_per_class_or_region", [np.float64(0.2), np.float32(0.3)], 0)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, nesterov=True)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    spatial = len(arguments["plans"]["configurations"][arguments["configuration"]]["patch_size"])
    trainer = SimpleNamespace(
        local_rank=0, disable_checkpointing=False, is_ddp=False, network=network, optimizer=optimizer, logger=logger,
        grad_scaler=None, _best_ema=np.float64(0.25), current_epoch=0, my_init_kwargs=arguments,
        inference_allowed_mirroring_axes=tuple(range(spatial)),
    )  # fmt: skip
    nnUNetTrainer.save_checkpoint(trainer, str(path))
    saved = torch.load(path, weights_only=False)  # written above
    torch.save(saved | {"trainer_name": "nnUNetTrainer"}, path)


def write_scan(
    folder: Path,
    case: str,
    *,
    shape: Sequence[int] = (22, 26, 24),
    spacing: Sequence[float] = (3.0, 1.5, 1.5),
    channels: int = 1,
    seed: int = 0,
) -> list[Path]:
    """Smooth structures in noise with a border of zeros; shape and spacing are (D, H, W)."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for channel in range(channels):
        field = gaussian_filter(rng.normal(0, 1, shape), 2.0)
        voxels = (field / field.std() * 100 + rng.normal(60, 15, shape)).astype(np.float32)
        voxels[:2] = voxels[:, :1] = voxels[..., -3:] = 0
        image = sitk.GetImageFromArray(voxels)
        image.SetSpacing([float(s) for s in spacing[::-1]])
        image.SetOrigin((12.5, -30.0, 7.25))
        files.append(folder / f"{case}_{channel:04d}.nii.gz")
        sitk.WriteImage(image, str(files[-1]))
    return files
