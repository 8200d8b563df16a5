"""Our messages as NVFlare's: a data exchange object with a JSON header and flat tensors, in pieces where long.

Pieces of a few megabytes are read, encrypted and sent one after the other, so neither side ever holds a second copy of
an update in some encoding.
"""

from __future__ import annotations

from typing import Any

import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.shareable import Shareable
from torch import Tensor

from fedcmt.engines.messages import WIRE_DTYPES, Announced, Fitted, Message, MessageError, unpack_header
from fedcmt.engines.nvflare_tensors import adjoining

TASK = "fedcmt"  # the one task there is: answer a message
_HEADER = "fedcmt"
_PIECE = 3 * 2**20  # bytes


def to_shareable(message: Message) -> Shareable:
    """A message as NVFlare's. An update says that it is one, so that filters and audits at the site see it."""
    kind = DataKind.WEIGHT_DIFF if isinstance(message.body, Fitted) else DataKind.APP_DEFINED
    pieces = {}
    for name, tensor in message.tensors.items():
        step = max(1, _PIECE // tensor.element_size())
        for index, start in enumerate(range(0, tensor.numel(), step)):
            pieces[f"{name}.{index}"] = tensor[start : start + step]
    return DXO(kind, pieces, {_HEADER: message.header()}).to_shareable()


def from_wire(shareable: Shareable) -> Message:
    """The message in NVFlare's; its checksums are left to :meth:`fedcmt.engines.messages.Message.check`.

    Raises:
        MessageError: It holds none, or not all of it.
    """
    try:
        dxo = from_shareable(shareable)
        header, pieces = dxo.meta[_HEADER], dxo.data
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MessageError(f"no message of this protocol ({type(error).__name__})") from None
    body, announced = unpack_header(header)
    return Message(body, {name: _joined(name, pieces, entry) for name, entry in announced.items()}, announced)


def _joined(name: str, pieces: Any, expected: Announced) -> Tensor:
    """One tensor from its pieces: a view where they arrived side by side."""
    found: list[Tensor] = []
    count = 0
    while count < expected.numel:
        piece = pieces.pop(f"{name}.{len(found)}", None) if isinstance(pieces, dict) else None
        if not isinstance(piece, Tensor) or piece.dtype != WIRE_DTYPES[expected.dtype] or piece.dim() != 1:
            raise MessageError(f"{name} arrived with {count} of {expected.numel} {expected.dtype} values")
        if not piece.numel() or count + piece.numel() > expected.numel:
            raise MessageError(f"{name} arrived in pieces that do not make {expected.numel} values")
        found.append(piece)
        count += piece.numel()
    if not found:
        return torch.empty(0, dtype=WIRE_DTYPES[expected.dtype])
    whole = adjoining(found[0], found)
    return torch.cat(found) if whole is None else whole
