"""Runs what the plan asks for, on phantoms of each seed, and reads what is there."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from plan import Part, Plan, local_alike

from fedcmt.compare import TEST_SEEDS_FROM, TUNING_SEEDS_FROM
from fedcmt.comparison import Row, read_run, row_of
from fedcmt.comparison_runs import Run, prepare_data, run_all, runs_of
from fedcmt.config import load_config
from fedcmt.variants import Variant

PHANTOMS = Path(__file__).parent.parent / "phantoms"
sys.path.append(str(PHANTOMS))
NEVER = 1_000_000  # a round that does not come


def preset_config(preset: str) -> Path:
    """The configuration of a phantom preset."""
    from raw_datasets import preset_file

    return Path(preset_file(preset))


def write_data(preset: str, seed: int, raw: Path) -> None:
    """Write a preset's phantoms of a seed, where they are not there yet."""
    from raw_datasets import write_preset

    write_preset(preset, seed, raw)


def newcomers(plan: Plan, part: Part, strategy: str) -> dict[str, Variant | None]:
    """The runs that tell about a newcomer: with it, without it, and it alone on two schedules."""
    assert part.newcomer is not None
    client, first = part.newcomer.client, part.newcomer.joins_at_round
    text = plan.text_of(strategy)
    own = f"config.clients.{client}."
    rounds = load_config(preset_config(part.preset)).rounds
    shared = None if text is None else ":".join(piece for piece in text.split(":") if not piece.startswith(own))
    texts = {
        "with": None if text is None else f"{text}:{own}joins_at_round={first}",
        "without": None if shared is None else f"{shared}:{own}joins_at_round={NEVER}",
        "alone": f"local:{own}joins_at_round={first}",
        "alone from the start": f"local:config.rounds={rounds - first + 1}",
    }
    return {key: None if value is None else plan.variant(value) for key, value in texts.items()}


def variants_of(plan: Plan, part: Part) -> list[Variant]:
    """All variants of a part that can be run, references included, each once."""
    wanted: list[Variant | None] = []
    for strategy in part.strategies.values():
        if part.newcomer is not None:
            wanted += newcomers(plan, part, strategy).values()
            continue
        variant = plan.variant(strategy, part.config)
        wanted += [variant] if variant is None else [local_alike(variant), variant]
    return list({variant.label: variant for variant in wanted if variant is not None}.values())


def runs_for(plan: Plan, part: Part, folder: Path) -> list[Run]:
    """A part's runs. Parts on the same preset share runs of the same variant and seed."""
    first = (TUNING_SEEDS_FROM if part.tuning else TEST_SEEDS_FROM) + part.first - 1
    data = folder / "data" / part.preset / "seed-{seed}"
    overrides = [f"{kind}={str(data / kind)!r}" for kind in ("raw", "preprocessed")]
    seeds, target = range(first, first + part.seeds), folder / part.preset
    return runs_of(preset_config(part.preset), variants_of(plan, part), seeds, target, 1, overrides)


def carry_out(
    runs: Sequence[Run], preset: str, processes: int, deadline: float | None, say: Callable[[str], None]
) -> list[str]:
    """Do runs that are not finished, seed by seed, until the deadline.

    Returns:
        What went wrong.
    """
    problems: list[str] = []
    for seed, group in groupby(runs, lambda run: run.seed):
        if deadline is not None and time.monotonic() >= deadline:
            break
        waiting = list(group)
        say(f"{preset}, seed {seed}: {len(waiting)} runs")
        write_data(preset, seed, waiting[0].config.folder("raw"))
        prepare_data(waiting, waiting[0].workspace.parents[2], say)
        outcome = run_all(waiting, processes, say, deadline=deadline)
        problems += [f"{run.variant.label}, seed {seed}: {error} ({run.log})" for run, error in outcome.failed]
    return problems


def published(path: Path) -> dict[str, dict[tuple[str, int], list[Row]]]:
    """Of each preset, the rows in ``results.csv`` of each variant and seed; they have no curves."""
    found: dict[str, dict[tuple[str, int], list[Row]]] = {}
    with open(path, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            row = row_of(line)
            found.setdefault(line["preset"], {}).setdefault((row.strategy, row.seed), []).append(row)
    return found


def is_known(run: Run, known: Mapping[tuple[str, int], list[Row]]) -> bool:
    """Whether a run need not be done: it is finished, or its rows are known."""
    return run.finished or (run.variant.label, run.seed) in known


def rows_of(runs: Iterable[Run], known: Mapping[tuple[str, int], list[Row]]) -> list[Row]:
    """The rows of the finished runs, and of others those that are known."""
    rows: list[Row] = []
    for run in runs:
        own = run.variant.label, run.seed
        rows += read_run(run.workspace, *own) if run.finished else known.get(own, [])
    return rows
