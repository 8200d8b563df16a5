"""Tensors of equal name and shape in flat buffers of different layouts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedcmt import ops
from fedcmt.layout import FlatLayout, Segment

Matches = dict[tuple[str, tuple[int, ...]], list[tuple[str, Segment]]]


def matches(layouts: Mapping[str, FlatLayout]) -> Matches:
    """Owners of each tensor, by its name and shape, in the order of ``layouts``."""
    found: Matches = {}
    for owner, layout in layouts.items():
        for segment in layout.segments:
            found.setdefault((segment.name, segment.shape), []).append((owner, segment))
    return found


def part(flat: Tensor, segment: Segment) -> Tensor:
    """A segment of a flat buffer, as a flat view."""
    return flat[segment.offset : segment.offset + segment.numel]


def matched_mean(
    values: Mapping[str, Tensor], layouts: Mapping[str, FlatLayout], num_cases: Mapping[str, int]
) -> dict[str, Tensor]:
    """Every tensor becomes the mean over the owners of one of the same name and shape.

    Args:
        values: Flat buffers by owner.
        layouts: Their layouts.
        num_cases: Weights; an owner of weight 0 takes the mean of the others and adds nothing to it.

    Returns:
        New flat buffers by owner.

    Source: AsymFedAvg (FednnU-Net, arXiv 2503.02549).
    """
    result = {owner: flat.clone() for owner, flat in values.items()}
    for owners in matches(layouts).values():
        weights = torch.tensor([float(num_cases[owner]) for owner, _ in owners])
        if len(owners) == 1 or not bool(weights.any()):
            continue
        mean = ops.weighted_mean([part(values[owner], segment) for owner, segment in owners], weights)
        assert isinstance(mean, Tensor)
        for owner, segment in owners:
            part(result[owner], segment).copy_(mean)
    return result
