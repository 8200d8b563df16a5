#!/usr/bin/env bash
# The tests, from nothing: environment, package, checks, pytest. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test

say "ruff and mypy"
ruff check .
mypy

say "pytest, in two processes"
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile "$@"
