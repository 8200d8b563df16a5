"""The federation's topology contract, injected into each client's own nnU-Net plan; what a client tells; its split.

All clients share one encoder, so the network's topology is the federation's and not the client's. Spacing,
normalisation, patch and batch stay each client's own, and intensity statistics never leave it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from sklearn.model_selection import StratifiedKFold

from fedcmt.config import ClientConfig
from fedcmt.dataset import RawDataset
from fedcmt.errors import InputError
from fedcmt.exchange import ShapeSummary
from fedcmt.files import read_json, write_json
from fedcmt.network import SLICES, configuration_name
from fedcmt.orientation import ORIENTATIONS_KEY
from fedcmt.preprocessing import preprocessed_plan, stored_orientations
from fedcmt.topology import TopologyContract, contract_digest

__all__ = [
    "ClientPlan",
    "TopologyContract",
    "check_client",
    "contract_digest",
    "make_splits",
    "prepare_client",
    "shape_summary",
]

_SPLIT_SEED = 12345  # nnU-Net's own, so that equal cases give equal folds


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
        return self.plans_manager.get_configuration(configuration_name(self.plans))

    @property
    def architecture(self) -> dict[str, Any]:
        """The network's description, from the contract."""
        return self.plans["configurations"][configuration_name(self.plans)]["architecture"]

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
    plans, dataset_json, folder = _nnunet_plan(client, dataset, task, preprocessed, workers)
    plans = deepcopy(plans)
    plans["plans_name"] = "FedCMTPlans"
    plans[ORIENTATIONS_KEY] = stored_orientations(folder)
    configuration = plans["configurations"][configuration_name(plans)]
    configuration["architecture"] = contract.architecture(task)
    planned = configuration["patch_size"]
    dimensions = len(planned)
    if dimensions == 2 and contract.divisor[0] != 1:
        raise InputError(
            f"single slices need a network without strides along the first axis, the topology's are "
            f"{contract.divisor.tolist()}",
            client=client.name,
            field="configuration",
            fix="set topology: auto, or strides such as [1, 2, 2]",
        )
    if task == "classification":
        size = _whole_case_size(client, folder, dataset, contract, dimensions)
    else:
        size = _patch_size(client, planned, contract)
    configuration["patch_size"] = size[-dimensions:]
    configuration["batch_size"] = client.batch_size or int(configuration["batch_size"])
    train, validation = _split(client, dataset, task, folder.parent)
    group = f"{client.modality.upper()}-{len(dataset.channel_names)}"
    return ClientPlan(dataset, task, group, plans, dataset_json, folder, train, validation)


def shape_summary(client: ClientConfig, dataset: RawDataset, preprocessed: Path, *, workers: int = 2) -> ShapeSummary:
    """All that a client tells before the topology is chosen; preprocesses where needed.

    Raises:
        InputError: The dataset or the client's settings are wrong.
    """
    task = check_client(client, dataset)
    plans, _, _ = _nnunet_plan(client, dataset, task, preprocessed, workers)
    configuration = plans["configurations"][configuration_name(plans)]
    # The median of few cases is close to one case's own size; multiples of 8 say enough for a topology.
    shape = (int(n) if n < 8 else 8 * round(n / 8) for n in configuration["median_image_size_in_voxels"])
    spacing = (float(f"{s:.3g}") for s in configuration["spacing"])
    return ShapeSummary(len(dataset.train), tuple(spacing), tuple(shape))


def _nnunet_plan(
    client: ClientConfig, dataset: RawDataset, task: str, preprocessed: Path, workers: int
) -> tuple[dict[str, Any], dict[str, Any], Path]:
    plans, dataset_json, folder = preprocessed_plan(
        dataset,
        task,
        preprocessed,
        spacing=client.spacing,
        slices=client.configuration == SLICES,
        client=client.name,
        workers=workers,
    )
    planned = configuration_name(plans)
    if client.configuration not in (None, planned):
        raise InputError(
            f"{dataset.name} has single-slice images, for which nnU-Net plans {planned} only",
            client=client.name,
            field="configuration",
            fix=f"leave it out or use {planned}",
        )
    return plans, dataset_json, folder


def _patch_size(client: ClientConfig, planned: Sequence[int], contract: TopologyContract) -> list[int]:
    flat = len(planned) == 2
    if client.patch_size and flat and client.patch_size[0] != 1:
        raise InputError(
            f"{client.patch_size} for a client of single slices",
            client=client.name,
            field="patch_size",
            fix=f"use {[1, *client.patch_size[1:]]}",
        )
    size = np.asarray(client.patch_size or ([1, *planned] if flat else planned))
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


def _whole_case_size(
    client: ClientConfig, folder: Path, dataset: RawDataset, contract: TopologyContract, dimensions: int
) -> list[int]:
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
    if dimensions == 2 and any(shape[0] != 1 for shape in shapes):
        raise InputError(
            f"{dataset.name} has cases of several slices, and classification uses whole cases",
            client=client.name,
            field="configuration",
            fix="use 3d_fullres",
        )
    size = -(-np.max(shapes, axis=0) // contract.divisor) * contract.divisor
    return _with_depth_below(client, size, contract)


def client_folds(
    client: ClientConfig, dataset: RawDataset, task: str, folder: Path
) -> tuple[list[str], list[str], list[dict[str, list[str]]]]:
    """The cases a client trains and validates on.

    Args:
        client: Its settings.
        dataset: Its dataset.
        task: ``segmentation`` or ``classification``.
        folder: Where nnU-Net keeps the dataset's ``splits_final.json``, which is used where it exists.

    Returns:
        Training cases, validation cases, and all folds.

    Raises:
        InputError: There is no such fold, or ``splits_final.json`` is damaged or names unknown cases.
    """
    cases = sorted(dataset.train)
    if client.fold == "all":
        return cases, cases, []
    path = folder / "splits_final.json"
    splits = _read_splits(path, client) if path.is_file() else make_splits(dataset, task)
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
    return split["train"], split["val"], splits


def _read_splits(path: Path, client: ClientConfig) -> list[dict[str, list[str]]]:
    splits = read_json(path)

    def is_fold(fold: object) -> bool:
        parts = [fold.get("train"), fold.get("val")] if isinstance(fold, dict) else [None]
        return all(isinstance(part, list) and all(isinstance(case, str) for case in part) for part in parts)

    if not isinstance(splits, list) or not splits or not all(is_fold(fold) for fold in splits):
        raise InputError(
            f'{path} is no list of {{"train": [...], "val": [...]}}',
            client=client.name,
            field="fold",
            fix="correct or delete that file",
        )
    return splits


def _split(
    client: ClientConfig, dataset: RawDataset, task: str, folder: Path
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    train, validation, splits = client_folds(client, dataset, task, folder)
    path = folder / "splits_final.json"
    if splits and not path.is_file():
        write_json(path, splits)
    return tuple(train), tuple(validation)


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
