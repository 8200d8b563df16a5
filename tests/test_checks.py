"""``fedcmt check``: every problem of a dataset at once, warnings marked as such, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from organs_dataset import SHAPE, complaints, edit, label_map, load, make_classification, save, scan
from phantoms import federation

from fedcmt.cli import main
from fedcmt.dataset import check_images
from fedcmt.errors import InputError, InputErrors, Problems


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def spoil(folder: Path) -> list[tuple[str | None, str]]:
    """Spoils nine things; returns case and field of each, in the order of the check."""
    edit(folder, labels={"background": 0, "liver": 1.5, "spleen": "2"}, numTraining=7)
    (folder / "imagesTr" / "case_2_0001.nii.gz").unlink()
    (folder / "labelsTs" / "case_8.nii.gz").write_bytes(b"")
    fractional = label_map().astype(np.float32)
    fractional[-1, -1, -1] = 0.5
    save(folder / "labelsTr" / "case_1.nii.gz", fractional[1:])
    (folder / "imagesTs" / "case_9_0000.nii.gz").write_bytes(b"abc")
    save(folder / "imagesTs" / "case_9_0001.nii.gz", np.full(SHAPE, np.nan, np.float32))
    return [
        (None, "labels"),
        (None, "labels"),
        ("case_2", "images"),
        (None, "numTraining"),
        ("case_8", "imagesTs"),
        ("case_1", "shape"),
        ("case_1", "labels"),
        ("case_9", "images"),
        ("case_9", "voxels"),
    ]


def test_all_problems_of_a_dataset_are_listed_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = spoil(folder)
    before = files_below(folder)
    assert main(["check", "-d", "11", "--raw", str(folder.parent)]) == 2
    printed = capsys.readouterr()
    count, *lines = printed.err.strip().splitlines()
    assert count == f"error: {len(expected)} problems:"
    assert len(lines) == len(expected)
    for line, (case, field) in zip(lines, expected, strict=True):
        place = f"case '{case}', field '{field}': " if case else f"field '{field}': "
        assert line.startswith(f"  {place}"), line
        assert "; " in line  # every line says what to do
    assert printed.out == ""
    assert files_below(folder) == before


def test_loading_lists_all_problems_of_the_lists_of_files(folder: Path) -> None:
    expected = [place for place in spoil(folder) if place[1] in ("labels", "images", "numTraining", "imagesTs")][:5]
    assert [(error.case, error.field) for error in complaints(lambda: load(folder))] == expected


def test_all_problems_of_a_table_are_listed_at_once(folder: Path) -> None:
    rows = "identifier,label,split\ncase_1,x,train\ncase_1,healthy,train\ncase_7,tumour,\ncase_9,tumour,val\nshort\n"
    make_classification(folder, rows)
    found = [(error.case, error.field) for error in complaints(lambda: load(folder))]
    assert found == [
        ("case_1", "cls_data.csv"),
        (None, "cls_data.csv"),
        ("case_1", "label"),
        ("case_7", "identifier"),
        ("case_9", "split"),
        ("case_2", "label"),
    ]


def test_a_good_dataset_and_its_warnings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_classification(folder)
    save(folder / "imagesTr" / "case_1_0000.nii.gz", np.full(SHAPE, 7, np.int16))
    assert main(["check", "-d", "Dataset011_Organs", "--raw", str(folder.parent)]) == 0
    first, *warnings = capsys.readouterr().out.strip().splitlines()
    assert first.startswith(
        "Dataset011_Organs: classification, 2 training and 1 test cases, channels T1, T2: no problem"
    )
    assert [line.split("; ")[0] for line in warnings] == [
        "warning: case 'case_1': channel 'T1' is constant (7)",
        "warning: class 'healthy' of Dataset011_Organs has 1 training cases",
        "warning: class 'tumour' of Dataset011_Organs has 1 training cases",
    ]


def test_orientations_that_differ_are_a_warning(folder: Path) -> None:
    flipped = np.diag([0.8, 0.8, 3.0, 1.0])
    for channel in range(2):
        save(folder / "imagesTr" / f"case_1_000{channel}.nii.gz", scan(40 + channel), flipped)
    save(folder / "labelsTr" / "case_1.nii.gz", label_map(), flipped)
    assert "orientations: RAS (1), LAS (1)" in check_images(load(folder))[0]


def test_a_federation_is_checked_client_by_client(
    raw_datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = federation(raw_datasets, tmp_path / "preprocessed", tmp_path / "w")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert main(["check", "--config", str(path)]) == 0
    assert capsys.readouterr().out.count("no problem found") == 4
    settings["clients"][0]["modality"] = "MR"
    settings["clients"][1]["dataset"] = 899
    settings["clients"][2]["fold"] = 9
    splits = tmp_path / "preprocessed" / "Dataset804_Classes" / "splits_final.json"
    splits.parent.mkdir(parents=True)
    splits.write_text(json.dumps([{"train": ["case_00"]}]))
    path.write_text(yaml.safe_dump(settings))
    assert main(["check", "--config", str(path)]) == 2
    count, *lines = capsys.readouterr().err.strip().splitlines()
    assert count == "error: 4 problems:"
    places = [("ct_plain", "modality"), ("ct_regions", "dataset"), ("mr_two", "fold"), ("mr_class", "fold")]
    for line, (client, field) in zip(lines, places, strict=True):
        assert line.startswith(f"  client '{client}', field '{field}': ")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["config.yaml", "preprocessed"]


def test_several_errors_behave_as_one() -> None:
    problems = Problems()
    problems.raise_any()
    problems.add(InputError("a\nb", case="x"))
    with problems.caught(client="c", field="f"):
        raise InputErrors([InputError("one", case="y"), InputError("two", field="g")])
    with pytest.raises(InputErrors) as caught:
        problems.raise_any()
    text = "3 problems:\n  case 'x': a b\n  client 'c', case 'y', field 'f': one\n  client 'c', field 'g': two"
    assert str(caught.value) == text
    kind, arguments = caught.value.__reduce__()
    assert str(kind(*arguments)) == text
    assert len(str(InputError("x" * 10_000))) < 1000


def test_nothing_to_check_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 2
    assert "nothing to check" in capsys.readouterr().err


def test_a_run_names_the_mistakes_of_all_clients_and_writes_nothing(
    raw_datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = federation(raw_datasets, tmp_path / "preprocessed", tmp_path / "w")
    settings["clients"][1]["dataset"] = 899
    settings["clients"][3]["channels"] = 3
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    for command in (["run", str(path)], ["preprocess", "--config", str(path)]):
        assert main(command) == 2
        count, *lines = capsys.readouterr().err.strip().splitlines()
        assert count == "error: 2 problems:"
        assert lines[0].startswith("  client 'ct_regions', field 'dataset': 899 is not in")
        assert lines[1].startswith("  client 'mr_class', field 'channels': expected 3 channels")
        assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]
