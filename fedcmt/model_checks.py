"""What a model folder's files must say before anything is built from them.

They may come from elsewhere. Nothing in them is executed; names of classes are looked up in fixed lists
(``fedcmt.network``), and numbers are bounded before memory is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcmt.dataset_json import parse_dataset_json
from fedcmt.errors import InputError, Problems
from fedcmt.network import SLICES

_LARGEST = 4096  # channels of a stage, or heads
_LONGEST = 64  # entries of a list that describes a network
_DEEPEST = 4
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")  # a class or function that nnU-Net finds among its own


def check_model(
    files: Mapping[str, Path],
    plans: Any,
    dataset_json: Any,
    facts: Any,
    configuration: str,
    tensors: Mapping[str, Tensor],
) -> None:
    """Refuse a model whose files are malformed.

    Args:
        files: Paths of ``plans``, ``dataset_json``, ``facts`` and ``weights``.
        plans: nnU-Net's plans as read from JSON.
        dataset_json: Channels and labels as read from JSON. Its file list is not looked at: the files stay at the site.
        facts: Task, heads and mirror axes as read from JSON.
        configuration: Which of the plans' configurations is used.
        tensors: The weights.

    Raises:
        InputError: Everything that is wrong, at once.
    """
    problems = Problems()
    channels, dimensions = 0, 2 if configuration == SLICES else 3
    if not isinstance(dataset_json, dict):
        problems.add(InputError(f"{files['dataset_json']} holds no object", field="dataset.json"))
    else:
        described = {key: value for key, value in dataset_json.items() if key != "dataset"}
        channels = len(parse_dataset_json(described, problems).channel_names)
    with problems.caught(field="plans"):
        _check_plans(plans, configuration, dimensions, channels, files["plans"])
    with problems.caught(field="model"):
        _check_facts(facts, dimensions, files["facts"])
    with problems.caught():
        check_finite(tensors, files["weights"])
    problems.raise_any()


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights that are no numbers.

    Raises:
        InputError: Every tensor with NaN or Inf, at once.
    """
    problems = Problems()
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            reason = f"{path} holds NaN or Inf in '{name}'"
            problems.add(InputError(reason, field="model", fix="restore the file from its source"))
    problems.raise_any()


def check_topology(stored: Any, expected: str, weights: Path) -> None:
    """Refuse weights that were trained with another topology than the plans beside them say.

    Raises:
        InputError: They were.
    """
    if stored is not None and stored != expected:
        raise InputError(
            f"{weights} was trained in a federation of another topology than plans.json beside it says",
            field="topology",
            fix="put the files of one model together",
        )


def _check_plans(plans: Any, configuration: str, dimensions: int, channels: int, path: Path) -> None:
    try:
        entry = plans["configurations"][configuration]
        architecture = entry["architecture"]
        sizes, spacing = list(entry["patch_size"]), list(entry["spacing"])
        axes = [list(plans["transpose_forward"]), list(plans["transpose_backward"])]
        schemes, masks = list(entry["normalization_schemes"]), list(entry["use_mask_for_norm"])
        statistics = dict(plans["foreground_intensity_properties_per_channel"])
        names = [*schemes, entry["preprocessor_name"]]
        names += [entry[key] for key in entry if key.startswith("resampling_fn_") and not key.endswith("_kwargs")]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        fix = "restore it from its source"
        raise InputError(f"{path} is no plan of {configuration} ({error!r:.80})", fix=fix) from None
    wrong = ""
    if not _bounded(architecture):
        wrong = f"an architecture with numbers above {_LARGEST}, or more than {_LONGEST} entries"
    elif not all(_is_count(n) and n <= _LARGEST for n in sizes) or len(sizes) != dimensions:
        wrong = f"patch_size {sizes!r:.60}, expected {dimensions} sizes in voxels"
    elif not all(_is_number(s) and 0 < s < 1e4 for s in spacing) or len(spacing) != dimensions:
        wrong = f"spacing {spacing!r:.60}, expected {dimensions} positive numbers in mm"
    elif any(sorted(order, key=repr) != [0, 1, 2] for order in axes):
        wrong = f"axes {axes!r:.60}, expected the numbers 0, 1 and 2"
    elif not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
        wrong = f"functions named {names!r:.80}"
    elif channels and not len(schemes) == len(masks) == channels:
        wrong = f"{len(schemes)} normalization_schemes, expected {channels} (one per channel)"
    elif not all(_are_statistics(statistics.get(str(channel))) for channel in range(channels)):
        wrong = "no intensity statistics of some channel"
    if wrong:
        raise InputError(f"{path} has {wrong}", fix="restore it from its source")


def _check_facts(facts: Any, dimensions: int, path: Path) -> None:
    fix = "restore it from its source"
    if not isinstance(facts, dict) or facts.get("task") not in ("segmentation", "classification"):
        raise InputError(f"{path} names no task, expected segmentation or classification", fix=fix)
    heads: Any = facts.get("num_heads")
    axes: Any = facts.get("mirror_axes")
    classes: Any = facts.get("class_names")
    if not _is_count(heads) or heads > _LARGEST:
        raise InputError(f"{path} has num_heads {heads!r:.40}, expected 1 to {_LARGEST}", fix=fix)
    allowed = list(range(dimensions))
    if not isinstance(axes, list) or not all(axis in allowed for axis in axes):
        raise InputError(f"{path} has mirror_axes {axes!r:.40}, expected some of {allowed}", fix=fix)
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not named or (facts["task"] == "classification" and len(classes) != heads):
        raise InputError(f"{path} has class_names {classes!r:.60}, expected {heads} names", fix=fix)


def _bounded(value: Any, depth: int = 0) -> bool:
    """Whether JSON describes a network of a size that can be meant."""
    if isinstance(value, (dict, list)):
        entries = list(value.values()) if isinstance(value, dict) else value
        return depth < _DEEPEST and len(entries) <= _LONGEST and all(_bounded(entry, depth + 1) for entry in entries)
    return not isinstance(value, (int, float)) or abs(value) <= _LARGEST


def _are_statistics(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_number(number) for number in value.values())


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
