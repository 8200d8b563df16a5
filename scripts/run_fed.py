"""Run or resume a federation: python scripts/run_fed.py CONFIG [--workspace DIR] [--set key.path=value ...]"""

import argparse
import sys

from fedcmt.cli import add_run_arguments, run
from fedcmt.command import run_command

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser)
    options = parser.parse_args()
    sys.exit(run_command(lambda: run(options)))
