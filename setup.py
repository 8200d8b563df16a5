"""Drives CMake. Sources, flags and defaults live in CMakeLists.txt.

Environment: FEDCMT_CUDA = auto | on | off, FEDCMT_CUDA_ARCH = for example "80-real;90",
FEDCMT_CPUSIM = 1 for CUDA kernels that run on the CPU (tests).
"""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def find_nvcc() -> str | None:
    """nvcc from CUDACXX, CUDA_HOME, PATH, or NVIDIA's pip wheels, in this order."""
    cuda_home = os.environ.get("CUDA_HOME")
    candidates = [
        os.environ.get("CUDACXX"),
        os.path.join(cuda_home, "bin", "nvcc") if cuda_home else None,
        shutil.which("nvcc"),
    ]
    for folder in dict.fromkeys([*sys.path, sysconfig.get_path("purelib")]):
        candidates += sorted(glob.glob(os.path.join(folder, "nvidia", "cu1*", "bin", "nvcc")))
    for candidate in filter(None, candidates):
        found = shutil.which(candidate)
        if found:
            return os.path.realpath(found)
    return None


class CMakeBuild(build_ext):
    """Builds fedcmt._C through CMake and Ninja."""

    def build_extension(self, ext: Extension) -> None:
        """Configures and builds into the place setuptools expects."""
        import pybind11

        source = Path(__file__).resolve().parent
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        mode = os.environ.get("FEDCMT_CUDA", "auto")
        architectures = os.environ.get("FEDCMT_CUDA_ARCH")
        nvcc = None if mode == "off" else find_nvcc()
        options = [
            f"-DFEDCMT_CUDA={mode}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []),
            *(["-DFEDCMT_CPUSIM=ON"] if os.environ.get("FEDCMT_CPUSIM") == "1" else []),
            *([f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"] if architectures else []),
        ]
        configure = ["cmake", "-S", str(source), "-B", str(build), "-G", "Ninja", "--fresh"]
        subprocess.run([*configure, *options], check=True)
        jobs = ["--parallel", str(self.parallel)] if self.parallel else []
        subprocess.run(["cmake", "--build", str(build), *jobs], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)


setup(ext_modules=[Extension("fedcmt._C", [])], cmdclass={"build_ext": CMakeBuild})
