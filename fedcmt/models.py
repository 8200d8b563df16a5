"""Trained models ready to predict: a client's in a workspace, or a stock nnU-Net model folder."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedcmt.checkpoint import FACTS, ClientFolder, load_model
from fedcmt.errors import InputError
from fedcmt.files import check_same_tensors, read_json
from fedcmt.model_checks import check_finite
from fedcmt.network import FedCMTClassifier, build_network, configuration_name

CHECKPOINT = "checkpoint_final.pth"

# Stock checkpoints hold, beside tensors and plain Python, NumPy scalars: losses in their log, the best score. These
# names are all that unpickling them needs; each makes a number out of bytes and nothing else.
_SCALAR_TYPES = [np.dtype(name) for name in ("float64", "float32", "float16", "int64", "int32", "bool")]
_SCALAR = import_module("numpy._core.multiarray").scalar
_SCALARS: list[Any] = [
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),  # its name before NumPy 2
    np.dtype,
    *(type(dtype) for dtype in _SCALAR_TYPES),
]
_ARCHITECTURES = "dynamic_network_architectures.architectures."
_OPERATORS = "torch.nn."
_CLASSIFIER = f"{FedCMTClassifier.__module__}.{FedCMTClassifier.__name__}"


@dataclass(frozen=True)
class NnunetFolder:
    """An nnU-Net model folder: plans.json, dataset.json and ``fold_*``.

    Attributes:
        path: The folder.
        folds: Which folds; empty for all that hold the checkpoint (``all`` only where there is no other).
        checkpoint: Name of the checkpoint in each fold's folder.
    """

    path: Path
    folds: tuple[str, ...] = ()
    checkpoint: str = CHECKPOINT


@dataclass(frozen=True)
class Model:
    """A network with what prediction must know beside it.

    Attributes:
        name: For messages.
        network: Its weights are those of the only fold, or still to be loaded.
        folds: Weights of each fold; empty where the network holds them.
        plans: nnU-Net's.
        configuration: Of the plans.
        dataset_json: Channels and labels.
        mirror_axes: Spatial axes that may be mirrored.
        class_names: Classification: names of the classes; else empty.
    """

    name: str
    network: nn.Module
    folds: tuple[Mapping[str, Tensor], ...]
    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    mirror_axes: tuple[int, ...]
    class_names: tuple[str, ...] = ()

    @property
    def task(self) -> str:
        """``segmentation`` or ``classification``."""
        return "classification" if self.class_names else "segmentation"


def open_model(folder: ClientFolder | NnunetFolder) -> Model:
    """Load a model.

    Raises:
        InputError: Its files are missing, damaged or do not fit each other.
    """
    if isinstance(folder, NnunetFolder):
        return _nnunet_model(folder)
    network, plans, dataset_json, facts = load_model(folder)
    names = tuple(facts["class_names"]) if facts["task"] == "classification" else ()
    axes = tuple(facts["mirror_axes"])
    return Model(folder.path.name, network, (), plans, configuration_name(plans), dataset_json, axes, names)


def _nnunet_model(folder: NnunetFolder) -> Model:
    if not folder.path.is_dir():
        raise InputError(f"{folder.path} is no folder", field="-m")
    plans, dataset_json = (read_json(folder.path / name) for name in ("plans.json", "dataset.json"))
    files = [folder.path / f"fold_{fold}" / folder.checkpoint for fold in _folds(folder)]
    checkpoints = [_read_checkpoint(file) for file in files]
    try:
        configuration = str(checkpoints[0]["init_args"]["configuration"])
        mirror_axes = checkpoints[0].get("inference_allowed_mirroring_axes") or ()
        weights = [checkpoint["network_weights"] for checkpoint in checkpoints]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{files[0]} is no checkpoint of nnU-Net ({error!r} is missing)", field="-m") from None
    names = _class_names(folder.path)
    network = _network(folder.path, plans, configuration, dataset_json, names)
    for file, fold in zip(files, weights, strict=True):
        check_same_tensors(network.state_dict(), fold, source=file)
        check_finite(fold, file)
    network.load_state_dict(weights[0], assign=True)
    folds = tuple(weights) if len(weights) > 1 else ()
    axes = tuple(map(int, mirror_axes))
    return Model(folder.path.name, network.eval(), folds, plans, configuration, dataset_json, axes, names)


def _class_names(path: Path) -> tuple[str, ...]:
    """Of an exported client that classifies, for which nnU-Net's files have no place; empty for all others."""
    if not (path / FACTS).is_file():
        return ()
    facts = read_json(path / FACTS)
    if not isinstance(facts, dict) or facts.get("task") != "classification":
        return ()
    names = facts.get("class_names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path / FACTS} has class_names {names!r:.60}, expected names", field="-m")
    return tuple(names)


def _folds(folder: NnunetFolder) -> Sequence[str]:
    found = sorted(path.parent.name.removeprefix("fold_") for path in folder.path.glob(f"fold_*/{folder.checkpoint}"))
    if not found:
        raise InputError(f"{folder.path} holds no fold_*/{folder.checkpoint}", field="-m", fix="name the checkpoint")
    missing = [fold for fold in folder.folds if fold not in found]
    if missing:
        raise InputError(
            f"{folder.path} holds no fold_{missing[0]}/{folder.checkpoint}",
            field="--folds",
            fix=f"use {', '.join(found)}",
        )
    return folder.folds or [fold for fold in found if fold != "all"] or found


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_SCALARS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path} is damaged or holds more than tensors and numbers, and is not loaded ({reason})",
            field="-m",
            fix="use a checkpoint that nnU-Net wrote",
        ) from None
    except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is missing, truncated or no checkpoint ({reason})", field="-m") from None


def _network(
    path: Path, plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], class_names: Sequence[str]
) -> nn.Module:
    """The network that the plans describe, without weights. nnU-Net would search its trainers for a class to ask."""
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    try:
        manager = PlansManager(plans)
        plan = manager.get_configuration(configuration)
        if plan.previous_stage_name is not None:
            raise InputError(
                f"{path} is the second stage of a cascade and needs the first one's labels",
                field="configuration",
                fix="use nnUNetv2_predict for cascades",
            )
        channels = determine_num_input_channels(manager, plan, dataset_json)
        heads = len(class_names) or manager.get_label_manager(dataset_json).num_segmentation_heads
        architecture = plan.configuration["architecture"]
        if (architecture["network_class_name"] == _CLASSIFIER) != bool(class_names):
            raise ValueError(f"{FACTS} should name classes exactly for a classifier")
        with torch.device("meta"):
            return _built(architecture, channels, heads)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ImportError, AssertionError, RuntimeError) as error:
        raise InputError(
            f"{path} describes no network that can be built here ({type(error).__name__}: {error})", field="plans"
        ) from None


def _built(architecture: Mapping[str, Any], channels: int, heads: int) -> nn.Module:
    name = architecture["network_class_name"]
    if not name.startswith(_ARCHITECTURES):
        return build_network(architecture, channels, heads, initialize=False)
    kwargs = dict(architecture["arch_kwargs"])
    for key in architecture["_kw_requires_import"]:
        kwargs[key] = None if kwargs[key] is None else _class(kwargs[key], _OPERATORS)
    return _class(name, _ARCHITECTURES)(input_channels=channels, num_classes=heads, deep_supervision=False, **kwargs)


def _class(name: str, package: str) -> type[nn.Module]:
    """A network class of a known package: plans come from outside, and importing runs code."""
    module, _, attribute = name.rpartition(".")
    if not name.startswith(package):
        raise ValueError(f"{name} is not of {package.rstrip('.')}")
    found = getattr(import_module(module), attribute)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{name} is no network class")
    return found
