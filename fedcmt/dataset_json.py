"""``dataset.json``: reads the file and checks everything in it that can be checked without the images."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcmt.dataset_files import MAX_NAME_LENGTH, CaseFiles, kind_of, read_file_list
from fedcmt.errors import InputError, Problems

Label = int | tuple[int, ...]

# Those of our readable formats that nnU-Net's own readers take.
DATASET_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")

_REQUIRED = ("channel_names", "labels", "numTraining", "file_ending")
# nnU-Net reads the normalisation from these channel names, so several channels may carry the same one.
_NORMALISATION_NAMES = {"ct", "nonorm", "zscore", "rescale_to_0_1", "rgb_to_0_1"}
# Those of nnU-Net's readers that give the voxels as they are stored; "None" is nnU-Net's word for its own choice.
_READERS = ("SimpleITKIO", "NibabelIO", "None")
_MAX_JSON_BYTES = 64 * 2**20


@dataclass(frozen=True)
class DatasetJson:
    """The checked content of a ``dataset.json``.

    What the file says wrongly is empty or None here, and a problem on record, so that the rest can be checked.

    Attributes:
        raw: the document as read.
        channel_names: by channel number; empty where unknown.
        file_ending: of images and labels, with the dot; empty where unknown.
        labels: name to label, or to the labels of a region; with background and ignore; empty where unknown.
        regions_class_order: the label that each region is written as; None without regions.
        ignore_label: the label left out of training and scoring, if there is one.
        num_training: number of training cases the file claims; None where unknown.
        class_names: classes in the order of their ids, where the file lists them.
        is_classification: whether the file says that the dataset is a classification task.
        file_list: case identifier to files, where the file lists them.
    """

    raw: dict[str, Any]
    channel_names: tuple[str, ...]
    file_ending: str
    labels: dict[str, Label]
    regions_class_order: tuple[int, ...] | None
    ignore_label: int | None
    num_training: int | None
    class_names: tuple[str, ...] | None
    is_classification: bool
    file_list: dict[str, CaseFiles] | None

    @property
    def label_values(self) -> frozenset[int]:
        """Every integer that a label map may hold."""
        return frozenset(value for label in self.labels.values() for value in _as_values(label))


def read_dataset_json(path: Path, problems: Problems) -> DatasetJson:
    """Reads and checks a ``dataset.json``.

    Args:
        path: the file.
        problems: takes every key that is missing, malformed or contradictory.

    Raises:
        InputError: the file is missing or is no JSON object.
    """
    return parse_dataset_json(_read_json(path), problems)


def parse_dataset_json(raw: dict[str, Any], problems: Problems) -> DatasetJson:
    """Checks the content of a ``dataset.json``; see :func:`read_dataset_json`."""
    is_classification = "classification_labels" in raw or raw.get("is_classification_dataset") is True
    if is_classification and "labels" not in raw:
        raw = {**raw, "labels": {"background": 0}}
    _check_keys(raw, problems)
    channel_names: tuple[str, ...] = ()
    file_ending, num_training = "", None
    class_names: tuple[str, ...] | None = None
    file_list: dict[str, CaseFiles] | None = None
    if "channel_names" in raw:
        with problems.caught():
            channel_names = _channel_names(raw["channel_names"])
    labels, ignore_label, regions_class_order = _checked_labels(raw, problems)
    if "file_ending" in raw:
        with problems.caught():
            file_ending = _file_ending(raw["file_ending"])
    reader = raw.get("overwrite_image_reader_writer", "None")
    if not isinstance(reader, str) or reader not in _READERS:
        reason = f"found {str(reader)[:60]!r}, expected {' or '.join(_READERS[:2])}"
        fix = "leave it out; images are trained and predicted in the orientation they are stored in"
        problems.add(InputError(reason, field="overwrite_image_reader_writer", fix=fix))
    if "numTraining" in raw:
        with problems.caught():
            num_training = _whole_number(raw["numTraining"], "numTraining")
    if "classification_labels" in raw:
        with problems.caught():
            class_names = _class_names(raw["classification_labels"])
    if "dataset" in raw:
        with problems.caught():
            file_list = read_file_list(raw["dataset"], len(channel_names), file_ending, problems)
    return DatasetJson(
        raw=raw,
        channel_names=channel_names,
        file_ending=file_ending,
        labels=labels,
        regions_class_order=regions_class_order,
        ignore_label=ignore_label,
        num_training=num_training,
        class_names=class_names,
        is_classification=is_classification,
        file_list=file_list,
    )


def closest(name: str, candidates: Iterable[str]) -> str | None:
    """Returns the most similar of the candidates, or None where nothing is similar."""
    return next(iter(difflib.get_close_matches(name, list(candidates), n=1)), None)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path.name} is missing in {path.parent.name}", field="dataset.json", fix="add it")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise InputError(f"{path.name} is larger than {_MAX_JSON_BYTES} bytes", field="dataset.json", fix="shorten it")
    try:
        content = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=_object_without_duplicates)
    except InputError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        reason = f"{path.name} cannot be read as JSON ({error})"
        raise InputError(reason, field="dataset.json", fix="correct the file") from error
    if not isinstance(content, dict):
        raise InputError(f"{path.name} holds {kind_of(content)}, expected an object", field="dataset.json")
    return content


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise InputError(f"the key '{key}' appears twice in one object", field=key, fix="keep one of them")
        content[key] = value
    return content


def _check_keys(raw: dict[str, Any], problems: Problems) -> None:
    for key in _REQUIRED:
        if key not in raw:
            unused = [name for name in raw if name not in _REQUIRED]
            similar = "modality" if key == "channel_names" and "modality" in raw else closest(key, unused)
            fix = f"rename '{similar}' to '{key}'" if similar else f"add '{key}' as nnU-Net v2 asks for it"
            problems.add(InputError(f"dataset.json has no '{key}'", field=key, fix=fix))


def _channel_names(value: Any) -> tuple[str, ...]:
    example = 'write it as {"0": "CT"}, with one key per channel'
    if not isinstance(value, dict) or not value:
        found = "an empty object" if value == {} else kind_of(value)
        raise InputError(
            f"found {found}, expected an object with a key per channel", field="channel_names", fix=example
        )
    expected = [str(index) for index in range(len(value))]
    if sorted(value) != sorted(expected):
        raise InputError(f"keys are {_quoted(value)}, expected {_quoted(expected)}", field="channel_names", fix=example)
    names = tuple(value[key] for key in expected)
    for name in names:
        _check_name(name, "channel_names")
        if names.count(name) > 1 and name.casefold() not in _NORMALISATION_NAMES:
            raise InputError(f"'{name}' is given to two channels", field="channel_names", fix="give each its own name")
    return names


def _checked_labels(
    raw: dict[str, Any], problems: Problems
) -> tuple[dict[str, Label], int | None, tuple[int, ...] | None]:
    """Returns labels, ignore label and order of the regions; labels with a problem are left out altogether."""
    if "labels" not in raw:
        return {}, None, None
    before = len(problems.errors)
    labels: dict[str, Label] = {}
    with problems.caught():
        labels = _labels(raw["labels"], problems)
    # Each of these would complain about what the one before it has found already.
    if len(problems.errors) > before:
        return {}, None, None
    ignore_label = None
    with problems.caught():
        ignore_label = _ignore_label(labels)
        _check_label_values(labels, problems)
    if len(problems.errors) > before:
        return {}, None, None
    order = None
    with problems.caught():
        order = _regions_class_order(raw, labels)
    return labels, ignore_label, order


def _labels(value: Any, problems: Problems) -> dict[str, Label]:
    example = 'write it as {"background": 0, "tumour": 1}'
    if not isinstance(value, dict):
        raise InputError(f"found {kind_of(value)}, expected an object", field="labels", fix=example)
    labels: dict[str, Label] = {}
    for name, label in value.items():
        if name.isdigit() and isinstance(label, str):
            raise InputError(
                f"'{name}' is the key and '{label}' the value", field="labels", fix=f"swap them: {example}"
            )
        with problems.caught():
            _check_name(name, "labels")
            labels[name] = _region(name, label) if isinstance(label, list) else _label(name, label)
    if "background" not in value or labels.get("background", 0) != 0:
        found = f"found {value['background']!r}" if "background" in value else "there is none"
        raise InputError(f"'background' should be 0, {found}", field="labels", fix=example)
    return labels


def _label(name: str, value: Any) -> int:
    return _whole_number(value, "labels", f"label '{name}'")


def _region(name: str, value: list[Any]) -> tuple[int, ...]:
    if not value:
        raise InputError(f"the region '{name}' is empty", field="labels", fix="list its labels")
    values = tuple(_whole_number(item, "labels", f"region '{name}'") for item in value)
    if len(set(values)) != len(values):
        raise InputError(f"region '{name}' lists a label twice: {value}", field="labels", fix="keep one")
    return values


def _ignore_label(labels: dict[str, Label]) -> int | None:
    if "ignore" not in labels:
        return None
    ignore = labels["ignore"]
    if not isinstance(ignore, int):
        raise InputError(f"'ignore' is the region {list(ignore)}, expected one label", field="labels", fix="use one")
    highest = max(value for name, label in labels.items() if name != "ignore" for value in _as_values(label))
    if ignore <= highest:
        raise InputError(
            f"'ignore' is {ignore} but the other labels go up to {highest}",
            field="labels",
            fix=f"make 'ignore' the highest label ({highest + 1}, or renumber the maps)",
        )
    return ignore


def _check_label_values(labels: dict[str, Label], problems: Problems) -> None:
    seen: dict[frozenset[int], str] = {}
    for name, label in labels.items():
        values = frozenset(_as_values(label))
        if values in seen:
            reason = f"'{seen[values]}' and '{name}' are both {sorted(values)}"
            problems.add(InputError(reason, field="labels", fix="keep one of them"))
        elif name != "background" and 0 in values:
            problems.add(InputError(f"'{name}' contains 0, the background", field="labels", fix="leave 0 out"))
        seen.setdefault(values, name)
    present = {value for values in seen for value in values}
    missing = sorted(set(range(max(present) + 1)) - present)
    if missing:
        raise InputError(
            f"labels {_shortened(sorted(present))} have a gap: {_shortened(missing)} missing",
            field="labels",
            fix="number them 0, 1, 2, ...",
        )


def _regions_class_order(raw: dict[str, Any], labels: dict[str, Label]) -> tuple[int, ...] | None:
    field = "regions_class_order"
    if not any(isinstance(label, tuple) for label in labels.values()):
        return None
    foreground = [name for name in labels if name not in ("background", "ignore")]
    fix = f"list one label for each of {_quoted(foreground)}, in that order"
    if field not in raw:
        raise InputError("labels hold regions but 'regions_class_order' is missing", field=field, fix=fix)
    value = raw[field]
    if not isinstance(value, list) or len(value) != len(foreground):
        raise InputError(f"found {value!r}, expected a list of {len(foreground)} labels", field=field, fix=fix)
    order = tuple(_whole_number(item, field) for item in value)
    if len(set(order)) != len(order):
        raise InputError(f"{list(order)} names a label twice", field=field, fix=fix)
    for name, label in zip(foreground, order, strict=True):
        if label not in _as_values(labels[name]):
            reason = f"region '{name}' would be written as {label}, which is not one of its labels {labels[name]}"
            raise InputError(reason, field=field, fix=fix)
    return order


def _class_names(value: Any) -> tuple[str, ...]:
    field = "classification_labels"
    example = 'write it as {"healthy": 0, "tumour": 1}'
    if isinstance(value, list):
        by_id: list[tuple[Any, Any]] = list(enumerate(value))
    elif isinstance(value, dict):
        by_id = [_class_pair(key, item, example) for key, item in value.items()]
    else:
        raise InputError(f"found {kind_of(value)}, expected an object or a list", field=field, fix=example)
    for _, name in by_id:
        _check_name(name, field)
    ids = [class_id for class_id, _ in by_id]
    names = tuple(name for _, name in sorted(by_id))
    if sorted(ids) != list(range(len(ids))):
        raise InputError(f"class ids are {sorted(ids)}, expected 0..{len(ids) - 1}", field=field, fix=example)
    if len(names) < 2:
        raise InputError(f"{len(names)} class given, expected at least 2", field=field, fix=example)
    if len(set(names)) != len(names):
        raise InputError(f"a class name appears twice in {_quoted(names)}", field=field, fix="give each its own name")
    return names


def _class_pair(key: str, item: Any, example: str) -> tuple[int, str]:
    if isinstance(item, int) and not isinstance(item, bool):
        return item, key
    if isinstance(item, str) and key.isascii() and key.isdigit():
        return int(key), item
    reason = f"'{key}': {item!r} is neither a name with its id nor an id with its name"
    raise InputError(reason, field="classification_labels", fix=example)


def _file_ending(value: Any) -> str:
    if value not in DATASET_ENDINGS:
        raise InputError(
            f"found {value!r}, expected one of {', '.join(DATASET_ENDINGS)}",
            field="file_ending",
            fix="give the images' ending with its dot, or convert the images",
        )
    return str(value)


def _check_name(name: Any, field: str) -> None:
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > MAX_NAME_LENGTH:
        shown = repr(name)[:60]
        raise InputError(f"{shown} is no name", field=field, fix=f"use 1 to {MAX_NAME_LENGTH} printable characters")


def _whole_number(value: Any, field: str, what: str = "it") -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 65535:
        shown = repr(value)[:60]
        raise InputError(
            f"{what} is {shown}, expected a whole number from 0 to 65535",
            field=field,
            fix="write a whole number without quotes",
        )
    return value


def _shortened(values: list[int]) -> str:
    return ", ".join(str(value) for value in values[:10]) + (", ..." if len(values) > 10 else "")


def _as_values(label: Label) -> tuple[int, ...]:
    return label if isinstance(label, tuple) else (label,)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
