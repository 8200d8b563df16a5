"""`logits_to_labels` against the steps of nnU-Net that it replaces: labels equal in every voxel, ties included."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg

from fedcmt import ops

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not ops.backend_info().native, reason="no extension")),
]
# (source, target, axis resampled separately); ratios of 2 and 3 make exact ties of halves frequent
GRIDS = [
    ((9, 10, 12), (13, 15, 18), None),
    ((8, 12, 12), (8, 18, 24), None),
    ((6, 9, 8), (9, 9, 8), None),
    ((20, 21, 22), (13, 14, 15), None),
    ((9, 12, 12), (6, 18, 24), 0),
    ((12, 9, 12), (18, 14, 12), 1),
    ((12, 9, 13), (18, 14, 18), 2),
    ((1, 12, 12), (1, 18, 7), None),
    ((5, 1, 3), (2, 1, 7), None),
    ((7, 9, 33), (7, 9, 33), None),
]


def made_logits(heads: int, shape: Sequence[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that take few values, so that they tie, and weights as a sum of tiles makes them."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(heads, *shape, generator=generator) * 2**-9).half() * 2
    return logits, (torch.rand(tuple(shape), generator=generator) * 20 + 1e-3).half()


def stock(logits: torch.Tensor, weights: torch.Tensor, target: Sequence[int], axis: int | None) -> np.ndarray:
    """nnU-Net's resampled logits."""
    divided = torch.div(logits, weights).numpy()
    return resample_data_or_seg(divided, np.array(target), False, axis, 1, axis is not None, order_z=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [1, 2, 7])
@pytest.mark.parametrize(("source", "target", "axis"), GRIDS)
def test_labels_equal_nnunets(
    backend: ops.Backend, heads: int, source: tuple[int, ...], target: tuple[int, ...], axis: int | None
) -> None:
    logits, weights = made_logits(heads, source)
    labels = ops.logits_to_labels(logits, target, weights=weights, nearest_axis=axis, backend=backend)
    assert labels.dtype == torch.uint8
    assert np.array_equal(labels.numpy(), stock(logits, weights, target, axis).argmax(0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("source", "target", "axis"), GRIDS)
def test_regions_equal_nnunets(
    backend: ops.Backend, source: tuple[int, ...], target: tuple[int, ...], axis: int | None
) -> None:
    logits, weights = made_logits(3, source)
    values = (300, 2, 1)
    chances = torch.sigmoid(torch.from_numpy(stock(logits, weights, target, axis)).float()).numpy()
    expected = np.zeros(target, np.uint16)
    for chance, value in zip(chances, values, strict=True):
        expected[chance > 0.5] = value
    labels = ops.logits_to_labels(
        logits, target, weights=weights, nearest_axis=axis, region_values=values, backend=backend
    )
    assert labels.dtype == torch.uint16
    assert np.array_equal(labels.numpy(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_half_is_decided_as_numpy_decides(backend: ops.Backend) -> None:
    """All finite halves, subnormal ones too, against their neighbours; and halfway between neighbours."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[torch.isfinite(halves)].sort().values
    first, second = halves[:-1].reshape(1, 1, -1), halves[1:].reshape(1, 1, -1)
    logits = torch.stack([first.repeat(1, 2, 1), torch.cat([first, second], 1)])
    rows = resample_data_or_seg(logits.numpy(), np.array((1, 3, halves.numel() - 1)), False, None, 1, False)
    labels = ops.logits_to_labels(logits, rows.shape[1:], backend=backend)
    assert np.array_equal(labels.numpy(), rows.argmax(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_read_and_written_in_place(backend: ops.Backend) -> None:
    whole, weights = made_logits(3, (10, 12, 14))
    part = (slice(2, 9), slice(1, 11), slice(3, 13))
    target = (9, 11, 12)
    canvas = torch.full((14, 13, 12), 9, dtype=torch.uint8)
    out = canvas.permute(2, 1, 0)[2:11, 1:12, 1:13]
    given = ops.logits_to_labels(whole[(slice(None), *part)], target, weights=weights[part], out=out, backend=backend)
    assert given is out
    apart = ops.logits_to_labels(whole[(slice(None), *part)].contiguous(), target, weights=weights[part].contiguous())
    assert torch.equal(out, apart)
    assert int((canvas == 9).sum()) == canvas.numel() - out.numel()


def test_threads_do_not_change_labels() -> None:
    logits, weights = made_logits(4, (11, 40, 13))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.logits_to_labels(logits, (17, 70, 20), weights=weights))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 6e4])
def test_an_overflow_is_an_error(backend: ops.Backend, value: float) -> None:
    logits, weights = made_logits(2, (5, 6, 7))
    logits[1, 4, 3, 2] = value
    weights[4, 3, 2] = 0.5
    with pytest.raises(FloatingPointError, match="finite"):
        ops.logits_to_labels(logits, (6, 7, 8), weights=weights, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4, 5)}, "float16"),
        ({"logits": torch.zeros(2, 3, 4, dtype=torch.half)}, r"\[K, D, H, W\]"),
        ({"logits": torch.zeros(2, 3, 4, 10, dtype=torch.half)[..., ::2]}, "gaps"),
        ({"logits": torch.zeros(0, 3, 4, 5, dtype=torch.half)}, "hold values"),
        ({"weights": torch.ones(3, 4, 6, dtype=torch.half)}, "weights"),
        ({"shape": (3, 0, 2)}, "positive"),
        ({"region_values": (1,)}, "one a region"),
        ({"region_values": (1, 70000)}, "65535"),
        ({"out": torch.zeros(3, 4, 5, dtype=torch.int64)}, "uint8"),
        ({"out": torch.zeros(3, 4, 4, dtype=torch.uint8)}, "out"),
        ({"region_values": (1, 300), "out": torch.zeros(3, 4, 5, dtype=torch.uint8)}, "up to 300"),
        ({"backend": "gpu"}, "backend"),
    ],
)
def test_arguments_are_checked(change: dict[str, object], message: str) -> None:
    arguments = {"logits": torch.zeros(2, 3, 4, 5, dtype=torch.half), "shape": (3, 4, 5)} | change
    logits, shape = arguments.pop("logits"), arguments.pop("shape")
    with pytest.raises((TypeError, ValueError), match=message):
        ops.logits_to_labels(logits, shape, **arguments)
