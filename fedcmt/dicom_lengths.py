"""Lengths that a DICOM file claims, looked at before GDCM asks for that much memory.

One wrong byte can claim 4 GiB for a name; GDCM allocates and clears as much before it finds the file too short. Only
the structure is followed here (DICOM PS3.5, section 7), and what reaches beyond the file is refused; all else is left
to GDCM, which reads many files that bend the standard.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from fedcmt.errors import InputError

_META_START = 132  # after preamble and mark
_META_GROUP, _TRANSFER_SYNTAX = 0x0002, (0x0002, 0x0010)
_IMPLICIT, _BIG_ENDIAN, _DEFLATED = (f"1.2.840.10008.1.2{end}" for end in ("", ".2", ".1.99"))
_ITEM, _SEQUENCE_END, _PIXEL_DATA = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD), (0x7FE0, 0x0010)
_LONG_FORMS = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_UNDEFINED = 0xFFFFFFFF
_SLACK = 16 * 2**20  # bytes of pixels beyond the end of the file that are left to GDCM


def check_lengths(path: Path) -> None:
    """Refuse a DICOM file with an element that reaches beyond the file's end.

    Pixel data may miss 16 MiB here: GDCM says better what is wrong with them.

    Raises:
        InputError: It has one, and is damaged or cut off.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place = _first_beyond(content)
    if place is not None:
        reason = f"{path.name} is truncated or damaged (an element at byte {place} is longer than the file)"
        raise InputError(reason, field="images", fix="restore or remove it")


def _first_beyond(content: mmap.mmap) -> int | None:
    """Where the first element begins that reaches beyond the end; None if there is none."""
    place, order, explicit, in_meta, in_pixels = _META_START, "<", True, True, False
    syntax = ""
    while place + 8 <= len(content):
        tag = struct.unpack_from(f"{order}HH", content, place)
        if in_meta and tag[0] != _META_GROUP:
            if syntax == _DEFLATED:
                return None  # what was damaged does not inflate
            order, explicit, in_meta = ">" if syntax == _BIG_ENDIAN else "<", syntax != _IMPLICIT, False
            continue
        form, header, length = _element(content, place, order, explicit and tag[0] != _ITEM[0])
        start = place + header
        if tag in (_PIXEL_DATA, _SEQUENCE_END):
            in_pixels = tag == _PIXEL_DATA and length == _UNDEFINED  # fragments follow, as items
        holds_items = not form and content[start : start + 4] == struct.pack(f"{order}HH", *_ITEM)
        if length == _UNDEFINED or form == b"SQ" or holds_items or (tag == _ITEM and not in_pixels):
            place = start  # elements come next, rather than a value
            continue
        if start + length > len(content) + (_SLACK if tag == _PIXEL_DATA else 0):
            return place
        if tag == _TRANSFER_SYNTAX:
            syntax = content[start : start + length].decode("ascii", "replace").strip("\0 ")
        place = start + length
    return None


def _element(content: mmap.mmap, place: int, order: str, explicit: bool) -> tuple[bytes, int, int]:
    """Value representation (empty where implicit), bytes of the header, and length of the value."""
    form = content[place + 4 : place + 6]
    if not explicit or not form.isalpha() or not form.isupper():  # GDCM takes the unreadable for implicit too
        return b"", 8, struct.unpack_from(f"{order}I", content, place + 4)[0]
    if form in _LONG_FORMS:
        if place + 12 > len(content):
            return form, 12, 0
        return form, 12, struct.unpack_from(f"{order}I", content, place + 8)[0]
    return form, 8, struct.unpack_from(f"{order}H", content, place + 6)[0]
