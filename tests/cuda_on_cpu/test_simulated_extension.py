"""The extension with simulated CUDA kernels, as tests/test_ops.py uses it."""

from __future__ import annotations

import pytest
import torch
from simulated_cuda import simulated_cuda

from fedcmt import ops


def test_cpu_tensors_go_to_the_simulated_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = [torch.linspace(-1, 1 + i, 4099) for i in range(3)]
    rows = torch.stack(updates).double()
    with simulated_cuda() as extension:
        assert extension.cuda_is_simulated
        extension.take_launch_count()
        grams = []
        for order in ("forward", "reverse", "random"):
            monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
            grams.append(ops.gramian(updates, backend="native"))
        assert extension.take_launch_count() > 0
    torch.testing.assert_close(grams[0], rows @ rows.T, rtol=1e-12, atol=0)
    assert torch.equal(grams[0], grams[1])
    assert torch.equal(grams[0], grams[2])


def test_an_error_of_the_runtime_becomes_an_exception() -> None:
    with simulated_cuda() as extension, pytest.raises(RuntimeError, match="CUDA error 101: invalid device ordinal"):
        extension.project_conflicts_cuda(0, 1, 1, 0, 0, (0, 7, 0))
