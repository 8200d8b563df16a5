"""A small made-up CT series, one file per slice, written with pydicom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SPACING = (0.75, 1.25, 2.5)  # between columns, between rows, between slices
ORIGIN = np.array([-31.5, 17.25, -400.125])


def rotation() -> np.ndarray:
    """An oblique frame: directions of rows, columns and normal in LPS, as columns."""
    a, b = 0.3, -0.2
    turn_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return turn_z @ turn_x


def hounsfield(shape: Sequence[int] = (6, 10, 12), seed: int = 0) -> np.ndarray:
    """Voxels `[D, H, W]`, each with a value of its own."""
    values = np.random.default_rng(seed).permutation(int(np.prod(shape))).reshape(shape)
    return (values * 2 - 1000).astype(np.int32)


def write_series(folder: Path, voxels: np.ndarray, frame: np.ndarray | None = None, **changes: object) -> list[Path]:
    """Writes `[D, H, W]` in Hounsfield units; files are named in an order that says nothing about their places."""
    folder.mkdir(parents=True, exist_ok=True)
    frame = rotation() if frame is None else frame
    study, series, reference = generate_uid(), generate_uid(), generate_uid()
    files = []
    for index, plane in enumerate(voxels):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
        dataset.PatientID, dataset.PatientName, dataset.PatientBirthDate, dataset.PatientSex = "p1", "Made^Up", "", "O"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = study, series, reference
        dataset.StudyID, dataset.StudyDate, dataset.StudyTime, dataset.AccessionNumber = "1", "20260101", "120000", ""
        dataset.ReferringPhysicianName = dataset.PositionReferenceIndicator = ""
        dataset.Modality, dataset.Manufacturer, dataset.SeriesDescription = "CT", "none", "made up"
        dataset.SeriesNumber, dataset.InstanceNumber = 1, index + 1
        dataset.ImagePositionPatient = [f"{v:.9g}" for v in ORIGIN + frame[:, 2] * SPACING[2] * index]
        dataset.ImageOrientationPatient = [f"{v:.9g}" for v in frame[:, :2].T.ravel()]
        dataset.PixelSpacing, dataset.SliceThickness = [SPACING[1], SPACING[0]], SPACING[2]
        dataset.Rows, dataset.Columns = plane.shape
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
        dataset.RescaleSlope, dataset.RescaleIntercept = 2, -1000
        dataset.PixelData = ((plane + 1000) // 2).astype("<u2").tobytes()
        for name, value in changes.items():
            setattr(dataset, name, value)
        path = folder / f"IM{(index * 7 + 3) % len(voxels):04d}{'.dcm' if index % 2 else ''}"
        dataset.save_as(path, enforce_file_format=True)
        files.append(path)
    return files


def affine_by_pydicom(files: Sequence[Path]) -> np.ndarray:
    """The affine (voxel x, y, z -> mm in RAS+) from the first and last slice, as the DICOM standard defines it."""
    first, last = (pydicom.dcmread(path, stop_before_pixels=True) for path in (files[0], files[-1]))
    row, column = np.array(first.ImageOrientationPatient, float).reshape(2, 3)
    start, end = (np.array(one.ImagePositionPatient, float) for one in (first, last))
    affine = np.eye(4)
    affine[:3, 0] = row * float(first.PixelSpacing[1])
    affine[:3, 1] = column * float(first.PixelSpacing[0])
    affine[:3, 2] = (end - start) / (len(files) - 1)
    affine[:3, 3] = start
    return np.diag([-1.0, -1, 1, 1]) @ affine
