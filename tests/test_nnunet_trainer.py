"""Stock nnU-Net trains our network, and stock prediction and ours agree on the result."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from phantoms import write_slices

from fedcmt.checkpoint import ClientFolder
from fedcmt.cli import main
from fedcmt.doctor import TRAINER_FOLDER
from fedcmt.files import write_json, write_tensors
from fedcmt.infer import Predictor
from fedcmt.initial_weights import read_weights, start_from
from fedcmt.network import build_network
from fedcmt.volume import read_volume

pytestmark = pytest.mark.filterwarnings("ignore")  # stock nnU-Net's own


@pytest.fixture
def stock_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's three folders and the one with our trainer."""
    write_slices(tmp_path / "raw", "Dataset871_Slices", modality="MR", train=3)
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINER_FOLDER))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    return tmp_path


def train(dataset: str, configuration: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``nnUNetv2_train DATASET CONFIGURATION 0 -p fedcmt_planned -tr nnUNetTrainerFedCMT``, two steps long."""
    from nnunetv2.run.run_training import run_training
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    trainer = recursive_find_trainer_class_by_name("nnUNetTrainerFedCMT")
    built = trainer.__init__

    def short(self: object, plans: dict, configuration: str, fold: int, dataset_json: dict, device: object) -> None:
        built(self, plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1

    monkeypatch.setattr(trainer, "__init__", short)
    # Its final validation starts pools of processes, which takes longer than all the rest.
    monkeypatch.setattr(trainer, "perform_actual_validation", lambda self, save_probabilities: None)
    run_training(
        dataset, configuration, 0, trainer.__name__, plans_identifier="fedcmt_planned", device=torch.device("cpu")
    )


@pytest.mark.parametrize(
    ("dataset", "configuration"), [("Dataset801_Plain", "3d_fullres"), ("Dataset871_Slices", "2d")]
)
def test_stock_training_and_both_predictions_agree(
    dataset: str, configuration: str, stock_folders: Path, raw_datasets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    if dataset == "Dataset801_Plain":
        shutil.copytree(raw_datasets / dataset, stock_folders / "raw" / dataset)
    assert main(["preprocess", "-d", dataset]) == 0
    train(dataset, configuration, monkeypatch)
    result = stock_folders / "results" / dataset / f"nnUNetTrainerFedCMT__fedcmt_planned__{configuration}"

    source = stock_folders / "raw" / dataset / "imagesTs"
    image = next(source.iterdir())
    stock = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(result), (0,))
    stock.predict_from_files_sequential([[str(image)]], [str(stock_folders / "stock")])
    theirs = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(stock_folders / "stock.nii.gz")))

    ours = Predictor(as_client(result, stock_folders / "client"), device="cpu", mirroring=False)
    labels = ours.predict(read_volume(image)).data[0]
    assert len(np.unique(theirs)) > 1
    assert np.array_equal(labels, theirs)


def as_client(result: Path, folder: Path) -> ClientFolder:
    """A client's folder of what stock nnU-Net trained: its plans name our network, its tensors are ours."""
    client = ClientFolder(folder)
    plans = json.loads((result / "plans.json").read_text())
    configuration = result.name.rsplit("__", 1)[1]
    plans["configurations"] = {configuration: plans["configurations"][configuration]}
    architecture = plans["configurations"][configuration]["architecture"]
    assert architecture["network_class_name"] == "fedcmt.network.FedCMTNet"
    dataset_json = json.loads((result / "dataset.json").read_text())
    weights = read_weights(result / "fold_0" / "checkpoint_final.pth")  # a real stock checkpoint, read safely
    network = build_network(architecture, 1, len(dataset_json["labels"]))
    matched = start_from(network, weights, ["adaptor", "encoder", "decoder"])
    assert not matched.left
    assert not matched.unused
    write_json(client.plans, plans)
    write_json(client.dataset_json, dataset_json)
    write_json(client.facts, {"task": "segmentation", "num_heads": 3, "mirror_axes": [0, 1], "class_names": []})
    write_tensors(client.weights, dict(network.named_parameters()), {})
    return client


def test_doctor_names_the_folder_to_export(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    assert main(["doctor"]) == 0
    assert f"export nnUNet_extTrainer={TRAINER_FOLDER}" in capsys.readouterr().out
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), str(TRAINER_FOLDER)]))
    assert main(["doctor"]) == 0
    assert "nnUNet_extTrainer: has FedCMT's trainer" in capsys.readouterr().out


def test_the_folder_holds_the_shim_and_no_package_of_its_own() -> None:
    assert sorted(path.name for path in TRAINER_FOLDER.glob("*.py")) == ["__init__.py", "fedcmt_trainer.py"]
