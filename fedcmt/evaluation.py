"""``fedcmt evaluate``: predictions against the truth, in nnU-Net's ``summary.json`` form and as a table.

Counts, Dice, IoU, means and the treatment of empty classes are those of nnU-Net's ``compute_metrics_on_folder``;
surface distances come on top.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fedcmt.dataset_json import DatasetJson, Label, parse_dataset_json
from fedcmt.errors import InputError, Problems
from fedcmt.files import read_json, write_text
from fedcmt.metrics import surface_distances_mm
from fedcmt.volume import READABLE_ENDINGS, Volume, geometry_difference, has_ending, read_volume

ENTROPY_SUFFIX = "_entropy"  # of the maps that prediction writes beside label maps, on request
METRICS = ("Dice", "IoU", "TP", "FP", "FN", "TN", "n_pred", "n_ref", "ASSD", "HD95")


def evaluate_segmentations(
    predictions: Path,
    truth: Path,
    output: Path,
    *,
    dataset_json: Path | None = None,
    chill: bool = False,
    workers: int = 2,
) -> tuple[dict[str, Any], dict[str, Label], list[str]]:
    """Score a folder of label maps, and write ``output`` (JSON) and a table beside it (CSV).

    Args:
        predictions: Folder of label maps.
        truth: Folder of the true label maps, named alike.
        output: Where to; ends with ``.json``.
        dataset_json: Says the labels; default: the one in `predictions` or beside the folder `truth`.
        chill: As in nnU-Net, do not mind cases of `truth` without a prediction.
        workers: Threads.

    Returns:
        The summary as nnU-Net has it, the scored classes by name, and warnings.

    Raises:
        InputError: Files are missing or damaged, or a prediction is not on its truth's grid; all of it at once.
    """
    if output.suffix != ".json":
        raise InputError(f"{output.name} does not end with .json", field="-o", fix="name a .json file")
    description = _description(dataset_json, predictions, truth)
    classes = scored_classes(description.labels)
    pairs, warnings = _pairs(predictions, truth, chill)
    problems, rows = Problems(), []
    with ThreadPoolExecutor(workers) as pool:
        scored = pool.map(lambda case: _scored(case, *pairs[case], classes, description.ignore_label), pairs)
        for row, found, remarks in scored:
            problems.errors += found.errors
            warnings += remarks
            rows += [row] if row is not None else []
    problems.raise_any()
    summary = summarised(rows, [str(label) for label in classes.values()])
    # NaN as nnU-Net writes it and its tools read it, though it is no strict JSON.
    write_text(output, json.dumps(summary, indent=4, sort_keys=True) + "\n")
    write_text(output.with_suffix(".csv"), _table(list(pairs), rows, classes))
    return summary, classes, warnings


def _scored(
    case: str, prediction: Path, truth: Path, classes: Mapping[str, Label], ignore_label: int | None
) -> tuple[dict[str, Any] | None, Problems, list[str]]:
    """An entry of ``metric_per_case``, what is wrong with the case, and warnings."""
    problems, remarks = Problems(), []
    with problems.caught(case=case):
        predicted, reference = _read_pair(prediction, truth)
        remarks = _check_grids(case, predicted, reference)
        metrics = case_metrics(predicted.data[0], reference.data[0], classes, ignore_label, reference.spacing)
        row = {
            "reference_file": str(truth),
            "prediction_file": str(prediction),
            "metrics": {str(classes[name]): values for name, values in metrics.items()},
        }
        return row, problems, remarks
    return None, problems, remarks


def scored_classes(labels: Mapping[str, Label]) -> dict[str, Label]:
    """The classes that nnU-Net scores: foreground labels, or where there are regions of several labels, those."""
    named = {name: label for name, label in labels.items() if name not in ("background", "ignore")}
    if any(isinstance(label, tuple) and len(label) > 1 for label in named.values()):
        return named
    return {name: label[0] if isinstance(label, tuple) else label for name, label in named.items()}


def case_metrics(
    prediction: np.ndarray,
    truth: np.ndarray,
    classes: Mapping[str, Label],
    ignore_label: int | None,
    spacing: Sequence[float],
) -> dict[str, dict[str, float]]:
    """Scores of one case by class name.

    Args:
        prediction: Label map `[D, H, W]`.
        truth: Label map `[D, H, W]`; voxels of `ignore_label` do not count on either side.
        classes: Name to label or labels.
        ignore_label: Or None.
        spacing: In mm along (D, H, W).

    Returns:
        ``METRICS`` of each class. Dice and IoU are NaN where neither map holds the class, surface distances (ASSD, HD95
        in mm) where one of them does not.
    """
    counted = np.ones(truth.shape, bool) if ignore_label is None else truth != ignore_label
    scores = {}
    for name, label in classes.items():
        values = label if isinstance(label, tuple) else (label,)
        predicted, reference = (np.isin(array, values) & counted for array in (prediction, truth))
        tp, n_pred, n_ref = (int(np.count_nonzero(mask)) for mask in (predicted & reference, predicted, reference))
        fp, fn = n_pred - tp, n_ref - tp
        union = tp + fp + fn
        assd, hd95 = surface_distances_mm(predicted, reference, spacing)
        scores[name] = {
            "Dice": 2 * tp / (2 * tp + fp + fn) if union else float("nan"),
            "IoU": tp / union if union else float("nan"),
            "TP": tp,
            "FP": fp,
            "FN": fn,
            "TN": int(np.count_nonzero(counted)) - union,
            "n_pred": n_pred,
            "n_ref": n_ref,
            "ASSD": assd,
            "HD95": hd95,
        }
    return scores


def summarised(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    """nnU-Net's summary: each class's mean over the cases that define a score, and the mean of these over classes."""
    mean = {key: {m: _nanmean([row["metrics"][key][m] for row in rows]) for m in METRICS} for key in keys}
    foreground = {m: float(np.mean([mean[key][m] for key in keys])) for m in METRICS}
    return {"metric_per_case": list(rows), "mean": mean, "foreground_mean": foreground}


def _nanmean(values: Sequence[float]) -> float:
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else float("nan")


def _description(given: Path | None, predictions: Path, truth: Path) -> DatasetJson:
    candidates = [given] if given else [predictions / "dataset.json", truth.parent / "dataset.json"]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise InputError(
            f"no dataset.json in {predictions} or {truth.parent}" if given is None else f"{given} does not exist",
            field="--dataset-json",
            fix="name the dataset.json that says the labels",
        )
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no object", field="--dataset-json", fix="name nnU-Net's dataset.json")
    problems = Problems()
    # Only labels matter here, and the file may come from an older nnU-Net or lie apart from its dataset.
    labels = {key: content[key] for key in ("labels", "regions_class_order") if key in content}
    filler = {"channel_names": {"0": "any"}, "numTraining": 1, "file_ending": ".nii.gz"}
    description = parse_dataset_json(filler | labels, problems)
    problems.raise_any()
    if not scored_classes(description.labels):
        raise InputError(f"{path} names no label but the background", field="labels", fix="name the labels to score")
    return description


def _maps(folder: Path, field: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder", field=field, fix="name a folder of label maps")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if has_ending(path, READABLE_ENDINGS) and not path.name.startswith("."):
            ending = next(e for e in READABLE_ENDINGS if path.name.lower().endswith(e))
            stem = path.name[: -len(ending)]
            if stem in found:
                raise InputError(
                    f"{found[stem].name} and {path.name} are of the same case", case=stem, field=field, fix="keep one"
                )
            found[stem] = path
    companions = [stem for stem in found if stem.endswith(ENTROPY_SUFFIX) and stem[: -len(ENTROPY_SUFFIX)] in found]
    return {stem: path for stem, path in found.items() if stem not in companions}


def _pairs(predictions: Path, truth: Path, chill: bool) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
    predicted, true = _maps(predictions, "-p"), _maps(truth, "-t")
    missing = [case for case in true if case not in predicted]
    if missing and not chill:
        problems = Problems()
        for case in missing:
            reason = f"{predictions} has no prediction for it"
            problems.add(InputError(reason, case=case, field="-p", fix="predict it, or leave it out with --chill"))
        problems.raise_any()
    pairs = {case: (path, true[case]) for case, path in predicted.items() if case in true}
    if not pairs:
        raise InputError(f"no file of {predictions} is named like one of {truth}", field="-p", fix="name them alike")
    return pairs, [f"case '{case}': {truth} has no truth for it; not scored" for case in predicted if case not in true]


def _read_pair(prediction: Path, truth: Path) -> tuple[Volume, Volume]:
    problems, volumes = Problems(), []
    for path, field in ((prediction, "-p"), (truth, "-t")):
        with problems.caught(field=field):
            volumes.append(read_volume(path, dtype=None))
    problems.raise_any()
    return volumes[0], volumes[1]


def _check_grids(case: str, predicted: Volume, reference: Volume) -> list[str]:
    difference = geometry_difference(reference, predicted)
    if difference is None:
        return []
    field, text = difference
    if field == "shape":
        raise InputError(f"truth and prediction differ: {text}", field=field, fix="predict on the truth's grid")
    return [f"case '{case}': truth and prediction differ in {text}; compared voxel by voxel, as nnU-Net does"]


def _table(cases: Sequence[str], rows: Sequence[Mapping[str, Any]], classes: Mapping[str, Label]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "class", "label", *METRICS[:-2], "ASSD_mm", "HD95_mm"])
    for case, row in zip(cases, rows, strict=True):
        for name, label in classes.items():
            values = row["metrics"][str(label)]
            shown = " ".join(map(str, label)) if isinstance(label, tuple) else label
            writer.writerow([case, name, shown, *("" if np.isnan(values[m]) else values[m] for m in METRICS)])
    return text.getvalue()
