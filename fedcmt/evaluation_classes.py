"""``fedcmt evaluate`` for classification: ``predictions.csv`` against ``cls_data.csv``."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedcmt.dataset_cases import CLASS_FILE, read_table
from fedcmt.errors import InputError, Problems
from fedcmt.files import write_json, write_text
from fedcmt.metrics import classification_scores

PREDICTIONS_FILE = "predictions.csv"
_PREFIX = "probability_"


def table_at(path: Path, name: str) -> Path | None:
    """The table that a path names: itself if it is a CSV file, or the one called `name` in a folder; else None."""
    if path.is_dir():
        return path / name if (path / name).is_file() else None
    return path if path.suffix == ".csv" else None


def evaluate_classes(predictions: Path, truth: Path, output: Path, *, chill: bool = False) -> dict[str, Any]:
    """Score the probabilities of classes, and write ``output`` (JSON) and a table beside it (CSV).

    Args:
        predictions: A table with ``identifier`` and a column ``probability_<class>`` for each class.
        truth: A table with ``identifier`` and ``label``, a class's name or number.
        output: Where to; ends with ``.json``.
        chill: Do not mind cases of `truth` without a prediction.

    Returns:
        ``task``, ``class_names``, ``cases``, ``classes`` (recall and number of cases) and ``mean``: accuracy, balanced
        accuracy and AUROC; undefined scores are None.

    Raises:
        InputError: A table is malformed, or cases are missing; all of it at once.
    """
    if output.suffix != ".json":
        raise InputError(f"{output.name} does not end with .json", field="-o", fix="name a .json file")
    problems = Problems()
    names, chances = _read_predictions(predictions, problems)
    true = _read_truth(truth, names, problems)
    for case in [] if chill else sorted(set(true) - set(chances)):
        reason = f"{predictions.name} has no prediction for it"
        problems.add(InputError(reason, case=case, field="-p", fix="predict it, or leave it out with --chill"))
    problems.raise_any()
    scored = [case for case in chances if case in true]
    if not scored:
        raise InputError(
            f"{predictions.name} and {truth.name} have no case in common", field="-p", fix="name them alike"
        )
    truths, probabilities = np.array([true[case] for case in scored]), np.stack([chances[case] for case in scored])
    guesses = probabilities.argmax(axis=1)
    cases = [
        {
            "case": case,
            "truth": names[true[case]],
            "prediction": names[guess],
            "probabilities": dict(zip(names, map(float, chances[case]), strict=True)),
        }
        for case, guess in zip(scored, guesses.tolist(), strict=True)
    ]
    summary: dict[str, Any] = {
        "task": "classification",
        "class_names": names,
        "mean": {key: _or_none(value) for key, value in classification_scores(probabilities, truths).items()},
        "classes": {
            name: {"num_cases": int((truths == i).sum()), "recall": _recall(guesses, truths, i)}
            for i, name in enumerate(names)
        },
        "cases": cases,
    }
    write_json(output, summary)
    write_text(output.with_suffix(".csv"), _table(cases, names))
    return summary


def _read_predictions(path: Path, problems: Problems) -> tuple[list[str], dict[str, np.ndarray]]:
    columns, table = read_table(path, ("identifier",), path.name)
    names = [column.removeprefix(_PREFIX) for column in columns if column.startswith(_PREFIX)]
    if len(names) < 2:
        raise InputError(
            f"{path.name} has {len(names)} columns {_PREFIX}<class>, expected at least 2",
            field=path.name,
            fix="use the table that fedcmt.infer wrote",
        )
    chances: dict[str, np.ndarray] = {}
    for number, row in enumerate(table, start=2):
        case = row.get("identifier")
        with problems.caught(case=case or None, field=path.name):
            values = _probabilities([row.get(f"{_PREFIX}{name}") for name in names])
            if not case or case in chances:
                raise InputError(f"row {number} has no identifier, or that of another row", fix="correct the table")
            if values is None:
                raise InputError(f"row {number} has values that are no probabilities", fix="correct the table")
            chances[case] = values
    return names, chances


def _probabilities(texts: Sequence[str | None]) -> np.ndarray | None:
    try:
        values = np.array([float(text or "") for text in texts])
    except ValueError:
        return None
    return values if np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1.001 else None


def _read_truth(path: Path, names: Sequence[str], problems: Problems) -> dict[str, int]:
    _, table = read_table(path, ("identifier", "label"), path.name)
    true: dict[str, int] = {}
    for number, row in enumerate(table, start=2):
        case, label = (row.get("identifier") or "").strip(), (row.get("label") or "").strip()
        with problems.caught(case=case or None, field=path.name):
            if not case or case in true:
                raise InputError(f"row {number} has no identifier, or that of another row", fix="correct the table")
            if label in names:
                true[case] = names.index(label)
            elif label.isascii() and label.isdigit() and int(label) < len(names):
                true[case] = int(label)
            else:
                reason = f"found '{label}', expected one of {', '.join(names)}"
                raise InputError(reason, fix="use the classes of the predictions")
    return true


def _recall(guesses: np.ndarray, truths: np.ndarray, class_id: int) -> float | None:
    present = truths == class_id
    return float((guesses[present] == class_id).mean()) if present.any() else None


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _table(cases: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "truth", "prediction", "correct", *(f"{_PREFIX}{name}" for name in names)])
    for case in cases:
        correct = int(case["truth"] == case["prediction"])
        writer.writerow([case["case"], case["truth"], case["prediction"], correct, *case["probabilities"].values()])
    return text.getvalue()


__all__ = ["CLASS_FILE", "PREDICTIONS_FILE", "evaluate_classes", "table_at"]
