"""Finds CUDA's headers, for tests that compile csrc/cuda with a host compiler."""

from __future__ import annotations

import glob
import re
import shutil
import subprocess
import sys
from pathlib import Path

# What the simulator includes.
PROBE = "#include <cuda_runtime_api.h>\n#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n#include <vector_functions.h>\n"


def find_cuda_include(compiler: str) -> Path | str:
    """The folder that `compiler` can take CUDA's headers from, or the reason why there is none."""
    problem = "none were found"
    for folder in _candidates():
        command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{folder}", "-x", "c++", "-"]
        done = subprocess.run(command, input=PROBE, capture_output=True, text=True)
        if done.returncode == 0:
            return folder
        problem = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
    return f"needs CUDA's headers, from nvcc or the wheels nvidia-cuda-{{runtime,crt,cccl}}: {problem}"


def _candidates() -> list[Path]:
    """Beside nvcc, then in NVIDIA's wheels."""
    folders = []
    nvcc = shutil.which("nvcc")
    if nvcc is not None:  # which may be a script that calls the real one
        steps = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-E", "/dev/null"], capture_output=True, text=True)
        folders += [Path(top) / "include" for top in re.findall(r"^#\$ TOP=(.+)$", steps.stderr, re.MULTILINE)]
    for root in sys.path:
        folders += [Path(found) for found in sorted(glob.glob(f"{root}/nvidia/cu1*/include"), reverse=True)]
    return [folder.resolve() for folder in folders]
