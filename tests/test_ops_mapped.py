"""Updates that rest in files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedcmt import ops


def write(folder: Path, rows: list[torch.Tensor]) -> list[Path]:
    paths = [folder / f"{i}.bin" for i in range(len(rows))]
    for path, row in zip(paths, rows, strict=True):
        path.write_bytes(row.view(torch.uint8).numpy().tobytes())
    return paths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_results_are_those_in_memory(tmp_path: Path, dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    length = 3 * 65_536 + 1001
    rows = [torch.randn(length).to(dtype) for _ in range(5)]
    mapped = ops.MappedUpdates(write(tmp_path, rows), dtype)
    assert len(mapped) == 5
    assert torch.equal(ops.gramian(mapped), ops.gramian(rows))
    assert torch.equal(ops.gramian(mapped, segments=[0, 999, length]), ops.gramian(rows, segments=[0, 999, length]))
    params, other = torch.zeros(length), torch.zeros(length)
    assert ops.server_step(params, None, mapped, [0.2] * 5, lr=1.0) == ops.server_step(
        other, None, rows, [0.2] * 5, lr=1.0
    )
    assert torch.equal(params, other)
    mean = ops.weighted_mean(mapped, [1.0] * 5)
    assert torch.equal(mean, ops.weighted_mean(rows, [1.0] * 5))
    assert torch.equal(mapped[3], rows[3])
    torch.set_num_threads(before)


def test_empty_and_wrong_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    assert ops.gramian(ops.MappedUpdates([empty, empty])).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    odd = tmp_path / "odd"
    odd.write_bytes(b"12345")
    with pytest.raises(ValueError, match=r"at least one file\. Got none"):
        ops.MappedUpdates([])
    with pytest.raises(ValueError, match=r"one size. Got sizes \[0, 5\]"):
        ops.MappedUpdates([empty, odd])
    with pytest.raises(ValueError, match=r"whole values of torch\.float32\. Got 5 bytes"):
        ops.MappedUpdates([odd])
    with pytest.raises(FileNotFoundError):
        ops.MappedUpdates([tmp_path / "missing"])


PROGRAM = """
import resource, sys, torch
import fedcmt
from fedcmt import ops
torch.set_num_threads(2)
mapped = ops.MappedUpdates(sys.argv[1:], torch.float32)
params = torch.zeros(mapped[0].numel())
ops.gramian([params[:1000]])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
gram = ops.gramian(mapped, backend="native")
ops.server_step(params, None, mapped, [0.1] * len(mapped), lr=1.0, backend="native")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_stays_small(tmp_path: Path) -> None:
    length = 6_000_000  # 12 files of 24 MB
    rows = [torch.full((length,), float(i + 1)) for i in range(12)]
    paths = write(tmp_path, rows)
    done = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, paths)], capture_output=True, text=True, check=True)
    grown = int(done.stdout) * 1024  # ru_maxrss counts KiB
    assert grown < 12 * length * 4 / 4
