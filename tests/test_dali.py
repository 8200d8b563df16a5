"""The DALI backend on a CPU: nnU-Net's patches, the torch backend's batches, and what happens after errors.

Tolerances: the table in docs/data.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from augmentation import case, of_nnunet
from test_augmentation_parity import SHAPES, draws_of, rules_of

from fedcmt.data.geometry import Reading, reading
from fedcmt.data.intensity import standard_noise
from fedcmt.data.readahead import ReadAhead
from fedcmt.data.sampling import Draws, PatchRules
from fedcmt.data.source import Case
from fedcmt.data.targets import TargetRules
from fedcmt.data.torch_pipeline import Batch, PatchSource, TorchMaker, augmented
from fedcmt.errors import InputError, RunError

dali = pytest.importorskip("fedcmt.data.dali")
CPU = torch.device("cpu")

# Largest difference of an intensity from nnU-Net's, as a share of the image's standard deviation.
TOLERANCES = {
    "crop": 0.0,
    "rotation": 5e-5,
    "scaling": 5e-5,
    "beyond the region": 2e-4,
    "noise": 1e-6,
    "blur": 2e-6,
    "brightness": 0.0,
    "contrast": 2e-6,
    "low resolution": 1e-5,
    "gamma inverted": 5e-6,
    "gamma": 5e-6,
    "mirror": 0.0,
    "all": 2e-4,
}


def run(transforms: Sequence[str], shape: str, channels: int) -> list[tuple[torch.Tensor, torch.Tensor, Any]]:
    """Image and labels `[D, H, W]` of each transform, all in one batch, and nnU-Net's."""
    rules = replace(rules_of(shape, channels), batch_size=len(transforms))
    wanted = TargetRules((rules.patch_size,), False, None, ())
    samples, expected = [], []
    for transform in transforms:
        draws = draws_of(transform, shape, channels)
        image, marks = case(channels, rules.initial_size, 3)
        part = reading(draws, rules)
        box = tuple(slice(low, low + n) for low, n in zip(part.corner, part.size, strict=True))
        read = image[(slice(None), *box)].copy(), marks[box].copy()
        samples.append(dali.sample_inputs(*read, part, draws, rules, wanted))
        noise = standard_noise(channels, rules.patch_size, draws.noise_seed)
        expected.append(of_nnunet(image, marks, draws, rules, noise))
    pipeline = dali.build(rules, wanted, CPU)
    outputs = pipeline.run(**{name: [sample[name] for sample in samples] for name in samples[0]})
    images, labels = (torch.from_dlpack(output.as_tensor()) for output in outputs)
    return list(zip(images[..., 0], labels[:, 0], expected, strict=True))


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_patches_are_nnunets(shape: str, channels: int) -> None:
    for transform, (image, labels, (theirs, their_labels)) in zip(
        TOLERANCES, run(list(TOLERANCES), shape, channels), strict=True
    ):
        error = (image - theirs).abs().max() / theirs.std()
        assert error <= TOLERANCES[transform], f"{transform}: {error}"
        wrong = (labels != their_labels.clamp_min(0)).float().mean()
        assert wrong <= (2e-4 if draws_of(transform, shape, channels).warped else 0), f"{transform}: {wrong}"


class MadeCases:
    """A reader of cases that are made up; `fail` is called before each is read."""

    def __init__(self, rules: PatchRules, fail: Callable[[str], None] = lambda name: None) -> None:
        shape = tuple(2 * n for n in rules.initial_size)
        self._arrays = {name: case(rules.channels, shape, 4, seed) for seed, name in enumerate(("one", "two"))}
        self._fail = fail

    def case(self, name: str) -> Case:
        image, labels = self._arrays[name]
        voxels = {label: np.argwhere(labels == label).astype(np.int32) for label in (1, 2, 3)}
        return Case(image, labels[None], voxels, ())

    def read(self, name: str, part: Reading) -> tuple[np.ndarray, np.ndarray]:
        self._fail(name)
        image, labels = self._arrays[name]
        size, corner = np.array(part.size), np.array(part.corner)
        padded = np.pad(image, ((0, 0), *zip(size, size, strict=True)))
        marks = np.pad(labels, tuple(zip(size, size, strict=True)), constant_values=-1)
        box = tuple(slice(low, low + n) for low, n in zip(corner + size, size, strict=True))
        return padded[(slice(None), *box)].copy(), marks[box].copy()


def client(shape: str, *, regions: bool = False, masked: tuple[int, ...] = ()) -> PatchSource:
    rules = replace(rules_of(shape, 2), rotation=0.5)
    half = tuple(max(1, n // 2) for n in rules.patch_size)
    wanted = TargetRules((rules.patch_size, half), True, ((1, 2), (2, 3), 3) if regions else None, masked)
    return PatchSource("site", None, ("one", "two"), rules, wanted)  # type: ignore[arg-type]


def generator(index: int) -> np.random.Generator:
    return np.random.default_rng((3, index))


def makers(source: PatchSource, fail: Callable[[str], None] = lambda name: None) -> tuple[Any, Any]:
    cases: Any = MadeCases(source.rules, fail)
    return dali.DaliMaker(source, cases, generator, CPU, 2), TorchMaker(source, cases, generator, False)


@pytest.mark.parametrize(("regions", "masked"), [(False, ()), (True, (1,))])
@pytest.mark.parametrize("shape", SHAPES)
def test_batches_are_the_torch_backends(shape: str, regions: bool, masked: tuple[int, ...]) -> None:
    """Targets in every voxel, images to the tolerance of all changes together."""
    ours, theirs = makers(client(shape, regions=regions, masked=masked))
    for index in (0, 7, 1, 2, 3, 4):
        got, expected = ours.make(index), theirs.make(index)
        assert got.cases == expected.cases
        assert got.data.shape == expected.data.shape
        for one, other in zip(got.target, expected.target, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        error = (got.data - expected.data).abs().max() / expected.data.std()
        assert error <= 2e-4, f"batch {index}: {error}"


def test_a_batch_depends_on_its_index_alone() -> None:
    first = makers(client("isotropic"))[0]
    batches = [first.make(index) for index in (0, 1, 2)]
    again = makers(client("isotropic"))[0].make(2)
    assert torch.equal(batches[2].data, again.data)
    assert torch.equal(batches[2].target[0], again.target[0])


def test_batches_lie_in_dalis_memory_and_stay_as_they_are() -> None:
    """Nothing is copied, and a batch in use is not written over by later ones."""
    maker = makers(client("isotropic"))[0]
    maker.make(0)
    buffers: list[Any] = []
    hand_over = maker._lent.hand_over
    maker._lent.hand_over = lambda index, given: (buffers.extend(given), hand_over(index, given))[1]
    batch = maker.make(1)
    assert [t.data_ptr() for t in (batch.data, *batch.target)] == [buffer.data_ptr() for buffer in buffers]
    kept = batch.data.clone()
    del buffers[:]
    for index in range(2, 7):
        maker.make(index)
    assert torch.equal(batch.data, kept)


def test_an_error_of_the_source_is_passed_on_and_the_next_batch_is_as_it_would_have_been() -> None:
    broken = {"now": True}

    def fail(name: str) -> None:
        if broken["now"]:
            raise InputError("the image holds NaN or Inf", client="site", case=name)

    maker = makers(client("isotropic"), fail)[0]
    with pytest.raises(InputError, match="NaN") as caught:
        maker.make(3)
    assert "site" in str(caught.value)
    assert "one" in str(caught.value) or "two" in str(caught.value)
    broken["now"] = False
    assert torch.equal(maker.make(3).data, makers(client("isotropic"))[0].make(3).data)


def test_a_hanging_source_is_noticed() -> None:
    """Its thread is replaced, with a pipeline of its own; order and content stay."""
    source, stuck, notes = client("isotropic"), threading.Event(), []
    first = iter([True])

    def hang_once(name: str) -> None:
        if next(first, False):
            stuck.wait()

    reading_ahead: ReadAhead[Batch] = ReadAhead(
        lambda: makers(source, hang_once)[0], first=0, count=3, threads=1, ahead=1, timeout=3.0, note=notes.append
    )
    expected = makers(source)[0]
    with reading_ahead as batches:
        for index, batch in enumerate(batches):
            assert torch.equal(batch.data, expected.make(index).data)
        stuck.set()
    assert reading_ahead.replaced == 1
    assert len(notes) == 1
    assert "client 'site', case" in notes[0]


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_a_pipeline_that_failed_is_rebuilt(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    maker = makers(client("isotropic"))[0]
    expected = maker.make(0)
    dead = maker._pipeline

    def fails(**inputs: object) -> None:
        raise error("CUDA allocation failed")

    monkeypatch.setattr(dead, "run", fails)
    got = maker.make(0)
    assert maker._pipeline is not dead
    assert torch.equal(got.data, expected.data)


def test_a_batch_that_fails_twice_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI itself refuses it: an image with a channel too many."""
    maker = makers(client("isotropic"))[0]
    original = dali.sample_inputs

    def wrong(*arguments: Any) -> dict[str, np.ndarray]:
        inputs = original(*arguments)
        inputs["brightness"] = np.ones((5, 1, 1, 1), np.float32)
        return inputs

    monkeypatch.setattr(dali, "sample_inputs", wrong)
    with pytest.raises(RunError, match="client 'site', case"):
        maker.make(0)
    monkeypatch.setattr(dali, "sample_inputs", original)
    assert torch.isfinite(maker.make(0).data).all()


def test_the_neutral_inputs_change_nothing() -> None:
    rules = rules_of("isotropic", 2)
    draws = Draws(0, "case", (0, 0, 0), False)
    image, marks = case(2, rules.patch_size, 3)
    part = Reading((0, 0, 0), rules.patch_size)
    wanted = TargetRules((rules.patch_size,), False, None, ())
    inputs = dali.sample_inputs(image.copy(), marks, part, draws, rules, wanted)
    outputs = dali.build(replace(rules, batch_size=1), wanted, CPU).run(**{k: [v] for k, v in inputs.items()})
    assert np.array_equal(torch.from_dlpack(outputs[0].as_tensor())[0, ..., 0].numpy(), image)
    assert np.array_equal(augmented(image.copy(), marks, part, draws, rules)[0], image)
