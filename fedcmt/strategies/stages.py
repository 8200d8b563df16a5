"""The encoder's stages as segments of its flat buffer."""

from __future__ import annotations

import re

from fedcmt.layout import FlatLayout

_STAGE = re.compile(r"\.(?:stages\.(\d+)|stem)\.")


def stage_bounds(layout: FlatLayout) -> list[int]:
    """Bounds 0 = b_0 < ... < b_S = P of the stages, in the order of depth; a residual encoder's stem is of the first.

    Raises:
        ValueError: A parameter belongs to no stage.
    """
    bounds, current = [0], None
    for segment in layout.segments:
        found = _STAGE.search(segment.name)
        if found is None:
            raise ValueError(f"parameters should belong to a stage. Got {segment.name}")
        stage = found[1] or "0"
        if current is not None and stage != current:
            bounds.append(segment.offset)
        current = stage
    return [*bounds, layout.size]
