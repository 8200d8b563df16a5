"""Scores of several strategies, their paired differences, and the table and CSV that show them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

from fedcmt.files import read_json

ScoreKind = Literal["test", "final"]
# The model that a client ends with, by what it has: its personal one, the one it chose, the server's, its own.
_STAGES = ("personal", "adopted", "aggregated", "local")
UPPER = "joint"  # the upper reference
_COLUMNS = ("strategy", "seed", "client", "metric", "test", "final", "local_steps", "personal_steps", "score_kind")


@dataclass(frozen=True)
class Row:
    """One client in one run.

    Attributes:
        strategy: Label of the strategy and its settings.
        seed: Of the federation.
        client: Name.
        metric: What the scores are.
        test: Score of the client's model on its test cases; NaN where undefined.
        final: Score of the model it holds after the last round, on its held-out cases.
        local_steps: Of all rounds.
        personal_steps: Of all rounds, for a personal model beside.
        score_kind: What ``test`` was measured on.
        curve: Rounds and held-out scores.
    """

    strategy: str
    seed: int
    client: str
    metric: str
    test: float
    final: float
    local_steps: int
    personal_steps: int
    score_kind: str
    curve: tuple[tuple[int, float], ...]

    def score(self, kind: ScoreKind) -> float:
        """One of the two scores."""
        return self.test if kind == "test" else self.final


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences and its 95 % interval; the interval is NaN for fewer than two pairs."""

    mean: float
    low: float
    high: float
    pairs: int

    @classmethod
    def of(cls, differences: Sequence[float]) -> Difference:
        """Student's t interval over independent pairs."""
        values = np.asarray([d for d in differences if not math.isnan(d)])
        if len(values) == 0:
            return cls(math.nan, math.nan, math.nan, 0)
        mean = float(values.mean())
        if len(values) == 1:
            return cls(mean, math.nan, math.nan, 1)
        half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
        return cls(mean, mean - half, mean + half, len(values))

    @property
    def text(self) -> str:
        """As in the table."""
        if math.isnan(self.mean):
            return "–"
        interval = "" if math.isnan(self.low) else f" [{self.low:+.3f}, {self.high:+.3f}]"
        return f"{self.mean:+.3f}{interval}"


def read_run(workspace: Path, strategy: str, seed: int) -> list[Row]:
    """The rows of a finished run, one a client."""
    lines = [json.loads(line) for line in (workspace / "metrics.jsonl").read_text().splitlines()]
    rows = []
    for entry in read_json(workspace / "results.json")["clients"]:
        own = [line for line in lines if line.get("client") == entry["client"]]
        stage = next(stage for stage in _STAGES if stage in own[-1])
        curve = tuple((line["round"], line[stage]["score"]) for line in own if stage in line)
        rows.append(
            Row(
                strategy,
                seed,
                entry["client"],
                own[-1][stage]["metric"],
                _mean_score(entry),
                curve[-1][1],
                sum(line["local_steps"] for line in own),
                sum(line.get("personal_steps", 0) for line in own),
                entry["score_kind"],
                curve,
            )
        )
    return rows


def _mean_score(entry: Mapping[str, Any]) -> float:
    """Balanced accuracy, or the mean Dice over the classes that have one."""
    mean = entry["mean"]
    if entry["task"] == "classification":
        values = [mean.get("balanced_accuracy")]
    else:
        values = [scores["Dice"] for scores in mean.values()]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


def labels_of(rows: Iterable[Row]) -> list[str]:
    """Strategies in the order of their first row."""
    return list(dict.fromkeys(row.strategy for row in rows))


def clients_of(rows: Iterable[Row]) -> list[str]:
    """Clients in the order of their first row."""
    return list(dict.fromkeys(row.client for row in rows))


def _scores(rows: Iterable[Row], label: str, kind: ScoreKind) -> dict[tuple[int, str], float]:
    return {(row.seed, row.client): row.score(kind) for row in rows if row.strategy == label}


def difference(
    rows: Sequence[Row], label: str, reference: str, kind: ScoreKind, client: str | None = None
) -> Difference:
    """Label minus reference, paired by seed: of one client, or of the mean over clients.

    Clients of one run are not independent, so a run is one pair, whatever number of clients it has.
    """
    return Difference.of(list(_by_seed(rows, label, reference, kind, client).values()))


def share_of_headroom(rows: Sequence[Row], label: str, reference: str, upper: str, kind: ScoreKind) -> Difference:
    """(label - reference) / (upper - reference) of the means over seeds and clients, with Fieller's 95 % interval.

    The interval is NaN where the upper one is not clearly ahead of the reference: there is no headroom to share then.
    """
    gains, heads = _by_seed(rows, label, reference, kind), _by_seed(rows, upper, reference, kind)
    seeds = sorted(set(gains) & set(heads))
    x, y = np.asarray([gains[s] for s in seeds]), np.asarray([heads[s] for s in seeds])
    if len(seeds) == 0 or y.mean() <= 0:
        return Difference(math.nan, math.nan, math.nan, len(seeds))
    ratio = float(x.mean() / y.mean())
    if len(seeds) == 1:
        return Difference(ratio, math.nan, math.nan, 1)
    spread = np.cov(x, y) * stats.t.ppf(0.975, len(seeds) - 1) ** 2 / len(seeds)
    a, b, c = y.mean() ** 2 - spread[1, 1], x.mean() * y.mean() - spread[0, 1], x.mean() ** 2 - spread[0, 0]
    if a <= 0:
        return Difference(ratio, math.nan, math.nan, len(seeds))
    half = math.sqrt(max(b * b - a * c, 0.0))
    return Difference(ratio, float((b - half) / a), float((b + half) / a), len(seeds))


def _by_seed(
    rows: Sequence[Row], label: str, reference: str, kind: ScoreKind, client: str | None = None
) -> dict[int, float]:
    """Seed -> label minus reference, of one client or of the mean over clients."""
    own, other = _scores(rows, label, kind), _scores(rows, reference, kind)
    per_seed: dict[int, list[float]] = {}
    for (seed, name), score in own.items():
        if (seed, name) in other and client in (None, name) and not math.isnan(score - other[seed, name]):
            per_seed.setdefault(seed, []).append(score - other[seed, name])
    return {seed: float(np.mean(values)) for seed, values in per_seed.items()}


def as_csv(rows: Iterable[Row]) -> str:
    """All rows."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        values = [getattr(row, column) for column in _COLUMNS]
        writer.writerow(["" if isinstance(v, float) and math.isnan(v) else v for v in values])
    return buffer.getvalue()


def row_of(line: Mapping[str, str]) -> Row:
    """A row of :func:`as_csv` by column, without its curve; other columns are left out."""
    return Row(
        strategy=line["strategy"],
        seed=int(line["seed"]),
        client=line["client"],
        metric=line["metric"],
        test=float(line["test"] or "nan"),
        final=float(line["final"] or "nan"),
        local_steps=int(line["local_steps"]),
        personal_steps=int(line["personal_steps"]),
        score_kind=line["score_kind"],
        curve=(),
    )


_KINDS = {
    "test": "model of each client, of the last round unless inference.checkpoint says best, scored on its test cases",
    "final": "model that each client holds after the last round, scored on its held-out cases",
}


def as_markdown(rows: Sequence[Row], reference: str, kind: ScoreKind, *, tuning: bool) -> str:
    """The comparison as a document."""
    labels, clients = labels_of(rows), clients_of(rows)
    seeds = sorted({row.seed for row in rows})
    others = [label for label in labels if label != reference]
    lines = [
        f"# Comparison on {len(seeds)} {'tuning' if tuning else 'test'} seed{'s' if len(seeds) > 1 else ''}",
        "",
        f"Score: {_KINDS[kind]} (mean Dice over classes, or balanced accuracy). Seeds {seeds[0]} to {seeds[-1]}.",
        f"Differences are to `{reference}`, paired by seed, with 95 % intervals of Student's t over seeds; the mean",
        "over clients of a run is one pair. `worse` counts clients whose mean is below theirs alone, `significantly`",
        "those whose interval is. No correction for the number of comparisons.",
        "",
        *summary_table(rows, labels, reference, kind),
    ]
    lines += ["", "## Per client", "", f"| strategy | {' | '.join(clients)} |", "|---" * (len(clients) + 1) + "|"]
    for label in others:
        cells = [difference(rows, label, reference, kind, client).text for client in clients]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    if len(others) > 1:
        lines += ["", "## Row minus column", "", f"| | {' | '.join(others)} |", "|---" * (len(others) + 1) + "|"]
        for label in others:
            cells = ["" if label == other else difference(rows, label, other, kind).text for other in others]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def summary_table(rows: Sequence[Row], labels: Sequence[str], reference: str, kind: ScoreKind) -> list[str]:
    """Score, difference to the reference, clients worse off and steps of each strategy, as lines of markdown.

    Where the upper reference is among the strategies, also what share of its lead each one reaches.
    """
    clients = clients_of(rows)
    share = f" share of {UPPER}'s lead |" if UPPER in labels else ""
    lines = [f"| strategy | score | difference to {reference} |{share} worse | significantly | steps a client |"]
    lines += ["|---" * lines[0].count(" |") + "|"]
    for label in labels:
        own = [row for row in rows if row.strategy == label]
        scores = [row.score(kind) for row in own if not math.isnan(row.score(kind))]
        cells = [label, f"{np.mean(scores):.3f}" if scores else "–"]
        if label == reference:
            cells += [""] * (4 if share else 3)
        else:
            per_client = [difference(rows, label, reference, kind, client) for client in clients]
            cells.append(difference(rows, label, reference, kind).text)
            if share:
                cells.append("" if label == UPPER else percent(share_of_headroom(rows, label, reference, UPPER, kind)))
            cells += [f"{sum(d.mean < 0 for d in per_client)} of {len(clients)}"]
            cells += [f"{sum(d.high < 0 for d in per_client)}"]
        lines.append(f"| {' | '.join([*cells, steps(own)])} |")
    return lines


def steps(own: Sequence[Row]) -> str:
    """Local steps of a client over all rounds, and those of its personal model."""
    personal = np.mean([row.personal_steps for row in own])
    return f"{np.mean([row.local_steps for row in own]):.0f}" + (f" + {personal:.0f} personal" if personal else "")


def percent(share: Difference) -> str:
    """A share as in the table."""
    if math.isnan(share.mean):
        return "–"
    interval = "" if math.isnan(share.low) else f" [{share.low:.0%}, {share.high:.0%}]"
    return f"{share.mean:.0%}{interval}"
