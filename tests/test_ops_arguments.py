"""What the operations refuse and say, which backend they choose, and how they live without the extension."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedcmt import ops
from fedcmt.ops import _backend, _native


def step_with(**changes: Any) -> Callable[[], object]:
    """A valid server step on 8 elements with some arguments changed."""
    arguments: dict[str, Any] = {
        "params": torch.zeros(8),
        "momentum": torch.zeros(8),
        "updates": [torch.ones(8), torch.ones(8)],
        "weights": [0.5, 0.5],
        "lr": 1.0,
        "beta": 0.5,
        **changes,
    }
    return lambda: ops.server_step(**arguments)


MEMORY = torch.zeros(20)
MISTAKES = {
    "one tensor": (lambda: ops.gramian(torch.ones(2, 8)), TypeError, "list or tuple .* Got Tensor"),
    "no updates": (lambda: ops.gramian([]), ValueError, "at least one tensor. Got none"),
    "a list": (lambda: ops.gramian([[1.0]]), TypeError, r"`updates\[0\]` .* tensor. Got list"),
    "float64": (lambda: ops.gramian([torch.ones(3).double()]), TypeError, "Got torch.float64"),
    "mixed dtypes": (
        lambda: ops.gramian([torch.ones(3), torch.ones(3).half()]),
        TypeError,
        r"`updates\[1\]` .* torch.float32. Got torch.float16",
    ),
    "2-D": (lambda: ops.gramian([torch.ones(2, 3)]), ValueError, r"1-D tensor. Got \(2, 3\)"),
    "strided": (lambda: ops.gramian([torch.ones(6)[::2]]), ValueError, "contiguous. Got stride 2"),
    "lengths": (
        lambda: ops.gramian([torch.ones(3), torch.ones(4)]),
        ValueError,
        r"length of updates\[0\], 3. Got 4",
    ),
    "devices": (
        lambda: ops.gramian([torch.ones(3), torch.ones(3, device="meta")]),
        ValueError,
        r"`updates\[1\]` .* cpu. Got meta",
    ),
    "backend": (lambda: ops.gramian([torch.ones(3)], backend="gpu"), ValueError, "Got 'gpu'"),
    "native on meta": (
        lambda: ops.gramian([torch.ones(3, device="meta")], backend="native"),
        ValueError,
        "cpu or cuda tensors. Got meta",
    ),
    "half params": (step_with(params=torch.zeros(8).half()), TypeError, "`params` .* torch.float16"),
    "short params": (step_with(params=torch.zeros(7)), ValueError, "`params` .* 8. Got 7"),
    "half momentum": (step_with(momentum=torch.zeros(8).half()), TypeError, "`momentum` .* torch.float16"),
    "beta without momentum": (step_with(momentum=None), ValueError, "Got None, beta = 0.5"),
    "params is momentum": (
        step_with(params=MEMORY[:8], momentum=MEMORY[7:15]),
        ValueError,
        "`params` should not share memory with momentum",
    ),
    "params in updates": (
        step_with(params=MEMORY[:8], updates=[torch.ones(8), MEMORY[4:12]]),
        ValueError,
        r"`params` should not share memory with updates\[1\]",
    ),
    "momentum in updates": (
        step_with(momentum=MEMORY[:8], updates=[MEMORY[:8], torch.ones(8)]),
        ValueError,
        r"`momentum` should not share memory with updates\[0\]",
    ),
    "weight count": (step_with(weights=[1.0]), ValueError, "one number an update, 2. Got 1"),
    "2-D weights": (step_with(weights=torch.ones(2, 1)), ValueError, r"one number an update, 2. Got \(2, 1\)"),
    "complex weights": (step_with(weights=torch.ones(2).cfloat()), ValueError, "should be real. Got torch.complex64"),
    "ragged weights": (step_with(weights=[[1.0], [1.0, 2.0]]), ValueError, "rows of one length"),
    "weights type": (step_with(weights=1.0), TypeError, "`weights` .* Got float"),
    "NaN weight": (step_with(weights=[0.5, float("nan")]), ValueError, r"weights\[1\]` .* Got nan"),
    "huge weight": (step_with(weights=[1e39, 0.0]), ValueError, r"Got 1e\+39"),
    "text weight": (step_with(weights=["a", 1.0]), TypeError, r"`weights\[0\]` .* Got str"),
    "weights of targets": (
        step_with(params=[torch.zeros(8)], momentum=[torch.zeros(8)], weights=[0.5, 0.5]),
        ValueError,
        r"numbers of shape \(1, 2\). Got \(2,\)",
    ),
    "no targets": (step_with(params=[], momentum=[]), ValueError, "`params` should hold at least one tensor"),
    "momentum of targets": (
        step_with(params=[torch.zeros(8)], momentum=torch.zeros(8)),
        TypeError,
        "`momentum` should be a list where `params` is one. Got Tensor",
    ),
    "targets that share memory": (
        step_with(params=[MEMORY[:8], MEMORY[4:12]], momentum=[torch.zeros(8), torch.zeros(8)], weights=[[1, 1]] * 2),
        ValueError,
        r"`params\[0\]` should not share memory with params\[1\]",
    ),
    "optimizer": (step_with(optimizer="lion"), ValueError, "`optimizer` should be one of .* Got 'lion'"),
    "adam without second": (step_with(optimizer="adam"), ValueError, "`second` should be a tensor with adam"),
    "sgd with second": (step_with(second=torch.zeros(8)), ValueError, "`second` should be None with sgd"),
    "beta2": (step_with(optimizer="adam", second=torch.zeros(8), beta2=1.5), ValueError, "between 0 and 1. Got 1.5"),
    "epsilon": (step_with(optimizer="yogi", second=torch.zeros(8), epsilon=0.0), ValueError, "above 0. Got 0.0"),
    "max_norm": (step_with(max_norm=0), ValueError, "`max_norm` should be above 0. Got 0"),
    "gram": (
        step_with(max_norm=1.0, gram=torch.zeros(2, 2)),
        ValueError,
        r"`gram` should be float64 of shape \(2, 2\). Got torch.float32",
    ),
    "segments": (
        lambda: ops.gramian([torch.ones(8)], segments=[0, 5, 3, 8]),
        ValueError,
        r"rise from 0 to the length, 8. Got \[0, 5, 3, 8\]",
    ),
    "short segments": (lambda: ops.gramian([torch.ones(8)], segments=[0, 7]), ValueError, r"Got \[0, 7\]"),
    "gram to append to": (
        lambda: ops.gramian_append(torch.zeros(2, 2).double(), [torch.ones(8)], torch.ones(8)),
        ValueError,
        r"shape \(1, 1\). Got torch.float64, \(2, 2\)",
    ),
    "order": (
        lambda: ops.project_conflicts(torch.eye(2).double(), order=torch.zeros(2, 2, dtype=torch.int64)),
        ValueError,
        "permutations of 0 to 1",
    ),
    "flat gram": (lambda: ops.project_conflicts(torch.ones(4).double()), TypeError, r"\[N, N\] or \[S, N, N\]"),
    "limit": (lambda: ops.restore_norms([[1.0]], torch.ones(1, 1).double(), limit=-1), ValueError, "Got -1"),
    "negative weight": (lambda: ops.weighted_mean([torch.ones(3)], [-1.0]), ValueError, "not be negative. Got -1.0"),
    "no weight": (lambda: ops.weighted_mean([torch.ones(3)], [0.0]), ValueError, "zeros in group 0"),
    "mask shape": (lambda: ops.weighted_mean([torch.ones(3)], [1.0], [[1]]), ValueError, r"bool of shape .*int64"),
    "empty group": (
        lambda: ops.weighted_mean([torch.ones(3)], [1.0], [[True], [False]]),
        ValueError,
        "`updates` of group 1 should have one length. Got no member",
    ),
    "lengths in a group": (
        lambda: ops.weighted_mean([torch.ones(3), torch.ones(4)], [1.0, 1.0]),
        ValueError,
        r"group 0 should have one length. Got lengths \[3, 4\]",
    ),
    "screen into itself": (lambda: ops.screen(MEMORY, into=MEMORY), ValueError, "should not share memory with update"),
    "screen into float64": (
        lambda: ops.screen(torch.ones(3), into=torch.ones(3).double()),
        TypeError,
        "`into` should be float32 or bfloat16 or float16. Got torch.float64",
    ),
    "infinite lr": (step_with(lr=float("inf")), ValueError, "`lr` should be finite .* Got inf"),
    "text beta": (step_with(beta="0.5"), TypeError, "`beta` should be a number. Got str"),
}


@pytest.mark.parametrize(("call", "kind", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_explained(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_neighbours_in_memory_are_no_overlap() -> None:
    memory = torch.zeros(24)
    stats = ops.server_step(memory[:8], memory[8:16], [memory[16:]], [1.0], lr=1.0, beta=0.5)
    assert stats == ops.StepStats(norm=0.0, nonfinite=0)


def test_auto_logs_its_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    _backend._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="fedcmt.ops"):
        ops.gramian([torch.ones(3)])
        ops.gramian([torch.ones(3)])
    assert [record.getMessage() for record in caplog.records] == [
        f"fedcmt.ops on cpu: native ({ops.backend_info().cpu_path})"
    ]


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


def test_import_works_without_the_extension() -> None:
    output = run_python(
        "import sys; sys.modules['fedcmt._C'] = None\n"
        "import torch; from fedcmt import ops\n"
        "print(ops.backend_info().native, ops.gramian([torch.ones(3)]).item())\n"
        "for attempt in range(2):\n"
        "    try: ops.gramian([torch.ones(3)], backend='native')\n"
        "    except ImportError as error: print(error)\n"
    )
    first, *errors = output.splitlines()
    assert first == "False 3.0"
    assert len(errors) == 2
    assert all("Build it with: pip install" in error for error in errors)


def test_cpu_path_comes_from_the_environment() -> None:
    show = "from fedcmt import ops; print(ops.backend_info().cpu_path)"
    assert run_python(show, FEDCMT_CPU_PATH="plain").strip() == "plain"
    catch = f"try:\n    {show}\nexcept ValueError as error:\n    print(error)"
    assert "FEDCMT_CPU_PATH: CPU path should be one of" in run_python(catch, FEDCMT_CPU_PATH="sse9")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.skipif(not _native.has_cuda_kernels(), reason="needs an extension with CUDA kernels")
def test_cuda_call_without_a_gpu_is_a_clean_error() -> None:
    extension = _native.extension()
    with pytest.raises(RuntimeError, match=r"CUDA error \d+: "):
        extension.gramian_cuda([0], 0, [0, 0], 0, (0, 0, 0))
    with pytest.raises(RuntimeError, match=r"CUDA error \d+: "):
        extension.server_step_cuda([[0], [0], [0]], [0], 0, [0, 0], [1.0], (0, 1.0, 0.0, 1.0, 0.0, 0.0), 0, (0, 0, 0))
