"""Label maps as DICOM segmentation objects on the slices of the scan they belong to."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedcmt import __version__
from fedcmt.dicom import series_files
from fedcmt.errors import InputError
from fedcmt.files import write_bytes
from fedcmt.volume import read_volume


def check_dicom_seg(cases: Mapping[str, Sequence[Path]], task: str) -> None:
    """Refuses early what could not be written later.

    Args:
        cases: What ``dicom_cases`` found.
        task: Of the model.

    Raises:
        InputError: The input is no DICOM, the model makes no label maps, or highdicom is not installed.
    """
    if not cases:
        raise InputError("the input is no DICOM series", field="--dicom-seg", fix="leave --dicom-seg out")
    if task != "segmentation":
        raise InputError("this model makes no label maps", field="--dicom-seg", fix="leave --dicom-seg out")
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"DICOM segmentations need highdicom ({error})", field="--dicom-seg", fix="pip install 'fedcmt[dicom]'"
        ) from None


def segment_names(dataset_json: Mapping[str, Any]) -> dict[int, str]:
    """Value in a written label map -> its name; background and ignore are left out."""
    named = {name: label for name, label in dataset_json["labels"].items() if name not in ("background", "ignore")}
    order = dataset_json.get("regions_class_order")
    if order and any(isinstance(label, (list, tuple)) for label in named.values()):
        return {int(value): name for value, name in zip(order, named, strict=True)}
    return {int(label): name for name, label in named.items()}


def write_segmentations(cases: Mapping[str, Sequence[Path]], folder: Path, names: Mapping[int, str]) -> None:
    """Writes ``<case>.dcm`` beside every ``<case>.nii.gz`` that was predicted from a DICOM series.

    Args:
        cases: Case -> its channels as given by ``dicom_cases``; the first one's slices are referred to.
        folder: Where the label maps are.
        names: Label -> name of its segment.

    Raises:
        InputError: highdicom refuses the slices of a case.
    """
    for case, channels in cases.items():
        labels = folder / f"{case}.nii.gz"
        if labels.is_file():
            voxels = read_volume(labels, dtype=None).data[0]
            try:
                content = dicom_segmentation(voxels, series_files(channels[0]), names)
            except (AttributeError, ValueError, KeyError, TypeError) as error:
                if isinstance(error, InputError):
                    raise error.located(case=case) from None
                raise InputError(
                    f"no DICOM segmentation can be written for it ({error})",
                    case=case,
                    field="--dicom-seg",
                    fix="complete the slices' headers, or leave --dicom-seg out",
                ) from error
            write_bytes(folder / f"{case}.dcm", content)


def dicom_segmentation(labels: np.ndarray, slices: Sequence[Path], names: Mapping[int, str]) -> bytes:
    """Makes a DICOM segmentation with one binary segment per name.

    Args:
        labels: `[D, H, W]` integers.
        slices: The `D` slices of the scan, in the order of axis D.
        names: Label -> name of its segment, numbered from 1 in this order.

    Returns:
        The file's content.
    """
    import highdicom as hd
    import pydicom
    from pydicom.sr.codedict import codes

    sources = [pydicom.dcmread(path, stop_before_pixels=True) for path in slices]
    numbered = np.zeros(labels.shape, np.uint8)
    for number, value in enumerate(names, 1):
        numbered[labels == value] = number
    algorithm = hd.AlgorithmIdentificationSequence(
        name="FedCMT", version=__version__, family=codes.DCM.ArtificialIntelligence
    )
    descriptions = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=hd.sr.CodedConcept(f"label-{value}", "99FEDCMT", name[:64]),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, (value, name) in enumerate(names.items(), 1)
    ]
    segmentation = hd.seg.Segmentation(
        source_images=sources,
        pixel_array=numbered,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        series_instance_uid=hd.UID(),
        series_number=300,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="FedCMT",
        manufacturer_model_name="FedCMT",
        software_versions=__version__,
        device_serial_number="0",
    )
    content = io.BytesIO()
    segmentation.save_as(content, enforce_file_format=True)
    return content.getvalue()
