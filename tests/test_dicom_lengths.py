"""Lengths that DICOM files claim: damaged ones cost no memory, and what GDCM reads is not refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_series import hounsfield, write_series
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLosslessSV1

from fedcmt.dicom import is_dicom
from fedcmt.dicom_lengths import check_lengths
from fedcmt.errors import InputError
from fedcmt.volume import read_volume

SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, JPEGLosslessSV1]
FORGED = (b"\xff\xff\xff\x7f", b"\xfe\xff\xff\xff", b"\x00\x00\xff\x3f")
"""Lengths of 1 to 4 GiB, little endian."""


def test_files_that_gdcm_reads_are_not_refused() -> None:
    """pydicom comes with files of many makers, some of them odd, some cut off."""
    refused, read = [], 0
    for path in sorted((Path(pydicom.__file__).parent / "data").rglob("*")):
        if not (path.is_file() and is_dicom(path)):
            continue
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(path))
        try:
            reader.ReadImageInformation()
        except RuntimeError:
            continue
        read += 1
        try:
            check_lengths(path)
        except InputError:
            refused.append(path.name)
    assert read > 50
    assert not refused


@pytest.mark.parametrize("forged", FORGED)
def test_no_forged_byte_asks_for_memory(tmp_path: Path, forged: bytes) -> None:
    (path,) = write_series(tmp_path / "ct", hounsfield()[:1])
    content = path.read_bytes()
    with peak_memory() as peak:
        for place in range(132, len(content) - len(forged)):
            path.write_bytes(content[:place] + forged + content[place + len(forged) :])
            with suppress(InputError):
                read_volume(path)
        assert peak() < 200 * 2**20


def write_nested(path: Path, syntax: str, defined: bool) -> bytes:
    """Turns a slice into one with sequences in sequences, whose lengths are given or left open."""
    slice_ = pydicom.dcmread(path)
    inner, outer = Dataset(), Dataset()
    inner.CodeValue, inner.LongCodeValue = "123", "u" * 40
    outer.ConceptNameCodeSequence = [inner, inner]
    outer.PatientComments = "c" * 40
    slice_.ReferencedImageSequence = [outer, outer]
    slice_["ReferencedImageSequence"].is_undefined_length = not defined
    outer["ConceptNameCodeSequence"].is_undefined_length = not defined
    outer.is_undefined_length_sequence_item = inner.is_undefined_length_sequence_item = not defined
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    slice_.PixelData = np.frombuffer(slice_.PixelData, "<u2").astype(f"{order}u2").tobytes()
    if syntax == JPEGLosslessSV1:
        slice_.PixelData = encapsulate([b"p" * 40])
        slice_["PixelData"].is_undefined_length = True
    slice_.file_meta.TransferSyntaxUID = UID(syntax)
    pydicom.dataset.validate_file_meta(slice_.file_meta)
    pydicom.dcmwrite(
        path,
        slice_,
        implicit_vr=syntax == ImplicitVRLittleEndian,
        little_endian=order == "<",
        force_encoding=True,
    )
    return path.read_bytes()


@pytest.mark.parametrize("defined", [True, False])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_lengths_are_followed_into_sequences(tmp_path: Path, syntax: str, defined: bool) -> None:
    (path,) = write_series(tmp_path / "ct", hounsfield()[:1])
    content = write_nested(path, syntax, defined)
    check_lengths(path)
    if syntax != JPEGLosslessSV1:  # its pixels are made up
        assert read_volume(path).data.shape == (1, 1, 10, 12)
    short = syntax != ImplicitVRLittleEndian  # a text's length has two bytes
    order = "big" if syntax == ExplicitVRBigEndian else "little"
    values = [(b"c" * 40, 2 if short else 4), (b"u" * 40, 4)] + [(b"p" * 40, 4)] * (syntax == JPEGLosslessSV1)
    for value, size in values:
        place = content.index(value) - size
        assert int.from_bytes(content[place : place + size], order) == 40
        beyond = (len(content) - place - size + 2).to_bytes(size, order)
        path.write_bytes(content[:place] + beyond + content[place + size :])
        with pytest.raises(InputError, match="is longer than the file"):
            check_lengths(path)


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Yields what tells by how many bytes this process has grown at its largest since."""

    def status(field: str) -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split(f"{field}:")[1].split()[0]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
    before = status("VmRSS")
    yield lambda: status("VmHWM") - before
