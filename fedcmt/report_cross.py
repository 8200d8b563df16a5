"""The report's table of the cross-site evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedcmt.checkpoint import CROSS_FILE, Workspace
from fedcmt.errors import InputError
from fedcmt.files import read_json


def cross_site_table(workspace: Path) -> dict[str, Any] | None:
    """Rows of models and columns of test sets; None where ``fedcmt cross-evaluate`` did not run.

    Raises:
        InputError: The file is damaged.
    """
    path = Workspace(workspace).cross_evaluation
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        scores = {(pair["model"], pair["data"]): pair for pair in content["pairs"]}
        reasons = {(entry["model"], entry["data"]): entry["reason"] for entry in content["left_out"]}
        models = content["models"]
        rows = [
            {
                "name": model,
                "round": models[model]["round"],
                "cells": [_cell(model, data, scores.get((model, data)), reasons.get((model, data))) for data in models],
            }
            for model in models
        ]
    except (KeyError, TypeError, AttributeError):
        fix = "run fedcmt cross-evaluate again"
        raise InputError(f"{path} is damaged", field=CROSS_FILE, fix=fix) from None
    return {"columns": list(models), "rows": rows}


def _cell(model: str, data: str, pair: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {
        "own": model == data,
        "data": data,
        "score": pair["score"] if pair else None,
        "metric": pair["metric"] if pair else None,
        "num_cases": pair["num_cases"] if pair else 0,
        "reason": reason,
    }
