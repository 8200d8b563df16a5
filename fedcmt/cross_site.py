"""Cross-site evaluation: every client's model on every other client's test set, where tasks agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedcmt.checkpoint import Workspace, existing_client
from fedcmt.config import FederationConfig, load_config
from fedcmt.dataset import Case, RawDataset, load_dataset
from fedcmt.errors import InputError, Problems
from fedcmt.evaluation import case_metrics, scored_classes
from fedcmt.files import read_json, read_tensors, write_json
from fedcmt.infer import Predictor
from fedcmt.metrics import classification_scores
from fedcmt.volume import read_volume


def cross_evaluate(
    workspace: Path, *, raw: Path | None = None, device: str = "auto", note: Callable[[str], None] = print
) -> dict[str, Any]:
    """Predict every client's test cases with every model that fits, and write ``cross_evaluation.json``.

    Args:
        workspace: Of a federation with models.
        raw: nnU-Net's raw folder; default: the configuration's.
        device: ``auto``, ``cpu`` or ``cuda[:i]``.
        note: Told of every pair.

    Returns:
        The content of the file: ``pairs`` with scores, ``left_out`` with reasons.

    Raises:
        InputError: No workspace, a client without model, or bad data.
    """
    files = Workspace(workspace)
    if not files.config.is_file():
        raise InputError(f"{workspace} is no workspace of a federation", field="workspace", fix="name one")
    config = load_config(files.config)
    names = [client.name for client in config.clients]
    folders = {name: existing_client(workspace, name) for name in names}
    datasets = _datasets(config, raw)
    tasks = {name: str(read_json(folders[name].facts)["task"]) for name in names}
    pairs, left_out = [], []
    for model in names:
        fitting = []
        for data in names:
            reason = disagreement(datasets[model], tasks[model], datasets[data], tasks[data])
            if reason:
                left_out.append({"model": model, "data": data, "reason": reason})
            else:
                fitting.append(data)
        if not fitting:
            continue
        predictor = Predictor.from_workspace(
            workspace,
            model,
            device=device,
            mirroring=config.inference.mirroring,
            tile_step_size=config.inference.tile_step_size,
        )
        for data in fitting:
            score = _classes if tasks[data] == "classification" else _segmentations
            try:
                mean, main, metric, count = score(predictor, datasets[model], datasets[data])
            except InputError as error:
                raise error.located(client=data) from None
            note(f"{model} on {data}: {metric} {main:.3f} ({count} cases)")
            pairs.append(
                {"model": model, "data": data, "num_cases": count, "metric": metric, "score": main, "mean": mean}
            )
    facts = {name: read_tensors(folders[name].weights)[1] for name in names}
    content = {
        "federation": config.name,
        "models": {name: {"round": fact.get("round"), "stage": fact.get("stage")} for name, fact in facts.items()},
        "pairs": pairs,
        "left_out": left_out,
    }
    content = _without_nan(content)
    write_json(files.cross_evaluation, content)
    return content


def disagreement(model: RawDataset, model_task: str, data: RawDataset, data_task: str) -> str | None:
    """Why a model trained on one dataset cannot be scored on another's test set; None where it can."""
    if model_task != data_task:
        return f"tasks differ: {model_task}, {data_task}"
    if [name.casefold() for name in model.channel_names] != [name.casefold() for name in data.channel_names]:
        return f"channels differ: {', '.join(model.channel_names)}; {', '.join(data.channel_names)}"
    if data_task == "classification":
        if set(model.class_names or ()) != set(data.class_names or ()):
            return "classes differ"
        return None if _known_classes(data) else "no test case has a known class"
    first, second = scored_classes(model.labels), scored_classes(data.labels)
    if set(first) != set(second):
        return f"labels differ: {', '.join(first)}; {', '.join(second)}"
    regions = model.regions_class_order or data.regions_class_order
    if regions and (first, model.regions_class_order) != (second, data.regions_class_order):
        return "regions of the same names are made of different labels"
    return None if _with_truth(data) else "no test case has a truth"


def _datasets(config: FederationConfig, raw: Path | None) -> dict[str, RawDataset]:
    problems, datasets = Problems(), {}
    for client in config.clients:
        with problems.caught(client=client.name):
            datasets[client.name] = load_dataset(raw or config.folder("raw"), client.dataset, client=client.name)
    problems.raise_any()
    return datasets


def _with_truth(data: RawDataset) -> dict[str, Case]:
    return {identifier: case for identifier, case in data.test.items() if case.label is not None}


def _known_classes(data: RawDataset) -> dict[str, Case]:
    return {identifier: case for identifier, case in data.test.items() if identifier in data.case_class}


def _segmentations(
    predictor: Predictor, model: RawDataset, data: RawDataset
) -> tuple[dict[str, dict[str, float]], float, str, int]:
    classes, cases, rows = scored_classes(data.labels), _with_truth(data), []
    for identifier, case in cases.items():
        try:
            predicted = predictor.predict(read_volume(case.images), case=case.identifier).data[0]
            truth = read_volume(case.label or "", dtype=None)
        except InputError as error:
            raise error.located(case=identifier) from None
        translated = translated_labels(predicted, model, data)
        rows.append(case_metrics(translated, truth.data[0], classes, data.ignore_label, truth.spacing))
    mean = {
        name: {key: _mean([row[name][key] for row in rows]) for key in ("Dice", "ASSD", "HD95")} for name in classes
    }
    return mean, _mean([scores["Dice"] for scores in mean.values()]), "Dice", len(cases)


def translated_labels(labels: np.ndarray, model: RawDataset, data: RawDataset) -> np.ndarray:
    """A model's label map with the numbers that another dataset gives to the same names."""
    if data.regions_class_order:  # the same on both sides
        return labels
    translated = np.zeros(labels.shape, np.int32)
    numbers = scored_classes(data.labels)
    for name, value in scored_classes(model.labels).items():
        translated[labels == value] = numbers[name]
    return translated


def _classes(predictor: Predictor, model: RawDataset, data: RawDataset) -> tuple[dict[str, float], float, str, int]:
    cases, names = _known_classes(data), list(data.class_names or ())
    order = [list(model.class_names or ()).index(name) for name in names]
    chances = []
    for identifier, case in cases.items():
        try:
            predicted = predictor.predict_case(read_volume(case.images), case=case.identifier)
            chances.append(np.asarray(predicted.probabilities)[order])
        except InputError as error:
            raise error.located(case=identifier) from None
    mean = classification_scores(np.stack(chances), np.array([data.case_class[case] for case in cases]))
    return mean, mean["balanced_accuracy"], "balanced accuracy", len(cases)


def _mean(values: list[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
