"""The prediction command on a folder: what is written beside the labels, what is shown, what a broken case does."""

from __future__ import annotations

import io
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from stock_models import write_model, write_scan

from fedcmt.case_progress import LiveCaseProgress, open_progress
from fedcmt.infer import Predictor, main
from fedcmt.predictor import entropy_map
from fedcmt.volume import read_volume


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small stock model."""
    return write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A folder of three scans."""
    for number in range(3):
        write_scan(tmp_path / "scans", f"case_{number}", shape=(10 + number, 14, 16), seed=number)
    return tmp_path / "scans"


def run(model: Path, source: Path, output: Path, *flags: str) -> int:
    """The command, in this process."""
    return main(["-m", str(model), "-i", str(source), "-o", str(output), "--disable-mirroring", *flags])


def test_a_folder_is_predicted_as_its_cases_are(
    model: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, scans, tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"case_{i}.nii.gz" for i in range(3)]
    predictor = Predictor.from_model_folder(model, mirroring=False)
    for number in range(3):
        alone = predictor.predict(read_volume(scans / f"case_{number}_0000.nii.gz")).data
        assert np.array_equal(read_volume(tmp_path / "out" / f"case_{number}.nii.gz").data, alone)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in lines[:3]] == [[f"case {i + 1}/3", f"case_{i}"] for i in range(3)]
    assert lines[3] == f"3 cases written to {tmp_path / 'out'}"


def test_a_broken_case_is_skipped_and_the_command_says_so(
    model: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = scans / "case_1_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:300])
    assert run(model, scans, tmp_path / "out") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["case_0.nii.gz", "case_2.nii.gz"]
    shown = capsys.readouterr()
    errors = shown.err.splitlines()
    assert len(errors) == 2
    assert "case 'case_1'" in errors[0]
    assert "truncated" in errors[0]
    assert errors[1] == "error: 1 of 3 cases skipped: case_1"
    assert "2 cases written" in shown.out


def test_maps_and_previews_are_written_on_request(model: Path, scans: Path, tmp_path: Path) -> None:
    flags = ("--save-probabilities", "--save-entropy", "--save-previews")
    scan = scans / "case_0_0000.nii.gz"
    assert run(model, scan, tmp_path / "out", *flags) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"case_0.nii.gz", "case_0.npz", "case_0_entropy.nii.gz", "case_0.png"}
    chances = np.load(tmp_path / "out" / "case_0.npz")["probabilities"]
    entropy = nibabel.load(tmp_path / "out" / "case_0_entropy.nii.gz")
    assert np.array_equal(entropy.affine, nibabel.load(scan).affine)
    values = entropy.get_fdata().transpose(2, 1, 0)
    expected = -(chances * np.log(np.maximum(chances, 1e-12))).sum(0) / np.log(3)
    np.testing.assert_allclose(values, expected, atol=1e-5)
    assert (tmp_path / "out" / "case_0.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_only_the_entropy_is_written_where_only_it_is_asked_for(model: Path, scans: Path, tmp_path: Path) -> None:
    assert run(model, scans / "case_0_0000.nii.gz", tmp_path / "out", "--save-entropy") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"case_0.nii.gz", "case_0_entropy.nii.gz"}


def test_entropy_is_nothing_where_certain_and_one_where_undecided() -> None:
    chances = np.zeros((4, 1, 1, 2), np.float32)
    chances[:, 0, 0, 0] = 0.25
    chances[2, 0, 0, 1] = 1
    np.testing.assert_allclose(entropy_map(chances, regions=False), [[[1, 0]]], atol=1e-6)
    regions = np.array([0.5, 0, 1, 0.5], np.float32).reshape(2, 1, 1, 2)
    np.testing.assert_allclose(entropy_map(regions, regions=True), [[[0.5, 0.5]]], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--client", "-m MODEL_FOLDER"]),
        (["-m", "MODEL", "--workspace", "w"], ["field '-m'", "not both"]),
        (["--workspace", "w", "--client", "a", "--folds", "1"], ["--folds", "with -m"]),
        (["-m", "MODEL", "--tile-step-size", "0"], ["--tile-step-size", "found 0"]),
    ],
)
def test_a_contradictory_command_is_one_line(
    model: Path,
    scans: Path,
    tmp_path: Path,
    arguments: list[str],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(model) if argument == "MODEL" else argument for argument in arguments]
    assert main([*given, "-i", str(scans), "-o", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in parts), line


class Terminal(io.StringIO):
    """A stream that takes itself for a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    progress = open_progress(2, stream)
    assert isinstance(progress, LiveCaseProgress)
    cases = {f"case_{i}": (scans / f"case_{i}_0000.nii.gz",) for i in range(2)}
    with progress:
        Predictor.from_model_folder(model, mirroring=False).predict_files(cases, tmp_path / "out", progress=progress)
    assert progress._bar.tasks[0].completed == 2
    assert "case_1  written after" in stream.getvalue()


def test_many_labels_are_written_as_16_bits(tmp_path: Path, scans: Path) -> None:
    labels = {"background": 0, **{f"label_{i}": i for i in range(1, 300)}}
    model = write_model(tmp_path / "many", labels=labels, features=(2, 4))
    volume = read_volume(scans / "case_0_0000.nii.gz")
    predicted = Predictor.from_model_folder(model, mirroring=False, device="cpu").predict(volume)
    assert predicted.data.dtype == np.uint16
    assert predicted.data.max() > 255


def test_old_plans_are_understood(model: Path, tmp_path: Path, scans: Path) -> None:
    """Plans of nnU-Net before 2.3 name the network's settings otherwise."""
    import shutil

    copy = tmp_path / "old"
    shutil.copytree(model, copy)
    plans = json.loads((copy / "plans.json").read_text())
    configuration = plans["configurations"]["3d_fullres"]
    arguments = configuration.pop("architecture")["arch_kwargs"]
    configuration |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 4,
        "unet_max_num_features": 320,
        "n_conv_per_stage_encoder": arguments["n_conv_per_stage"],
        "n_conv_per_stage_decoder": arguments["n_conv_per_stage_decoder"],
        "conv_kernel_sizes": arguments["kernel_sizes"],
        "pool_op_kernel_sizes": arguments["strides"],
        "num_pool_per_axis": [1, 1, 1],
    }
    (copy / "plans.json").write_text(json.dumps(plans))
    volume = read_volume(scans / "case_0_0000.nii.gz")
    with pytest.warns(UserWarning, match="old nnU-Net plans"):
        old = Predictor.from_model_folder(copy, mirroring=False).predict(volume)
    assert np.array_equal(old.data, Predictor.from_model_folder(model, mirroring=False).predict(volume).data)
