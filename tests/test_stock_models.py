"""Predicting from stock nnU-Net model folders: labels equal those of nnU-Net itself, voxel by voxel."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from stock_models import write_model, write_scan

from fedcmt.errors import InputError
from fedcmt.infer import Predictor, main
from fedcmt.models import NnunetFolder, open_model
from fedcmt.volume import read_volume

MANY = {"background": 0, **{f"label_{i}": i for i in range(1, 9)}}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "edema": [3]}

# name: (model, scan, mirroring)
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "isotropic": ({"spacing": (2, 2, 2)}, {"spacing": (2.4, 1.6, 1.6)}, False),
    "mirrored": ({"spacing": (2, 2, 2)}, {"spacing": (2.4, 1.6, 1.6), "shape": (16, 20, 20)}, True),
    "two to three": ({"spacing": (3, 1.5, 1.5)}, {"spacing": (2, 1.5, 1.5)}, False),
    "separate z": ({"spacing": (6, 1.2, 1.2)}, {"spacing": (5, 1, 1), "shape": (18, 30, 28)}, False),
    "separate x": ({"spacing": (1.2, 1.2, 6)}, {"spacing": (1, 1, 5), "shape": (28, 30, 18)}, False),
    "same grid": ({"spacing": (3, 1.5, 1.5)}, {"spacing": (3, 1.5, 1.5)}, False),
    "padded": ({"spacing": (2, 2, 2)}, {"spacing": (2, 2.2, 2), "shape": (9, 11, 14)}, False),
    "regions": ({"labels": REGIONS, "regions_class_order": (1, 2, 3)}, {"spacing": (2.4, 1.6, 1.6)}, False),
    "channels": ({"channels": 3}, {"channels": 3, "spacing": (2.5, 1.7, 1.9)}, False),
    "CT": ({"normalization": "CTNormalization"}, {"spacing": (2.5, 1.7, 1.9)}, False),
    "many labels": ({"labels": MANY}, {"spacing": (2.5, 1.7, 1.9)}, False),
    "slices": ({"spacing": (1.4, 1.4), "patch_size": (16, 16)}, {"shape": (7, 26, 24)}, False),
    "transposed": ({"spacing": (2, 2, 2), "transpose": (2, 0, 1)}, {"spacing": (2.4, 1.6, 1.6)}, False),
    "folds": ({"folds": (0, 1, 3)}, {"spacing": (2.4, 1.6, 1.6), "shape": (18, 20, 20)}, False),
}


def stock_labels(model: Path, files: list[Path], output: Path, *, mirroring: bool, folds: Any = None) -> np.ndarray:
    """nnU-Net's own labels `[D, H, W]`, through its sequential interface."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    stock = nnUNetPredictor(use_mirroring=mirroring, device=torch.device("cpu"), allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(model), folds)
    output.parent.mkdir(parents=True, exist_ok=True)
    stock.predict_from_files_sequential([[str(file) for file in files]], [str(output)])
    return sitk.GetArrayFromImage(sitk.ReadImage(f"{output}.nii.gz"))


@pytest.mark.parametrize("kind", KINDS)
def test_labels_equal_nnunets(kind: str, tmp_path: Path) -> None:
    made, scanned, mirroring = KINDS[kind]
    model = write_model(tmp_path / "model", **made)
    files = write_scan(tmp_path / "scans", "case", **scanned)
    theirs = stock_labels(model, files, tmp_path / "stock" / "case", mirroring=mirroring)
    ours = Predictor.from_model_folder(model, device="cpu", mirroring=mirroring).predict(read_volume(files))
    assert len(np.unique(theirs)) > 1
    assert np.array_equal(ours.data[0], theirs)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of two folds."""
    return write_model(tmp_path_factory.mktemp("stock") / "model", folds=(0, 1))


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan."""
    return write_scan(tmp_path_factory.mktemp("scan"), "scan", shape=(12, 18, 18))[0]


def run(model: Path, source: Path, output: Path, *flags: str) -> int:
    """The command, in this process."""
    return main(["-m", str(model), "-i", str(source), "-o", str(output), "--disable-mirroring", *flags])


def test_command_writes_the_labels_of_the_folds_named(model: Path, scan: Path, tmp_path: Path) -> None:
    assert run(model, scan, tmp_path, "--folds", "1", "--device", "cpu") == 0
    theirs = stock_labels(model, [scan], tmp_path / "stock" / "scan", mirroring=False, folds=(1,))
    assert np.array_equal(read_volume(tmp_path / "scan.nii.gz").data[0], theirs)


def test_probabilities_equal_nnunets(model: Path, scan: Path, tmp_path: Path) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    stock = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(model), (0,))
    ((labels, probabilities),) = stock.predict_from_files_sequential([[str(scan)]], None, save_probabilities=True)
    predictor = Predictor.from_model_folder(model, [0], device="cpu", mirroring=False)
    ours = predictor.predict_case(read_volume(scan), probabilities=True)
    assert np.array_equal(ours.labels, labels)
    # Half-precision logits are equal; torch's softmax depends in its last bit on how threads share the work.
    np.testing.assert_allclose(ours.probabilities, probabilities, rtol=0, atol=2e-7)


def test_stock_checkpoint_is_refused_by_torch_alone(model: Path) -> None:
    """The reason for the list of NumPy's scalar types: without it a checkpoint of the trainer does not load."""
    with pytest.raises(pickle.UnpicklingError):
        torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert open_model(NnunetFolder(model)).configuration == "3d_fullres"


class Malicious:
    """Runs something when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        ("truncated", ["checkpoint_final.pth", "truncated"]),
        ("malicious", ["checkpoint_final.pth", "not loaded"]),
        ("other network", ["does not fit the network"]),
        ("other class", ["plans", "os.system"]),
        ("no folder", ["field '-m'", "no folder"]),
        ("fold", ["--folds", "use 0, 1"]),
        ("cascade", ["cascade", "nnUNetv2_predict"]),
        ("reader", ["NibabelIOWithReorient"]),
        ("pictures", ["NaturalImage2DIO", "nnUNetv2_predict"]),
        ("not a number", ["checkpoint_final.pth", "NaN or Inf", "seg_layers"]),
    ],
)
def test_a_damaged_model_is_one_line(
    model: Path,
    scan: Path,
    tmp_path: Path,
    damage: str,
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    copy, flags = tmp_path / "model", []
    shutil.copytree(model, copy)
    checkpoint = copy / "fold_0" / "checkpoint_final.pth"
    plans = json.loads((copy / "plans.json").read_text())
    configuration = plans["configurations"]["3d_fullres"]
    if damage == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    elif damage == "malicious":
        torch.save({"network_weights": {}, "trainer_name": Malicious()}, checkpoint)
    elif damage == "other network":
        configuration["architecture"]["arch_kwargs"]["features_per_stage"] = [6, 8]
    elif damage == "other class":
        configuration["architecture"]["network_class_name"] = "os.system"
    elif damage == "no folder":
        copy = tmp_path / "none"
    elif damage == "fold":
        flags = ["--folds", "7"]
    elif damage == "cascade":
        configuration["previous_stage"] = "3d_lowres"
    elif damage == "reader":
        plans["image_reader_writer"] = "NibabelIOWithReorient"
    elif damage == "pictures":
        plans["image_reader_writer"] = "NaturalImage2DIO"
    elif damage == "not a number":
        saved = torch.load(checkpoint, weights_only=False)  # written by this test's fixture
        saved["network_weights"]["decoder.seg_layers.0.bias"][0] = float("nan")
        torch.save(saved, checkpoint)
    if copy.is_dir():
        (copy / "plans.json").write_text(json.dumps(plans))
    assert run(copy, scan, tmp_path / "out", *flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert all(part in lines[0] for part in parts), lines[0]
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out").exists()


def test_an_empty_scan_is_one_warning(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    image = sitk.GetImageFromArray(np.zeros((18, 20, 22), np.float32))
    sitk.WriteImage(image, str(tmp_path / "in" / "empty_0000.nii.gz"))
    assert run(model, tmp_path / "in" / "empty_0000.nii.gz", tmp_path / "out", "--folds", "0") == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("case 1/1")]
    assert "channel 'MR0' is constant (0)" in line


def test_logits_that_overflow_are_an_error_and_not_labels(model: Path, scan: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    predictor = Predictor.from_model_folder(copy, [0], device="cpu", mirroring=False)
    with torch.no_grad():
        for name, weights in predictor._model.network.named_parameters():
            if "seg_layers" in name:
                weights.copy_(weights * 1e6)
    from fedcmt.errors import RunError

    with pytest.raises(RunError, match="half"):
        predictor.predict(read_volume(scan))


def test_an_ensemble_is_the_mean_of_probabilities(tmp_path: Path, scan: Path) -> None:
    models = [write_model(tmp_path / str(seed), seed=seed, spacing=(2, 2, 1 + seed)) for seed in (0, 1)]
    options = {"device": "cpu", "mirroring": False}
    volume = read_volume(scan)
    single = [Predictor.from_model_folder(m, **options).predict_case(volume, probabilities=True) for m in models]
    both = Predictor.from_model_folder(models, **options).predict_case(volume, probabilities=True)
    mean = np.mean([prediction.probabilities for prediction in single], axis=0)
    np.testing.assert_allclose(both.probabilities, mean, atol=1e-6)
    assert np.array_equal(both.labels, both.probabilities.argmax(0))
    assert not np.array_equal(both.labels, single[0].labels)
    assert np.array_equal(both.labels, Predictor.from_model_folder(models, **options).predict(volume).data[0])


def test_models_of_other_labels_are_not_averaged(tmp_path: Path, model: Path) -> None:
    other = write_model(tmp_path / "other", labels=MANY)
    with pytest.raises(InputError, match="labels"):
        Predictor.from_model_folder([model, other])
