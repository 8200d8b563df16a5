"""The optional file list ``dataset`` of a ``dataset.json``, and which names a case may have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Any

from fedcmt.errors import InputError, Problems

MAX_NAME_LENGTH = 200


@dataclass(frozen=True)
class CaseFiles:
    """One entry of the optional file list ``dataset``; paths are relative to the dataset's folder."""

    images: tuple[str, ...]
    label: str | None


def read_file_list(value: Any, num_channels: int, file_ending: str, problems: Problems) -> dict[str, CaseFiles]:
    """Checks a file list.

    Args:
        value: as read from JSON.
        num_channels: images of a case; 0 where unknown.
        file_ending: of every file; empty where unknown.
        problems: takes every entry that is wrong.

    Returns:
        Case identifier to files; entries with a problem are left out.

    Raises:
        InputError: it is no object.
    """
    example = 'write it as {"case": {"images": ["imagesTr/case_0000.nii.gz"], "label": "labelsTr/case.nii.gz"}}'
    if not isinstance(value, dict):
        raise InputError(f"found {kind_of(value)}, expected an object", field="dataset", fix=example)
    files: dict[str, CaseFiles] = {}
    for identifier, entry in value.items():
        with problems.caught(case=identifier):
            check_identifier(identifier)
            if not isinstance(entry, dict) or not isinstance(entry.get("images"), list):
                raise InputError("no list 'images' given", field="dataset", fix=example)
            images, label = entry["images"], entry.get("label")
            if num_channels and len(images) != num_channels:
                reason = f"{len(images)} images listed, expected {num_channels} (one per channel)"
                raise InputError(reason, field="dataset", fix="list every channel once")
            for name in [*images, *([] if label is None else [label])]:
                _check_relative_path(name, file_ending)
            files[identifier] = CaseFiles(tuple(images), label)
    return files


def check_identifier(identifier: str) -> None:
    """Refuses a case identifier that could not be, or should not be, part of a file name.

    Raises:
        InputError: it is empty, too long, hidden, or holds a path separator or control characters.
    """
    allowed = identifier.isprintable() and not set(identifier) & set("/\\:$~")
    if not allowed or not 0 < len(identifier) <= MAX_NAME_LENGTH or identifier.startswith("."):
        shown = identifier if len(identifier) <= 40 else f"{identifier[:40]}..."
        raise InputError(
            f"'{shown}' cannot be a case identifier",
            field="identifier",
            fix=f"use 1 to {MAX_NAME_LENGTH} letters, digits, '_', '-' or '.', not starting with '.'",
        )


def _check_relative_path(name: Any, file_ending: str) -> None:
    fix = "give a path inside the dataset's folder, such as imagesTr/case_0000.nii.gz"
    if not isinstance(name, str) or not name or not name.isprintable():
        raise InputError(f"{name!r} is no path", field="dataset", fix=fix)
    # Windows' rules cover both: drive letters, back slashes and leading slashes.
    path = PureWindowsPath(name)
    if path.anchor or ".." in path.parts or set(name) & set("$~%\\"):
        reason = f"'{name}' is absolute, leaves the folder with '..' or needs an environment variable"
        raise InputError(reason, field="dataset", fix=fix)
    if not name.endswith(file_ending):
        raise InputError(f"'{name}' does not end with file_ending '{file_ending}'", field="dataset", fix=fix)


def kind_of(value: Any) -> str:
    """Returns what kind of JSON value this is, for messages."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
