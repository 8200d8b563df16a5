"""What a client learns from a subject: organs, lesions, vessels, or whether the liver is fatty."""

from __future__ import annotations

from typing import Literal

import numpy as np
from anatomy import ORGANS, Anatomy, Tissue, coarse, make_anatomy

TaskName = Literal["organ", "lesion", "vessel", "class"]

LABELS: dict[TaskName, dict[str, int]] = {
    "organ": {"background": 0, **{organ.name.lower(): i for i, organ in enumerate(ORGANS, 1)}},
    "lesion": {"background": 0, "lesion": 1},
    "vessel": {"background": 0, "vessel": 1},
    "class": {"background": 0, "body": 1},  # nnU-Net asks for labels; the cases have no label maps
}
# Livers are as large with fat as without: only the image tells.
CLASSES = {"healthy": 0, "steatosis": 1}


def make_subject(rng: np.random.Generator, steatosis: bool) -> Anatomy:
    """A subject; all tasks have the same, but for the fatty livers."""
    return make_anatomy(rng, lesions=int(rng.integers(2, 4)), cysts=2, decoys=2, steatosis=steatosis)


def make_labels(anatomy: Anatomy, task: TaskName) -> np.ndarray:
    """Label map `[D, H, W]` uint8: the label that fills most of a voxel, where it fills enough of it."""
    if task == "organ":
        shares = np.stack([coarse(anatomy.organ == organ) for organ in ORGANS])
        return np.where(shares.max(0) >= 0.5, shares.argmax(0) + 1, 0).astype(np.uint8)
    # Most vessels are thinner than a voxel: half of it would leave gaps in them.
    share, enough = (anatomy.lesion, 0.5) if task == "lesion" else (anatomy.tissue == Tissue.VESSEL, 0.35)
    return (coarse(share) >= enough).astype(np.uint8)
