#!/usr/bin/env bash
# The main job, from nothing: environment, package, real CT and MR volumes, a federation of six clients, its report.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

say "fetching real CT and MR volumes"
python scripts/demo_data.py --output data/nnUNet_raw

say "federating: configs/demo.yaml (run the same command again to resume or to look again)"
python scripts/run_fed.py configs/demo.yaml --workspace workspace/demo

say "done: predictions in workspace/demo/predictions, report in workspace/demo/report.html"
