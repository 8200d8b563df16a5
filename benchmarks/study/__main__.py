"""Run the study of plan.yaml and write docs/results.md: ``python benchmarks/study``. Calling it again goes on."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from document import DOCS, write_document
from plan import read_plan
from tables import Results
from work import carry_out, is_known, published, rows_of, runs_for

from fedcmt.command import run_command
from fedcmt.comparison_runs import Run
from fedcmt.errors import InputError, RunError


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="study", description="Run the study of plan.yaml, and write docs/results.md.")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run these parts only (default: all in their order)")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="start no run after these; 0 only writes")
    parser.add_argument("--processes", type=int, default=1, metavar="P", help="runs at a time (default 1)")
    parser.add_argument("--published", action="store_true", help="do no run that docs/results.csv has")
    parser.add_argument("-o", "--output", type=Path, default=Path("workspace/study"), help="folder of runs and data")
    options = parser.parse_args()
    run = options.output, options.only, options.budget, options.processes
    return run_command(lambda: study(*run, scores=DOCS / "results.csv" if options.published else None))


def study(
    folder: Path,
    only: list[str] | None = None,
    budget: float | None = None,
    processes: int = 1,
    scores: Path | None = None,
) -> None:
    """Run the parts and write what is known of all of them.

    Args:
        scores: A ``results.csv``; runs that it holds need not be done again.

    Raises:
        InputError: A mistake in the plan, or no such part.
        RunError: Runs failed.
    """
    deadline = None if budget is None else time.monotonic() + 60 * budget
    plan, digest = read_plan()
    unknown = sorted(set(only or []) - set(plan.parts))
    if unknown:
        raise InputError(f"no part '{unknown[0]}'", field="--only", fix=f"use {', '.join(plan.parts)}")
    if processes < 1:
        raise InputError(f"should be at least 1, found {processes}", field="--processes")
    runs = {key: runs_for(plan, part, folder) for key, part in plan.parts.items()}
    known = {part.preset: {} for part in plan.parts.values()} | (published(scores) if scores else {})

    def left(key: str) -> list[Run]:
        return [run for run in runs[key] if not is_known(run, known[plan.parts[key].preset])]

    problems = []
    for key in only or plan.parts:
        say = lambda text, key=key: print(f"{key}: {text}", flush=True)  # noqa: E731 (names the part in every line)
        problems += carry_out(left(key), plan.parts[key].preset, processes, deadline, say)
    results = {key: Results(plan, part, rows_of(runs[key], known[part.preset])) for key, part in plan.parts.items()}
    print(f"{write_document(plan, digest, results)}: written")
    missing = {run.workspace for key in only or plan.parts for run in left(key)}
    print(f"{len(missing)} runs are left" + ("; the same command goes on" if missing else ""))
    if problems:
        raise RunError(f"{len(problems)} runs failed: {problems[0]}")


if __name__ == "__main__":
    sys.exit(main())
