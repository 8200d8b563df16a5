"""Starting a network from a checkpoint of stock nnU-Net or of FedCMT: safe reading, matching by name and shape."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.dtypes import Float32DType, Float64DType, Int64DType
from torch import Tensor, nn

from fedcmt.errors import InputError
from fedcmt.files import read_tensors
from fedcmt.network import Part

_SHOWN = 6  # names in one line of the display
# Other names of the same tensors, kept by nnU-Net's building blocks.
_ALIASES = (".all_modules.", "decoder.encoder.")
# Stock networks have no adaptor: what reads the image there is the adaptor's counterpart here.
_FIRST_CONVOLUTIONS = ("encoder.stages.0.0.convs.0.", "encoder.stem.convs.0.")


@dataclass(frozen=True)
class Matched:
    """What a network took from a checkpoint.

    Attributes:
        taken: Names of the network's tensors that were set.
        left: Names that keep their random start, with the reason.
        unused: Tensors of the checkpoint that have no place in these parts of the network.
    """

    taken: tuple[str, ...]
    left: Mapping[str, str]
    unused: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """Counts and names, for people."""
        yield f"{len(self.taken)} of {len(self.taken) + len(self.left)} tensors taken: {_shortened(self.taken)}"
        if self.left:
            yield f"{len(self.left)} keep their random start: " + _shortened(
                [f"{name} ({reason})" for name, reason in self.left.items()]
            )
        if self.unused:
            yield f"{len(self.unused)} of the checkpoint not used: {_shortened(self.unused)}"


def read_weights(path: Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint, aliases left out.

    Args:
        path: Stock nnU-Net's ``checkpoint_*.pth``, one that ``fedcmt export`` wrote, or a ``.safetensors`` model of a
            workspace.

    Raises:
        InputError: The file is missing, damaged, or holds anything but tensors and plain values. Nothing in it is ever
            executed.
    """
    weights = read_tensors(path)[0] if path.suffix == ".safetensors" else _read_pth(path)
    return {name: tensor for name, tensor in weights.items() if not any(alias in name for alias in _ALIASES)}


def _read_pth(path: Path) -> dict[str, Tensor]:
    # torch would also read bare pickles, as written before 2020; nnU-Net v2 never wrote any.
    if path.is_file() and not zipfile.is_zipfile(path):
        raise InputError(f"{path} is truncated or no torch checkpoint", field="initial_weights")
    # All that stock checkpoints hold beside tensors and plain values: NumPy scalars of their curves and scores. NumPy 1
    # pickled them under another module's name.
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    known: list[Any] = [np.dtype, Float32DType, Float64DType, Int64DType]
    known += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(known):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", field="initial_weights") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{path} is damaged or holds more than tensors and plain values ({first[:160]})", field="initial_weights"
        ) from None
    weights = content.get("network_weights") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise InputError(f"{path} holds no 'network_weights', so it is no nnU-Net checkpoint", field="initial_weights")
    return {str(name): tensor for name, tensor in weights.items()}


@torch.no_grad()
def start_from(network: nn.Module, weights: Mapping[str, Tensor], parts: Sequence[Part]) -> Matched:
    """Set the tensors of some parts of a network that a checkpoint has by the same name and shape.

    A stock network's first convolution goes into the adaptor; the encoder's own first convolution, which has no
    counterpart there, keeps its random start. 2D kernels fit where ours have extent 1 along the first axis.

    Args:
        network: One of :mod:`fedcmt.network`.
        weights: From :func:`read_weights`.
        parts: Which parts to set.

    Returns:
        What matched and what did not; it may be nothing.
    """
    if not any(name.startswith("adaptor.") for name in weights):
        weights = {_name_here(name): tensor for name, tensor in weights.items()}
    named = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    targets = {name: tensor for name, tensor in named.items() if name.split(".", 1)[0] in parts}
    taken, left = [], {}
    for name, target in targets.items():
        found = weights.get(name)
        if found is None:
            left[name] = "not in the checkpoint"
            continue
        if found.ndim == 4 and target.ndim == 5:
            found = found[:, :, None]
        if found.shape != target.shape:
            left[name] = f"{_size(found)} in the checkpoint, {_size(target)} here"
        else:
            target.data.copy_(found)
            taken.append(name)
    unused = [name for name in weights if name.split(".", 1)[0] in parts and name not in taken]
    return Matched(tuple(taken), left, tuple(unused))


def _name_here(stock: str) -> str:
    for prefix in _FIRST_CONVOLUTIONS:
        if stock.startswith(prefix):
            return "adaptor." + stock.removeprefix(prefix)
    return stock


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) + more) or "none"


def report_matches(path: Path, matches: Mapping[str, Matched], client: str | None, note: Callable[[str], None]) -> None:
    """Say what the parts took from a checkpoint.

    Raises:
        InputError: Nothing fits.
    """
    for part, matched in matches.items():
        for line in matched.lines():
            note(f"{client + ': ' if client else ''}{path.name} -> {part}: {line}")
    if not any(matched.taken for matched in matches.values()):
        raise InputError(
            f"nothing in {path} matches the {' or the '.join(matches)} by name and shape",
            client=client,
            field="initial_weights",
            fix="use a checkpoint of the same topology",
        )
