"""The report of a workspace: one HTML page that needs nothing but itself.

It reads what a run leaves behind (docs/workspace.md) and works in the middle of a run as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedcmt.errors import InputError
from fedcmt.files import read_json, write_text
from fedcmt.report_cross import cross_site_table
from fedcmt.report_figures import Point, cosine_colours, cosine_curve, training_curves
from fedcmt.report_slices import (
    SlicePicture,
    case_dice,
    classification_picture,
    dice_of,
    representative_cases,
    segmentation_picture,
)

Line = Mapping[str, Any]

TEMPLATE = "report.html.j2"
MAX_THUMBNAILS = 12
MAX_CASES_LISTED = 200
# Beyond this many rounds the participation cells carry colour only.
MAX_ROUNDS_WITH_MARKS = 30

SCORE_KINDS = {
    "test": ("test score", "held-out subjects that took no part in training or in choosing the model"),
    "validation": (
        "validation score",
        "no test set: these subjects were not trained on, but may have helped to pick the model, which flatters",
    ),
    "training-site": (
        "training-site score",
        "these subjects were trained on: it shows that the model fits them, not how it does on new patients",
    ),
}
NO_SCORES = {False: ("no score yet", ""), True: ("no score", "")}


@dataclass(frozen=True)
class Run:
    """What a workspace holds so far.

    Attributes:
        config: The resolved configuration; empty where there is none.
        client_lines: Client -> round -> its line of ``metrics.jsonl``.
        server_lines: Round -> the server's line.
        results: Client -> its entry of ``results.json``; empty before the end.
        header: ``results.json`` without its clients.
    """

    config: Mapping[str, Any]
    client_lines: Mapping[str, Mapping[int, Line]]
    server_lines: Mapping[int, Line]
    results: Mapping[str, Mapping[str, Any]]
    header: Mapping[str, Any]

    @property
    def clients(self) -> list[str]:
        """Every client that is named anywhere, in the order of the configuration."""
        configured = [client["name"] for client in self.config.get("clients", [])]
        refused = [name for line in self.server_lines.values() for name in line.get("refused") or {}]
        return list(dict.fromkeys([*configured, *self.results, *self.client_lines, *refused]))

    @property
    def rounds(self) -> list[int]:
        """The rounds that left a line."""
        return sorted({*self.server_lines, *(index for lines in self.client_lines.values() for index in lines)})


def write_report(workspace: Path) -> Path:
    """Writes ``report.html`` into a workspace, atomically.

    Args:
        workspace: Folder of a finished or running federation.

    Returns:
        Path of the page.

    Raises:
        InputError: The folder holds no run, or one of its files is damaged.
    """
    run = read_run(workspace)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, count=count, duration=duration, megabytes=megabytes, dice=dice_of)
    page = environment.get_template(TEMPLATE).render(
        head=_headline(workspace, run),
        clients=[_client_section(workspace, run, name) for name in run.clients],
        participation=_participation(run),
        agreement=_agreement(run),
        cross=cross_site_table(workspace),
        score_kinds=SCORE_KINDS,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    path = workspace / "report.html"
    write_text(path, page)
    return path


def read_run(workspace: Path) -> Run:
    """Reads configuration, metrics and results of a workspace, whichever are there.

    Raises:
        InputError: None of them is there, or one is damaged.
    """
    config, metrics, results = (workspace / name for name in ("config.yaml", "metrics.jsonl", "results.json"))
    if not any(path.is_file() for path in (config, metrics, results)):
        raise InputError(f"{workspace} holds no run", field="workspace", fix="name the folder that a run wrote into")
    client_lines: dict[str, dict[int, Line]] = {}
    server_lines: dict[int, Line] = {}
    for line in _read_metrics(metrics):
        lines = server_lines if line["kind"] == "server" else client_lines.setdefault(line["client"], {})
        lines[line["round"]] = line
    header = dict(read_json(results)) if results.is_file() else {}
    scored = {entry["client"]: entry for entry in header.pop("clients", [])}
    return Run(_read_config(config), client_lines, server_lines, scored, header)


def number(value: Any, digits: int = 3) -> str:
    """Formats a score; an undefined one is a dash."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def count(value: Any) -> str:
    """Formats a whole number with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u202f") if isinstance(value, int) else "–"


def megabytes(value: Any) -> str:
    """Formats a number of bytes."""
    return f"{value / 1e6:,.1f} MB".replace(",", "\u202f")


def duration(seconds: float) -> str:
    """Formats a length of time."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _read_config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no valid YAML: {' '.join(str(error).split())}", field="config") from None


def _read_metrics(path: Path) -> Iterator[Line]:
    if not path.is_file():
        return
    for position, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise InputError(f"line {position} of {path} is no valid JSON: {error}", field="metrics.jsonl") from None
        if not isinstance(line, dict) or "round" not in line or "kind" not in line:
            raise InputError(f"line {position} of {path} has no 'kind' and 'round'", field="metrics.jsonl")
        yield line


def _headline(workspace: Path, run: Run) -> dict[str, Any]:
    strategy = run.config.get("strategy") or {}
    last = run.server_lines[max(run.server_lines)] if run.server_lines else {}
    done = max(run.server_lines, default=0)
    planned = run.config.get("rounds") or run.header.get("rounds") or done
    return {
        "federation": run.header.get("federation") or run.config.get("name") or workspace.resolve().name,
        "strategy": run.header.get("strategy") or last.get("strategy") or strategy.get("name") or "–",
        "done": done,
        "planned": planned,
        "scored_rounds": (run.header.get("rounds") or planned) if run.results else 0,
        "seconds": sum(_seconds(line) for line in run.server_lines.values()),
    }


def _seconds(line: Line) -> float:
    """Returns the seconds of a line, which are one number or one for each activity."""
    value = line.get("seconds") or 0.0
    return float(sum(value.values()) if isinstance(value, Mapping) else value)


def _client_section(workspace: Path, run: Run, name: str) -> dict[str, Any]:
    lines = run.client_lines.get(name, {})
    last = lines[max(lines)] if lines else {}
    configured: Line = next((client for client in run.config.get("clients", []) if client["name"] == name), {})
    result = run.results.get(name, {})
    task = result.get("task") or last.get("task") or configured.get("task") or "–"
    modality = result.get("modality") or configured.get("modality") or "–"
    kind, meaning = (
        SCORE_KINDS.get(result["score_kind"], (result["score_kind"], "")) if result else NO_SCORES[bool(run.results)]
    )
    losses = _points((index, line.get("train_loss")) for index, line in lines.items())
    return {
        "name": name,
        "task": task,
        "dataset": result.get("dataset") or configured.get("dataset") or "–",
        "modality": modality,
        "channels": result.get("num_channels") or configured.get("channels"),
        "group": result.get("group") or last.get("group") or "–",
        "num_cases": last.get("num_cases"),
        "rounds_used": sum(_status(run, name, index)[0] == "used" for index in run.rounds),
        "best": last.get("best"),
        "validated_on": last.get("validated_on"),
        "score_kind": kind,
        "score_meaning": meaning,
        "scored_cases": len(result.get("cases", [])),
        "main_score": _main_score(result),
        "work": _work(lines),
        "curves": _curves(lines, last, losses) if losses or lines else None,
        "segmentation": _segmentation(workspace, result, modality) if result and task == "segmentation" else None,
        "classification": _classification(workspace, result, modality) if result and task == "classification" else None,
        "model": result.get("model"),
    }


def _points(pairs: Iterable[tuple[int, Any]]) -> list[Point]:
    return sorted((index, value) for index, value in pairs if value is not None and math.isfinite(value))


def _curves(lines: Mapping[int, Line], last: Line, losses: Sequence[Point]) -> dict[str, Any]:
    stages = {
        stage: _points((index, (line.get(stage) or {}).get("score")) for index, line in lines.items())
        for stage in ("local", "aggregated")
    }
    metrics = {entry.get("metric") for line in lines.values() for stage in stages if (entry := line.get(stage))}
    metric = {"dice": "Dice", "balanced_accuracy": "balanced accuracy"}.get(next(iter(metrics), ""), "score")
    best = last.get("best") or {}
    marked = (best["round"], best["score"]) if best.get("score") is not None else None
    source = training_curves(losses, stages["local"], stages["aggregated"], marked, metric)
    return {"source": source, "metric": metric}


def _work(lines: Mapping[int, Line]) -> dict[str, float]:
    spent = [line.get("seconds") or {} for line in lines.values()]
    return {
        "steps": sum(line.get("local_steps") or 0 for line in lines.values()),
        **{key: sum(one.get(key) or 0.0 for one in spent) for key in ("train", "data_wait", "validate")},
        **{key: sum(line.get(key) or 0 for line in lines.values()) for key in ("bytes_sent", "bytes_received")},
    }


def _main_score(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the one number of a client for the overview: mean Dice over classes, or balanced accuracy."""
    mean = result.get("mean") or {}
    if not result:
        return None
    if result["task"] == "classification":
        return {"name": "balanced accuracy", "value": mean.get("balanced_accuracy")}
    return {"name": "mean Dice", "value": case_dice({"scores": mean})}


def _segmentation(workspace: Path, result: Mapping[str, Any], modality: str) -> dict[str, Any]:
    cases, mean = result.get("cases", []), result.get("mean") or {}
    pictures: list[tuple[str, SlicePicture]] = [
        (why, segmentation_picture(workspace, case, result.get("labels") or {}, modality))
        for why, case in representative_cases(cases)
    ]
    return {
        "classes": list(mean),
        "mean": mean,
        "cases": [(case["case"], case.get("scores") or {}) for case in cases[:MAX_CASES_LISTED]],
        "num_cases": len(cases),
        "pictures": pictures,
    }


def _classification(workspace: Path, result: Mapping[str, Any], modality: str) -> dict[str, Any]:
    names, cases = list(result.get("class_names") or []), result.get("cases", [])
    shown = [_classified(case, names) for case in cases[:MAX_CASES_LISTED]]
    pictures = [classification_picture(workspace, case, modality) for case in cases[:MAX_THUMBNAILS]]
    return {
        "classes": names or list(dict.fromkeys(name for case in shown for name in case["probabilities"])),
        "mean": result.get("mean") or {},
        "cases": shown,
        "num_cases": len(cases),
        "pictures": list(zip(shown, pictures, strict=False)),
    }


def _classified(case: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    truth, prediction = (
        names[value] if isinstance(value, int) and value < len(names) else value
        for value in (case.get("truth"), case.get("prediction"))
    )
    verdict = "" if truth is None else "right" if truth == prediction else "wrong"
    return {
        "case": case["case"],
        "truth": truth,
        "prediction": prediction,
        "verdict": verdict,
        "probabilities": case.get("probabilities") or {},
    }


def _status(run: Run, name: str, index: int) -> tuple[str, str]:
    """Returns what a client did in a round, ``used``, ``refused`` or ``absent``, and the words for it."""
    line = run.client_lines.get(name, {}).get(index, {})
    server = run.server_lines.get(index, {})
    reason = (server.get("refused") or {}).get(name) or line.get("refused")
    if reason:
        return "refused", str(reason)
    used = name in server["clients"] if "clients" in server else bool(line.get("participated"))
    if not used:
        why = (server.get("absent") or {}).get(name, "no update")
        return "absent", "warming up" if name in (server.get("warming_up") or []) else str(why)
    weights = dict(zip(server.get("clients") or [], server.get("weights") or [], strict=False))
    return "used", f"weight {number(weights[name])}" if name in weights else "update used"


def _participation(run: Run) -> dict[str, Any]:
    rounds = run.rounds
    rows = [(name, [(index, *_status(run, name, index)) for index in rounds]) for name in run.clients]
    step = 1 if len(rounds) <= MAX_ROUNDS_WITH_MARKS else 10
    refusals = [(index, name, words) for name, cells in rows for index, status, words in cells if status == "refused"]
    return {
        "rounds": [index if index % step == 0 or index == rounds[0] else "" for index in rounds],
        "rows": rows,
        "dense": step > 1,
        "refusals": sorted(refusals),
        "never": [name for name, cells in rows if all(status == "absent" for _, status, _ in cells)],
    }


def _agreement(run: Run) -> dict[str, Any] | None:
    """Returns the cosines between updates: the last round's, the mean over rounds, and their course."""
    rounds = {index: line for index, line in run.server_lines.items() if len(line.get("clients") or []) > 1}
    rounds = {index: line for index, line in rounds.items() if line.get("cosines")}
    if not rounds:
        return None
    by_round = {index: _pair_cosines(line) for index, line in rounds.items()}
    collected: dict[tuple[str, str], list[float]] = {}
    for pairs in by_round.values():
        for pair, cosine in pairs.items():
            collected.setdefault(pair, []).append(cosine)
    means = {pair: sum(values) / len(values) for pair, values in collected.items()}
    seen = {name for line in rounds.values() for name in line["clients"]}
    last = max(rounds)
    course = [(index, sum(pairs.values()) / len(pairs)) for index, pairs in sorted(by_round.items()) if pairs]
    return {
        "last_round": last,
        "last": _heatmap([name for name in run.clients if name in rounds[last]["clients"]], by_round[last]),
        "mean": _heatmap([name for name in run.clients if name in seen], means),
        "num_rounds": len(rounds),
        "course": cosine_curve(course),
        "last_mean": course[-1][1] if course else None,
    }


def _pair_cosines(line: Line) -> dict[tuple[str, str], float]:
    pairs = {}
    for (row, first), (column, second) in combinations(enumerate(line["clients"]), 2):
        value = line["cosines"][row][column]
        if value is not None and math.isfinite(value):
            pairs[first, second] = pairs[second, first] = float(value)
    return pairs


def _heatmap(names: Sequence[str], pairs: Mapping[tuple[str, str], float]) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        cells = []
        for other in names:
            value = 1.0 if name == other else pairs.get((name, other))
            background, ink = cosine_colours(value) if value is not None else ("#f2f4f6", "#66727d")
            cells.append({"value": value, "background": background, "ink": ink, "own": name == other, "other": other})
        rows.append({"name": name, "cells": cells})
    return rows
