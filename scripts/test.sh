#!/usr/bin/env bash
# The tests, from nothing: environment, package, checks, pytest. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test

say "ruff and mypy"
ruff check .
mypy

say "pytest"
python -m pytest "$@"
