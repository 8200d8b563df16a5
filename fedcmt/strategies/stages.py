"""The encoder's stages as segments of its flat buffer."""

from __future__ import annotations

import re

from fedcmt.layout import FlatLayout

_STAGE = re.compile(r"\.stages\.(\d+)\.")


def stage_bounds(layout: FlatLayout) -> list[int]:
    """Bounds 0 = b_0 < ... < b_S = P of the stages, in the order of depth.

    Raises:
        ValueError: A parameter belongs to no stage.
    """
    bounds, current = [0], None
    for segment in layout.segments:
        found = _STAGE.search(segment.name)
        if found is None:
            raise ValueError(f"parameters should belong to a stage. Got {segment.name}")
        if current is not None and found[1] != current:
            bounds.append(segment.offset)
        current = found[1]
    return [*bounds, layout.size]
