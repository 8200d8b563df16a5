"""Prediction: the input's grid exactly, stock nnU-Net's labels, and one line for every mistake."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from phantoms import write_case

from fedcmt.checkpoint import ClientFolder, existing_client
from fedcmt.errors import InputError
from fedcmt.infer import Predictor, find_cases, main
from fedcmt.volume import read_volume


def image_of(raw: Path, dataset: str, case: str = "case_02", channel: int = 0) -> Path:
    return raw / dataset / "imagesTs" / f"{case}_{channel:04d}.nii.gz"


def run(workspace: Path, client: str, source: Path, output: Path, *flags: str) -> int:
    """The command, in this process."""
    arguments = ["--workspace", str(workspace), "--client", client, "-i", str(source), "-o", str(output)]
    return main([*arguments, *flags])


def oblique_affine() -> np.ndarray:
    """Rotated about two axes, one axis flipped, three different spacings."""
    a, b = 0.3, -0.2
    rotate_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    rotate_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = rotate_z @ rotate_x @ np.diag([-1.5, 2.25, 4.0])
    affine[:3, 3] = [12.5, -80.25, 33.125]
    return affine


@pytest.mark.parametrize("forms", ["both", "qform", "sform"])
def test_label_map_stands_on_the_inputs_grid_exactly(finished: Path, tmp_path: Path, forms: str) -> None:
    rng = np.random.default_rng(0)
    image = nibabel.Nifti1Image(rng.normal(0, 100, (26, 22, 18)).astype(np.float32), oblique_affine())
    image.set_sform(oblique_affine() if forms != "qform" else None, code=1 if forms != "qform" else 0)
    image.set_qform(oblique_affine() if forms != "sform" else None, code=2 if forms != "sform" else 0)
    source = tmp_path / "oblique.nii.gz"
    nibabel.save(image, source)
    assert run(finished, "ct_plain", source, tmp_path / "out", "--disable-mirroring") == 0
    written = nibabel.load(tmp_path / "out" / "oblique.nii.gz")
    read = nibabel.load(source)
    assert np.array_equal(written.affine, read.affine)
    assert written.shape == read.shape
    assert (written.get_sform(coded=True)[1], written.get_qform(coded=True)[1]) == (
        read.get_sform(coded=True)[1],
        read.get_qform(coded=True)[1],
    )
    ours, theirs = SimpleITK.ReadImage(str(tmp_path / "out" / "oblique.nii.gz")), SimpleITK.ReadImage(str(source))
    for geometry in ("GetSpacing", "GetOrigin", "GetDirection", "GetSize"):
        assert getattr(ours, geometry)() == getattr(theirs, geometry)()


@pytest.mark.parametrize(
    ("client", "dataset"),
    [("ct_plain", "Dataset801_Plain"), ("ct_regions", "Dataset802_Regions"), ("mr_two", "Dataset803_TwoChannels")],
)
@pytest.mark.parametrize("mirroring", [False, True])
def test_labels_equal_stock_nnunet(
    finished: Path, raw_datasets: Path, tmp_path: Path, client: str, dataset: str, mirroring: bool
) -> None:
    """Stock nnU-Net reads the exported folder, preprocesses, predicts and writes by itself."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    stock = nnUNetPredictor(use_mirroring=mirroring, device=torch.device("cpu"), allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(finished / "clients" / client / "model"), (0,))
    channels = 2 if client == "mr_two" else 1
    files = [str(image_of(raw_datasets, dataset, channel=c)) for c in range(channels)]
    stock.predict_from_files_sequential([files], [str(tmp_path / "stock")])
    theirs = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "stock.nii.gz")))
    predictor = Predictor.from_workspace(finished, client, device="cpu", mirroring=mirroring)
    ours = predictor.predict(read_volume([Path(file) for file in files])).data[0]
    assert len(np.unique(theirs)) > 1
    assert np.array_equal(ours, theirs)


def test_exported_checkpoint_loads_without_pickle(finished: Path) -> None:
    checkpoint = torch.load(
        finished / "clients" / "ct_plain" / "model" / "fold_0" / "checkpoint_final.pth", weights_only=True
    )
    assert set(checkpoint) == {"network_weights", "trainer_name", "init_args", "inference_allowed_mirroring_axes"}


def test_probabilities_are_a_distribution_and_agree_with_the_labels(
    finished: Path, raw_datasets: Path, tmp_path: Path
) -> None:
    assert (
        run(
            finished,
            "ct_plain",
            image_of(raw_datasets, "Dataset801_Plain"),
            tmp_path,
            "--save-probabilities",
            "--disable-mirroring",
        )
        == 0
    )
    probabilities = np.load(tmp_path / "case_02.npz")["probabilities"]
    labels = read_volume(tmp_path / "case_02.nii.gz").data[0]
    assert np.allclose(probabilities.sum(0), 1, atol=1e-3)
    assert np.array_equal(probabilities.argmax(0), labels)


def test_mirroring_changes_probabilities(finished: Path, raw_datasets: Path) -> None:
    volume = read_volume(image_of(raw_datasets, "Dataset801_Plain"))
    plain, mirrored = (
        Predictor.from_workspace(finished, "ct_plain", mirroring=mirroring)
        .predict_case(volume, probabilities=True)
        .probabilities
        for mirroring in (False, True)
    )
    assert not np.allclose(plain, mirrored, atol=1e-3)


def test_classification_writes_a_table(finished: Path, raw_datasets: Path, tmp_path: Path) -> None:
    assert run(finished, "mr_class", raw_datasets / "Dataset804_Classes" / "imagesTs", tmp_path) == 0
    rows = list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))
    assert [row["identifier"] for row in rows] == ["case_04", "case_05"]
    for row in rows:
        chances = {name: float(row[f"probability_{name}"]) for name in ("healthy", "tumour")}
        assert sum(chances.values()) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == max(chances, key=chances.get)


def test_a_case_smaller_than_the_patch_is_predicted(finished: Path, tmp_path: Path) -> None:
    write_case(tmp_path, "small", 0, modality="CT", channels=1, shape=(9, 20, 7), has_label=False, split="Ts")
    source = tmp_path / "imagesTs" / "small_0000.nii.gz"
    assert run(finished, "ct_plain", source, tmp_path) == 0
    assert nibabel.load(tmp_path / "small.nii.gz").shape == (9, 20, 7)


def test_module_runs_as_a_command(finished: Path, raw_datasets: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "fedcmt.infer",
            "--workspace",
            finished,
            "--client",
            "mr_two",
            "-i",
            raw_datasets / "Dataset803_TwoChannels" / "imagesTs",
            "-o",
            tmp_path / "out",
            "--device",
            "cpu",
            "--disable-mirroring",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "case_02.nii.gz").is_file()


@pytest.mark.parametrize(
    ("client", "source", "parts"),
    [
        ("nobody", None, ["client 'nobody'", "ct_plain"]),
        ("../ct_plain", None, ["no such client"]),
        ("ct_plain", "none.nii.gz", ["does not exist"]),
        ("mr_two", "alone_0000.nii.gz", ["case 'alone'", "alone_0001.nii.gz is missing"]),
        ("mr_two", "named.nii.gz", ["case 'named'", "found 1 channel, expected 2"]),
        ("ct_plain", "broken.nii.gz", ["case 'broken'"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    finished: Path,
    raw_datasets: Path,
    tmp_path: Path,
    client: str,
    source: str | None,
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = image_of(raw_datasets, "Dataset801_Plain") if source is None else tmp_path / source
    if source == "broken.nii.gz":
        path.write_bytes(image_of(raw_datasets, "Dataset801_Plain").read_bytes()[:500])
    elif source and source != "none.nii.gz":
        path.write_bytes(image_of(raw_datasets, "Dataset801_Plain").read_bytes())
    code = run(finished, client, path, tmp_path / "out")
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1
    assert all(part in lines[0] for part in parts), lines[0]
    assert not list(tmp_path.glob("out/*"))


def test_a_folder_without_workspace_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no workspace"):
        existing_client(tmp_path, "any")


def test_a_model_of_another_network_is_refused(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "client"
    shutil.copytree(finished / "clients" / "ct_plain", folder)
    shutil.copy(finished / "clients" / "mr_two" / "last.safetensors", folder / "last.safetensors")
    with pytest.raises(InputError, match="does not fit the network"):
        Predictor(ClientFolder(folder))


def test_cases_are_found_by_channel_and_by_name(tmp_path: Path) -> None:
    for name in ("a_0000.nii.gz", "a_0001.nii.gz", "notes.txt", ".hidden.nii.gz"):
        (tmp_path / name).touch()
    assert find_cases(tmp_path, 2) == {"a": (tmp_path / "a_0000.nii.gz", tmp_path / "a_0001.nii.gz")}
    single = tmp_path / "single"
    single.mkdir()
    (single / "scan_2020.nrrd").touch()
    (single / "b.nii").touch()
    assert find_cases(single, 1) == {"b": (single / "b.nii",), "scan_2020": (single / "scan_2020.nrrd",)}
    with pytest.raises(InputError, match="a channel too many"):
        find_cases(tmp_path, 1)
    (single / "b.nii.gz").touch()
    with pytest.raises(InputError, match="same output"):
        find_cases(single, 1)


def test_several_clients_are_an_ensemble(finished: Path, raw_datasets: Path, tmp_path: Path) -> None:
    image = image_of(raw_datasets, "Dataset801_Plain")
    flags = ("--disable-mirroring", "--save-probabilities")
    assert run(finished, "ct_plain", image, tmp_path / "one", *flags) == 0
    assert run(finished, "ct_plain", image, tmp_path / "two", "--client", "ct_plain", *flags) == 0
    one, two = (np.load(tmp_path / name / "case_02.npz")["probabilities"] for name in ("one", "two"))
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_clients_of_other_labels_or_channels_are_not_averaged(finished: Path) -> None:
    with pytest.raises(InputError, match=r"ct_plain and mr_two cannot be averaged: 1 and 2"):
        Predictor.from_workspace(finished, ["ct_plain", "mr_two"])
    with pytest.raises(InputError, match=r"ct_plain and ct_regions cannot be averaged"):
        Predictor.from_workspace(finished, ["ct_plain", "ct_regions"])


def test_an_exported_folder_predicts_as_its_client(finished: Path, raw_datasets: Path) -> None:
    volume = read_volume(image_of(raw_datasets, "Dataset802_Regions"))
    options = {"device": "cpu", "mirroring": False}
    exported = Predictor.from_model_folder(finished / "clients" / "ct_regions" / "model", **options)
    client = Predictor.from_workspace(finished, "ct_regions", **options)
    assert np.array_equal(exported.predict(volume).data, client.predict(volume).data)


def test_an_exported_classifier_predicts_as_its_client(finished: Path, raw_datasets: Path, tmp_path: Path) -> None:
    images, model = raw_datasets / "Dataset804_Classes" / "imagesTs", finished / "clients" / "mr_class" / "model"
    assert run(finished, "mr_class", images, tmp_path / "client") == 0
    assert main(["-m", str(model), "-i", str(images), "-o", str(tmp_path / "exported")]) == 0
    written = [(tmp_path / name / "predictions.csv").read_text() for name in ("client", "exported")]
    assert written[0] == written[1]
