"""Small made-up scans in nnU-Net's raw format: bright shapes in noise, a few seconds to preprocess."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np

AFFINE = np.array([[-2.0, 0, 0, 30], [0, -2.0, 0, 40], [0, 0, 3.0, -20], [0, 0, 0, 1]])


def ellipsoid(shape: Sequence[int], center: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """A solid ellipsoid as a boolean array."""
    grid = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    return sum(((g - c) / r) ** 2 for g, c, r in zip(grid, center, radii, strict=True)) < 1


def write_case(
    folder: Path,
    case: str,
    seed: int,
    *,
    modality: str,
    channels: int,
    shape: Sequence[int],
    has_label: bool,
    split: str,
    bright: bool = True,
) -> None:
    """One scan: body, organ (label 1) and lesion (label 2) inside it; arrays are x, y, z."""
    rng = np.random.default_rng(seed)
    body = ellipsoid(shape, np.array(shape) / 2, np.array(shape) * 0.45)
    center = np.array(shape) / 2 + rng.uniform(-2, 2, 3)
    organ, lesion = ellipsoid(shape, center, np.array(shape) * 0.25), ellipsoid(shape, center, np.array(shape) * 0.12)
    labels = (organ.astype(np.uint8) + lesion).astype(np.uint8)
    for channel in range(channels):
        image = body * 1.0 + organ * (1.0 + channel) + lesion * (2.0 if bright else 0.0) + rng.normal(0, 0.2, shape)
        image = image * 150 - 100 if modality == "CT" else image * 80 + 20
        file = folder / f"images{split}" / f"{case}_{channel:04d}.nii.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(image.astype(np.float32), AFFINE), file)
    if has_label:
        file = folder / f"labels{split}" / f"{case}.nii.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(labels, AFFINE), file)


def write_dataset(
    raw: Path,
    name: str,
    *,
    modality: str,
    channels: int = 1,
    train: int = 2,
    test: int = 1,
    shape: Sequence[int] = (28, 30, 20),
    regions: bool = False,
    ignore: bool = False,
    classification: bool = False,
) -> Path:
    """A raw dataset of phantom scans."""
    folder, seed = raw / name, sum(map(ord, name))
    rows, total = ["identifier,label,split"], train + test
    for index in range(total):
        split = "Tr" if index < train else "Ts"
        write_case(
            folder,
            f"case_{index:02d}",
            seed + index,
            modality=modality,
            channels=channels,
            shape=shape,
            has_label=not classification,
            split=split,
            bright=not classification or index % 2 == 1,
        )
        rows.append(f"case_{index:02d},{index % 2},{'train' if split == 'Tr' else 'test'}")
    labels: dict[str, object] = {"background": 0, "organ": 1, "lesion": 2}
    document: dict[str, object] = {"numTraining": train, "file_ending": ".nii.gz"}
    if regions:
        labels = {"background": 0, "whole": [1, 2], "lesion": [2]}
        document["regions_class_order"] = [1, 2]
    if ignore:
        labels["ignore"] = 3
    names = [modality if modality == "CT" else f"MR{c}" for c in range(channels)]
    document |= {"channel_names": {str(c): n for c, n in enumerate(names)}, "labels": labels}
    if classification:
        document["classification_labels"] = {"healthy": 0, "tumour": 1}
        (folder / "cls_data.csv").write_text("\n".join(rows) + "\n")
    (folder / "dataset.json").write_text(json.dumps(document))
    return folder


def write_slices(raw: Path, name: str, **settings: object) -> Path:
    """A raw dataset of single slices: the middle ones of phantom scans."""
    folder = write_dataset(raw, name, **{"shape": (40, 36, 9), **settings})
    for path in folder.rglob("*.nii.gz"):
        image = nibabel.load(path)
        middle = image.shape[2] // 2
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj)[:, :, middle : middle + 1], AFFINE), path)
    return folder


TINY_TRAINING = {"local_steps": 2, "validation_batches": 1, "learning_rate": 0.003}
TINY_TOPOLOGY = {"features": [4, 8, 16], "adaptor_width": 4}


def federation(raw: Path, preprocessed: Path, workspace: Path, **changes: object) -> dict[str, object]:
    """Settings of a federation over the datasets of the ``raw_datasets`` fixture."""
    clients = [
        {"name": "ct_plain", "dataset": 801, "modality": "CT", "patch_size": [16, 16, 16]},
        {"name": "ct_regions", "dataset": 802, "modality": "CT", "patch_size": [16, 16, 16]},
        {"name": "mr_two", "dataset": 803, "modality": "MR", "channels": 2, "patch_size": [16, 16, 16]},
        {"name": "mr_class", "dataset": 804, "modality": "MR", "task": "classification"},
    ]
    return {
        "name": "phantoms",
        "seed": 3,
        "rounds": 2,
        "threads": 1,
        "raw": str(raw),
        "preprocessed": str(preprocessed),
        "workspace": str(workspace),
        "topology": TINY_TOPOLOGY,
        "training": TINY_TRAINING,
        "inference": {"mirroring": False},
        "clients": clients,
        **changes,
    }
