"""Parameters on their way to clients, and updates as they arrive."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcmt.config import NvflareConfig
from fedcmt.engines.messages import WIRE_DTYPES, Announced, Fitted, Message, MessageError, announce
from fedcmt.engines.privacy import dequantized
from fedcmt.exchange import ClientUpdate, Outgoing

_PARTS = ("encoder", "adaptor", "decoder")


class WireParameters:
    """Parameters in the wire's precision, each made and summed once however many clients get it.

    Args:
        dtype: The wire's precision; in the server's own nothing is copied.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._made: dict[int, tuple[Tensor, Tensor, Announced]] = {}

    def forget(self) -> None:
        """The server's parameters have changed, or may have."""
        self._made.clear()

    def of(self, outgoing: Outgoing | None) -> tuple[dict[str, Announced] | None, dict[str, Tensor]]:
        """What a client gets.

        Returns:
            What it is, and the tensors, by part; None and none where nothing is exchanged.
        """
        if outgoing is None:
            return None, {}
        tensors, announced = {}, {}
        for part in _PARTS:
            tensor = getattr(outgoing, part)
            if tensor is None:
                continue
            if id(tensor) not in self._made:
                wired = tensor.detach().to(self._dtype).cpu().contiguous()
                self._made[id(tensor)] = (tensor, wired, announce(wired))
            _, tensors[part], announced[part] = self._made[id(tensor)]
        return announced, tensors


def received_update(name: str, body: Fitted, message: Message, wire: NvflareConfig) -> ClientUpdate:
    """The update in a message; all but the encoder in float32, that as it came.

    Raises:
        MessageError: It is not in the form that was asked for.
    """
    tensors = dict(message.tensors)
    if not {"encoder", "adaptor"} <= set(tensors) <= {*_PARTS, "decoder_start"}:
        raise MessageError(f"update holds {sorted(tensors)}, expected encoder and adaptor")
    states = (body.quantized or {}) if wire.quantizer == "adaquant" else {}
    asked = {WIRE_DTYPES[wire.wire_dtype]} | ({torch.float16} if wire.quantizer == "float16" else set())
    for part, tensor in list(tensors.items()):
        if part in states:
            tensors[part] = dequantized(tensor, states[part])
        elif tensor.dtype not in asked:
            raise MessageError(f"{part} update is {tensor.dtype}, expected {wire.wire_dtype}")
        if part != "encoder" or tensor.dtype == torch.float16:
            tensors[part] = tensors[part].float()
    return ClientUpdate(name, body.round, body.num_cases, **tensors)
