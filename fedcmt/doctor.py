"""What was built, what this machine has, and what falls back to what."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fedcmt import __version__, ops
from fedcmt.data.backend import dali_missing

TRAINER_FOLDER = Path(__file__).parent / "nnunet_ext"
_PACKAGES = ("torch", "torchvision", "nnunetv2", "numpy", "SimpleITK", "nibabel", "safetensors", "tensorboard")


def examination() -> Iterator[str]:
    """One finding a line."""
    yield f"fedcmt {__version__}, Python {platform.python_version()} ({sys.executable})"
    for package in _PACKAGES:
        try:
            yield f"  {package} {version(package)}"
        except PackageNotFoundError:
            yield f"  {package} MISSING: pip install {package}"
    yield from _extension()
    yield from _hardware()
    missing = dali_missing()
    yield "patches: torch on CPUs, DALI on GPUs" if missing is None else f"patches: torch, on GPUs too ({missing})"
    for which in ("raw", "preprocessed"):
        folder = os.environ.get(f"nnUNet_{which}")
        yield f"nnUNet_{which}: " + (folder or "not set; give it in the config")
    yield from _stock_training()


def _extension() -> Iterator[str]:
    info = ops.backend_info()
    if info.import_error:
        yield f"extension: MISSING ({info.import_error}); the torch reference is used, 5 times slower"
        return
    yield f"extension: CPU kernels ({info.cpu_path}, {info.openmp_max_threads} threads)"
    if info.cuda_architectures:
        yield f"  CUDA kernels for {', '.join(info.cuda_architectures)}"
    else:
        yield "  no CUDA kernels; updates on a GPU use the torch reference: install with nvcc to build them"


def _stock_training() -> Iterator[str]:
    variable = "nnUNet_extTrainer"
    known = [Path(path).resolve() for path in os.environ.get(variable, "").split(os.pathsep) if path]
    if TRAINER_FOLDER.resolve() in known:
        yield f"{variable}: has FedCMT's trainer, for nnUNetv2_train ... -tr nnUNetTrainerFedCMT"
    else:
        yield f"{variable}: for nnUNetv2_train ... -tr nnUNetTrainerFedCMT run: export {variable}={TRAINER_FOLDER}"


def _hardware() -> Iterator[str]:
    yield f"CPU: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        yield "GPU: none; training and prediction run on the CPU"
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        yield f"GPU {index}: {facts.name}, {facts.total_memory / 2**30:.0f} GiB, sm_{facts.major}{facts.minor}"
