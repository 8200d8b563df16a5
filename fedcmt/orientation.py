"""Scans that are odd, or stored in another orientation than a model was trained on.

nnU-Net does not reorient: a network sees voxels in the order they are stored, and a head stored upside down is
another input to it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from fedcmt.errors import InputError
from fedcmt.nifti import header_from_affine
from fedcmt.volume import Volume, axis_codes, turned_axes

_AXES = {"L": "x", "R": "x", "A": "y", "P": "y", "I": "z", "S": "z"}
ORIENTATIONS_KEY = "training_orientations"  # in plans.json, written by preprocessing


def reoriented(volume: Volume, codes: str) -> Volume:
    """Swaps and flips axes so that x, y and z point where ``codes`` (such as ``RAS``) says.

    Every voxel keeps its place in the body. What is written on the result's grid is turned back to the stored one.

    Raises:
        ValueError: The volume is a turned one already.
    """
    if volume.axes_back is not None:
        raise ValueError("`volume` should be as it is stored. Found one that was turned.")
    stored, wanted = io_orientation(volume.affine), axcodes2ornt(tuple(codes))
    there = ornt_transform(stored, wanted)
    affine = volume.affine @ inv_ornt_aff(there, volume.data.shape[:0:-1])
    depth, height, width = (float(size) for size in np.linalg.norm(affine[:3, :3], axis=0)[::-1])
    return replace(
        volume,
        data=turned_axes(volume.data, there),
        spacing=(depth, height, width),
        affine=affine,
        header=volume.header if volume.header is not None else header_from_affine(volume.affine),
        axes_back=ornt_transform(wanted, stored),
    )


def fitted_scan(
    volume: Volume, plans: Mapping[str, Any], channel_names: Sequence[str], case: str, *, reorient: bool = False
) -> Volume:
    """Looks at a scan before it is predicted, and says on stderr what is odd about it.

    Args:
        volume: The scan as it is stored.
        plans: The model's plans; those of FedCMT say in which orientations the training cases were stored.
        channel_names: Of the model.
        case: Its identifier, for warnings.
        reorient: Turn the scan where its orientation is none of the training data's.

    Returns:
        The scan, turned or as it is.

    Raises:
        InputError: What the plans say is no count of orientations.
    """
    for index, channel in enumerate(volume.data):
        if channel.size and channel.min() == channel.max():
            name = channel_names[index] if index < len(channel_names) else index
            _warn(
                case, f"channel '{name}' is constant ({channel.flat[0]:g}); whatever the model finds there is made up"
            )
    trained = _trained_orientations(plans)
    found = axis_codes(volume.affine)
    if not trained or found in trained:
        return volume
    usual = max(trained, key=lambda codes: trained[codes])
    if reorient:
        return reoriented(volume, usual)
    named = ", ".join(trained)
    _warn(case, f"its axes point to {found}, those of the training data to {named}; if labels are wrong use --reorient")
    return volume


def _trained_orientations(plans: Mapping[str, Any]) -> Mapping[str, int]:
    stored = plans.get(ORIENTATIONS_KEY) or {}
    if not isinstance(stored, Mapping) or not all(
        isinstance(count, int) and sorted(_AXES.get(letter, letter) for letter in codes) == ["x", "y", "z"]
        for codes, count in stored.items()
    ):
        raise InputError(
            f"plans.json has {ORIENTATIONS_KEY} {stored!r:.60}, expected how many cases are LPS, RAS, ...",
            field="plans",
            fix="restore it from its source",
        )
    return stored


def _warn(case: str, text: str) -> None:
    print(f"warning: case '{case}': {text}", file=sys.stderr, flush=True)
