"""How NVFlare's tensors arrive: piece after piece into one buffer, so that an update never stands in memory twice."""

from __future__ import annotations

import mmap
from typing import Any

import torch
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.f3.streaming.cacheable import ItemConsumer
from nvflare.fuel.f3.streaming.download_service import download_object
from nvflare.fuel.utils import fobs
from safetensors.torch import load
from torch import Tensor

from fedcmt.allocator import give_back_freed_blocks, reuse_large_blocks

_MAP_NORESERVE = 0x4000  # Linux's; Python names it from 3.13 on
_KEPT = 2**23  # bytes, more than a piece of a message, from which on freed memory is given back at once
_TRIMMED_AFTER = 4  # arriving pieces
_LARGEST = 2**34  # bytes of address space for one message; what is not written to takes no memory


def register() -> None:
    """Teach NVFlare to carry tensors. Without it, on either side, they arrive empty and without an error."""
    fobs.register(GatheringDecomposer)
    # For pieces of messages. By default glibc learns from the first one that is freed to keep all later ones, in as
    # many heaps as threads have used; giving each back at once, the other extreme, spends more time on fresh pages than
    # on TLS.
    reuse_large_blocks(_KEPT, one_heap=True)


class GatheringDecomposer(TensorDecomposer):
    """NVFlare's own, but for where arriving tensors are put."""

    def download(
        self,
        from_fqcn: str,
        ref_id: str,
        per_request_timeout: float,
        cell: Any,
        secure: bool = False,
        optional: bool = False,
        abort_signal: Any = None,
        progress_cb: Any = None,
        fobs_ctx: dict[str, Any] | None = None,
    ) -> tuple[Any, Any]:
        """Called by NVFlare for a message's tensors.

        Returns:
            What went wrong, if anything, and the tensors by name.
        """
        gathering = Gathering()
        download_object(
            from_fqcn=from_fqcn,
            ref_id=ref_id,
            consumer=gathering,
            per_request_timeout=per_request_timeout,
            cell=cell,
            secure=secure,
            optional=optional,
            abort_signal=abort_signal,
            progress_cb=progress_cb,
        )
        return gathering.error, gathering.result


class Gathering(ItemConsumer):
    """Puts tensors one after the other into a buffer, as they arrive."""

    def __init__(self) -> None:
        super().__init__()
        self._buffer: Tensor | None = None
        self._filled = 0
        self._pieces = 0

    def consume_items(self, items: list[Any], result: Any) -> Any:
        """Called by NVFlare with the next items, each a safetensors file in bytes."""
        result = {} if result is None else result
        for item in items:
            if self._pieces % _TRIMMED_AFTER == 0:
                give_back_freed_blocks()
            self._pieces += 1
            for name, tensor in load(item).items():
                if name in result:
                    raise ValueError(f"tensor '{name}' arrived twice")
                result[name] = self._placed(tensor)
        return result

    def _placed(self, tensor: Tensor) -> Tensor:
        if self._buffer is None:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            try:
                self._buffer = torch.frombuffer(mmap.mmap(-1, _LARGEST, flags), dtype=torch.uint8)
            except (OSError, ValueError, OverflowError):  # a system that gives no address space on trust
                self._buffer = torch.empty(0, dtype=torch.uint8)
        size, start = tensor.numel() * tensor.element_size(), self._filled
        if tensor.dim() != 1 or start % tensor.element_size() or start + size > self._buffer.numel():
            return tensor
        self._filled += size
        place = self._buffer[start : start + size].view(tensor.dtype)
        return place.copy_(tensor)


def adjoining(first: Tensor, pieces: list[Tensor]) -> Tensor | None:
    """The one tensor that pieces make which follow each other in memory, or None."""
    end = first.storage_offset()
    for piece in pieces:
        same = piece.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or piece.storage_offset() != end or piece.dtype != first.dtype:
            return None
        end += piece.numel()
    return first.as_strided((end - first.storage_offset(),), (1,))
