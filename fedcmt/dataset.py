"""An nnU-Net raw dataset, for segmentation or classification, and every complaint about one.

``load_dataset`` looks at names and text files only and is cheap; ``check_images`` reads every voxel once.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from fedcmt.dataset_cases import Case, list_cases, read_classes
from fedcmt.dataset_json import Label, read_dataset_json
from fedcmt.errors import InputError, Problems
from fedcmt.volume import Volume, axis_codes, geometry_difference, read_volume

__all__ = [
    "Case", "ImageFindings", "RawDataset", "check_images", "find_dataset", "image_warnings", "inspect_dataset",
    "inspect_images", "load_dataset",
]  # fmt: skip

# Below this many voxels along an axis a patch is mostly padding.
_SMALL_EXTENT = 8


@dataclass(frozen=True)
class RawDataset:
    """A checked nnU-Net raw dataset.

    Attributes:
        name: the folder's name, such as ``Dataset901_ChestRegions``.
        folder: where it lies.
        channel_names: by channel number.
        file_ending: of images and labels, with the dot.
        labels: name to label or region as in dataset.json, with background and ignore.
        regions_class_order: the label each region is written as; None without regions.
        ignore_label: label left out of training and scoring, or None.
        train: cases of imagesTr by identifier, sorted.
        test: cases of imagesTs by identifier, sorted; label None where labelsTs has none.
        class_names: classes, index = class id; None for a dataset that is for segmentation only.
        case_class: class id by case, for training cases and those test cases whose class is known.
        dataset_json: the document as read.
    """

    name: str
    folder: Path
    channel_names: tuple[str, ...]
    file_ending: str
    labels: dict[str, Label]
    regions_class_order: tuple[int, ...] | None
    ignore_label: int | None
    train: dict[str, Case]
    test: dict[str, Case]
    class_names: tuple[str, ...] | None
    case_class: dict[str, int]
    dataset_json: dict[str, Any]

    @property
    def label_values(self) -> frozenset[int]:
        """Every integer that a label map may hold."""
        values = (label if isinstance(label, tuple) else (label,) for label in self.labels.values())
        return frozenset(value for label in values for value in label)


def find_dataset(raw: Path, dataset: int | str, *, client: str | None = None) -> Path:
    """Finds a dataset's folder by its number or full name.

    Args:
        raw: nnU-Net's raw folder.
        dataset: ``901``, ``"901"`` or ``"Dataset901_ChestRegions"``.
        client: named in errors.

    Raises:
        InputError: no folder or several fit, or the name is not a dataset's name.
    """
    raw = Path(raw)
    text = str(dataset)
    if isinstance(dataset, bool) or not re.fullmatch(r"\d{1,6}|Dataset\d{3,6}_[A-Za-z0-9_.\-]{1,120}", text, re.ASCII):
        raise InputError(
            f"found {text[:60]!r}, expected a number such as 901 or a name such as Dataset901_ChestRegions",
            client=client,
            field="dataset",
            fix="correct the name",
        )
    if not raw.is_dir():
        raise InputError(
            f"the folder {raw} does not exist", client=client, field="dataset", fix="name nnU-Net's raw folder"
        )
    present = sorted(path for path in raw.iterdir() if path.is_dir() and re.match(r"Dataset\d{3,}_", path.name))
    if text.isdigit():
        found = [path for path in present if int(path.name[len("Dataset") :].split("_")[0]) == int(text)]
    else:
        found = [path for path in present if path.name == text]
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name for path in (found or present)[:10]) or "none"
    if found:
        reason, fix = f"{text} is ambiguous: {names}", "give the full name, or remove one of them"
    else:
        reason, fix = f"{text} is not in {raw} (there: {names})", "correct the number or add the dataset"
    raise InputError(reason, client=client, field="dataset", fix=fix)


def load_dataset(raw: Path, dataset: int | str, *, client: str | None = None) -> RawDataset:
    """Reads and checks dataset.json, cls_data.csv and the lists of files, without opening an image.

    Label maps are opened only for ``is_classification_dataset`` without cls_data.csv, whose classes are in the maps.

    Args:
        raw: nnU-Net's raw folder.
        dataset: number or name, as for ``find_dataset``.
        client: named in errors.

    Raises:
        InputError: anything is missing, malformed or contradictory; all of it at once.
    """
    problems = Problems()
    found = inspect_dataset(raw, dataset, problems, client=client)
    problems.raise_any()
    return cast(RawDataset, found)  # None only with a problem on record


def inspect_dataset(
    raw: Path, dataset: int | str, problems: Problems, *, client: str | None = None
) -> RawDataset | None:
    """Reads a dataset as ``load_dataset`` does, and goes on after a problem.

    Args:
        raw: nnU-Net's raw folder.
        dataset: number or name, as for ``find_dataset``.
        problems: takes everything that is missing, malformed or contradictory.
        client: named in errors.

    Returns:
        What could be read, fit for ``inspect_images`` only where there are problems; None where there is no dataset.
    """
    own = Problems()
    found = None
    with own.caught():
        folder = find_dataset(raw, dataset)
        description = read_dataset_json(folder / "dataset.json", own)
        train, test = list_cases(folder, description, own)
        class_names: tuple[str, ...] | None = None
        case_class: dict[str, int] = {}
        with own.caught():
            class_names, case_class = read_classes(folder, description, train, test, own)
        found = RawDataset(
            name=folder.name,
            folder=folder,
            channel_names=description.channel_names,
            file_ending=description.file_ending,
            labels=description.labels,
            regions_class_order=description.regions_class_order,
            ignore_label=description.ignore_label,
            train=train,
            test=test,
            class_names=class_names,
            case_class=case_class,
            dataset_json=description.raw,
        )
    for error in own.errors:
        problems.add(error.located(client=client))
    return found


@dataclass(frozen=True)
class ImageFindings:
    """What the images of a dataset look like.

    Attributes:
        warnings: one line for each thing that is odd but can be trained on.
        orientations: axis codes such as ``RAS`` -> number of training cases stored that way.
    """

    warnings: list[str]
    orientations: dict[str, int]


def check_images(dataset: RawDataset, *, client: str | None = None) -> list[str]:
    """Reads every image and label map of a dataset and checks them against each other and dataset.json.

    Args:
        dataset: as from ``load_dataset``.
        client: named in errors and warnings.

    Returns:
        The warnings of ``ImageFindings``.

    Raises:
        InputError: a file is damaged, a label map lies on another grid than its image or holds values that
            dataset.json does not name, or the same image is in the training and the test set; all of it at once.
    """
    problems = Problems()
    findings = inspect_images(dataset, problems, client=client)
    problems.raise_any()
    return findings.warnings


def inspect_images(dataset: RawDataset, problems: Problems, *, client: str | None = None) -> ImageFindings:
    """Checks images as ``check_images`` does, and goes on after a problem."""
    warnings: list[str] = []
    codes: Counter[str] = Counter()
    shapes: dict[str, tuple[int, ...]] = {}
    seen: dict[str, tuple[str, str]] = {}
    sets = [("training", case) for case in dataset.train.values()]
    sets += [("test", case) for case in dataset.test.values()]
    for split, case in sets:
        image, found = None, []
        with problems.caught(client=client, case=case.identifier, field="images"):
            image = read_volume(case.images) if case.images else None
        with problems.caught(client=client, case=case.identifier, field="labels"):
            found += _check_label(case, image, dataset)
        if image is not None:
            found[:0] = image_warnings(image, dataset.channel_names)
            shapes[case.identifier] = image.data.shape[1:]
            codes[axis_codes(image.affine)] += split == "training"
            with problems.caught(client=client, case=case.identifier):
                found += _same_image(image, split, case.identifier, seen)
        warnings += [str(InputError(text, client=client, case=case.identifier)) for text in found]
    warnings += [str(InputError(text, client=client, case=case)) for case, text in _small_images(shapes)]
    orientations = {code: number for code, number in codes.most_common() if number}
    if len(orientations) > 1:
        stored = ", ".join(f"{code} ({number})" for code, number in orientations.items())
        text = f"training cases are stored in different orientations: {stored}; the model sees them as they are stored"
        warnings.append(str(InputError(text, client=client)))
    return ImageFindings(warnings, orientations)


def _same_image(image: Volume, split: str, identifier: str, seen: dict[str, tuple[str, str]]) -> list[str]:
    earlier_split, earlier = seen.setdefault(_digest(image), (split, identifier))
    if earlier_split != split:
        reason = f"its image is the same as that of {earlier_split} case '{earlier}'"
        raise InputError(reason, field="images", fix="keep it in one of the two sets")
    return [] if earlier == identifier else [f"its image is the same as that of case '{earlier}'"]


def _digest(image: Volume) -> str:
    digest = hashlib.sha256(repr(image.data.shape).encode())
    digest.update(np.ascontiguousarray(image.data).data)
    return digest.hexdigest()


def image_warnings(image: Volume, channel_names: Sequence[str]) -> Iterator[str]:
    """What is odd about an image ``[C, D, H, W]`` but can be worked with: constant channels."""
    names = channel_names if len(channel_names) == len(image.data) else [str(i) for i in range(len(image.data))]
    for name, channel in zip(names, image.data, strict=True):
        if channel.min() == channel.max():
            yield f"channel '{name}' is constant ({channel.flat[0]:g})"


def _small_images(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str | None, str]]:
    """One line for all images of very few voxels along an axis. A dataset of single slices is nothing odd.

    Args:
        shapes: Case to (D, H, W).

    Yields:
        The case, where it is only one, and the text.
    """
    first = 1 if all(shape[0] == 1 for shape in shapes.values()) else 0
    small = [case for case, shape in shapes.items() if min(shape[first:]) < _SMALL_EXTENT]
    if len(small) == 1:
        yield small[0], f"the image is only {shapes[small[0]]} voxels (D, H, W); patches will be padded"
    elif small:
        reason = f"{len(small)} images have fewer than {_SMALL_EXTENT} voxels along an axis"
        yield None, f"{reason}, '{small[0]}' is {shapes[small[0]]} (D, H, W); patches will be padded"


def _check_label(case: Case, image: Volume | None, dataset: RawDataset) -> list[str]:
    """Checks a case's label map and returns warnings about it; all problems are raised at once."""
    if case.label is None:
        return []
    label, problems = read_volume(case.label, dtype=None), Problems()
    difference = None if image is None else geometry_difference(image, label)
    if difference is not None:
        field, text = difference
        reason = f"label map {case.label.name} does not lie on its image: {text}"
        problems.add(InputError(reason, field=field, fix="resample the label map onto the image's grid"))
    values = np.unique(label.data)
    fractional = values[values != np.round(values)]
    unknown = [value for value in values.tolist() if value not in dataset.label_values and value == round(value)]
    if fractional.size:
        reason = f"label map {case.label.name} holds {fractional[0]:g}, expected whole numbers"
        problems.add(InputError(reason, field="labels", fix="save the map with nearest-neighbour resampling"))
    if unknown and dataset.labels:  # without labels their own problem is on record
        known = _shortened(sorted(dataset.label_values))
        reason = f"label map {case.label.name} holds {_shortened(unknown)}, dataset.json names {known}"
        problems.add(InputError(reason, field="labels", fix="name the label in dataset.json or correct the map"))
    problems.raise_any()
    if not any(value not in (0, dataset.ignore_label) for value in values):
        return [f"label map {case.label.name} is all background"]
    return []


def _shortened(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.10g}" for value in values[:10]) + (", ..." if len(values) > 10 else "")
