"""Compare strategies on phantoms: writes the data of every seed that is needed, then runs ``fedcmt compare``.

``python benchmarks/phantoms/compare.py small --strategies fedavg,fedcmt --seeds 10``
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from make import raw_folder
from raw_datasets import preset_file, write_preset

from fedcmt.command import run_command
from fedcmt.compare import TEST_SEEDS_FROM, TUNING_SEEDS_FROM, compare, parse_variants


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compare strategies on phantoms that differ by seed.")
    parser.add_argument("preset", metavar="PRESET", help="ci, small, full or lone")
    parser.add_argument("--strategies", required=True, metavar="A,B,...", help="as of fedcmt compare")
    parser.add_argument("--seeds", type=int, required=True, metavar="N", help="how many test (or tuning) seeds")
    parser.add_argument("--tuning", action="store_true", help="use tuning seeds, which tests never see")
    parser.add_argument("-o", "--output", type=Path, help="where to write (default workspace/NAME-compare)")
    parser.add_argument("--processes", type=int, default=1, metavar="P", help="runs at a time (default 1)")
    parser.add_argument("--score", choices=["test", "final"], help="as of fedcmt compare (default test)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", dest="overrides", help="override a setting"
    )
    return run_command(lambda: _compare(parser.parse_args()))


def _compare(options: argparse.Namespace) -> None:
    variants = parse_variants(options.strategies)
    first = TUNING_SEEDS_FROM if options.tuning else TEST_SEEDS_FROM
    for seed in range(first, first + options.seeds):
        write_preset(options.preset, seed, raw_folder(options.preset, seed))
    result = compare(
        preset_file(options.preset),
        variants,
        options.seeds,
        tuning=options.tuning,
        folder=options.output,
        processes=options.processes,
        score=options.score,
        overrides=options.overrides,
    )
    print((result.folder / "comparison.md").read_text())


if __name__ == "__main__":
    sys.exit(main())
