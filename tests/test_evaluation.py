"""Evaluation: nnU-Net's numbers where it has them, by hand where it has not, and one line for what cannot be scored."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from organs_dataset import AFFINE, save

from fedcmt.cli import main
from fedcmt.evaluation import METRICS, evaluate_segmentations, scored_classes
from fedcmt.evaluation_classes import evaluate_classes
from fedcmt.metrics import surface_distances_mm

PLAIN = {"labels": {"background": 0, "liver": 1, "spleen": 2, "rare": 3}}
IGNORED = {"labels": {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}}
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three cases: one well predicted, one whose truth is empty, one that misses a class that nobody has otherwise."""
    generator = np.random.default_rng(0)
    for index in range(3):
        truth = np.zeros((12, 11, 10), np.uint8)
        truth[2:6, 2:8, 3:7], truth[7:10, 3:5, 2:6] = 1, 2
        prediction = np.roll(truth, index, 0)
        if index == 1:
            truth[:] = 0
        if index == 2:
            truth[0, 0, :3] = 3
        prediction[generator.random(truth.shape) < 0.02] = 1
        save(tmp_path / "truth" / f"case_{index}.nii.gz", truth)
        save(tmp_path / "predicted" / f"case_{index}.nii.gz", prediction)
    return tmp_path / "predicted", tmp_path / "truth"


def nnunet_summary(predicted: Path, truth: Path, document: dict[str, Any], output: Path) -> dict[str, Any]:
    """What nnU-Net itself computes, in this process."""
    from nnunetv2.evaluation import evaluate_predictions as stock
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    labels = LabelManager(document["labels"], document.get("regions_class_order"))
    scored = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    stock.compute_metrics_on_folder(
        str(truth), str(predicted), str(output), SimpleITKIO(), ".nii.gz", scored, labels.ignore_label, num_processes=1
    )
    return json.loads(output.read_text())


def test_entropy_maps_beside_the_predictions_are_passed_over(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predicted, truth = folders
    (truth.parent / "dataset.json").write_text(json.dumps(PLAIN))
    for name in ("case_0_entropy", "other_entropy"):
        save(predicted / f"{name}.nii.gz", np.full((12, 11, 10), 0.5, np.float32))
    summary, _, remarks = evaluate_segmentations(predicted, truth, tmp_path / "summary.json")
    assert len(summary["metric_per_case"]) == 3
    assert len(remarks) == 1
    assert "other_entropy" in remarks[0]


class _HerePool:
    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> _HerePool:
        return self

    def __exit__(self, *_: object) -> None: ...

    def starmap(self, function: Any, arguments: Any) -> list[Any]:
        return [function(*each) for each in arguments]


def without_distances(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_distances(entry) for key, entry in value.items() if key not in ("ASSD", "HD95")}
    return [without_distances(entry) for entry in value] if isinstance(value, list) else value


@pytest.mark.parametrize("document", [PLAIN, IGNORED, REGIONS], ids=["plain", "ignore", "regions"])
def test_summary_equals_nnunets(
    folders: tuple[Path, Path], tmp_path: Path, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted, truth = folders
    from nnunetv2.evaluation import evaluate_predictions as stock

    class Context:
        Pool = _HerePool

    monkeypatch.setattr(stock.multiprocessing, "get_context", lambda _: Context)
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    summary, _, remarks = evaluate_segmentations(predicted, truth, tmp_path / "ours.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # means of nothing
        expected = nnunet_summary(predicted, truth, document, tmp_path / "stock.json")
    ours = json.loads((tmp_path / "ours.json").read_text())
    assert remarks == []
    # As text: there a NaN equals a NaN.
    assert json.dumps(without_distances(ours), sort_keys=True) == json.dumps(expected, sort_keys=True)
    assert set(summary["foreground_mean"]) == set(METRICS)
    assert stock.load_summary_json(str(tmp_path / "ours.json"))["mean"].keys()


def test_empty_truth_and_empty_prediction(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predicted, truth = folders
    (tmp_path / "dataset.json").write_text(json.dumps(PLAIN))
    summary, _, _ = evaluate_segmentations(predicted, truth, tmp_path / "out.json")
    empty_truth, misses = (summary["metric_per_case"][i]["metrics"] for i in (1, 2))
    assert (empty_truth["1"]["Dice"], empty_truth["1"]["n_ref"]) == (0, 0)
    assert np.isnan([empty_truth["1"]["ASSD"], empty_truth["1"]["HD95"], empty_truth["3"]["Dice"]]).all()
    assert (misses["3"]["Dice"], misses["3"]["FN"]) == (0, 3)
    assert summary["mean"]["3"]["Dice"] == 0  # of the one case that has it
    assert np.isnan(summary["mean"]["3"]["ASSD"])


def test_table_has_a_row_per_case_and_class(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps(PLAIN))
    summary, _, _ = evaluate_segmentations(*folders, tmp_path / "out.json")
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [(row["case"], row["class"]) for row in rows[:4]] == [
        ("case_0", "liver"), ("case_0", "spleen"), ("case_0", "rare"), ("case_1", "liver"),
    ]  # fmt: skip
    assert float(rows[0]["Dice"]) == summary["metric_per_case"][0]["metrics"]["1"]["Dice"]
    assert float(rows[1]["HD95_mm"]) == summary["metric_per_case"][0]["metrics"]["2"]["HD95"]
    assert rows[2]["Dice"] == ""


def test_hausdorff_by_hand() -> None:
    first, second = np.zeros((1, 1, 30), bool), np.zeros((1, 1, 30), bool)
    first[..., 0], second[..., [0, 20]] = True, True
    # From the first: 0. From the second: 0 and 20 x 0.5 mm; its 95th percentile, interpolated, is 9.5.
    assert surface_distances_mm(first, second, (3, 1, 0.5)) == (pytest.approx(10 / 3), pytest.approx(9.5))
    assert surface_distances_mm(second, first, (3, 1, 0.5))[1] == pytest.approx(9.5)


def test_scored_classes() -> None:
    assert scored_classes({"background": 0, "a": (1,), "ignore": 2}) == {"a": 1}
    assert scored_classes({"background": 0, "whole": (1, 2), "core": 2}) == {"whole": (1, 2), "core": 2}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, list[str]]:
    code = main(["evaluate", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err.strip().splitlines()


def test_the_command(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predicted, truth = folders
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps(PLAIN))
    code, out, _ = run(capsys, "-p", predicted, "-t", truth, "--dataset-json", labels)
    assert code == 0
    assert "liver: Dice" in out
    assert sorted(path.name for path in predicted.iterdir())[3:] == ["summary.csv", "summary.json"]
    save(predicted / "extra.nii.gz", np.zeros((12, 11, 10), np.uint8))
    code, out, _ = run(
        capsys, "-p", predicted, "-t", truth, "--dataset-json", labels, "-o", tmp_path / "new" / "s.json"
    )
    assert code == 0
    assert "warning: case 'extra'" in out
    assert (tmp_path / "new" / "s.csv").is_file()


def test_what_cannot_be_scored(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predicted, truth = folders
    arguments = ["-p", predicted, "-t", truth, "-o", tmp_path / "s.json"]
    code, _, lines = run(capsys, *arguments)
    assert code == 2
    assert "field '--dataset-json'" in lines[0]
    (tmp_path / "dataset.json").write_text(json.dumps(PLAIN))
    save(predicted / "case_0.nii.gz", np.zeros((12, 11, 9), np.uint8))
    (predicted / "case_1.nii.gz").write_bytes(b"")
    code, _, lines = run(capsys, *arguments)
    assert code == 2
    assert lines[0] == "error: 2 problems:"
    assert lines[1].startswith("  case 'case_0', field 'shape'")
    assert lines[2].startswith("  case 'case_1'")
    for name in ("case_0", "case_1"):
        (predicted / f"{name}.nii.gz").unlink()
    code, _, lines = run(capsys, *arguments)
    assert code == 2
    assert "--chill" in lines[1]
    assert not (tmp_path / "s.json").exists()
    save(predicted / "case_2.nii.gz", np.zeros((12, 11, 10), np.uint8), AFFINE * 1.02)
    code, out, _ = run(capsys, *arguments, "--chill")
    assert code == 0
    assert "warning: case 'case_2': truth and prediction differ in spacing" in out
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "a": 2}}))
    assert run(capsys, *arguments, "--chill")[0] == 2
    assert run(capsys, "-p", tmp_path / "none", "-t", truth)[0] == 2
    assert run(capsys, *arguments[:-1], tmp_path / "s.txt", "--chill")[0] == 2


PREDICTED = "identifier,prediction,probability_healthy,probability_tumour\n"


def test_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "a,healthy,0.9,0.1\nb,healthy,0.6,0.4\nc,tumour,0.35,0.65\nd,tumour,0.2,0.8\nunknown,tumour,0.1,0.9\n"
    (tmp_path / "predictions.csv").write_text(PREDICTED + rows)
    (tmp_path / "cls_data.csv").write_text(
        "identifier,label,split\na,0,test\nb,tumour,test\nc,healthy,test\nd,1,test\n"
    )
    code, out, _ = run(capsys, "-p", tmp_path, "-t", tmp_path, "-o", tmp_path / "s.json")
    assert code == 0
    assert "auroc: 0.7500" in out
    summary = json.loads((tmp_path / "s.json").read_text())
    assert summary["mean"] == {"accuracy": 0.5, "balanced_accuracy": 0.5, "auroc": 0.75}
    assert summary["classes"]["tumour"] == {"num_cases": 2, "recall": 0.5}
    table = list(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    assert [(row["case"], row["correct"]) for row in table] == [("a", "1"), ("b", "0"), ("c", "0"), ("d", "1")]


@pytest.mark.parametrize(
    ("rows", "truth", "part"),
    [
        ("a,healthy,x,0.1\n", "a,healthy\n", "no probabilities"),
        ("a,healthy,nan,0.1\n", "a,healthy\n", "no probabilities"),
        ("a,healthy,0.9\n", "a,healthy\n", "no probabilities"),
        ("a,healthy,0.9,0.1\na,healthy,0.9,0.1\n", "a,healthy\n", "another row"),
        ("a,healthy,0.9,0.1\n", "a,sick\n", "expected one of healthy, tumour"),
        ("a,healthy,0.9,0.1\n", "b,healthy\n", "--chill"),
        ("", "", "no case in common"),
    ],
)
def test_class_tables_that_cannot_be_scored(
    tmp_path: Path, rows: str, truth: str, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.csv").write_text(PREDICTED + rows)
    (tmp_path / "t.csv").write_text("identifier,label\n" + truth)
    code, _, lines = run(capsys, "-p", tmp_path / "p.csv", "-t", tmp_path / "t.csv", "-o", tmp_path / "s.json")
    assert code == 2
    assert any(part in line for line in lines), lines
    assert not (tmp_path / "s.json").exists()


def test_a_table_without_probabilities(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("identifier,prediction\na,healthy\n")
    with pytest.raises(ValueError, match="columns probability_"):
        evaluate_classes(tmp_path / "p.csv", tmp_path / "p.csv", tmp_path / "s.json")
