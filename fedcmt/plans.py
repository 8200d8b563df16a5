"""The federation's topology contract, injected into each client's own nnU-Net plan.

All clients share one encoder, so the network's topology is the federation's and not the client's. Spacing,
normalisation, patch and batch stay each client's own, and intensity statistics never leave it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from sklearn.model_selection import StratifiedKFold

from fedcmt.config import ClientConfig, TopologyConfig
from fedcmt.dataset import RawDataset
from fedcmt.errors import InputError
from fedcmt.network import CONFIGURATION
from fedcmt.preprocessing import preprocessed_plan

_NORMS = {
    "instance": ("torch.nn.modules.instancenorm.InstanceNorm3d", {"eps": 1e-5, "affine": True}),
    "batch": ("torch.nn.modules.batchnorm.BatchNorm3d", {"eps": 1e-5, "affine": True}),
}
_SPLIT_SEED = 12345  # nnU-Net's own, so that equal cases give equal folds


@dataclass(frozen=True)
class TopologyContract:
    """What every client's network must agree on: stages, features, kernels, strides, norm, adaptor width."""

    arch_kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, config: TopologyConfig) -> TopologyContract:
        """Fill in a topology's defaults."""
        stages = len(config.features)
        norm, norm_kwargs = _NORMS[config.norm]
        return cls(
            {
                "n_stages": stages,
                "features_per_stage": list(config.features),
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "kernel_sizes": config.kernel_sizes or [[3, 3, 3]] * stages,
                "strides": config.strides or [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
                "n_conv_per_stage": [config.convs_per_stage] * stages,
                "n_conv_per_stage_decoder": [config.decoder_convs_per_stage] * (stages - 1),
                "conv_bias": True,
                "norm_op": norm,
                "norm_op_kwargs": norm_kwargs,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
                "adaptor_width": config.adaptor_width,
            }
        )

    def architecture(self, task: str) -> dict[str, Any]:
        """The ``architecture`` block of a client's plan."""
        kwargs = dict(self.arch_kwargs)
        if task == "classification":
            del kwargs["n_conv_per_stage_decoder"]
        name = "FedCMTClassifier" if task == "classification" else "FedCMTNet"
        return {
            "network_class_name": f"fedcmt.network.{name}",
            "arch_kwargs": kwargs,
            "_kw_requires_import": ["conv_op", "norm_op", "nonlin"],
        }

    @property
    def divisor(self) -> np.ndarray:
        """`[3]`: input sizes must be multiples of the strides' product."""
        return np.prod(np.asarray(self.arch_kwargs["strides"]), axis=0)

    def digest(self) -> str:
        """Hash of the contract, compared when clients, checkpoints and models meet. Decoders are personal."""
        shared = {key: value for key, value in self.arch_kwargs.items() if key != "n_conv_per_stage_decoder"}
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()


def contract_digest(architecture: Mapping[str, Any]) -> str:
    """The digest of the contract that a plan's ``architecture`` block was made from."""
    return TopologyContract(architecture["arch_kwargs"]).digest()


@dataclass(frozen=True)
class ClientPlan:
    """All a client needs to train: its nnU-Net plan with the contract, its cases and its split."""

    dataset: RawDataset
    task: str
    group: str  # adaptor group: modality and number of channels
    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    folder: Path  # preprocessed cases
    train: tuple[str, ...]
    validation: tuple[str, ...]

    @property
    def plans_manager(self) -> PlansManager:
        """nnU-Net's view of the plan."""
        return PlansManager(deepcopy(self.plans))

    @property
    def configuration(self) -> ConfigurationManager:
        """nnU-Net's view of the one configuration in the plan."""
        return self.plans_manager.get_configuration(CONFIGURATION)

    @property
    def architecture(self) -> dict[str, Any]:
        """The network's description, from the contract."""
        return self.plans["configurations"][CONFIGURATION]["architecture"]

    @property
    def num_heads(self) -> int:
        """Outputs of the network: labels with background, regions, or classes."""
        if self.task == "classification":
            return len(self.dataset.class_names or ())
        return int(self.plans_manager.get_label_manager(self.dataset_json).num_segmentation_heads)

    @property
    def validates_on_training(self) -> bool:
        """True where there are too few subjects to hold one out."""
        return bool(set(self.train) & set(self.validation))


def check_client(client: ClientConfig, dataset: RawDataset) -> str:
    """Compare a client's settings with its dataset.

    Returns:
        The client's task.

    Raises:
        InputError: Task, channels or modality contradict the dataset.
    """
    task = client.task or ("classification" if dataset.class_names else "segmentation")
    if task == "classification" and not dataset.class_names:
        raise InputError(
            f"{dataset.name} holds no classification labels",
            client=client.name,
            field="task",
            fix="add cls_data.csv and classification_labels, or set task: segmentation",
        )
    if task == "segmentation" and not all(case.label for case in dataset.train.values()):
        raise InputError(
            f"{dataset.name} has training cases without a label map",
            client=client.name,
            field="task",
            fix="add labelsTr, or set task: classification",
        )
    found = len(dataset.channel_names)
    if client.channels is not None and client.channels != found:
        raise InputError(
            f"expected {client.channels} channels, {dataset.name} has {found} ({', '.join(dataset.channel_names)})",
            client=client.name,
            field="channels",
            fix=f"set channels: {found} or choose another dataset",
        )
    # nnU-Net normalises a channel as CT when it is named so: a wrong name would train on wrong intensities.
    is_ct = "ct" in [name.lower() for name in dataset.channel_names]
    if (client.modality.upper() == "CT") != is_ct:
        raise InputError(
            f"modality {client.modality} contradicts the channels of {dataset.name} "
            f"({', '.join(dataset.channel_names)})",
            client=client.name,
            field="modality",
            fix="set modality to CT for datasets with a channel named CT, and only for those",
        )
    return task


def prepare_client(
    client: ClientConfig, dataset: RawDataset, contract: TopologyContract, preprocessed: Path, *, workers: int = 2
) -> ClientPlan:
    """Preprocess a client's dataset through nnU-Net where needed and put the contract into its plan.

    Raises:
        InputError: The dataset or the client's settings are wrong.
    """
    task = check_client(client, dataset)
    plans, dataset_json, folder = preprocessed_plan(
        dataset, task, preprocessed, spacing=client.spacing, client=client.name, workers=workers
    )
    plans = deepcopy(plans)
    plans["plans_name"] = "FedCMTPlans"
    configuration = plans["configurations"][CONFIGURATION]
    configuration["architecture"] = contract.architecture(task)
    planned = configuration["patch_size"]
    if task == "classification":
        configuration["patch_size"] = _whole_case_size(client, folder, dataset, contract)
    else:
        configuration["patch_size"] = _patch_size(client, planned, contract)
    configuration["batch_size"] = client.batch_size or int(configuration["batch_size"])
    train, validation = _split(client, dataset, task, folder.parent)
    group = f"{client.modality.upper()}-{len(dataset.channel_names)}"
    return ClientPlan(dataset, task, group, plans, dataset_json, folder, train, validation)


def _patch_size(client: ClientConfig, planned: Sequence[int], contract: TopologyContract) -> list[int]:
    size = np.asarray(client.patch_size or planned)
    rounded = np.maximum(size // contract.divisor, 1) * contract.divisor
    if client.patch_size and not np.array_equal(size, rounded):
        raise InputError(
            f"{client.patch_size} is no multiple of the topology's strides {contract.divisor.tolist()}",
            client=client.name,
            field="patch_size",
            fix=f"use {rounded.tolist()}",
        )
    return _with_depth_below(client, rounded, contract)


def _with_depth_below(client: ClientConfig, size: np.ndarray, contract: TopologyContract) -> list[int]:
    if np.prod(size // contract.divisor) < 2:
        raise InputError(
            f"{size.tolist()} leaves one voxel in the deepest stage, which cannot be normalised",
            client=client.name,
            field="patch_size",
            fix=f"use {(2 * contract.divisor).tolist()} or more",
        )
    return [int(n) for n in size]


def _whole_case_size(client: ClientConfig, folder: Path, dataset: RawDataset, contract: TopologyContract) -> list[int]:
    """Classification sees whole cases: the largest case, rounded up. The class of a patch is not known."""
    import blosc2

    if client.patch_size:
        raise InputError(
            "classification uses whole cases, not patches",
            client=client.name,
            field="patch_size",
            fix="remove patch_size; a coarser spacing makes cases smaller",
        )
    shapes = [blosc2.open(str(folder / f"{case}.b2nd"), mode="r").shape[1:] for case in dataset.train]
    size = -(-np.max(shapes, axis=0) // contract.divisor) * contract.divisor
    return _with_depth_below(client, size, contract)


def _split(
    client: ClientConfig, dataset: RawDataset, task: str, folder: Path
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    cases = sorted(dataset.train)
    if client.fold == "all":
        return tuple(cases), tuple(cases)
    path = folder / "splits_final.json"
    splits = json.loads(path.read_text()) if path.is_file() else make_splits(dataset, task)
    if not path.is_file():
        path.write_text(json.dumps(splits, indent=2))
    if client.fold >= len(splits):
        raise InputError(
            f"fold {client.fold} of {len(splits)}",
            client=client.name,
            field="fold",
            fix=f"use 0 to {len(splits) - 1} or 'all'",
        )
    split = splits[client.fold]
    unknown = sorted({*split["train"], *split["val"]} - set(cases))
    if unknown or not split["train"] or not split["val"]:
        what = f"names the unknown case '{unknown[0]}'" if unknown else "has an empty part"
        raise InputError(
            f"fold {client.fold} in {path} {what}", client=client.name, field="fold", fix="correct or delete that file"
        )
    return tuple(split["train"]), tuple(split["val"])


def make_splits(dataset: RawDataset, task: str) -> list[dict[str, list[str]]]:
    """Cross-validation folds by case: nnU-Net's with five cases or more, else leave one out.

    Classification is stratified. With too few cases to hold one out (one case, or a class with one), the only fold
    validates on its training cases.
    """
    cases = sorted(dataset.train)
    if task == "classification":
        classes = [dataset.case_class[case] for case in cases]
        folds = min(5, min(classes.count(c) for c in set(classes)))
        if folds < 2:
            return [{"train": cases, "val": cases}]
        parts = StratifiedKFold(folds, shuffle=True, random_state=_SPLIT_SEED).split(cases, classes)
        return [{"train": [cases[i] for i in train], "val": [cases[i] for i in val]} for train, val in parts]
    if len(cases) >= 5:
        return generate_crossval_split(cases, seed=_SPLIT_SEED, n_splits=5)
    if len(cases) == 1:
        return [{"train": cases, "val": cases}]
    return [{"train": [c for c in cases if c != held_out], "val": [held_out]} for held_out in cases]
