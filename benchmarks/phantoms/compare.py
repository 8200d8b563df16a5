"""Compare strategies on phantoms: writes the data of every seed that is needed, then runs ``fedcmt compare``.

``python benchmarks/phantoms/compare.py small --strategies fedavg,fedcmt --seeds 10``
"""

from __future__ import annotations

import argparse
import sys

from make import raw_folder
from raw_datasets import preset_file, write_preset

from fedcmt.cli import add_compare_options
from fedcmt.cli import compare as run_comparison
from fedcmt.command import run_command
from fedcmt.compare import TEST_SEEDS_FROM, TUNING_SEEDS_FROM, parse_variants


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compare strategies on phantoms that differ by seed.")
    parser.add_argument("preset", metavar="PRESET", help="ci, small, full or lone")
    add_compare_options(parser)
    return run_command(lambda: _compare(parser.parse_args()))


def _compare(options: argparse.Namespace) -> None:
    options.config = preset_file(options.preset)
    parse_variants(options.strategies)  # a mistake there is told before data are written
    first = TUNING_SEEDS_FROM if options.tuning else TEST_SEEDS_FROM
    for seed in range(first, first + options.seeds):
        write_preset(options.preset, seed, raw_folder(options.preset, seed))
    run_comparison(options)


if __name__ == "__main__":
    sys.exit(main())
