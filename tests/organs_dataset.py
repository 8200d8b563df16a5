"""A small, good raw dataset and the means to spoil it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from fedcmt.dataset import RawDataset, load_dataset
from fedcmt.errors import InputError

SHAPE = (12, 11, 10)
AFFINE = np.diag([-0.8, 0.8, 3.0, 1.0])
REGIONS = {"background": 0, "whole": [1, 2], "core": [2]}


def save(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(data, affine).to_filename(path)


def scan(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-50, 900, SHAPE).astype(np.int16)


def label_map(highest: int = 2) -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    for value in range(1, highest + 1):
        labels[value * 2 : value * 2 + 2, 3:6, 3:6] = value
    return labels


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A raw folder with Dataset011_Organs (2 channels, 2 training cases, 1 test case)."""
    folder = tmp_path / "raw" / "Dataset011_Organs"
    for number, (split, identifier) in enumerate([("Tr", "case_1"), ("Tr", "case_2"), ("Ts", "case_9")]):
        for channel in range(2):
            save(folder / f"images{split}" / f"{identifier}_000{channel}.nii.gz", scan(10 * number + channel))
        save(folder / f"labels{split}" / f"{identifier}.nii.gz", label_map())
    document = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "liver": 1, "spleen": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(document))
    return folder.parent


@pytest.fixture
def folder(raw: Path) -> Path:
    return raw / "Dataset011_Organs"


def edit(folder: Path, **changes: Any) -> None:
    """Changes keys of dataset.json; ``None`` removes one."""
    document = json.loads((folder / "dataset.json").read_text()) | changes
    kept = {key: value for key, value in document.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(kept))


def make_classification(folder: Path, rows: str = "identifier,label\ncase_1,healthy\ncase_2,tumour\n") -> None:
    shutil.rmtree(folder / "labelsTr", ignore_errors=True)
    shutil.rmtree(folder / "labelsTs", ignore_errors=True)
    edit(folder, classification_labels={"healthy": 0, "tumour": 1})
    (folder / "cls_data.csv").write_text(rows)


def load(folder: Path) -> RawDataset:
    return load_dataset(folder.parent, 11, client="site_a")


def complaint(action: Callable[[], object]) -> InputError:
    """The first of the complaints, each of which must be one line that names the client."""
    return complaints(action)[0]


def complaints(action: Callable[[], object]) -> list[InputError]:
    with pytest.raises(InputError) as caught:
        action()
    for error in caught.value.each():
        assert "\n" not in str(error)
        assert "client 'site_a'" in str(error)
    return caught.value.each()
