"""The native extension with CUDA kernels that run on the CPU, for the tests of fedcmt.ops.

With it, operations on CPU tensors go to the *_cuda functions. See tests/cuda_on_cpu.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from cuda_headers import find_cuda_include

from fedcmt.ops import _native

ROOT = Path(__file__).resolve().parent.parent
# Kept, one for each Python: a second build compiles only what has changed.
BUILD = ROOT / "build" / f"simulated_cuda-{sysconfig.get_config_var('SOABI')}"


@contextmanager
def simulated_cuda() -> Iterator[ModuleType]:
    """fedcmt.ops on the simulated kernels; skips the test where they cannot be built."""
    extension = simulated_extension()
    if isinstance(extension, str):
        pytest.skip(extension)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "_load", lambda: extension)
        yield extension


@functools.cache
def simulated_extension() -> ModuleType | str:
    """The module, built by CMakeLists.txt with FEDCMT_CPUSIM, or what is missing to build it.

    Raises:
        RuntimeError: It does not compile.
    """
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    tools = {name: shutil.which(name, path=search) for name in ("g++", "cmake", "ninja")}
    missing = [name for name, path in tools.items() if path is None]
    if importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11")
    if missing:
        return f"needs {', '.join(missing)}"
    include = find_cuda_include(str(tools["g++"]))
    if isinstance(include, str):
        return include
    _build(str(tools["cmake"]), str(tools["ninja"]), include)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return _load(BUILD / f"_C{suffix}")


def _build(cmake: str, ninja: str, cuda_include: Path) -> None:
    import pybind11

    BUILD.mkdir(parents=True, exist_ok=True)
    options = [
        "-DFEDCMT_CPUSIM=ON",
        f"-DFEDCMT_CUDA_INCLUDE={cuda_include}",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [cmake, "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", *options],
            [cmake, "--build", str(BUILD), "--parallel", "2"],
        ):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-5000:]}")


def _load(path: Path) -> ModuleType:
    name = "simulated_cuda._C"  # the last part has to be the name that the module was compiled with
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
