"""NVFlare's privacy filters and quantizers on flat updates, before they leave the client."""

from __future__ import annotations

import bz2
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedcmt.config import FilterConfig, NvflareConfig
from fedcmt.engines.messages import MessageError
from fedcmt.errors import InputError
from fedcmt.layout import FlatLayout
from fedcmt.strategies.matching import part

DESTROYED = 0.5  # cosine to what was learned below which little of an update is left
_HALF = torch.finfo(torch.float16)
_LEVELS = {"u1": np.uint8, "<u2": np.uint16}


class UpdateFilters:
    """What ``nvflare.filters`` and ``nvflare.quantizer`` do to an update.

    The filters are NVFlare's own classes. They see the update as named tensors, so that ``exclude`` can name
    parameters; what it takes out becomes zero. Their noise comes from the system, never from the federation's seed.

    Args:
        config: The settings.

    Raises:
        InputError: A filter does not take these settings.
    """

    def __init__(self, config: NvflareConfig) -> None:
        self._quantizer = config.quantizer
        self._filters = [_make(entry) for entry in config.filters]

    @property
    def active(self) -> bool:
        """Whether anything is done."""
        return bool(self._filters) or self.quantizes

    @property
    def quantizes(self) -> bool:
        """Whether updates are shortened by more than the wire's precision."""
        return self._quantizer != "none"

    def apply(self, parts: Mapping[str, Tensor], layouts: Mapping[str, FlatLayout]) -> None:
        """Filter an update in place, flat float32 by part."""
        if not self._filters:
            return
        from nvflare.apis.dxo import DXO, DataKind
        from nvflare.apis.fl_context import FLContext
        from nvflare.apis.shareable import Shareable

        places = {s.name: part(flat, s) for name, flat in parts.items() for s in layouts[name].segments}
        dxo = DXO(DataKind.WEIGHT_DIFF, {name: tensor.cpu().numpy().copy() for name, tensor in places.items()})
        for one in self._filters:
            dxo = one.process_dxo(dxo, Shareable(), FLContext()) or dxo
        for name, place in places.items():
            value = dxo.data.get(name)
            place.zero_() if value is None else place.copy_(torch.from_numpy(np.ascontiguousarray(value)))

    def quantize(self, parts: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Any]] | None, dict[str, Tensor]]:
        """Shorten an update.

        Returns:
            What the receiver needs besides, by part, and the tensors; None where nothing is done. Values that are not
            finite are left to the server, which refuses them by name.
        """
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in parts.values())
        if not self.quantizes or not finite:
            return None, dict(parts)
        if self._quantizer == "float16":
            return None, {n: t.clamp(_HALF.min, _HALF.max).to(torch.float16) for n, t in parts.items()}
        packed, states = {}, {}
        for name, tensor in parts.items():
            packed[name], states[name] = _adaquant(tensor)
        return states, packed


def _make(entry: FilterConfig) -> Any:
    from nvflare.app_common.filters.exclude_vars import ExcludeVars
    from nvflare.app_common.filters.percentile_privacy import PercentilePrivacy
    from nvflare.app_common.filters.svt_privacy import SVTPrivacy

    classes = {"percentile": PercentilePrivacy, "svt": SVTPrivacy, "exclude": ExcludeVars}
    try:
        return classes[entry.name](**entry.settings())
    except (TypeError, ValueError) as error:
        raise InputError(f"filter '{entry.name}': {error}", field="nvflare.filters") from None


def _adaquant(tensor: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """NVFlare's ADAQUANT (arXiv 2208.05174), its result as bytes."""
    from nvflare.app_opt.pt.quantization.ada_quant import AdaQuantizer

    values, state = AdaQuantizer().quantize(tensor.cpu())
    numel = tensor.numel()
    if not state:  # as many levels as the type has
        return tensor, {}
    kept = {"offset": float(state["offset"]), "numel": numel, "norm": float(state.get("norm", 0.0))}
    if "norm" not in state:  # all values are equal
        return torch.zeros(0, dtype=torch.uint8), kept
    levels = {"level": int(state["quantization_level"])}
    if "compressed_tensor" in state:
        packed = torch.from_numpy(state["compressed_tensor"].copy())
        return packed, kept | levels | {"type": state["new_dtype"], "compressed": True}
    kind = "u1" if values.dtype.itemsize == 1 else "<u2"
    return torch.from_numpy(values.view(np.uint8).copy()), kept | levels | {"type": kind, "compressed": False}


def dequantized(packed: Tensor, state: Mapping[str, Any]) -> Tensor:
    """The update that :func:`_adaquant` shortened, `[P]` float32.

    Raises:
        MessageError: Its description does not fit it.
    """
    if not state:
        return packed.float()
    try:
        numel, offset, norm = int(state["numel"]), float(state["offset"]), float(state["norm"])
        if norm == 0.0:
            return torch.full((numel,), -offset)
        kind, level, content = _LEVELS[state["type"]], int(state["level"]), packed.numpy().tobytes()
        size = numel * np.dtype(kind).itemsize
        if state["compressed"]:
            content = bz2.BZ2Decompressor().decompress(content, max_length=size + 1)  # never more than announced
        if len(content) != size or level < 1:
            raise ValueError
        quantized = torch.from_numpy(np.frombuffer(content, dtype=kind).astype(np.float64))
    except (KeyError, TypeError, ValueError, OSError):
        raise MessageError("the quantized update does not fit its description") from None
    return (quantized * (norm / level) - offset).float()
