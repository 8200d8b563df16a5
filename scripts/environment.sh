# Sourced by demo.sh and test.sh: makes or reuses .venv in the checkout and installs the package into it.
# usage: source scripts/environment.sh [extra]

cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n== %s\n' "$*"; }

if [ ! -x .venv/bin/python ]; then
    python=""
    for candidate in python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "error: no Python 3.11 or newer found; install it first" >&2
        exit 2
    fi
    say "making .venv with $("$python" --version)"
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --upgrade pip
fi
# shellcheck disable=SC1091
source .venv/bin/activate

if ! python -c 'from importlib.metadata import version as v; raise SystemExit(not (v("torch").startswith("2.14.") and v("torchvision").startswith("0.29.")))' 2>/dev/null; then
    say "installing torch and torchvision, as a pair (about 90 s, 5 GB)"
    python -m pip install --quiet torch==2.14.1 torchvision==0.29.1
fi

say "building and installing fedcmt${1:+ with [$1]} (compiles the C++ kernels, and the CUDA kernels where nvcc is found)"
python -m pip install --quiet --editable ".${1:+[$1]}"
