"""The configuration for the Medical Segmentation Decathlon against the datasets' own descriptions."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from msd_datasets import MSD, as_converted

from fedcmt import strategies
from fedcmt.config import FederationConfig, load_config
from fedcmt.dataset import load_dataset
from fedcmt.plans import check_client

CONFIG = Path(__file__).parents[1] / "configs" / "msd10.yaml"


@pytest.fixture(scope="module")
def config() -> FederationConfig:
    return load_config(CONFIG)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ten datasets as nnU-Net converts them, with one case each."""
    root = tmp_path_factory.mktemp("msd")
    image = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    for task, document in MSD.items():
        number, name = task.removeprefix("Task").split("_")
        folder = root / f"Dataset{int(number):03d}_{name}"
        for kind in ("imagesTr", "labelsTr", "imagesTs"):
            (folder / kind).mkdir(parents=True)
        for channel in document["modality"]:
            nibabel.save(image, folder / "imagesTr" / f"case_{int(channel):04d}.nii.gz")
            nibabel.save(image, folder / "imagesTs" / f"test_{int(channel):04d}.nii.gz")
        nibabel.save(image, folder / "labelsTr" / "case.nii.gz")
        (folder / "dataset.json").write_text(json.dumps(as_converted(document, 1)))
    return root


def test_every_task_has_one_client(config: FederationConfig) -> None:
    wanted = [f"Dataset{task[4:6].zfill(3)}_{task[7:]}" for task in MSD]
    assert [client.dataset for client in config.clients] == wanted
    assert [client.modality for client in config.clients].count("CT") == 6
    assert [client.modality for client in config.clients].count("MR") == 4
    strategies.create(config.strategy).check([client.name for client in config.clients])


@pytest.mark.parametrize("index", range(10))
def test_client_agrees_with_its_dataset(config: FederationConfig, raw: Path, index: int) -> None:
    client, document = config.clients[index], list(MSD.values())[index]
    dataset = load_dataset(raw, client.dataset, client=client.name)
    assert check_client(client, dataset) == "segmentation"
    assert client.channels == len(document["modality"]) == len(dataset.channel_names)
    assert dataset.labels == {name: int(value) for value, name in document["labels"].items()}
