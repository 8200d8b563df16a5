"""Write a preset's phantoms as nnU-Net raw datasets: ``python benchmarks/phantoms/make.py small --seed 1``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from raw_datasets import preset_file, write_preset

from fedcmt.command import run_command
from fedcmt.config import load_config


def raw_folder(preset: str, seed: int) -> Path:
    """Where the preset's configuration looks for the data of a seed."""
    return Path(str(load_config(preset_file(preset)).folder("raw")).replace("{seed}", str(seed)))


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write a preset's phantoms as nnU-Net raw datasets.")
    parser.add_argument("preset", metavar="PRESET", help="ci, small, full or lone")
    parser.add_argument("--seed", type=int, default=1, help="of subjects, scanners and scans (default 1)")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="raw folder (default: the preset's own)")
    options = parser.parse_args()

    def write() -> None:
        raw = options.output or raw_folder(options.preset, options.seed)
        written = write_preset(options.preset, options.seed, raw)
        print(f"{raw}: {', '.join(path.name for path in written) or 'nothing to do'}")

    return run_command(write)


if __name__ == "__main__":
    sys.exit(main())
