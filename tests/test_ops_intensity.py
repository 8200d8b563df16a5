"""`change_intensities` against float64, batchgeneratorsv2 and the published numbers of Philox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops_engines import Engine, engine, one_thread, over_engines  # noqa: F401 (fixtures)
from scipy import stats
from stock_transforms import stock_blur, stock_brightness, stock_contrast, stock_gamma, stock_low_resolution
from torch import Tensor

from fedcmt import ops
from fedcmt.ops import intensity_reference, reference

SHAPES = [(1, 18, 20, 23), (4, 9, 17, 16), (2, 1, 30, 33), (3, 12, 1, 5), (1, 40, 41, 42)]
TOLERANCE = 4e-5  # of values up to 5; the most where powers of values near the least one are taken


def made_image(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Normal noise of another scale and mean in each channel."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.arange(shape[0]).reshape(-1, 1, 1, 1)
    return torch.randn(shape, generator=generator) * (0.5 + channels) + channels


def random_changes(seed: int, shape: tuple[int, ...], share: float = 0.6) -> dict[str, Any]:
    """Each change with the given probability; for some channels only where that is possible."""
    rng = np.random.default_rng(seed)
    channels, size = shape[0], shape[1:]

    def numbers(low: float, high: float) -> list[float]:
        return rng.uniform(low, high, channels).tolist() if rng.random() < share else []

    def some(make: Callable[[], Any]) -> list[Any]:
        return [make() if rng.random() < 0.7 else None for _ in range(channels)] if rng.random() < share else []

    return {
        "noise": float(rng.uniform(0, 0.1)) if rng.random() < share else 0.0,
        "noise_seed": int(rng.integers(2**63)),
        "blur": some(lambda: rng.uniform(0.5, 1, 3).tolist()),
        "brightness": numbers(0.75, 1.25),
        "contrast": numbers(0.75, 1.25),
        "low_resolution": some(lambda: [max(1, round(n * rng.uniform(0.5, 1))) for n in size]),
        "gamma_inverted": numbers(0.7, 1.5),
        "gamma": numbers(0.7, 1.5),
        "mirrored_axes": [axis for axis in range(3) if rng.random() < 0.5],
    }


def changed(image: Tensor, engine: Engine, **changes: Any) -> Tensor:  # noqa: F811
    result = image.clone().to(engine.device)
    ops.change_intensities(result, backend=engine.backend, **changes)
    return result.cpu()


def exact(image: Tensor, **changes: Any) -> Tensor:
    result = image.double()
    reference.change_intensities(result, **changes)
    return result


@over_engines
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_engines_agree_with_float64(engine: Engine, shape: tuple[int, ...]) -> None:  # noqa: F811
    image = made_image(shape)
    for seed in range(3):
        changes = random_changes(seed, shape)
        scale = float(image.abs().max())
        got = changed(image, engine, **changes).double()
        torch.testing.assert_close(got, exact(image, **changes), rtol=0, atol=TOLERANCE * scale)


@over_engines
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(2, 40)),
    seed=st.integers(0, 2**20),
)
def test_any_shape(engine: Engine, shape: tuple[int, ...], seed: int) -> None:  # noqa: F811
    image = made_image(shape, seed)
    changes = random_changes(seed, shape)
    got = changed(image, engine, **changes).double()
    torch.testing.assert_close(got, exact(image, **changes), rtol=0, atol=2e-4 * float(image.abs().max()))


@over_engines
def test_each_change_is_batchgeneratorsv2s(engine: Engine) -> None:  # noqa: F811
    image = made_image((3, 16, 18, 21))
    sigmas = [(0.5, 0.74, 1.0), None, (0.6, 0.58, 0.92)]
    sizes = [(8, 9, 13), (16, 10, 11), None]
    numbers = [0.8, 1.2, 1.4]
    pairs = {
        "blur": ({"blur": sigmas}, stock_blur(image, sigmas)),
        "brightness": ({"brightness": numbers}, stock_brightness(image, numbers)),
        "contrast": ({"contrast": numbers}, stock_contrast(image, numbers)),
        "low resolution": ({"low_resolution": sizes}, stock_low_resolution(image, sizes)),
        "gamma inverted": ({"gamma_inverted": numbers}, stock_gamma(image, numbers, inverted=True)),
        "gamma": ({"gamma": numbers}, stock_gamma(image, numbers, inverted=False)),
    }
    for name, (changes, expected) in pairs.items():
        error = (changed(image, engine, **changes) - expected).abs().max()
        assert error <= TOLERANCE, f"{name}: {error}"


@over_engines
def test_mirrored_images_give_mirrored_results(engine: Engine) -> None:  # noqa: F811
    """With sizes halved exactly, the nearest voxel lies on a tie, which a mirror image would settle the other way."""
    image = made_image((2, 8, 10, 12))
    changes = {"low_resolution": [(4, 5, 6), (8, 5, 7)], "contrast": [0.8, 1.2], "gamma": [0.9, 1.3]}
    expected = changed(image, engine, **changes)
    for axes in ([0], [2], [0, 1, 2]):
        dims = [axis + 1 for axis in axes]
        got = changed(image.flip(dims).contiguous(), engine, mirrored_axes=axes, **changes).flip(dims)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert not torch.equal(changed(image.flip(1).contiguous(), engine, **changes).flip(1), expected)


def test_philox_has_its_published_numbers() -> None:
    """Random123, kat_vectors: philox4x32 10, counter and key zero."""
    words = intensity_reference._philox(np.zeros(1, np.uint64), 0, 0)
    assert [int(word[0]) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@over_engines
def test_noise_is_a_function_of_seed_channel_and_voxel(engine: Engine) -> None:  # noqa: F811
    wide = changed(torch.zeros(2, 3, 5, 7), engine, noise=1.0, noise_seed=2**64 - 1)
    flat = changed(torch.zeros(2, 1, 1, 105), engine, noise=1.0, noise_seed=2**64 - 1)
    assert torch.equal(wide.flatten(1), flat.flatten(1))
    assert float((wide[0] - wide[1]).abs().min()) > 0
    assert float((changed(torch.zeros(1, 3, 5, 7), engine, noise=1.0, noise_seed=1)[0] - wide[0]).abs().min()) > 0


def test_noise_is_normal() -> None:
    """400,000 numbers against the distribution (Kolmogorov-Smirnov), and pairs for correlation."""
    image = torch.zeros(4, 40, 50, 50)
    ops.change_intensities(image, noise=1.0, noise_seed=7)
    numbers = image.flatten().double().numpy()
    assert stats.kstest(numbers, "norm").pvalue > 1e-3
    for lag in (1, 16, 32, 64):
        assert abs(np.corrcoef(numbers[:-lag], numbers[lag:])[0, 1]) < 4 / np.sqrt(numbers.size)


def test_nothing_asked_changes_nothing() -> None:
    image = made_image((2, 5, 6, 7))
    same = image.clone()
    ops.change_intensities(same)
    ops.change_intensities(same, blur=[None, None], low_resolution=[None, None], brightness=[1, 1], contrast=[1, 1])
    assert torch.equal(same, image)


@over_engines
def test_constant_channels_stay_finite(engine: Engine) -> None:  # noqa: F811
    """Their range is 0: gamma leaves them as they are."""
    image = torch.full((1, 6, 7, 8), 3.0)
    got = changed(image, engine, contrast=[1.2], gamma_inverted=[0.8], gamma=[1.4])
    torch.testing.assert_close(got, image)


def test_threads_do_not_change_a_bit() -> None:
    shape = (2, 20, 50, 60)
    image, results = made_image(shape), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)  # one_thread restores it
        results.append(changed(image, Engine("cpu", "native"), **random_changes(5, shape, share=1)))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(2, 4, 5, 6).double()}, "float32"),
        ({"image": torch.zeros(4, 5, 6)}, r"\[C, D, H, W\]"),
        ({"image": torch.zeros(2, 4, 6, 5).mT}, "gaps"),
        ({"image": torch.zeros(2, 4, 0, 5)}, "hold"),
        ({"noise": -1.0}, "noise"),
        ({"noise": float("nan")}, "noise"),
        ({"noise_seed": -1}, "noise_seed"),
        ({"blur": [(1, 1, 1)]}, "blur.*hold 2"),
        ({"blur": [(1, 1), None]}, "blur.*three"),
        ({"blur": [(1, 1, 9), None]}, "blur.*8"),
        ({"brightness": [1.0]}, "brightness.*hold 2"),
        ({"contrast": [1.0, float("inf")]}, "contrast.*finite"),
        ({"low_resolution": [(5, 5, 6), None]}, "low_resolution"),
        ({"low_resolution": [(0, 5, 6), None]}, "low_resolution"),
        ({"gamma": [0.0, 1.0]}, "gamma.*above 0"),
        ({"gamma_inverted": [1.0]}, "gamma_inverted"),
        ({"mirrored_axes": [3]}, "mirrored_axes"),
        ({"backend": "gpu"}, "backend"),
    ],
)
def test_arguments_are_checked(change: dict[str, Any], message: str) -> None:
    arguments = {"image": torch.zeros(2, 4, 5, 6)} | change
    image = arguments.pop("image")
    with pytest.raises((TypeError, ValueError), match=message):
        ops.change_intensities(image, **arguments)
