"""Writes every number of docs/results.md between its markers, the figures and the table of all scores."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from plan import Plan
from tables import (
    NOT_YET,
    Results,
    claims,
    client_table,
    comparison_table,
    newcomer_table,
    ranking,
    settings_list,
    verdicts,
)

from fedcmt.comparison import as_csv
from fedcmt.comparison_figures import curves_png, forest_png
from fedcmt.errors import InputError
from fedcmt.files import write_bytes, write_text

DOCS = Path(__file__).parent.parent.parent / "docs"
SCORES = {
    "test": "the client's model, the best on its held-out cases or, where a part says so, the last, on its test cases",
    "final": "the model that the client holds after the last round, on its held-out cases",
}


def write_document(plan: Plan, digest: str, results: Mapping[str, Results], docs: Path = DOCS) -> Path:
    """Fill the markers of ``results.md``, and write ``results.csv`` and the figures beside it.

    Raises:
        InputError: The document has no markers for a part.
    """
    path = docs / "results.md"
    blocks = {"state": _state(plan, digest, results), "choice": _choice(plan, results)}
    for key, part in results.items():
        blocks[key] = _part(part, _figures(key, part, docs))
    write_text(path, filled(path.read_text(encoding="utf-8"), blocks))
    write_text(docs / "results.csv", _csv(results))
    return path


def filled(text: str, blocks: Mapping[str, list[str]]) -> str:
    """A document with new content between ``<!-- study: KEY -->`` and ``<!-- end -->``.

    Raises:
        InputError: A block has no place, or a place no block.
    """
    found = re.findall(r"^<!-- study: (\S+) -->$", text, re.M)
    odd = sorted(set(found) ^ set(blocks))
    if odd or len(found) != len(set(found)):
        raise InputError(
            f"'{odd[0] if odd else found}' should stand once in plan.yaml and results.md", field="results.md"
        )
    for key, lines in blocks.items():
        pattern = re.compile(rf"(^<!-- study: {re.escape(key)} -->$).*?(^<!-- end -->$)", re.M | re.S)
        content = "\n".join(["", *lines, ""])
        text, count = pattern.subn(lambda m, new=content: f"{m[1]}{new}{m[2]}", text)  # type: ignore[misc]
        if count != 1:
            raise InputError(f"the block '{key}' has no <!-- end -->", field="results.md")
    return text


def _state(plan: Plan, digest: str, results: Mapping[str, Results]) -> list[str]:
    lines = [f"Plan `{digest}` (the first digits of its SHA-256). Score: {SCORES[plan.score]}.", ""]
    lines += ["| part | preset | seeds | strategies on all seeds | claims that hold |", "|---|---|---|---|---|"]
    for key, found in results.items():
        part, judged = found.part, claims(found)
        done = sum(found.seeds(name) == part.seeds for name in part.strategies)
        if part.newcomer is not None:
            done = len(judged) - judged.count(None)
        held = "not judged" if None in judged else f"{judged.count(True)} of {len(judged)}" if judged else ""
        kind = "tuning" if part.tuning else "fresh"
        lines.append(f"| {key} | {part.preset} | {part.seeds} {kind} | {done} of {len(part.strategies)} | {held} |")
    return lines


def _choice(plan: Plan, results: Mapping[str, Results]) -> list[str]:
    tuned = {key: found for key, found in results.items() if found.part.tuning}
    chosen = f"`{plan.chosen}`" if plan.chosen else "none yet"
    return [f"Rule: {plan.rule}", "", f"Chosen: {chosen}.", "", *ranking(tuned)]


def _part(results: Results, figures: list[str]) -> list[str]:
    part = results.part
    if part.newcomer is not None:
        return [*newcomer_table(results), "", *settings_list(results)]
    lines = [*verdicts(results), ""] if part.tests else []
    lines += [*comparison_table(results), ""] if results.rows else [f"This {NOT_YET}.", ""]
    if not part.tuning:
        lines += [*client_table(results), ""]
    return [*lines, *settings_list(results), "", *figures]


def _figures(key: str, results: Results, docs: Path) -> list[str]:
    """Curves and forest plot of a part on fresh seeds. Curves stay as they are where published rows have none."""
    rows = results.named_rows()
    if results.part.tuning or results.part.newcomer is not None or not any(row.strategy == "local" for row in rows):
        return []
    figures = {kind: docs / "figures" / f"study-{key}-{kind}.png" for kind in ("curves", "forest")}
    if all(row.curve for row in rows):
        write_bytes(figures["curves"], curves_png(rows))
    write_bytes(figures["forest"], forest_png(rows, "local", results.kind))
    return [f"![{kind} of {key}](figures/{path.name})" for kind, path in figures.items() if path.is_file()]


def _csv(results: Mapping[str, Results]) -> str:
    """Every score behind the document, each run once a preset."""
    lines: dict[str, None] = {}
    for found in results.values():
        for line in as_csv(found.rows).splitlines():
            lines[line if line.startswith("strategy,") else f"{found.part.preset},{line}"] = None
    header, *others = lines or ["strategy"]
    return "\n".join([f"preset,{header}", *others]) + "\n"
