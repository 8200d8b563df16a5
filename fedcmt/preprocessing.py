"""Fingerprint, plan and preprocessing of one dataset, all done by nnU-Net itself."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from importlib.metadata import version
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities import utils
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from scipy import ndimage

from fedcmt.dataset import Case, RawDataset, inspect_images
from fedcmt.errors import InputError, Problems
from fedcmt.files import read_json, write_json
from fedcmt.network import CONFIGURATION, SLICES, configuration_name
from fedcmt.volume import read_volume, write_segmentation


def preprocessed_plan(
    dataset: RawDataset,
    task: str,
    preprocessed: Path,
    *,
    spacing: Sequence[float] | None,
    slices: bool = False,
    client: str | None = None,
    workers: int = 2,
) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Check, fingerprint, plan and preprocess a dataset, unless that was done with these very files and settings.

    Args:
        dataset: The raw dataset.
        task: ``segmentation`` or ``classification``; the latter needs no label maps.
        preprocessed: nnU-Net's folder of preprocessed datasets.
        spacing: Target spacing `[3]` in mm in the order of the stored array (z, y, x), or nnU-Net's choice.
        slices: Plan ``2d``; otherwise only where the images are single slices.
        client: For messages.
        workers: Threads.

    Returns:
        nnU-Net's plans with one configuration, its dataset.json, the folder of preprocessed cases.

    Raises:
        InputError: The images are unfit or nnU-Net cannot plan for them.
    """
    identifier = "fedcmt_" + ("planned" if spacing is None else "x".join(f"{s:g}" for s in spacing))
    if slices:
        identifier += "_2d"
    target = preprocessed / dataset.name
    folder = target / (f"{identifier}_classification" if task == "classification" else identifier)
    settings = [dataset.dataset_json, dataset.class_names, task, list(spacing or []), version("nnunetv2")]
    inputs = _digest(settings, dataset.train.values())
    checked = _digest([inputs], dataset.test.values())
    record = _record(folder)
    known: dict[str, Any] = read_json(record) if record.is_file() and folder.is_dir() else {}
    if known.get("checked") == checked and "orientations" in known:
        return known["plans"], known["dataset_json"], folder
    problems = Problems()
    images = inspect_images(dataset, problems, client=client)
    problems.raise_any()
    findings = {"checked": checked, "warnings": images.warnings, "orientations": images.orientations}
    if known.get("inputs") == inputs:  # only test cases changed
        write_json(record, known | findings)
        return known["plans"], known["dataset_json"], folder
    record.unlink(missing_ok=True)
    folder.with_name(f"{folder.name}.json").unlink(missing_ok=True)  # nnU-Net keeps configurations of earlier plans
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    raw = _classification_view(dataset, folder) if task == "classification" else dataset.folder.parent
    with (
        open(folder.with_name(f"{folder.name}.log"), "w") as log,
        redirect_stdout(log),
        redirect_stderr(log),
        _nnunet_folders(raw, preprocessed),
        _threads_for_processes(),
    ):
        plans, dataset_json = _run_nnunet(dataset, folder, spacing, slices, client, workers)
    if task == "segmentation":
        _copy_truth(dataset, target / "gt_segmentations")
    write_json(record, {"inputs": inputs, **findings, "plans": plans, "dataset_json": dataset_json})
    return plans, dataset_json, folder


def preprocessing_warnings(folder: Path) -> list[str]:
    """What the check of the images remarked on, one line each."""
    return list(read_json(_record(folder))["warnings"])


def _copy_truth(dataset: RawDataset, folder: Path) -> None:
    """Where stock nnU-Net looks for the label maps when it validates a training on these cases."""
    folder.mkdir(exist_ok=True)
    for identifier, case in dataset.train.items():
        if case.label is not None:
            shutil.copyfile(case.label, folder / f"{identifier}{dataset.file_ending}")


def _record(folder: Path) -> Path:
    # Beside the folder and not in it: stock nnU-Net trains only from folders that hold nothing but cases.
    return folder.with_name(f"{folder.name}_record.json")


def stored_orientations(folder: Path) -> dict[str, int]:
    """Axis codes such as ``RAS`` -> number of training cases stored that way, most frequent first."""
    return dict(read_json(_record(folder))["orientations"])


def _run_nnunet(
    dataset: RawDataset,
    folder: Path,
    spacing: Sequence[float] | None,
    slices: bool,
    client: str | None,
    workers: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    extractor = DatasetFingerprintExtractor(dataset.name, num_processes=min(workers, len(dataset.train)))
    extractor.show_progress_bar = False
    try:
        extractor.run(overwrite_existing=True)
    except IndexError as error:  # nnU-Net's intensity statistics over no voxels at all
        raise InputError(
            f"no training case of {dataset.name} has a foreground voxel",
            client=client,
            field="labelsTr",
            fix="label some",
        ) from error
    planner = _planner(dataset, folder.name, spacing, client)
    try:
        planner.plan_experiment()
    except OverflowError as error:  # an image of less than half a voxel
        raise InputError(
            f"{spacing} mm leaves no voxel of some images of {dataset.name}",
            client=client,
            field="spacing",
            fix="lower it",
        ) from error
    plans_file = folder.parent / f"{folder.name}.json"
    plans = read_json(plans_file)
    name = SLICES if slices or CONFIGURATION not in plans["configurations"] else CONFIGURATION
    plans["configurations"] = {name: plans["configurations"][name] | {"data_identifier": folder.name}}
    write_json(plans_file, plans)
    dataset_json = read_json(folder.parent / "dataset.json")
    _preprocess_cases(folder, plans, dataset_json, Path(extractor.input_folder), workers)
    return plans, dataset_json


def _planner(
    dataset: RawDataset, plans_name: str, spacing: Sequence[float] | None, client: str | None
) -> ExperimentPlanner:
    """nnU-Net's planner, told which axis is that of single slices: by itself it takes the one of largest spacing."""
    target = None if spacing is None else [float(s) for s in spacing]
    planner = ExperimentPlanner(dataset.name, plans_name=plans_name, overwrite_target_spacing=target)
    extents = np.median(planner.dataset_fingerprint["shapes_after_crop"], 0)
    if extents[0] == 1:
        thickness = float(np.median(planner.dataset_fingerprint["spacings"], 0)[0])
        return ExperimentPlanner(
            dataset.name,
            plans_name=plans_name,
            overwrite_target_spacing=None if target is None else [thickness, *target[1:]],
            suppress_transpose=True,
        )
    if 1 in extents and extents[np.argmax(planner.determine_fullres_target_spacing())] != 1:
        raise InputError(
            f"{dataset.name} has single slices of {extents.astype(int).tolist()} voxels (z, y, x)",
            client=client,
            field="dataset",
            fix="store them with the slice along z",
        )
    return planner


def _preprocess_cases(
    folder: Path, plans: dict[str, Any], dataset_json: dict[str, Any], raw: Path, workers: int
) -> None:
    manager = PlansManager(plans)
    files = get_filenames_of_train_images_and_targets(str(raw), deepcopy(dataset_json))
    configuration = manager.get_configuration(configuration_name(plans))
    jobs: list[tuple[Any, ...]] = [
        (str(folder / case), paths["images"], paths["label"], manager, configuration, dataset_json)
        for case, paths in files.items()
    ]
    preprocessor = DefaultPreprocessor(verbose=False)
    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(preprocessor.run_case_save, *job) for job in jobs]:
            future.result()


@contextmanager
def _threads_for_processes() -> Iterator[None]:
    """Let nnU-Net's pools be of threads.

    The fingerprint extractor's spawned processes import torch anew, which takes longer than most datasets' fingerprint;
    and they cannot start at all from a script without a main guard. Listing files forks twelve processes each time.
    """
    module, pool = fingerprint_extractor.multiprocessing, utils.Pool
    fingerprint_extractor.multiprocessing = SimpleNamespace(get_context=lambda _: SimpleNamespace(Pool=ThreadPool))
    utils.Pool = ThreadPool
    try:
        yield
    finally:
        fingerprint_extractor.multiprocessing, utils.Pool = module, pool


@contextmanager
def _nnunet_folders(raw: Path, preprocessed: Path) -> Iterator[None]:
    """nnU-Net finds its folders through environment variables, read at each use."""
    # Planning calls torch.set_num_threads with nnUNet_n_proc_DA, and fails on the 0 that is right for training.
    wanted = {
        "nnUNet_raw": str(raw.resolve()),
        "nnUNet_preprocessed": str(preprocessed.resolve()),
        "nnUNet_n_proc_DA": "1",
    }
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _digest(settings: list[Any], cases: Iterable[Case]) -> str:
    """Changes when a setting does, or the size or time of one of the cases' files."""
    files = [path for case in cases for path in (*case.images, case.label) if path is not None]
    facts = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return hashlib.sha256(json.dumps([settings, facts], sort_keys=True).encode()).hexdigest()


def _classification_view(dataset: RawDataset, folder: Path) -> Path:
    """A raw dataset of the same images for nnU-Net, with body masks where there are no label maps.

    nnU-Net's statistics and foreground sampling need some foreground; a classification dataset may have none.
    """
    raw = folder / "raw"
    target = raw / dataset.name
    target.mkdir(parents=True)
    listing = {}
    for identifier, case in dataset.train.items():
        label = case.label
        if label is None:
            label = target / f"{identifier}_body.nii.gz"
            volume = read_volume(case.images)
            write_segmentation(volume, body_mask(volume.data[0]), label)
        listing[identifier] = {"images": [str(path.resolve()) for path in case.images], "label": str(label.resolve())}
    has_labels = all(case.label for case in dataset.train.values())
    labels = dataset.labels if has_labels else {"background": 0, "body": 1}
    regions = has_labels and dataset.regions_class_order
    order = {"regions_class_order": list(regions)} if regions else {}
    write_json(
        target / "dataset.json",
        {
            "channel_names": {str(i): name for i, name in enumerate(dataset.channel_names)},
            "labels": labels,
            "classification_labels": {name: i for i, name in enumerate(dataset.class_names or ())},
            "numTraining": len(dataset.train),
            "file_ending": dataset.file_ending,
            "dataset": listing,
            **order,
        },
    )
    return raw


def body_mask(image: np.ndarray) -> np.ndarray:
    """Voxels brighter than halfway between the image's dark and bright ends, holes filled, largest part only.

    Args:
        image: `[D, H, W]`.

    Returns:
        `[D, H, W]` uint8, never all zero.
    """
    dark, bright = np.percentile(image, (2, 98))
    mask = ndimage.binary_fill_holes(image > dark + 0.15 * (bright - dark)) if bright > dark else image >= dark
    parts, count = ndimage.label(mask)
    if count > 1:
        mask = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    return mask.astype(np.uint8)
