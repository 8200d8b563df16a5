"""Predictions and scores of a client's model on held-out cases, for ``results.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedcmt.checkpoint import Workspace, export_nnunet_model
from fedcmt.config import InferenceConfig
from fedcmt.dataset import Case
from fedcmt.files import read_tensors
from fedcmt.infer import Prediction, Predictor
from fedcmt.metrics import classification_scores, segmentation_scores
from fedcmt.plans import ClientPlan
from fedcmt.volume import read_volume


def score_client(
    workspace: Workspace, name: str, plan: ClientPlan, inference: InferenceConfig, device: str
) -> dict[str, Any]:
    """Predict a client's test cases with its model and score them where the truth is known.

    Without test cases the validation cases are scored; ``score_kind`` says which, and whether they were trained on.

    Returns:
        The client's entry of ``results.json``.
    """
    cases, kind = _held_out(plan)
    predictor = Predictor.from_workspace(
        workspace.path, name, device=device, mirroring=inference.mirroring, tile_step_size=inference.tile_step_size
    )
    folder = workspace.predictions(name)
    predictions = predictor.predict_files({key: case.images for key, case in cases.items()}, folder)
    facts = read_tensors(workspace.client(name).weights)[1]
    modality, channels = plan.group.rsplit("-", 1)
    entry = {
        "client": name,
        "group": plan.group,
        "task": plan.task,
        "dataset": plan.dataset.name,
        "modality": modality,
        "num_channels": int(channels),
        "score_kind": kind,
        "model": {key: facts[key] for key in ("round", "stage", "score")},
    }
    scored = _classification if plan.task == "classification" else _segmentation
    return without_nan(entry | scored(plan, cases, predictions, folder.relative_to(workspace.path), workspace.path))


def score_and_export(
    workspace: Workspace, name: str, plan: ClientPlan, inference: InferenceConfig, device: str
) -> dict[str, Any]:
    """Score a client's model and write it as an nnU-Net model folder; its entry of ``results.json``."""
    entry = score_client(workspace, name, plan, inference, device)
    export_nnunet_model(workspace.client(name), workspace.client(name).model)
    return entry


def _held_out(plan: ClientPlan) -> tuple[Mapping[str, Case], str]:
    if plan.dataset.test:
        return plan.dataset.test, "test"
    cases = {case: plan.dataset.train[case] for case in plan.validation}
    return cases, "training-site" if plan.validates_on_training else "validation"


def _segmentation(
    plan: ClientPlan, cases: Mapping[str, Case], predictions: Mapping[str, Prediction], folder: Path, workspace: Path
) -> dict[str, Any]:
    labels = {name: label for name, label in plan.dataset.labels.items() if name not in ("background", "ignore")}
    rows: list[dict[str, Any]] = []
    for identifier in predictions:
        case = cases[identifier]
        written = folder / f"{identifier}.nii.gz"
        scores: dict[str, dict[str, float]] = {}
        if case.label is not None:
            truth = read_volume(case.label)
            scores = segmentation_scores(
                _labels(workspace / written),
                truth.data[0].astype(np.int32),
                labels,
                ignore_label=plan.dataset.ignore_label,
                spacing=truth.spacing,
            )
        rows.append(
            {
                "case": identifier,
                "images": [str(path.resolve()) for path in case.images],
                "prediction": str(written),
                "truth": None if case.label is None else str(case.label.resolve()),
                "scores": scores,
            }
        )
    return {
        "labels": {name: list(v) if isinstance(v, tuple) else v for name, v in labels.items()},
        "cases": rows,
        "mean": _mean_scores([row["scores"] for row in rows if row["scores"]]),
    }


def _labels(path: Path) -> np.ndarray:
    return read_volume(path).data[0].astype(np.int32)


def _mean_scores(rows: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Mean over the cases in which a score is defined."""
    if not rows:
        return {}
    means: dict[str, dict[str, float]] = {}
    for name in rows[0]:
        for key in rows[0][name]:
            values = [row[name][key] for row in rows if not math.isnan(row[name][key])]
            means.setdefault(name, {})[key] = float(np.mean(values)) if values else math.nan
    return means


def _classification(
    plan: ClientPlan, cases: Mapping[str, Case], predictions: Mapping[str, Prediction], folder: Path, workspace: Path
) -> dict[str, Any]:
    names = plan.dataset.class_names or ()
    rows, known, chances = [], [], []
    for identifier, prediction in predictions.items():
        p = np.asarray(prediction.probabilities)
        truth = plan.dataset.case_class.get(identifier)
        if truth is not None:
            known.append(truth)
            chances.append(p)
        rows.append(
            {
                "case": identifier,
                "images": [str(path.resolve()) for path in cases[identifier].images],
                "truth": None if truth is None else names[truth],
                "prediction": names[int(p.argmax())],
                "probabilities": {name: float(value) for name, value in zip(names, p, strict=True)},
            }
        )
    mean = classification_scores(np.stack(chances), np.asarray(known)) if known else {}
    return {"class_names": list(names), "cases": rows, "mean": mean}


def without_nan(value: Any) -> Any:
    """JSON has no not-a-number: undefined scores become null."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
