"""Every model on every test set where tasks agree: the same numbers as the models' own scores, and a table."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedcmt.cli import main
from fedcmt.cross_site import disagreement, translated_labels
from fedcmt.dataset import load_dataset
from fedcmt.files import read_json
from fedcmt.report import write_report


@pytest.fixture
def workspace(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished federation with a second client that has the data of the first."""
    copy = tmp_path / "w"
    shutil.copytree(finished, copy)
    shutil.copytree(copy / "clients" / "ct_plain", copy / "clients" / "ct_twin")
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["clients"].append(config["clients"][0] | {"name": "ct_twin"})
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    return copy


def test_every_model_on_every_fitting_test_set(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cross-evaluate", str(workspace)]) == 0, capsys.readouterr().err
    content = read_json(workspace / "cross_evaluation.json")
    scores = {(pair["model"], pair["data"]): pair for pair in content["pairs"]}
    own = {("ct_regions", "ct_regions"), ("mr_two", "mr_two"), ("mr_class", "mr_class")}
    plain = {(first, second) for first in ("ct_plain", "ct_twin") for second in ("ct_plain", "ct_twin")}
    assert set(scores) == own | plain
    assert len({scores[pair]["score"] for pair in plain}) == 1
    assert len(content["left_out"]) == 25 - len(scores)
    reasons = {(entry["model"], entry["data"]): entry["reason"] for entry in content["left_out"]}
    assert reasons["ct_plain", "mr_class"].startswith("tasks differ")
    assert reasons["ct_plain", "mr_two"].startswith("channels differ")
    assert reasons["ct_plain", "ct_regions"].startswith("labels differ")
    results = {entry["client"]: entry for entry in read_json(workspace / "results.json")["clients"]}
    for name in ("ct_plain", "mr_two", "ct_regions"):
        for label, expected in results[name]["mean"].items():
            found = scores[name, name]["mean"][label]
            assert (found["Dice"], found["ASSD"]) == pytest.approx((expected["Dice"], expected["surface_distance_mm"]))
    assert scores["mr_class", "mr_class"]["mean"] == pytest.approx(results["mr_class"]["mean"])
    page = (workspace / "report.html").read_text()
    assert "Every model on every test set" in page
    assert "ct_twin on mr_two: channels differ: CT; MR0, MR1" in page


def test_report_without_and_with_a_damaged_table(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "w"
    copy.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(finished / name, copy)
    assert "Every model on every" not in write_report(copy).read_text()
    (copy / "cross_evaluation.json").write_text(json.dumps({"pairs": []}))
    with pytest.raises(ValueError, match=r"damaged; run fedcmt cross-evaluate again"):
        write_report(copy)


def test_what_agrees(raw_datasets: Path) -> None:
    plain, regions, classes = (load_dataset(raw_datasets, number) for number in (801, 802, 804))
    task = "segmentation"
    assert disagreement(plain, task, plain, task) is None
    swapped = replace(plain, labels={"background": 0, "lesion": 1, "organ": 2})
    assert disagreement(plain, task, swapped, task) is None
    np.testing.assert_array_equal(translated_labels(np.array([[[0, 1, 2]]]), plain, swapped), [[[0, 2, 1]]])
    other_order = replace(regions, regions_class_order=(2, 1))
    assert "different labels" in str(disagreement(regions, task, other_order, task))
    assert disagreement(regions, task, regions, task) is None
    labels = np.array([[[0, 1, 2]]])
    assert translated_labels(labels, regions, regions) is labels
    untested = replace(plain, test={name: replace(case, label=None) for name, case in plain.test.items()})
    assert disagreement(plain, task, untested, task) == "no test case has a truth"
    renamed = replace(classes, class_names=("a", "b"))
    assert disagreement(classes, "classification", renamed, "classification") == "classes differ"
    unknown = replace(classes, case_class={})
    assert "known class" in str(disagreement(classes, "classification", unknown, "classification"))


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cross-evaluate", str(tmp_path)]) == 2
    assert "no workspace" in capsys.readouterr().err
