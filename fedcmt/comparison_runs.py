"""The runs of a comparison: which there are, their data, and running them in several processes."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedcmt.checkpoint import Workspace
from fedcmt.config import ClientConfig, FederationConfig, load_config
from fedcmt.engines.site_process import end_with
from fedcmt.errors import InputError, RunError
from fedcmt.federation import prepare_clients, run_federation
from fedcmt.files import read_json
from fedcmt.variants import Variant


@dataclass(frozen=True)
class Run:
    """One strategy on one seed."""

    variant: Variant
    seed: int
    workspace: Path
    config: FederationConfig

    @property
    def log(self) -> Path:
        """What it printed."""
        return _log(self.workspace)

    @property
    def finished(self) -> bool:
        """Whether its scores are there."""
        results = Workspace(self.workspace).results
        return results.is_file() and bool(read_json(results)["rounds"] == self.config.rounds)


@dataclass(frozen=True)
class Outcome:
    """How a series of runs went.

    Attributes:
        failed: Runs and what went wrong.
        left: How many were not started before the deadline.
    """

    failed: list[tuple[Run, str]]
    left: int


def _minimal(config: FederationConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_unset=True)


def runs_of(
    config: Path | Mapping[str, Any],
    variants: Sequence[Variant],
    seeds: Sequence[int],
    folder: Path,
    threads: int,
    overrides: Sequence[str] = (),
) -> list[Run]:
    """All runs of some variants on some seeds; the arguments are those of :func:`compare`."""
    runs = []
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
            runs.append(Run(variant, seed, workspace, load_config(base)))
    return runs


def _preprocessing(client: ClientConfig) -> dict[str, Any]:
    """What a client's preprocessed data depend on."""
    return client.model_dump(include={"dataset", "task", "configuration", "spacing"})


def prepare_data(runs: Sequence[Run], folder: Path, say: Callable[[str], None]) -> None:
    """Check and preprocess each set of data once, before runs share it."""
    seen = set()
    for run in runs:
        place = str([run.config.raw, run.config.preprocessed, *(_preprocessing(c) for c in run.config.clients)])
        if place not in seen:
            seen.add(place)
            say(f"checking and preprocessing the data of seed {run.seed}")
            _quietly(folder / "preprocessing.log", partial(prepare_clients, run.config))


def run_all(
    runs: Sequence[Run],
    processes: int,
    say: Callable[[str], None],
    *,
    reports: bool = False,
    deadline: float | None = None,
) -> Outcome:
    """Run what is not finished yet, and go on where runs fail.

    Args:
        runs: From :func:`runs_of`, their data prepared.
        processes: Runs at a time.
        say: Called with what happens.
        reports: As of :func:`compare`.
        deadline: Value of ``time.monotonic`` after which no run is started.
    """
    started, count, failed = time.perf_counter(), 0, []
    for count, (run, error) in enumerate(_outcomes(runs, processes, reports, deadline), 1):
        minutes = (time.perf_counter() - started) / 60
        say(f"{count}/{len(runs)} {run.variant.label}, seed {run.seed}: {error or 'done'}; {minutes:.1f} min")
        if error:
            failed.append((run, error))
    return Outcome(failed, len(runs) - count)


def _outcomes(
    runs: Sequence[Run], processes: int, reports: bool, deadline: float | None
) -> Iterator[tuple[Run, str | None]]:
    waiting = iter(runs)

    def following() -> Run | None:
        return None if deadline is not None and time.monotonic() >= deadline else next(waiting, None)

    if processes == 1:
        while run := following():
            yield run, run_one(run.config, reports)
        return
    # Spawned: forking a process that has run torch's threads is not safe.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(runs)), context, end_with, (os.getpid(),)) as pool:
        going: dict[Future[str | None], Run] = {}
        while True:
            while len(going) < processes and (run := following()):
                going[pool.submit(run_one, run.config, reports)] = run
            if not going:
                return
            for future in wait(going, return_when=FIRST_COMPLETED).done:
                yield going.pop(future), future.result()


def run_one(config: FederationConfig, reports: bool = False) -> str | None:
    """Run or resume one federation, its output in a log beside its workspace.

    Args:
        config: Its settings.
        reports: Whether to write what shows its results.

    Returns:
        None, or what went wrong.
    """
    try:
        _quietly(_log(config.workspace_folder()), partial(run_federation, config, scores_only=not reports))
    except (InputError, RunError, OSError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _log(workspace: Path) -> Path:
    return workspace.with_name(f"{workspace.name}.log")


def _quietly(log: Path, action: Callable[[], Any]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        action()
