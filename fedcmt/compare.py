"""Runs several strategies on several seeds, and writes how they compare."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcmt import strategies
from fedcmt.comparison import Row, ScoreKind, as_csv, as_markdown, read_run
from fedcmt.comparison_figures import curves_png, forest_png
from fedcmt.comparison_runs import prepare_data, run_all, runs_of
from fedcmt.config import StrategyConfig, load_config
from fedcmt.errors import InputError, RunError
from fedcmt.files import write_bytes, write_text
from fedcmt.variants import REFERENCE, Variant, parse_variants

__all__ = ["MAX_SEEDS", "TEST_SEEDS_FROM", "TUNING_SEEDS_FROM", "Comparison", "Variant", "compare", "parse_variants"]

# Settings are chosen on tuning seeds and judged on test seeds; the ranges never meet.
TUNING_SEEDS_FROM = 1
TEST_SEEDS_FROM = 1_000_000
MAX_SEEDS = 999_999


@dataclass(frozen=True)
class Comparison:
    """What was written."""

    folder: Path
    rows: list[Row]
    score: ScoreKind


def compare(
    config: Path | Mapping[str, Any],
    variants: Sequence[Variant],
    seeds: int,
    *,
    tuning: bool = False,
    folder: Path | None = None,
    processes: int = 1,
    score: ScoreKind | None = None,
    overrides: Sequence[str] = (),
    reports: bool = False,
    budget: float | None = None,
    say: Callable[[str], None] = print,
) -> Comparison:
    """Run every strategy on every seed and write the comparison; going on where an earlier call stopped.

    All get the same data, and the same rounds and local steps unless a variant changes them. In ``raw`` and
    ``preprocessed`` of the config, ``{seed}`` stands for the seed: data that differ by seed.

    Args:
        config: A federation's configuration; its own strategy, seed and workspace are not used.
        variants: From :func:`parse_variants`.
        seeds: How many.
        tuning: Use the tuning seeds instead of the test seeds.
        folder: Where to write; default ``workspace/NAME-compare``. Tuning writes into its folder ``tuning``.
        processes: Runs at a time.
        score: ``test``, or ``final``; default ``test`` where every client has test cases.
        overrides: ``key.path=value`` each.
        reports: Write each run's report page, TensorBoard curves and model folders too; no score depends on them.
        budget: Minutes after which no further run is started.
        say: Called with what happens.

    Raises:
        InputError: A mistake in config, strategies or data.
        RunError: A run failed, and the others are done; or the budget is spent.
    """
    deadline = None if budget is None else time.monotonic() + 60 * budget
    if not 1 <= seeds <= MAX_SEEDS:
        raise InputError(f"should be 1 to {MAX_SEEDS}, found {seeds}", field="--seeds")
    if processes < 1:
        raise InputError(f"should be at least 1, found {processes}", field="--processes")
    settings = load_config(config, [*overrides, "strategy=local"])
    target = folder or Path("workspace") / f"{settings.name}-compare"
    target = target / "tuning" if tuning else target
    if "{seed}" in str(settings.raw) and "{seed}" not in str(settings.preprocessed):
        raise InputError(
            "raw data differ by seed, preprocessed data do not", field="preprocessed", fix="put {seed} into it as well"
        )
    first = TUNING_SEEDS_FROM if tuning else TEST_SEEDS_FROM
    threads = max(1, (os.cpu_count() or 1) // processes)
    runs = runs_of(config, variants, range(first, first + seeds), target, threads, overrides)
    for variant in variants:
        chosen = strategies.create(StrategyConfig.model_validate(dict(variant.strategy)))
        chosen.check([client.name for client in settings.clients])
        load_config(config, [*overrides, "strategy=local", *variant.overrides])
    prepare_data(runs, target, say)
    outcome = run_all(runs, processes, say, reports=reports, deadline=deadline)
    if outcome.failed:
        run, error = outcome.failed[0]
        raise RunError(
            f"{len(outcome.failed)} of {len(runs)} runs failed; {run.variant.label}, seed {run.seed}: {error} "
            f"(see {run.log}); the same command goes on"
        )
    if outcome.left:
        raise RunError(f"the budget is spent, {outcome.left} of {len(runs)} runs are left; the same command goes on")
    rows = [row for run in runs for row in read_run(run.workspace, run.variant.label, run.seed)]
    kind: ScoreKind = score or ("test" if all(row.score_kind == "test" for row in rows) else "final")
    write_text(target / "results.csv", as_csv(rows))
    write_text(target / "comparison.md", as_markdown(rows, REFERENCE, kind, tuning=tuning))
    write_bytes(target / "curves.png", curves_png(rows))
    if len(variants) > 1:
        write_bytes(target / "forest.png", forest_png(rows, REFERENCE, kind))
    return Comparison(target, rows, kind)
