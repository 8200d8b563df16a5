"""Which parameters are shared, in which order, and where they stand in the flat buffer.

The shared parameters of a client are views of one flat buffer, so packing an update is no step of its own: the buffer
is the update. Convolution weights stand in channels-last order (out, d, h, w, in), the order the trainer computes in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedcmt.ops import empty_buffer

_ALIGNMENT = 16  # elements; 64 bytes, so that every view can be loaded with the widest vector instruction


@dataclass(frozen=True)
class Segment:
    """One parameter's place in the flat buffer."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    def view(self, flat: Tensor) -> Tensor:
        """The parameter as a view of ``flat``, `[P]` -> `shape`."""
        part = flat[self.offset : self.offset + self.numel]
        if len(self.shape) < 4:
            return part.view(self.shape)
        out, inputs, *kernel = self.shape
        return part.view(out, *kernel, inputs).movedim(-1, 1)


@dataclass(frozen=True)
class FlatLayout:
    """Order, shapes and offsets of named parameters in one flat float32 buffer of ``size`` elements.

    Gaps between segments (for alignment) hold zeros in parameters and updates alike, so they add nothing to inner
    products.
    """

    segments: tuple[Segment, ...]
    size: int

    @classmethod
    def of(cls, parameters: Iterable[tuple[str, nn.Parameter]]) -> FlatLayout:
        """The layout of ``named_parameters()`` in the order given."""
        segments, offset = [], 0
        for name, parameter in parameters:
            segments.append(Segment(name, tuple(parameter.shape), offset))
            offset += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
        return cls(tuple(segments), offset)

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[str, Iterable[int], int]], size: int) -> FlatLayout:
        """The layout with these names, shapes and offsets.

        Raises:
            ValueError: Segments overlap or do not fit.
        """
        segments = tuple(Segment(name, tuple(shape), offset) for name, shape, offset in rows)
        end = 0
        for segment in segments:
            if segment.offset < end or min(segment.shape, default=1) < 1:
                raise ValueError(f"segment '{segment.name}' should begin at {end} or later, found {segment.offset}")
            end = segment.offset + segment.numel
        if end > size:
            raise ValueError(f"segments should end by {size}, found {end}")
        return cls(segments, size)

    def bind(self, parameters: Mapping[str, nn.Parameter], device: torch.device) -> Tensor:
        """Move the parameters into a new flat buffer and make them views of it.

        Args:
            parameters: Name -> parameter; exactly the names of this layout.
            device: Where the buffer lives.

        Returns:
            The buffer, `[P]` float32. Writing into it changes the parameters.
        """
        if set(parameters) != {segment.name for segment in self.segments}:
            raise ValueError(f"parameters {sorted(parameters)} do not match the layout")
        flat = empty_buffer(self.size, device=device).zero_()
        for segment in self.segments:
            parameter = parameters[segment.name]
            view = segment.view(flat)
            view.copy_(parameter.data)
            parameter.data = view
        return flat

    def digest(self) -> str:
        """A hash of names, shapes and offsets; equal digests mean interchangeable buffers."""
        text = json.dumps([[s.name, s.shape, s.offset] for s in self.segments])
        return hashlib.sha256(text.encode()).hexdigest()
