"""Runs several strategies on several seeds, and writes how they compare."""

from __future__ import annotations

import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from fedcmt import strategies
from fedcmt.comparison import Row, ScoreKind, as_csv, as_markdown, read_run
from fedcmt.comparison_figures import curves_png, forest_png
from fedcmt.config import FederationConfig, StrategyConfig, load_config
from fedcmt.errors import InputError, RunError
from fedcmt.federation import prepare_clients, run_federation
from fedcmt.files import write_bytes, write_text

REFERENCE = "local"
# Settings are chosen on tuning seeds and judged on test seeds; the ranges never meet.
TUNING_SEEDS_FROM = 1
TEST_SEEDS_FROM = 1_000_000
MAX_SEEDS = 999_999
_OF_CONFIG = "config."
_NOT_A_VARIANTS = ("strategy", "seed", "workspace", "raw", "preprocessed", "name")


@dataclass(frozen=True)
class Variant:
    """A strategy with settings, as written on the command line.

    Attributes:
        label: As written.
        strategy: Its name and settings.
        overrides: Settings of the federation that it changes, ``key.path=value`` each.
    """

    label: str
    strategy: Mapping[str, Any]
    overrides: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """The label as a folder's name."""
        return re.sub(r"[^A-Za-z0-9_.=+-]", "_", self.label)


@dataclass(frozen=True)
class Run:
    """One strategy on one seed."""

    variant: Variant
    seed: int
    workspace: Path
    config: FederationConfig


@dataclass(frozen=True)
class Comparison:
    """What was written."""

    folder: Path
    rows: list[Row]
    score: ScoreKind


def parse_variants(text: str) -> list[Variant]:
    """Strategies separated by commas, each ``name`` or ``name:key=value:key=value`` with values in YAML.

    ``local`` is put first where it is missing. A key may be a path: ``distillation.weight=0.5``. Keys that begin with
    ``config.`` are settings of the federation: ``config.training.local_steps=40``.

    Raises:
        InputError: No such strategy or setting, or one named twice.
    """
    labels = [label.strip() for label in text.split(",") if label.strip()]
    if REFERENCE not in labels:
        labels.insert(0, REFERENCE)
    variants = [_variant(label) for label in labels]
    folders = [variant.folder for variant in variants]
    twice = [variant.label for variant in variants if folders.count(variant.folder) > 1]
    if twice:
        raise InputError(f"'{twice[0]}' is named twice", field="--strategies", fix="name every variant once")
    return variants


def _variant(label: str) -> Variant:
    name, *assignments = label.split(":")
    own = [assignment for assignment in assignments if not assignment.startswith(_OF_CONFIG)]
    overrides = [entry.removeprefix(_OF_CONFIG) for entry in assignments if entry.startswith(_OF_CONFIG)]
    odd = next((key for entry in overrides if (key := re.split(r"[.=]", entry)[0]) in _NOT_A_VARIANTS), None)
    if odd:
        raise InputError(f"'{odd}' is the same for all variants", field="--strategies", fix="leave it out there")
    return Variant(label, _settings(name, own, label), tuple(overrides))


def _settings(name: str, assignments: Sequence[str], label: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"name": name}
    for assignment in assignments:
        path, separator, value = assignment.partition("=")
        if not separator or not path:
            raise InputError(
                f"'{assignment}' in '{label}' is no setting", field="--strategies", fix="write name:key=value"
            )
        node = settings
        *parents, last = path.split(".")
        for key in parents:
            node = node.setdefault(key, {})
        try:
            node[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"the value of '{assignment}' is no valid YAML", field="--strategies") from None
    return settings


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
        say: Called with what happens.

    Raises:
        InputError: A mistake in config, strategies or data.
        RunError: A run failed; the others are done.
    """
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
    runs = list(_runs(config, variants, range(first, first + seeds), target, threads, overrides))
    for variant in variants:
        chosen = strategies.create(StrategyConfig.model_validate(dict(variant.strategy)))
        chosen.check([client.name for client in settings.clients])
        load_config(config, [*overrides, "strategy=local", *variant.overrides])
    _prepare(runs, target, say)
    _run_all(runs, processes, say, reports=reports)
    rows = [row for run in runs for row in read_run(run.workspace, run.variant.label, run.seed)]
    kind: ScoreKind = score or ("test" if all(row.score_kind == "test" for row in rows) else "final")
    write_text(target / "results.csv", as_csv(rows))
    write_text(target / "comparison.md", as_markdown(rows, REFERENCE, kind, tuning=tuning))
    write_bytes(target / "curves.png", curves_png(rows))
    if len(variants) > 1:
        write_bytes(target / "forest.png", forest_png(rows, REFERENCE, kind))
    return Comparison(target, rows, kind)


def _minimal(config: FederationConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_unset=True)


def _runs(
    config: Path | Mapping[str, Any],
    variants: Sequence[Variant],
    seeds: Sequence[int],
    folder: Path,
    threads: int,
    overrides: Sequence[str],
) -> Iterator[Run]:
    # Seed by seed: a comparison that is cut off has the same seeds of every strategy.
    for seed in seeds:
        for variant in variants:
            workspace = folder / "runs" / variant.folder / f"seed-{seed}"
            changes = [*overrides, *variant.overrides, f"seed={seed}", f"workspace={str(workspace)!r}"]
            base = _minimal(load_config(config, changes))
            for key in ("raw", "preprocessed"):
                if base.get(key):
                    base[key] = base[key].replace("{seed}", str(seed))
            base = {"threads": threads, **base, "strategy": dict(variant.strategy)}
            yield Run(variant, seed, workspace, load_config(base))


def _prepare(runs: Sequence[Run], folder: Path, say: Callable[[str], None]) -> None:
    """Check and preprocess each set of data once, before runs share it."""
    seen = set()
    for run in runs:
        place = run.config.raw, run.config.preprocessed, run.variant.overrides
        if place not in seen:
            seen.add(place)
            say(f"checking and preprocessing the data of seed {run.seed}")
            _quietly(folder / "preprocessing.log", partial(prepare_clients, run.config))


def _run_all(runs: Sequence[Run], processes: int, say: Callable[[str], None], *, reports: bool) -> None:
    started, failed = time.perf_counter(), []
    for count, (run, error) in enumerate(_outcomes(runs, processes, reports), 1):
        minutes = (time.perf_counter() - started) / 60
        say(f"{count}/{len(runs)} {run.variant.label}, seed {run.seed}: {error or 'done'}; {minutes:.1f} min")
        if error:
            failed.append((run, error))
    if failed:
        run, error = failed[0]
        raise RunError(
            f"{len(failed)} of {len(runs)} runs failed; {run.variant.label}, seed {run.seed}: {error} "
            f"(see {_log(run.workspace)}); the same command goes on"
        )


def _outcomes(runs: Sequence[Run], processes: int, reports: bool) -> Iterator[tuple[Run, str | None]]:
    if processes == 1:
        for run in runs:
            yield run, run_one(run.config, reports)
        return
    # Spawned: forking a process that has run torch's threads is not safe.
    with ProcessPoolExecutor(min(processes, len(runs)), multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run_one, run.config, reports): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()


def run_one(config: FederationConfig, reports: bool = False) -> str | None:
    """Run or resume one federation, its output in a log beside its workspace.

    Args:
        config: Its settings.
        reports: Whether to write what shows its results.

    Returns:
        None, or what went wrong.
    """
    workspace = config.workspace_folder()
    try:
        _quietly(_log(workspace), partial(run_federation, config, scores_only=not reports))
    except (InputError, RunError, OSError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _log(workspace: Path) -> Path:
    return workspace.with_name(f"{workspace.name}.log")


def _quietly(log: Path, action: Callable[[], Any]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        action()
