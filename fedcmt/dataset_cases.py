"""The cases of a dataset: which files belong to which case, and which class ``cls_data.csv`` gives it."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedcmt.dataset_json import DatasetJson, check_identifier, closest
from fedcmt.errors import InputError
from fedcmt.volume import READABLE_ENDINGS, has_ending, read_volume

CLASS_FILE = "cls_data.csv"
_SPLITS = ("train", "test")


@dataclass(frozen=True)
class Case:
    """The files of one case: one image per channel, and the label map where there is one."""

    identifier: str
    images: tuple[Path, ...]
    label: Path | None


def list_cases(folder: Path, description: DatasetJson) -> tuple[dict[str, Case], dict[str, Case]]:
    """Lists the training and test cases of a dataset, sorted by identifier.

    Args:
        folder: the dataset's folder.
        description: its checked ``dataset.json``.

    Raises:
        InputError: a channel, image or label is missing, is left over or has the wrong name; ``numTraining`` is
            wrong; a case is in both sets.
    """
    if description.file_list is not None:
        train = _listed_cases(folder, description)
    else:
        train = _folder_cases(folder, "Tr", description)
    if not description.is_classification and not (folder / CLASS_FILE).is_file():
        _require_labels(train)
    if not train:
        raise InputError(
            f"{folder.name} has no training case",
            field="imagesTr",
            fix="add imagesTr/<case>_0000" + description.file_ending,
        )
    if description.num_training != len(train):
        raise InputError(
            f"dataset.json says {description.num_training}, {len(train)} training cases found",
            field="numTraining",
            fix=f"set it to {len(train)}, or add the missing files",
        )
    test = _folder_cases(folder, "Ts", description) if (folder / "imagesTs").is_dir() else {}
    for identifier in test:
        if identifier in train:
            raise InputError(
                "the case is in imagesTr and in imagesTs", case=identifier, fix="keep it in one of the two sets"
            )
    return train, test


def read_classes(
    folder: Path, description: DatasetJson, train: Mapping[str, Case], test: Mapping[str, Case]
) -> tuple[tuple[str, ...] | None, dict[str, int]]:
    """Reads the class of every case.

    Returns:
        The class names (index = class id) and the class id by case; ``(None, {})`` for a dataset without classes.

    Raises:
        InputError: ``cls_data.csv`` is missing or malformed, names an unknown case or class, leaves out a training
            case, or gives all training cases the same class.
    """
    path = folder / CLASS_FILE
    if path.is_file():
        rows = _read_rows(path)
        names = description.class_names or _names_from_rows(rows)
        case_class = {identifier: _class_id(identifier, row, names, train, test) for identifier, row in rows.items()}
    elif description.class_names is None and description.is_classification:
        names, case_class = _classes_from_labels(description, train, test)
    elif description.class_names is not None:
        raise InputError(
            f"{CLASS_FILE} is missing but dataset.json has classification_labels",
            field=CLASS_FILE,
            fix="add it beside dataset.json with the columns identifier,label[,split]",
        )
    else:
        return None, {}
    _check_classes(names, case_class, train)
    return names, case_class


def _listed_cases(folder: Path, description: DatasetJson) -> dict[str, Case]:
    cases = {}
    for identifier, files in sorted((description.file_list or {}).items()):
        label = None if files.label is None else folder / files.label
        case = Case(identifier, tuple(folder / name for name in files.images), label)
        for path in (*case.images, *([] if label is None else [label])):
            if not path.is_file():
                raise InputError(
                    f"{path.relative_to(folder)} does not exist",
                    case=identifier,
                    field="dataset",
                    fix="correct the list",
                )
        cases[identifier] = case
    return cases


def _folder_cases(folder: Path, split: str, description: DatasetJson) -> dict[str, Case]:
    """Lists ``images<split>`` and pairs it with ``labels<split>``; split is Tr or Ts."""
    images = _images_by_case(folder / f"images{split}", description)
    labels = _labels_by_case(folder / f"labels{split}", description.file_ending)
    left_over = sorted(set(labels) - set(images))
    if left_over:
        raise InputError(
            f"labels{split} has a label but images{split} has no image",
            case=left_over[0],
            field=f"images{split}",
            fix="add the image or remove the label",
        )
    if split == "Tr" and labels:
        _require_labels({name: Case(name, (), labels.get(name)) for name in images})
    return {name: Case(name, images[name], labels.get(name)) for name in sorted(images)}


def _images_by_case(folder: Path, description: DatasetJson) -> dict[str, tuple[Path, ...]]:
    ending, channels = description.file_ending, description.channel_names
    found: dict[str, dict[int, Path]] = {}
    for path in _files_with_ending(folder, ending):
        match = re.fullmatch(r"(.+)_(\d{4})", path.name[: -len(ending)], re.ASCII)
        if match is None:
            raise InputError(
                f"{folder.name}/{path.name} has no channel number",
                field="images",
                fix=f"name it <case>_0000{ending}",
            )
        identifier, channel = match[1], int(match[2])
        check_identifier(identifier)
        if channel >= len(channels):
            raise InputError(
                f"{path.name} is channel {channel}, dataset.json names {len(channels)} ({', '.join(channels)})",
                case=identifier,
                field="channel_names",
                fix="remove the file or name the channel",
            )
        found.setdefault(identifier, {})[channel] = path
    for identifier, files in found.items():
        for channel, name in enumerate(channels):
            if channel not in files:
                raise InputError(
                    f"channel {channel} ('{name}') is missing in {folder.name}",
                    case=identifier,
                    field="images",
                    fix=f"add {identifier}_{channel:04d}{ending}",
                )
    return {identifier: tuple(files[channel] for channel in sorted(files)) for identifier, files in found.items()}


def _labels_by_case(folder: Path, ending: str) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    return {path.name[: -len(ending)]: path for path in _files_with_ending(folder, ending)}


def _files_with_ending(folder: Path, ending: str) -> list[Path]:
    """Lists the volumes of a folder; other files are left alone, volumes with another ending are an error."""
    if not folder.is_dir():
        raise InputError(
            f"the folder {folder.name} is missing in {folder.parent.name}", field=folder.name, fix="add it"
        )
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    for path in files:
        if has_ending(path, READABLE_ENDINGS) and not path.name.endswith(ending):
            raise InputError(
                f"{folder.name}/{path.name} does not end with '{ending}'",
                field="file_ending",
                fix="give all files the ending that dataset.json names",
            )
    return [path for path in files if path.name.endswith(ending)]


def _require_labels(train: Mapping[str, Case]) -> None:
    for identifier, case in train.items():
        if case.label is None:
            raise InputError("the label map is missing", case=identifier, field="labelsTr", fix="add it to labelsTr")


def _read_rows(path: Path) -> dict[str, dict[str, str]]:
    """Reads the rows of ``cls_data.csv`` by identifier."""
    field = CLASS_FILE
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = [(column or "").strip() for column in reader.fieldnames or []]
            reader.fieldnames = columns
            table = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} cannot be read ({error})", field=field, fix="write it as UTF-8 text") from error
    if not {"identifier", "label"} <= set(columns) or len(set(columns)) != len(columns):
        reason = f"columns are {', '.join(columns) or 'none'}, expected identifier,label[,split]"
        raise InputError(reason, field=field, fix="correct the first line, separated by commas")
    rows: dict[str, dict[str, str]] = {}
    for number, entry in enumerate(table, start=2):
        if None in entry or None in entry.values():
            raise InputError(f"row {number} does not have {len(columns)} values", field=field, fix="complete the row")
        row = {column: value.strip() for column, value in entry.items()}
        if not row["identifier"]:
            raise InputError(f"row {number} has no identifier", field=field, fix="complete the row")
        if row["identifier"] in rows:
            raise InputError("the case has two rows", case=row["identifier"], field=field, fix="keep one row per case")
        rows[row["identifier"]] = row
    if not rows:
        raise InputError(f"{path.name} has no rows", field=field, fix="add one row per case")
    return rows


def _names_from_rows(rows: Mapping[str, Mapping[str, str]]) -> tuple[str, ...]:
    """Returns the classes where dataset.json does not list them: the labels used, numbers in their order."""
    used = sorted({row["label"] for row in rows.values()})
    if not all(label.isascii() and label.isdigit() for label in used):
        return tuple(used)
    ids = sorted({int(label) for label in used})
    if ids != list(range(len(ids))):
        raise InputError(
            f"class ids are {ids}, expected 0..{len(ids) - 1}", field="label", fix="list the classes in dataset.json"
        )
    return tuple(str(class_id) for class_id in ids)


def _class_id(
    identifier: str,
    row: Mapping[str, str],
    names: tuple[str, ...],
    train: Mapping[str, Case],
    test: Mapping[str, Case],
) -> int:
    members = {"train": train, "test": test}
    split, label = row.get("split", ""), row["label"]
    if split and split not in _SPLITS:
        raise InputError(f"found '{split}', expected train or test", case=identifier, field="split", fix="correct it")
    if not any(identifier in members[name] for name in ([split] if split else _SPLITS)):
        folders = {"train": "imagesTr", "test": "imagesTs", "": "imagesTr or imagesTs"}
        similar = closest(identifier, [*train, *test])
        raise InputError(
            f"{CLASS_FILE} names a case that is not in {folders[split]}",
            case=identifier,
            field="identifier",
            fix=f"did you mean '{similar}'?" if similar and similar != identifier else "correct or remove the row",
        )
    if label in names:
        return names.index(label)
    if label.isascii() and label.isdigit() and int(label) < len(names):
        return int(label)
    known = ", ".join(f"{class_id} '{name}'" for class_id, name in enumerate(names))
    raise InputError(f"found '{label}', expected one of {known}", case=identifier, field="label", fix="correct the row")


def _classes_from_labels(
    description: DatasetJson, train: Mapping[str, Case], test: Mapping[str, Case]
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Reads the classes of the older form: a case's class is the highest label anywhere in its map."""
    by_value = {label: name for name, label in description.labels.items() if name != "ignore"}
    names = tuple(by_value[value] for value in sorted(value for value in by_value if isinstance(value, int)))
    case_class = {}
    for identifier, case in (*train.items(), *test.items()):
        if case.label is None and identifier in test:
            continue
        if case.label is None or len(names) != len(by_value):
            raise InputError(
                "is_classification_dataset needs plain labels and a label map for every case",
                case=identifier,
                field=CLASS_FILE,
                fix=f"add {CLASS_FILE} with the columns identifier,label",
            )
        try:
            voxels = read_volume(case.label, dtype=None).data
        except InputError as error:
            raise error.located(case=identifier) from None
        highest = float(voxels[voxels != description.ignore_label].max(initial=0))
        if not np.isin(highest, range(len(names))):
            known = f"0..{len(names) - 1}"
            raise InputError(f"label {highest:g} found, expected {known}", case=identifier, field="labels")
        case_class[identifier] = int(highest)
    return names, case_class


def _check_classes(names: tuple[str, ...], case_class: Mapping[str, int], train: Mapping[str, Case]) -> None:
    for identifier in train:
        if identifier not in case_class:
            raise InputError(f"the case has no row in {CLASS_FILE}", case=identifier, field="label", fix="add the row")
    present = {case_class[identifier] for identifier in train}
    if len(present) < 2:
        raise InputError(
            f"all {len(train)} training cases are of class '{names[present.pop()]}', expected at least 2 classes",
            field="label",
            fix="add cases of another class",
        )
