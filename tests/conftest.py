"""Shared fixtures: phantom datasets and one finished federation on them."""

from __future__ import annotations

from pathlib import Path

import pytest
from organs_dataset import folder, raw  # noqa: F401 (fixtures)
from phantoms import federation, write_dataset

import fedcmt  # noqa: F401 (before torch: it sets how OpenMP's threads wait)


@pytest.fixture(scope="session")
def raw_datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnU-Net's raw folder with four small datasets."""
    root = tmp_path_factory.mktemp("raw")
    write_dataset(root, "Dataset801_Plain", modality="CT")
    write_dataset(root, "Dataset802_Regions", modality="CT", regions=True)
    write_dataset(root, "Dataset803_TwoChannels", modality="MR", channels=2, ignore=True)
    write_dataset(root, "Dataset804_Classes", modality="MR", train=4, test=2, classification=True)
    return root


@pytest.fixture(scope="session")
def preprocessed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnU-Net's preprocessed folder, filled on first use."""
    return tmp_path_factory.mktemp("preprocessed")


@pytest.fixture(scope="session")
def finished(raw_datasets: Path, preprocessed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Workspace of a federation that ran to its end."""
    from fedcmt import run_federation

    workspace = tmp_path_factory.mktemp("workspace") / "finished"
    run_federation(federation(raw_datasets, preprocessed, workspace))
    return workspace
