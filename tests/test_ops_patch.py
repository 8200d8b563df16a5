"""`warp_patch`: the same bits on every engine, nnU-Net's patches, SciPy's values in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import (
    SpatialTransform,
    create_affine_matrix_2d,
    create_affine_matrix_3d,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops_engines import Engine, engine, one_thread, over_engines  # noqa: F401 (fixtures)
from scipy import ndimage
from stock_transforms import stock_warp
from torch import Tensor

from fedcmt import ops

LABELS = (-1, 0, 1, 2, 5, 300)
# (channels, label maps, source, patch)
SHAPES = [
    (1, 1, (20, 22, 24), (16, 17, 18)),
    (4, 1, (9, 30, 31), (9, 20, 33)),
    (2, 2, (13, 11, 40), (7, 9, 35)),
    (5, 1, (1, 12, 13), (1, 9, 16)),
    (1, 0, (7, 1, 5), (4, 3, 1)),
    (0, 1, (6, 7, 1), (5, 5, 5)),
]


def made_case(channels: int, maps: int, shape: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normal noise, and labels in blocks of three voxels, so that up to eight meet in a point."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(channels, *shape, generator=generator)
    blocks = torch.randint(len(LABELS), (maps, *(n // 3 + 1 for n in shape)), generator=generator)
    for axis in (1, 2, 3):
        blocks = blocks.repeat_interleave(3, axis)
    labels = torch.tensor(LABELS, dtype=torch.int16)[blocks[:, : shape[0], : shape[1], : shape[2]]]
    return image, labels.contiguous()


def turned(seed: int, scale: float = 1.0) -> np.ndarray:
    angles = np.random.default_rng(seed).uniform(-np.pi / 6, np.pi / 6, 3)
    return create_affine_matrix_3d(angles, [scale] * 3)


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert got[0].dtype == torch.float32
    assert got[1].dtype == torch.int16
    assert torch.equal(got[0].cpu(), expected[0].cpu())
    assert torch.equal(got[1].cpu(), expected[1].cpu())


@over_engines
@pytest.mark.parametrize(("channels", "maps", "source", "shape"), SHAPES)
def test_every_engine_gives_the_same_bits(
    engine: Engine,  # noqa: F811
    channels: int,
    maps: int,
    source: tuple[int, ...],
    shape: tuple[int, ...],
) -> None:
    image, labels = made_case(channels, maps, source)
    for seed, scale in ((1, 0.7), (2, 1.0), (3, 1.4)):
        affine = ops.patch_affine(turned(seed, scale), source, shape, [seed - 1])
        got = ops.warp_patch(image.to(engine.device), labels.to(engine.device), affine, shape, backend=engine.backend)
        assert_same(got, ops.warp_patch(image, labels, affine, shape, backend="reference"))


SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 40))


@over_engines
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    channels=st.integers(1, 5),
    source=SIZES,
    shape=SIZES,
    scale=st.floats(0.3, 3),
    shift=st.tuples(*[st.floats(-9, 9)] * 3),
    mirrored=st.sets(st.integers(0, 2)),
    seed=st.integers(0, 2**20),
)
def test_any_shape_and_place(
    engine: Engine,  # noqa: F811
    channels: int,
    source: tuple[int, ...],
    shape: tuple[int, ...],
    scale: float,
    shift: tuple[float, ...],
    mirrored: set[int],
    seed: int,
) -> None:
    image, labels = made_case(channels, 1, source, seed)
    affine = ops.patch_affine(turned(seed, scale), source, shape, sorted(mirrored))
    affine[:, 3] += shift
    got = ops.warp_patch(image.to(engine.device), labels.to(engine.device), affine, shape, backend=engine.backend)
    assert_same(got, ops.warp_patch(image, labels, affine, shape, backend="reference"))


@pytest.mark.parametrize("scale", [0.7, 1.0, 1.4])
@pytest.mark.parametrize(("source", "shape"), [((40, 41, 42), (32, 32, 32)), ((14, 50, 51), (10, 33, 48))])
def test_warped_patches_are_nnunets(scale: float, source: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Images to 1e-4 of values of 4 and steeper than any scan; labels but for ties that its float32 grid moves."""
    for seed in range(4):
        image, labels = made_case(4, 1, source, seed)
        matrix = turned(seed, scale)
        got = ops.warp_patch(image, labels, ops.patch_affine(matrix, source, shape), shape)
        expected = stock_warp(image, labels, matrix, shape)
        torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-4)
        assert (got[1] != expected[1]).float().mean() <= 1e-4


def test_slices_are_warped_as_nnunet_warps_anisotropic_patches() -> None:
    """It makes 2D images of the slices, all with the same matrix."""
    source, shape = (5, 40, 44), (5, 32, 30)
    image, labels = made_case(2, 1, source)
    flat = create_affine_matrix_2d(0.7, [1.2, 1.2])
    matrix = np.eye(3)
    matrix[1:, 1:] = flat
    got = ops.warp_patch(image, labels, ops.patch_affine(matrix, source, shape), shape)
    stock_image, stock_labels = stock_warp(image.reshape(10, 40, 44), labels.reshape(5, 40, 44), flat, shape[1:])
    torch.testing.assert_close(got[0], stock_image.reshape(2, *shape), rtol=0, atol=1e-4)
    assert (got[1] != stock_labels.reshape(1, *shape)).float().mean() <= 1e-4


@pytest.mark.parametrize("fill", [-1, 0, 7])
@pytest.mark.parametrize("shift", [(0.5, 0.0, 0.0), (0.5, 0.5, 0.5), (0.25, 0.5, 0.75), (-7.5, 3.5, 0.5)])
def test_ties_are_settled_as_nnunet_settles_them(shift: tuple[float, ...], fill: int) -> None:
    """Places at halves of voxels are exact in float32 for sizes of powers of two, so every label has to be equal."""
    source = (16, 32, 16)
    image, labels = made_case(1, 1, source, 5)
    affine = ops.patch_affine(None, source, source)
    affine[:, 3] += shift
    got = ops.warp_patch(image, labels, affine, source, label_fill=fill)
    expected = stock_shifted(image, labels, shift, fill)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def stock_shifted(image: Tensor, labels: Tensor, shift: Sequence[float], fill: int) -> tuple[Tensor, Tensor]:
    """nnU-Net's transform with a grid that is moved by fractions of voxels."""
    shape = image.shape[1:]
    axes = [(2 * (torch.arange(n) + s) + 1) / n - 1 for n, s in zip(shape, shift, strict=True)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1)
    transform = SpatialTransform(shape, 0, random_crop=False, border_mode_seg="constant", padding_value_seg=fill)
    return transform._apply_to_image(image, grid=grid), transform._apply_to_segmentation(labels, grid=grid)


@over_engines
@pytest.mark.parametrize("mirrored", [(), (0,), (2,), (0, 1, 2)])
@pytest.mark.parametrize(
    ("source", "shape"), [((12, 13, 40), (9, 8, 31)), ((5, 6, 7), (9, 8, 16)), ((4, 5, 6), (4, 5, 6))]
)
def test_without_a_matrix_patches_are_cut_out(
    engine: Engine,  # noqa: F811
    mirrored: tuple[int, ...],
    source: tuple[int, ...],
    shape: tuple[int, ...],
) -> None:
    image, labels = made_case(3, 1, source)
    affine = ops.patch_affine(None, source, shape, mirrored)
    got = ops.warp_patch(image.to(engine.device), labels.to(engine.device), affine, shape, backend=engine.backend)
    expected = stock_warp(image, labels, None, shape)
    assert_same(got, (expected[0].flip([a + 1 for a in mirrored]), expected[1].flip([a + 1 for a in mirrored])))


def test_values_are_those_of_float64() -> None:
    source, shape = (30, 31, 32), (24, 25, 26)
    image, labels = made_case(1, 1, source)
    affine = ops.patch_affine(turned(4, 1.1), source, shape)
    got = ops.warp_patch(image, labels, affine, shape)[0][0].double().numpy()
    exact = ndimage.affine_transform(
        image[0].double().numpy(), affine[:, :3], affine[:, 3], shape, order=1, mode="grid-constant"
    )
    assert np.abs(got - exact).max() <= 2e-5  # coordinates to 2e-6 of a voxel, values up to 5


def test_threads_do_not_change_a_bit() -> None:
    image, labels = made_case(2, 1, (20, 50, 40))
    affine = ops.patch_affine(turned(3), (20, 50, 40), (16, 40, 33))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)  # one_thread restores it
        results.append(ops.warp_patch(image, labels, affine, (16, 40, 33)))
    for result in results[1:]:
        assert_same(result, results[0])


@over_engines
def test_views_are_read_and_results_written_in_place(engine: Engine) -> None:  # noqa: F811
    image, labels = (maps.to(engine.device) for maps in made_case(2, 1, (12, 14, 20)))
    part = (slice(None), slice(1, 11), slice(2, 13), slice(3, 19))
    shape = (8, 9, 17)
    affine = ops.patch_affine(turned(2), (10, 11, 16), shape)
    batch = torch.full((3, 2, *shape), 9.0, device=engine.device)
    target = torch.full((3, 1, *shape), 9, dtype=torch.int16, device=engine.device)
    out = ops.warp_patch(image[part], labels[part], affine, shape, out=(batch[1], target[1]), backend=engine.backend)
    assert (out[0].data_ptr(), out[1].data_ptr()) == (batch[1].data_ptr(), target[1].data_ptr())
    assert_same(
        (batch[1], target[1]), ops.warp_patch(image[part].contiguous(), labels[part].contiguous(), affine, shape)
    )
    assert bool((batch[::2] == 9).all())
    assert bool((target[::2] == 9).all())


@over_engines
def test_far_away_everything_is_fill(engine: Engine) -> None:  # noqa: F811
    image, labels = (maps.to(engine.device) for maps in made_case(1, 1, (5, 6, 7)))
    for scale, shift in ((1.5, 1e6), (1e6, -7e5), (0.5, 30.0)):
        affine = np.concatenate([np.eye(3) * scale, np.full((3, 1), shift)], axis=1)
        got = ops.warp_patch(image, labels, affine, (3, 4, 20), label_fill=-5, backend=engine.backend)
        assert float(got[0].abs().max()) == 0
        assert got[1].unique().tolist() == [-5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(1, 4, 5, 6, dtype=torch.double)}, "image.*float32"),
        ({"image": torch.zeros(4, 5, 6)}, r"\[K, D, H, W\]"),
        ({"image": torch.zeros(1, 4, 5, 12)[..., ::2]}, "gaps"),
        ({"image": torch.zeros(1, 0, 5, 6), "labels": torch.zeros(1, 0, 5, 6, dtype=torch.int16)}, "hold voxels"),
        ({"image": torch.zeros(1, 1, 1, 1).expand(1, 2**11, 2**11, 1)}, "labels"),
        ({"labels": torch.zeros(1, 4, 5, 6)}, "labels.*int16"),
        ({"labels": torch.zeros(1, 4, 5, 7, dtype=torch.int16)}, r"\[L, 4, 5, 6\]"),
        ({"affine": np.eye(3)}, r"\[3, 4\]"),
        ({"affine": np.full((3, 4), np.nan)}, "finite"),
        ({"affine": np.full((3, 4), 2e6)}, "2\\^20"),
        ({"shape": (3, 0, 2)}, "positive"),
        ({"label_fill": 2**15}, "int16"),
        ({"out": (torch.zeros(1, 2, 3, 5), torch.zeros(1, 2, 3, 4, dtype=torch.int16))}, "out"),
        ({"out": (torch.zeros(1, 2, 4, 3).mT, torch.zeros(1, 2, 3, 4, dtype=torch.int16))}, "gaps"),
        ({"backend": "gpu"}, "backend"),
    ],
)
def test_arguments_are_checked(change: dict[str, object], message: str) -> None:
    arguments = {
        "image": torch.zeros(1, 4, 5, 6),
        "labels": torch.zeros(1, 4, 5, 6, dtype=torch.int16),
        "affine": np.eye(3, 4),
        "shape": (2, 3, 4),
    } | change
    positional = [arguments.pop(name) for name in ("image", "labels", "affine", "shape")]
    with pytest.raises((TypeError, ValueError), match=message):
        ops.warp_patch(*positional, **arguments)
