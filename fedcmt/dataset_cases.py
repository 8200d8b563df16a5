"""The cases of a dataset: which files belong to which case, and which class ``cls_data.csv`` gives it."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedcmt.dataset_files import CaseFiles, check_identifier
from fedcmt.dataset_json import DATASET_ENDINGS, DatasetJson, closest
from fedcmt.errors import InputError, Problems
from fedcmt.volume import READABLE_ENDINGS, has_ending, read_volume

CLASS_FILE = "cls_data.csv"
_SPLITS = ("train", "test")


@dataclass(frozen=True)
class Case:
    """The files of one case: one image per channel, and the label map where there is one."""

    identifier: str
    images: tuple[Path, ...]
    label: Path | None


def list_cases(folder: Path, description: DatasetJson, problems: Problems) -> tuple[dict[str, Case], dict[str, Case]]:
    """Lists the training and test cases of a dataset, sorted by identifier.

    Args:
        folder: the dataset's folder.
        description: its checked ``dataset.json``.
        problems: takes every channel, image or label that is missing, left over or has the wrong name, a wrong
            ``numTraining``, and every case in both sets. Such a case is listed with the files it has.
    """
    if description.file_list is not None:
        train = _listed_cases(folder, description.file_list, problems)
    else:
        train = _folder_cases(folder, "Tr", description, problems)
    if description.file_list is not None and not (description.is_classification or (folder / CLASS_FILE).is_file()):
        _require_labels(train, problems)
    if not train and not problems.errors:
        fix = "add imagesTr/<case>_0000" + description.file_ending
        problems.add(InputError(f"{folder.name} has no training case", field="imagesTr", fix=fix))
    elif train and description.num_training not in (None, len(train)):
        reason = f"dataset.json says {description.num_training}, {len(train)} training cases found"
        fix = f"set it to {len(train)}, or add the missing files"
        problems.add(InputError(reason, field="numTraining", fix=fix))
    test = _folder_cases(folder, "Ts", description, problems) if (folder / "imagesTs").exists() else {}
    for identifier in sorted(set(test) & set(train)):
        reason = "the case is in the training set and in imagesTs"
        fix = "keep it in one of the two sets"
        problems.add(InputError(reason, case=identifier, field="images", fix=fix))
    return train, test


def read_classes(
    folder: Path, description: DatasetJson, train: Mapping[str, Case], test: Mapping[str, Case], problems: Problems
) -> tuple[tuple[str, ...] | None, dict[str, int]]:
    """Reads the class of every case.

    Args:
        folder: the dataset's folder.
        description: its checked ``dataset.json``.
        train: the training cases.
        test: the test cases.
        problems: takes every row of ``cls_data.csv`` that is malformed, twice there, or names an unknown case or
            class, and every training case without one.

    Returns:
        The class names (index = class id) and the class id by case; ``(None, {})`` for a dataset without classes.

    Raises:
        InputError: ``cls_data.csv`` is missing or unreadable, or all training cases are of the same class.
    """
    path = folder / CLASS_FILE
    if not path.exists() and description.is_classification and "classification_labels" in description.raw:
        raise InputError(
            f"{CLASS_FILE} is missing but dataset.json has classification_labels",
            field=CLASS_FILE,
            fix="add it beside dataset.json with the columns identifier,label[,split]",
        )
    if not path.exists() and not description.is_classification:
        return None, {}
    before = len(problems.errors)
    if path.exists():
        rows = _read_rows(path, problems)
        names = description.class_names or _names_from_rows(rows)
        case_class = {}
        for identifier, row in rows.items():
            with problems.caught(case=identifier):
                case_class[identifier] = _class_id(identifier, row, names, train, test)
        for identifier in sorted(set(train) - set(rows)):
            reason = f"the case has no row in {CLASS_FILE}"
            problems.add(InputError(reason, case=identifier, field="label", fix="add the row"))
    else:
        if not description.labels:
            return None, {}
        names, case_class = _classes_from_labels(description, train, test, problems)
    if len(problems.errors) == before:
        _check_classes(names, case_class, train)
    return names, case_class


def _listed_cases(folder: Path, file_list: Mapping[str, CaseFiles], problems: Problems) -> dict[str, Case]:
    cases = {}
    for identifier, files in sorted(file_list.items()):
        named = [*files.images, *([] if files.label is None else [files.label])]
        present = {name: folder / name for name in named if (folder / name).is_file()}
        for name in named:
            if name not in present:
                reason = f"{name} does not exist"
                problems.add(InputError(reason, case=identifier, field="dataset", fix="correct the list"))
        images = tuple(present[name] for name in files.images if name in present)
        cases[identifier] = Case(identifier, images, present.get(files.label or ""))
    return cases


def _folder_cases(folder: Path, split: str, description: DatasetJson, problems: Problems) -> dict[str, Case]:
    """Lists ``images<split>`` and pairs it with ``labels<split>``; split is Tr or Ts."""
    ending = description.file_ending or _most_common_ending(folder / f"images{split}")
    images = _images_by_case(folder / f"images{split}", ending, description.channel_names, problems)
    labels: dict[str, Path] = {}
    if images and (folder / f"labels{split}").exists():
        files = _files_with_ending(folder / f"labels{split}", ending, problems)
        labels = {path.name[: -len(ending)]: path for path in files}
    for identifier in sorted(set(labels) - set(images)):
        reason = f"labels{split} has a label but images{split} has no image"
        fix = "add the image or remove the label"
        problems.add(InputError(reason, case=identifier, field=f"images{split}", fix=fix))
    cases = {name: Case(name, images[name], labels.get(name)) for name in sorted(images)}
    needed = labels or not (description.is_classification or (folder / CLASS_FILE).is_file())
    if split == "Tr" and needed and cases:
        if (folder / "labelsTr").is_dir():
            _require_labels(cases, problems)
        elif not (folder / "labelsTr").exists():
            reason = f"the folder labelsTr is missing in {folder.name}"
            problems.add(InputError(reason, field="labelsTr", fix="add it with a label map for every case"))
    return cases


def _most_common_ending(folder: Path) -> str:
    """Returns the ending to list a folder by where dataset.json does not say a valid one."""
    names = [path.name.lower() for path in folder.iterdir()] if folder.is_dir() else []
    endings = Counter(ending for name in names for ending in DATASET_ENDINGS if name.endswith(ending))
    return endings.most_common(1)[0][0] if endings else DATASET_ENDINGS[0]


def _images_by_case(
    folder: Path, ending: str, channels: Sequence[str], problems: Problems
) -> dict[str, tuple[Path, ...]]:
    """Returns the files of every case; ``channels`` is empty where their number is unknown."""
    found: dict[str, dict[int, Path]] = {}
    for path in _files_with_ending(folder, ending, problems):
        match = re.fullmatch(r"(.+)_(\d{4})", path.name[: -len(ending)], re.ASCII)
        if match is None:
            reason = f"{folder.name}/{path.name} has no channel number"
            problems.add(InputError(reason, field="images", fix=f"name it <case>_0000{ending}"))
            continue
        identifier, channel = match[1], int(match[2])
        try:
            check_identifier(identifier)
        except InputError as error:
            problems.add(error)
            continue
        if channels and channel >= len(channels):
            reason = f"{path.name} is channel {channel}, dataset.json names {len(channels)} ({', '.join(channels)})"
            fix = "remove the file or name the channel"
            problems.add(InputError(reason, case=identifier, field="channel_names", fix=fix))
            continue
        found.setdefault(identifier, {})[channel] = path
    for identifier, files in found.items():
        for channel, name in enumerate(channels):
            if channel not in files:
                reason = f"channel {channel} ('{name}') is missing in {folder.name}"
                fix = f"add {identifier}_{channel:04d}{ending}"
                problems.add(InputError(reason, case=identifier, field="images", fix=fix))
    return {identifier: tuple(files[channel] for channel in sorted(files)) for identifier, files in found.items()}


def _files_with_ending(folder: Path, ending: str, problems: Problems) -> list[Path]:
    """Lists the volumes of a folder; other files are left alone, volumes with another ending are a problem."""
    if not folder.is_dir():
        found = "is no folder" if folder.exists() else f"is missing in {folder.parent.name}"
        problems.add(InputError(f"the folder {folder.name} {found}", field=folder.name, fix="add the folder"))
        return []
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    files = sorted(path for path in entries if has_ending(path, READABLE_ENDINGS))
    wrong = [path.name for path in files if not path.name.endswith(ending)]
    if wrong:
        reason = f"{folder.name}/{wrong[0]} does not end with '{ending}'"
        more = f", nor do {len(wrong) - 1} others in {folder.name}" if len(wrong) > 1 else ""
        fix = "give all files the ending that dataset.json names"
        problems.add(InputError(reason + more, field="file_ending", fix=fix))
    for path in files:
        if not path.is_file():
            reason = f"{folder.name}/{path.name} is no file, or a link to nothing"
            problems.add(InputError(reason, field=folder.name, fix="restore or remove it"))
    return [path for path in files if path.name.endswith(ending) and path.is_file()]


def _require_labels(train: Mapping[str, Case], problems: Problems) -> None:
    for identifier, case in train.items():
        if case.label is None:
            reason = "the label map is missing"
            problems.add(InputError(reason, case=identifier, field="labelsTr", fix="add it to labelsTr"))


def _read_rows(path: Path, problems: Problems) -> dict[str, dict[str, str]]:
    """Reads the rows of ``cls_data.csv`` by identifier."""
    columns, table = read_table(path, ("identifier", "label"), CLASS_FILE)
    rows: dict[str, dict[str, str]] = {}
    for number, entry in enumerate(table, start=2):
        with problems.caught(field=CLASS_FILE):
            if None in entry or None in entry.values():
                raise InputError(f"row {number} does not have {len(columns)} values", fix="complete the row")
            row = {column: value.strip() for column, value in entry.items()}
            if not row["identifier"]:
                raise InputError(f"row {number} has no identifier", fix="complete the row")
            if row["identifier"] in rows:
                raise InputError("the case has two rows", case=row["identifier"], fix="keep one row per case")
            rows[row["identifier"]] = row
    if not table:
        raise InputError(f"{path.name} has no rows", field=CLASS_FILE, fix="add one row per case")
    return rows


def read_table(path: Path, needed: Sequence[str], field: str) -> tuple[list[str], list[dict[str, str]]]:
    """Reads a CSV file with a first line of column names.

    Args:
        path: the file.
        needed: columns that must be there.
        field: named in errors.

    Returns:
        The columns, and a mapping for each row; a row that is too short or too long holds None.

    Raises:
        InputError: it cannot be read as such.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = [(column or "").strip() for column in reader.fieldnames or []]
            reader.fieldnames = columns
            table = list(reader)
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        fix = "write it as UTF-8 text"
        raise InputError(f"{path.name} cannot be read ({error})", field=field, fix=fix) from error
    if not set(needed) <= set(columns) or len(set(columns)) != len(columns):
        reason = f"columns are {', '.join(columns) or 'none'}, expected {','.join(needed)} and distinct names"
        raise InputError(reason, field=field, fix="correct the first line, separated by commas")
    return columns, table


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
    description: DatasetJson, train: Mapping[str, Case], test: Mapping[str, Case], problems: Problems
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Reads the classes of the older form: a case's class is the highest label anywhere in its map."""
    by_value = {label: name for name, label in description.labels.items() if name != "ignore"}
    names = tuple(by_value[value] for value in sorted(value for value in by_value if isinstance(value, int)))
    case_class: dict[str, int] = {}
    for identifier, case in (*train.items(), *test.items()):
        if case.label is None and identifier in test:
            continue
        with problems.caught(case=identifier):
            if case.label is None or len(names) != len(by_value):
                raise InputError(
                    "is_classification_dataset needs plain labels and a label map for every case",
                    field=CLASS_FILE,
                    fix=f"add {CLASS_FILE} with the columns identifier,label",
                )
            voxels = read_volume(case.label, dtype=None).data
            highest = float(voxels[voxels != description.ignore_label].max(initial=0))
            if not np.isin(highest, range(len(names))):
                reason = f"label {highest:g} found, expected 0..{len(names) - 1}"
                raise InputError(reason, field="labels", fix="name the label in dataset.json or correct the map")
            case_class[identifier] = int(highest)
    return names, case_class


def _check_classes(names: tuple[str, ...], case_class: Mapping[str, int], train: Mapping[str, Case]) -> None:
    present = {case_class[identifier] for identifier in train}
    if len(present) == 1:
        raise InputError(
            f"all {len(train)} training cases are of class '{names[present.pop()]}', expected at least 2 classes",
            field="label",
            fix="add cases of another class",
        )
