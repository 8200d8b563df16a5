"""Atomic files: a reader sees the old content or the new, never half of one, whatever happens in between."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedcmt.errors import InputError

_LOOK_AGAIN = 0.2  # seconds


def hold(path: Path, patience: float = 0.0) -> TextIO | None:
    """Take a lock file, creating its folder; the lock lasts until the file is closed or the process ends.

    Args:
        path: The lock file.
        patience: Seconds to wait for another process to let go of it.

    Returns:
        The open file; None where another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file, until = open(path, "w"), time.monotonic() + patience  # noqa: SIM115 (the caller closes it)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError:
            if time.monotonic() >= until:
                file.close()
                return None
        time.sleep(_LOOK_AGAIN)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically and durably, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    # The rename itself is durable only once the folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; not-a-number values must have been made ``None`` before."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        InputError: The file is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", field="file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no valid JSON: {error}", field="file") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and a JSON description of them as one safetensors file, atomically.

    Args:
        path: Where to.
        tensors: Name -> tensor on any device.
        facts: Anything JSON can hold; stands in the file's header.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(contiguous, {"facts": json.dumps(facts, sort_keys=True)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote.

    Raises:
        InputError: The file is missing, truncated or no such file. Nothing in it is ever executed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            if not isinstance(facts, dict):
                raise ValueError("its description is no object")
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is missing, truncated or no FedCMT file ({error})", field="file") from None


def check_same_tensors(targets: Mapping[str, Tensor], values: Mapping[str, Tensor], *, source: Path) -> None:
    """Compare a file's tensors with those expected.

    Raises:
        InputError: Names, shapes or types differ.
    """
    if set(targets) != set(values):
        odd = min(set(targets) ^ set(values))
        raise InputError(f"{source} does not fit the network: '{odd}' is on one side only", field="model")
    for name, target in targets.items():
        if target.shape != values[name].shape or target.dtype != values[name].dtype:
            raise InputError(
                f"{source} does not fit the network: '{name}' is {tuple(values[name].shape)} "
                f"{values[name].dtype}, expected {tuple(target.shape)} {target.dtype}",
                field="model",
            )


def copy_into(targets: Mapping[str, Tensor], values: Mapping[str, Tensor], *, source: Path) -> None:
    """Copy tensors into those of the same names.

    Raises:
        InputError: Names, shapes or types differ.
    """
    check_same_tensors(targets, values, source=source)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(values[name])
