"""The report: complete, self-contained, escaped, and there in the middle of a run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from fedcmt.errors import InputError
from fedcmt.report import number, write_report
from fedcmt.report_figures import cosine_colours
from fedcmt.report_slices import Cut, dice_of, display_window, representative_cases, segmentation_picture, slice_axis
from fedcmt.volume import Volume

BRAIN, LUNG, TRIAGE, LATE = "mr_brain", "ct_lung", "<i>triage</i>", "late_site"
AWKWARD_CLASS = "<b>x</b> $y$"
REASON = "update holds NaN in <encoder.stages.0>"


def save_nifti(path: Path, xyz: NDArray[Any], spacing: tuple[float, float, float]) -> str:
    """Writes an array whose axes run left, posterior, superior, as scanners often store them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(xyz, np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])), path)
    return str(path)


def _ball(shape: tuple[int, ...], centre: tuple[float, ...], radius: tuple[float, ...]) -> NDArray[np.bool_]:
    grid = np.meshgrid(*((np.arange(size) + 0.5) / size for size in shape), indexing="ij")
    terms = (((axis - middle) / half) ** 2 for axis, middle, half in zip(grid, centre, radius, strict=True))
    return np.asarray(sum(terms) < 1)


def _brain_case(folder: Path, name: str, size: int, seed: int) -> dict[str, Any]:
    shape = (size, size + size // 5, size // 2)
    noise = np.random.default_rng(seed)
    head = _ball(shape, (0.5, 0.5, 0.5), (0.42, 0.46, 0.6))
    truth = np.zeros(shape, np.uint8)
    for value, radius in ((1, 0.22), (2, 0.14), (3, 0.07)):
        truth[_ball(shape, (0.62, 0.42, 0.55), (radius, radius, radius))] = value
    image = (head * 400 + truth * 120 + noise.normal(0, 25, shape) * (head + 0.1)).astype(np.float32)
    guess = np.roll(truth, (size // 24, -(size // 30)), (0, 1))
    spacing = (1.0, 1.0, 2.0)
    images = [save_nifti(folder / f"{name}_{channel:04d}.nii.gz", image, spacing) for channel in range(2)]
    return {
        "case": name,
        "images": images,
        "truth": save_nifti(folder / f"{name}_truth.nii.gz", truth, spacing),
        "prediction": save_nifti(folder / f"{name}_guess.nii.gz", guess, spacing),
        "scores": {
            "whole tumour": {"Dice": 0.8 + seed / 100, "surface_distance_mm": 1.25},
            "core": {"Dice": 0.7, "surface_distance_mm": 2.5},
            "enhancing": {"Dice": None, "surface_distance_mm": None},
        },
    }


def _lung_case(folder: Path, workspace: Path, name: str, size: int) -> dict[str, Any]:
    shape = (size, size, size // 3)
    body = _ball(shape, (0.5, 0.5, 0.5), (0.46, 0.36, 5))
    spine = _ball(shape, (0.5, 0.74, 0.5), (0.06, 0.06, 5))
    truth = np.zeros(shape, np.uint8)
    truth[_ball(shape, (0.3, 0.48, 0.5), (0.14, 0.22, 0.45))] = 1
    truth[_ball(shape, (0.7, 0.48, 0.5), (0.14, 0.22, 0.45))] = 2
    image = np.where(truth > 0, -820, np.where(spine, 450, np.where(body, 45, -1000)))
    image = (image + np.random.default_rng(1).normal(0, 20, shape)).astype(np.int16)
    guess = np.where(np.roll(truth, size // 40, 1) > 0, truth, 0).astype(np.uint8)
    spacing = (0.8, 0.8, 2.5)
    save_nifti(workspace / "predictions" / LUNG / f"{name}.nii.gz", guess, spacing)
    scores = {"Dice": 0.931, "surface_distance_mm": 0.875}
    return {
        "case": name,
        "images": [save_nifti(folder / f"{name}_0000.nii.gz", image, spacing)],
        "truth": save_nifti(folder / f"{name}_truth.nii.gz", truth, spacing),
        "prediction": f"predictions/{LUNG}/{name}.nii.gz",
        "scores": {AWKWARD_CLASS: scores, "left lung": {"Dice": 0.9, "surface_distance_mm": 1.0}},
    }


def _triage_case(folder: Path, name: str, size: int, truth: str | None, probability: float) -> dict[str, Any]:
    shape = (size // 6, size, size)
    image = _ball(shape, (0.5, 0.45, 0.5), (5, 0.3, 0.4)) * 300.0 + np.random.default_rng(3).normal(0, 20, shape)
    return {
        "case": name,
        "images": [save_nifti(folder / f"{name}_0000.nii.gz", image.astype(np.float32), (4.0, 0.7, 0.7))],
        "truth": truth,
        "prediction": "torn" if probability > 0.5 else "healthy",
        "probabilities": {"healthy": 1 - probability, "torn": probability},
    }


def results(workspace: Path, raw: Path, size: int) -> dict[str, Any]:
    brain = [_brain_case(raw / "brain", f"brain_{seed:02d}", size, seed) for seed in (1, 2, 3)]
    triage = [_triage_case(raw / "knee", f"knee_{i}", size, truth, p)
              for i, (truth, p) in enumerate([("torn", 0.9125), ("healthy", 0.62), (None, 0.2)])]  # fmt: skip
    common = {"model": {"round": 3, "stage": "local", "score": 0.551}}
    return {
        "federation": "lung & brain <pilot>",
        "strategy": "fedcmt",
        "rounds": 4,
        "clients": [
            {"client": BRAIN, "group": "MR-2", "task": "segmentation", "dataset": "Dataset902_Brain", "modality": "MR",
             "num_channels": 2, "score_kind": "test", "cases": brain, **common,
             "labels": {"background": 0, "whole tumour": [1, 2, 3], "core": [2, 3], "enhancing": 3},
             "mean": {"whole tumour": {"Dice": 0.8213, "surface_distance_mm": 1.2512},
                      "core": {"Dice": 0.7, "surface_distance_mm": 2.5},
                      "enhancing": {"Dice": None, "surface_distance_mm": None}}},
            {"client": LUNG, "group": "CT-1", "task": "segmentation", "dataset": "Dataset901_Lung", "modality": "CT",
             "num_channels": 1, "score_kind": "training-site", **common,
             "cases": [_lung_case(raw / "lung", workspace, "lung_01", size)],
             "labels": {"background": 0, AWKWARD_CLASS: 1, "left lung": 2},
             "mean": {AWKWARD_CLASS: {"Dice": 0.931, "surface_distance_mm": 0.875},
                      "left lung": {"Dice": 0.9, "surface_distance_mm": 1.0}}},
            {"client": TRIAGE, "group": "MR-1", "task": "classification", "dataset": "Dataset903_Knee",
             "modality": "MR", "num_channels": 1, "score_kind": "validation", "cases": triage, **common,
             "class_names": ["healthy", "torn"],
             "mean": {"accuracy": 0.5, "balanced_accuracy": 0.4321, "auroc": None}},
        ],
    }  # fmt: skip


def client_line(index: int, name: str, group: str, metric: str, refused: str | None) -> dict[str, Any]:
    score = 0.83 * (1 - 0.7**index)
    return {
        "kind": "client", "round": index, "client": name, "group": group,
        "task": "segmentation" if metric == "dice" else "classification",
        "participated": refused is None, "refused": refused, "num_cases": 12, "local_steps": 250,
        "train_loss": None if refused else 1.2 / index + 0.1, "learning_rate": 3e-4, "update_norm": 1.0,
        "local": {"score": score, "loss": 0.5, "metric": metric, "classes": {"a": score}},
        "aggregated": {"score": score - 0.05 * (index % 2), "loss": 0.5, "metric": metric, "classes": {"a": None}},
        "best": {"round": index, "stage": "local", "score": score},
        "seconds": {"train": 31.0, "data_wait": 1.5, "validate": 4.0},
    }  # fmt: skip


def metrics(rounds: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for index in range(1, rounds + 1):
        refused = {LUNG: REASON} if index == 2 else {}
        groups = ((BRAIN, "MR-2", "dice"), (LUNG, "CT-1", "dice"), (TRIAGE, "MR-1", "balanced_accuracy"))
        lines += [client_line(index, *client, refused.get(client[0])) for client in groups]
        used = [name for name, *_ in groups if name not in refused]
        cosines = np.eye(len(used)) + (1 - np.eye(len(used))) * (0.6 - 1.2 * 0.8**index)
        if len(used) == 3:
            cosines[0, 2] = cosines[2, 0] = 0.7
        lines.append({"kind": "server", "round": index, "strategy": "fedcmt", "seconds": 41.0, "clients": used,
                      "weights": [1 / len(used)] * len(used), "cosines": cosines.tolist(), "step_norm": 0.5,
                      "groups": {"MR-2": [BRAIN]}, "refused": refused})  # fmt: skip
    return lines


def write_workspace(folder: Path, size: int = 24, rounds: int = 4, finished: bool = True) -> Path:
    workspace = folder / "workspace"
    workspace.mkdir(parents=True)
    clients = [(BRAIN, "MR"), (LUNG, "CT"), (TRIAGE, "MR"), (LATE, "CT")]
    entries = [{"name": name, "dataset": 900, "modality": modality} for name, modality in clients]
    config = {"name": "pilot", "rounds": max(rounds, 4), "strategy": {"name": "fedcmt"}, "clients": entries}
    (workspace / "config.yaml").write_text(yaml.safe_dump(config))
    if rounds:
        (workspace / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(rounds)))
    if finished:
        (workspace / "results.json").write_text(json.dumps(results(workspace, folder / "raw", size)))
    return workspace


class PageReader(HTMLParser):
    """Collects what a page would load, its visible text and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_report(write_workspace(tmp_path_factory.mktemp("report")))
    return path.read_text(encoding="utf-8")


def test_page_loads_nothing_from_outside(page: str) -> None:
    reader = PageReader(page)
    assert reader.addresses
    assert all(address.startswith("data:image/") for address in reader.addresses)
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_names_are_escaped(page: str) -> None:
    assert AWKWARD_CLASS not in page
    assert TRIAGE not in page
    assert REASON not in page
    text = PageReader(page).text
    assert AWKWARD_CLASS in text
    assert TRIAGE in text
    assert REASON in text
    assert "lung & brain <pilot>" in text


def test_scores_appear_with_three_decimals_and_dashes(page: str) -> None:
    text = PageReader(page).text
    for value in ("0.821", "1.251", "0.931", "0.875", "0.432", "0.912", "0.108"):
        assert value in text
    assert re.search(r"<th>enhancing</th><td class=\"num\">–</td><td class=\"num\">–</td>", page)
    assert "None" not in text
    assert "nan" not in text.lower().replace("update holds nan", "")


def test_every_kind_of_score_is_explained(page: str) -> None:
    text = PageReader(page).text
    assert "these subjects were trained on" in text
    assert "held-out subjects" in text
    assert "no test set: these subjects were not trained on" in text


def test_participation_and_refusal(page: str) -> None:
    text = PageReader(page).text
    assert "Refused updates" in text
    assert f"{LATE} has not taken part in any round" in text
    assert page.count('class="cell refused" title') == 1
    assert page.count('class="cell used" title') == 3 * 4 - 1


def test_pictures_of_every_client(page: str) -> None:
    text = PageReader(page).text
    # Two brain cases, one lung case, three knees.
    assert page.count("data:image/png") == 6
    assert "median Dice" in text
    assert "lowest Dice" in text
    assert "axial slice" in text
    assert "sagittal slice" in text
    assert "right is on the left, anterior at the top" in text
    assert "lung window −1350 to 150 HU" in text


def test_report_without_results(tmp_path: Path) -> None:
    text = PageReader(write_report(write_workspace(tmp_path, rounds=2, finished=False)).read_text()).text
    assert "finished 2 of 4 rounds" in " ".join(text.split())
    assert "no score yet" in text
    assert BRAIN in text


def test_report_before_the_first_round(tmp_path: Path) -> None:
    text = PageReader(write_report(write_workspace(tmp_path, rounds=0, finished=False)).read_text()).text
    assert "No round is finished yet" in text
    assert text.count("This client has not trained yet") == 4


def test_missing_image_leaves_only_the_picture_out(tmp_path: Path) -> None:
    workspace = write_workspace(tmp_path)
    gone = tmp_path / "raw" / "lung" / "lung_01_0000.nii.gz"
    gone.unlink()
    (tmp_path / "raw" / "knee" / "knee_0_0000.nii.gz").write_bytes(b"no image")
    page = write_report(workspace).read_text()
    assert "lung_01_0000.nii.gz is missing" in PageReader(page).text
    assert page.count("picture left out") == 2
    assert page.count("data:image/png") == 4


def test_label_map_of_another_shape_is_named(tmp_path: Path) -> None:
    workspace = write_workspace(tmp_path)
    wrong = workspace / "predictions" / LUNG / "lung_01.nii.gz"
    save_nifti(wrong, np.ones((4, 4, 4), np.uint8), (1.0, 1.0, 1.0))
    assert "lung_01.nii.gz has shape (D, H, W) (4, 4, 4)" in PageReader(write_report(workspace).read_text()).text


def test_many_rounds_keep_the_matrix_on_the_page(tmp_path: Path) -> None:
    page = write_report(write_workspace(tmp_path, rounds=120, finished=False)).read_text()
    assert 'class="matrix dense"' in page


def test_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_metrics_name_the_line(tmp_path: Path) -> None:
    workspace = write_workspace(tmp_path, finished=False)
    with (workspace / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "cli')
    with pytest.raises(InputError, match="line 17 of"):
        write_report(workspace)
    assert not (workspace / "report.html").exists()


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LIP", "SPR", "ASR"])
def test_slices_are_the_usual_way_up(codes: str) -> None:
    """A mark at right, anterior, superior is drawn top left of the axial slice, however the file is stored."""
    ras = np.zeros((5, 6, 7), np.float32)
    ras[4, 5, 6] = 1
    target = nib.orientations.axcodes2ornt(tuple(codes))
    stored = nib.Nifti1Image(ras, np.diag([1.0, 2.0, 2.5, 1.0])).as_reoriented(target)
    spacing = tuple(float(value) for value in stored.header.get_zooms()[::-1])
    volume = Volume(np.asarray(stored.dataobj).T[None], spacing, stored.affine)
    assert slice_axis(volume) == 2
    plane = Cut(2, 6).of(volume)
    assert plane.shape == (6, 5)
    assert plane[0, 0] == 1
    assert plane.sum() == 1
    assert Cut(2, 6).aspect(volume) == pytest.approx(2.0)


def test_thick_slices_are_shown_in_their_own_plane() -> None:
    volume = Volume(np.zeros((1, 9, 9, 3), np.float32), (0.7, 0.7, 4.0), np.diag([4.0, 0.7, 0.7, 1.0]))
    assert slice_axis(volume) == 0
    assert Cut(0, 1).words(volume) == "sagittal slice 2 of 3, 4.0 mm apart"


def test_small_classes_count_in_the_choice_of_the_slice(tmp_path: Path) -> None:
    labels = np.zeros((20, 20, 10), np.uint8)
    labels[:, :, 1] = 1
    labels[2:18, 2:18, 6] = 1
    labels[4:6, 4:6, 6] = 2
    name = save_nifti(tmp_path / "labels.nii.gz", labels, (1.0, 1.0, 1.0))
    case = {"case": "a", "images": [name], "truth": name, "prediction": None}
    picture = segmentation_picture(tmp_path, case, {"large": 1, "small": 2}, "MR")
    assert "axial slice 7 of 10" in picture.caption
    assert [entry.name for entry in picture.legend] == ["large", "small"]
    assert segmentation_picture(tmp_path, case, {"background": 0}, "MR").left_out == "its classes are unknown"


def test_windows() -> None:
    chest = np.full((8, 8), 40.0)
    chest[0], chest[:, 0] = -1000, 300
    assert display_window(chest, "CT")[0] == (-160.0, 240.0)
    chest[4:] = -800
    assert display_window(chest, "ct")[0] == (-1350.0, 150.0)
    assert display_window(np.zeros((4, 4)), "MR")[0] == (0.0, 1.0)
    lung_with_nodule, nodule = np.full((40, 40), -800.0), np.zeros((40, 40), bool)
    nodule[18:22, 18:22] = True
    lung_with_nodule[nodule], lung_with_nodule[:, 0] = 60, 300
    assert display_window(lung_with_nodule, "CT", nodule)[0] == (-1350.0, 150.0)
    low, high = display_window(np.arange(100.0).reshape(10, 10), "MR")[0]
    assert 0 < low < high <= 99


def test_representative_cases_do_not_flatter() -> None:
    cases = [{"case": str(dice), "scores": {"a": {"Dice": dice}}} for dice in (0.9, None, 0.1, 0.5)]
    assert [(why, case["case"]) for why, case in representative_cases(cases)] == [
        ("median Dice", "0.5"),
        ("lowest Dice", "0.1"),
    ]


def test_numbers_and_colours() -> None:
    assert [number(value) for value in (0.12345, -0.5, None, float("nan"), "x")] == ["0.123", "−0.500", "–", "–", "–"]
    assert [dice_of(scores) for scores in ({"Dice": 0.5}, {}, None)] == [0.5, None, None]
    assert cosine_colours(0.0)[0] == "#ffffff"
    assert cosine_colours(1.0) == ("#0072b2", "#ffffff")
    assert cosine_colours(-1.0) == ("#d55e00", "#ffffff")


def test_unknown_truth_is_drawn_without_a_score(tmp_path: Path) -> None:
    workspace = write_workspace(tmp_path)
    content = json.loads((workspace / "results.json").read_text())
    lung, triage = content["clients"][1:]
    lung["mean"], lung["cases"][0]["scores"], lung["cases"][0]["truth"] = {}, {}, None
    triage["mean"] = {}
    (workspace / "results.json").write_text(json.dumps(content))
    page = write_report(workspace).read_text()
    assert "No truth is known for these cases" in PageReader(page).text
    assert page.count("data:image/png") == 6


def test_scores_of_an_earlier_end_say_so(tmp_path: Path) -> None:
    workspace = write_workspace(tmp_path, rounds=6)
    text = " ".join(PageReader(write_report(workspace).read_text()).text.split())
    assert "Scores and pictures are those after round 4; the run goes on to round 6." in text
