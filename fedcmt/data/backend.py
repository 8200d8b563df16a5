"""Which backend makes the patches: torch on CPUs, DALI on GPUs, unless one is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from fedcmt.errors import InputError


@dataclass(frozen=True)
class BackendChoice:
    """A backend and why it was chosen."""

    name: Literal["dali", "torch"]
    reason: str


def resolve_backend(wanted: str, device: torch.device) -> BackendChoice:
    """The backend that `auto`, `dali` or `torch` stands for on a device.

    Raises:
        InputError: DALI is asked for and not there.
    """
    if wanted == "torch":
        return BackendChoice("torch", "asked for")
    missing = dali_missing()
    if wanted == "dali":
        if missing:
            raise InputError(missing, field="data.backend", fix="install nvidia-dali-cuda130 or use backend: torch")
        return BackendChoice("dali", "asked for")
    if device.type != "cuda":
        return BackendChoice("torch", "training on the CPU")
    return BackendChoice("torch", missing) if missing else BackendChoice("dali", "training on a GPU")


def dali_missing() -> str | None:
    """Why DALI cannot be used, or None where it can."""
    if find_spec("fedcmt.data.dali") is None:
        return "this build has no DALI backend"
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        return "nvidia-dali is not installed"
    return None
