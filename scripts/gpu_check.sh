#!/usr/bin/env bash
# Everything that a GPU can verify, in under 8 minutes and without a network: build, tests, compute-sanitizer, speed.
# Needs nvcc, CMake, ninja, a C++17 compiler, and a Python with torch, numpy, pybind11 and pytest.
# Later steps run where one fails; the exit code is 1 then. Results: gpu_check.json, gpu_check.md and a log a step.
#
# usage: scripts/gpu_check.sh [--dry-run] [folder, default build/gpu_check]
#   --dry-run    the CPU in place of the GPU, small sizes, no compute-sanitizer; FEDCMT_CPUSIM=1 simulates the kernels
#   PYTHON=...   the Python to use, default python3
#   FEDCMT_CUDA_ARCH=...   default: the GPU's own architecture

# The functions of the steps are called by name, each in a bash of its own.
# shellcheck disable=SC2317
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}" || command -v python) || { echo "error: no Python; set PYTHON" >&2; exit 2; }
device=cuda
patience=1
folder=$root/build/gpu_check
for argument in "$@"; do
    case $argument in
        --dry-run) device=cpu patience=5 ;;
        -*) echo "usage: $0 [--dry-run] [folder]" >&2; exit 2 ;;
        *) folder=$argument ;;
    esac
done
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
rm -f "$folder"/*.log "$folder"/*.json "$folder"/*.md "$folder/steps.tsv"

# CMake and ninja may have come with pip, beside this Python.
PATH=$(dirname "$python"):$PATH
# The package is a copy with the extension built for this GPU, so the checkout stays as it is. -P keeps the current
# folder, and so the checkout, out of Python's search path.
export PYTHONPATH=$folder/package PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1

# step NAME SECONDS COMMAND...: runs a command under a time limit into NAME.log and notes how it went.
step() {
    local name=$1 limit=$(($2 * patience)) begin=$SECONDS result=passed
    shift 2
    printf '== %s\n' "$name"
    timeout --kill-after=5 "$limit" "$@" >"$folder/$name.log" 2>&1
    case $? in
        0) ;;
        124 | 137) result=failed; echo "stopped after $limit s" >>"$folder/$name.log" ;;
        *) result=failed ;;
    esac
    tail -n 4 "$folder/$name.log"
    printf '%s\t%s\t%s\n' "$name" "$result" "$((SECONDS - begin))" >>"$folder/steps.tsv"
    printf '%s: %s, %s s\n\n' "$name" "$result" "$((SECONDS - begin))"
}

skip() {
    printf '== %s\nskipped: %s\n\n' "$1" "$2"
    printf '%s\tskipped: %s\t0\n' "$1" "$2" >>"$folder/steps.tsv"
}

facts() {
    if [ "$device" = cuda ]; then
        nvidia-smi || echo "no nvidia-smi"
        nvcc --version || echo "no nvcc on PATH"
    fi
    cmake --version
    "$python" "$root/scripts/gpu_check.py" facts "$folder" --device "$device"
}

find_nvcc() {
    local candidate
    for candidate in "${CUDACXX:-}" "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" nvcc /usr/local/cuda/bin/nvcc; do
        [ -n "$candidate" ] && command -v "$candidate" && return
    done
    "$python" - <<'PYTHON'
import glob, sys
found = [path for folder in sys.path for path in glob.glob(folder + "/nvidia/cu1*/bin/nvcc")]
print(*found[:1])
PYTHON
}

architecture() {
    "$python" -c 'import torch; print("{}{}-real".format(*torch.cuda.get_device_capability()))'
}

build() {
    local options nvcc pybind
    options=("-DPython_EXECUTABLE=$python" "-DCMAKE_INSTALL_PREFIX=$folder/package/fedcmt" -DCMAKE_BUILD_TYPE=Release)
    pybind=$("$python" -m pybind11 --cmakedir) && options+=("-Dpybind11_DIR=$pybind")
    if [ "$device" = cuda ]; then
        nvcc=$(find_nvcc)
        options+=(-DFEDCMT_CUDA=on "-DCMAKE_CUDA_ARCHITECTURES=${FEDCMT_CUDA_ARCH:-$(architecture)}")
        [ -n "$nvcc" ] && options+=("-DCMAKE_CUDA_COMPILER=$nvcc")
    else
        options+=(-DFEDCMT_CUDA=off "-DFEDCMT_CPUSIM=${FEDCMT_CPUSIM:-0}")
    fi
    rm -rf "$folder/package" && mkdir -p "$folder/package" && cp -R "$root/fedcmt" "$folder/package/" || return 1
    rm -f "$folder"/package/fedcmt/_C*.so
    cmake --fresh -S "$root" -B "$folder/cmake" -G Ninja "${options[@]}" && cmake --build "$folder/cmake" &&
        cmake --install "$folder/cmake" &&
        "$python" -c 'from fedcmt import ops; info = ops.backend_info(); print(info); raise SystemExit(not info.native)'
}

# The conftest of the tests needs nnU-Net, some tests compare with it, and others need hypothesis: none has to be here.
tests() {
    local files=() file module missing
    for file in "$root"/tests/test_ops*.py; do
        missing=
        for module in hypothesis nnunetv2 batchgeneratorsv2; do
            if grep -Eq "import $module|from $module|from stock_transforms" "$file" &&
                ! "$python" -c "import $module" 2>/dev/null; then
                missing=$module
            fi
        done
        if [ -n "$missing" ]; then
            echo "not run, needs $missing: $file"
        else
            files+=("$file")
        fi
    done
    [ ${#files[@]} -gt 0 ] || return 1
    "$python" -m pytest "${files[@]}" --noconftest -p no:cacheprovider --rootdir "$root" -c "$root/pyproject.toml" \
        -W default -q -k "$device and not simulated" >"$folder/pytest.txt" 2>&1
    local code=$?
    cat "$folder/pytest.txt"
    # Skipped tests alone are no success.
    [ "$code" -eq 0 ] && grep -Eq '[1-9][0-9]* passed' "$folder/pytest.txt"
}

exercise() {
    "$python" "$root/scripts/gpu_exercise.py" --device "$device"
}

# Without torch's cache every tensor is an allocation of its own, so that memcheck sees where it ends.
sanitize() {
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$1" --error-exitcode 1 --report-api-errors no \
        --kernel-name kns=fedcmt --print-limit 20 "$python" "$root/scripts/gpu_exercise.py" --device cuda --once
}

find_sanitizer() {
    local toolkit candidate
    toolkit=$(dirname "$(readlink -f "$(find_nvcc)")")/..
    for candidate in compute-sanitizer {"$toolkit",/usr/local/cuda}/{bin,compute-sanitizer}/compute-sanitizer; do
        command -v "$candidate" && return
    done
}

bench() {
    if [ "$device" = cpu ]; then
        "$python" "$root/scripts/gpu_check.py" bench "$folder" --device cpu --elements 10001 --repeats 3
    else
        "$python" "$root/scripts/gpu_check.py" bench "$folder" --seconds 57
    fi
}

# DALI on the GPU against the torch backend, its buffers in torch, and how long a trainer waits for patches.
data() {
    if [ "$device" = cpu ]; then
        "$python" "$root/scripts/gpu_data.py" "$folder" --device cpu --size 16 --batches 3 --parity 6 --threads 1
    else
        "$python" "$root/scripts/gpu_data.py" "$folder"
    fi
}

sanitizer=$(find_sanitizer)
export -f facts find_nvcc architecture build tests exercise sanitize bench data
export root python device folder sanitizer

# The limits add up to 480 s; a dry run has no GPU's speed and gets more.
step facts 20 bash -c facts
step build 110 bash -c build
step exercise 40 bash -c exercise
step tests 80 bash -c tests
if [ "$device" = cpu ]; then
    skip memcheck "dry run"
    skip racecheck "dry run"
elif [ -z "$sanitizer" ]; then
    skip memcheck "no compute-sanitizer"
    skip racecheck "no compute-sanitizer"
else
    step memcheck 55 bash -c 'sanitize memcheck'
    step racecheck 55 bash -c 'sanitize racecheck'
fi
step bench 75 bash -c bench
if "$python" -c 'import nvidia.dali, blosc2' 2>/dev/null; then
    step data 45 bash -c data
else
    skip data "needs nvidia-dali-cuda130 and blosc2"
fi

"$python" "$root/scripts/gpu_check.py" report "$folder"
failed=$?
cat "$folder/gpu_check.md"
printf '\nsee %s\n' "$folder"
exit "$failed"
