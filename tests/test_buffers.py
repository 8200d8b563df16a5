"""`fedcmt.ops.buffers`: memory for flat buffers."""

import gc
import mmap
import sys
from pathlib import Path

import pytest
import torch

from fedcmt import ops

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux only")
LARGE = 3_000_001  # 12 MB in float32; odd, so that its end lies within a page


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("length", [0, 1, 1000, LARGE])
def test_buffer_is_a_plain_vector(length: int, dtype: torch.dtype) -> None:
    buffer = ops.empty_buffer(length, dtype)
    assert (buffer.shape, buffer.dtype, buffer.device.type) == ((length,), dtype, "cpu")
    assert buffer.is_contiguous()
    buffer.fill_(2)
    assert float(buffer.double().sum()) == 2 * length


def test_zeros_and_copies_do_not_share_memory() -> None:
    source = torch.randn(LARGE)
    copy, zeros = ops.copy_buffer(source), ops.zero_buffer(source.half())
    assert torch.equal(copy, source)
    assert zeros.dtype == torch.float16
    assert zeros.shape == source.shape
    assert not zeros.any()
    source.zero_()
    assert copy.any()


def _huge_kilobytes(address: int) -> int:
    """Of the mapping that holds an address, from the kernel's books."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and ":" not in head:
            begin, end = (int(bound, 16) for bound in head.split("-"))
            inside = begin <= address < end
        elif inside and head == "AnonHugePages:":
            return int(line.split()[1])
    raise AssertionError("no mapping holds the address")


@ON_LINUX
def test_large_buffers_rest_in_huge_pages() -> None:
    allowed = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not allowed.is_file() or "[never]" in allowed.read_text():
        pytest.skip("this kernel gives no transparent huge pages")
    buffer = ops.empty_buffer(LARGE).zero_()
    assert buffer.data_ptr() % (2 << 20) == 0
    assert _huge_kilobytes(buffer.data_ptr()) >= 4 * LARGE // 1024 - 4096


@ON_LINUX
def test_memory_goes_with_the_last_view(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Pages(mmap.mmap):
        def __del__(self) -> None:
            closed.append(len(self))

    monkeypatch.setattr(mmap, "mmap", Pages)
    view = ops.empty_buffer(LARGE)[10:20]
    gc.collect()
    assert closed == []
    del view
    gc.collect()
    assert len(closed) == 1


def test_operations_take_them() -> None:
    rows = [ops.copy_buffer(torch.randn(LARGE)) for _ in range(3)]
    params = ops.zero_buffer(rows[0])
    ops.server_step(params, None, rows, [0.5, 0.25, 0.25], lr=1.0)
    torch.testing.assert_close(params, 0.5 * rows[0] + 0.25 * (rows[1] + rows[2]))
