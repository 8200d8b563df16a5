"""Strategies with settings, as a comparison names them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import yaml

from fedcmt.errors import InputError

REFERENCE = "local"
_LONGEST = 120  # characters; folders may have 255 with what comes after
_OF_CONFIG = "config."
_NOT_A_VARIANTS = ("strategy", "seed", "workspace", "raw", "preprocessed", "name")


@dataclass(frozen=True)
class Variant:
    """A strategy with settings, as written on the command line.

    Attributes:
        label: As written.
        strategy: Its name and settings.
        overrides: Settings of the federation that it changes, ``key.path=value`` each.
    """

    label: str
    strategy: Mapping[str, Any]
    overrides: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """The label as a folder's name; long ones end in a hash."""
        name = re.sub(r"[^A-Za-z0-9_.=+-]", "_", self.label)
        return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}-{sha256(self.label.encode()).hexdigest()[:8]}"


def parse_variants(text: str) -> list[Variant]:
    """Strategies separated by commas, each ``name`` or ``name:key=value:key=value`` with values in YAML.

    ``local`` is put first where it is missing. A key may be a path: ``distillation.weight=0.5``. Keys that begin with
    ``config.`` are settings of the federation: ``config.training.local_steps=40``.

    Raises:
        InputError: No such strategy or setting, or one named twice.
    """
    labels = [label.strip() for label in text.split(",") if label.strip()]
    if REFERENCE not in labels:
        labels.insert(0, REFERENCE)
    variants = [_variant(label) for label in labels]
    folders = [variant.folder for variant in variants]
    twice = [variant.label for variant in variants if folders.count(variant.folder) > 1]
    if twice:
        raise InputError(f"'{twice[0]}' is named twice", field="--strategies", fix="name every variant once")
    return variants


def _variant(label: str) -> Variant:
    name, *assignments = label.split(":")
    own = [assignment for assignment in assignments if not assignment.startswith(_OF_CONFIG)]
    overrides = [entry.removeprefix(_OF_CONFIG) for entry in assignments if entry.startswith(_OF_CONFIG)]
    odd = next((key for entry in overrides if (key := re.split(r"[.=]", entry)[0]) in _NOT_A_VARIANTS), None)
    if odd:
        raise InputError(f"'{odd}' is the same for all variants", field="--strategies", fix="leave it out there")
    return Variant(label, _settings(name, own, label), tuple(overrides))


def _settings(name: str, assignments: Sequence[str], label: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"name": name}
    for assignment in assignments:
        path, separator, value = assignment.partition("=")
        if not separator or not path:
            raise InputError(
                f"'{assignment}' in '{label}' is no setting", field="--strategies", fix="write name:key=value"
            )
        node = settings
        *parents, last = path.split(".")
        for key in parents:
            node = node.setdefault(key, {})
        try:
            node[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"the value of '{assignment}' is no valid YAML", field="--strategies") from None
    return settings
