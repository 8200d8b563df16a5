"""Choosing the device, and what it computes well in."""

from __future__ import annotations

import torch

from fedcmt.errors import InputError


def choose_device(name: str) -> torch.device:
    """``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        InputError: No such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device '{name}'", field="device", fix="use auto, cpu or cuda[:i]") from None
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise InputError(
            f"{name} was asked for and there are {torch.cuda.device_count()} GPUs",
            field="device",
            fix="use auto or cpu",
        )
    return device


def trains_in_bfloat16(device: torch.device) -> bool:
    """Whether mixed precision is worth it here: on GPUs, and on CPUs with matrix units for bfloat16 (AMX)."""
    return device.type == "cuda" or bool(torch.cpu.get_capabilities().get("amx_bf16"))
