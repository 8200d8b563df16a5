"""The DALI backend: images augmented by one graph, on a GPU or, from the same text, on a CPU.

The draws, the reading, the label maps and the noise field are those of the torch backend: labels are warped by
:func:`fedcmt.ops.warp_patch` where they are read and equal the torch backend's in every voxel. The graph changes
images alone, and takes targets and masks along to where they are used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, math, pipeline_def, types
from torch import Tensor

from fedcmt import ops
from fedcmt.data.geometry import Reading, reading
from fedcmt.data.intensity import standard_noise
from fedcmt.data.sampling import Draws, PatchRules, Size, draw_patch
from fedcmt.data.source import Case, CaseReader, Image, Labels
from fedcmt.data.targets import TargetRules, nearest_exact, targets
from fedcmt.data.torch_pipeline import Batch, PatchSource
from fedcmt.errors import RunError

_LEAST_WIDTH = 1e-7  # of a range or a deviation that is divided by
# A sample's channels are frames of one channel each, [C, D, H, W, 1]: warping wants one last, and no operator has to
# reshape, which DALI 2.4 refuses on GPUs where the number of dimensions changes.
_LAYOUT = "FDHWC"
_SPATIAL = [1, 2, 3]
_Inputs = dict[str, np.ndarray]


class DaliMaker:
    """Makes a round's batches; a :class:`fedcmt.data.readahead.Maker`.

    Args:
        source: Whose patches.
        reader: Of the client's cases, used by this thread alone.
        generator: Gives the generator of a sample of this round, by its index.
        device: Where the graph runs and the batches are.
        ahead: Batches that may be asked for beyond the one in use.
    """

    def __init__(
        self,
        source: PatchSource,
        reader: CaseReader,
        generator: Callable[[int], np.random.Generator],
        device: torch.device,
        ahead: int,
    ) -> None:
        self._source, self._reader, self._generator, self._device = source, reader, generator, device
        self._case: str | None = None
        self._pipeline: Pipeline | None = None
        self._lent = _Lent(device, ahead)

    def doing(self) -> str:
        """Client and case."""
        return f"client '{self._source.client}', case '{self._case}'"

    def make(self, index: int) -> Batch:
        """The batch of an index: samples ``index * batch_size`` and following.

        Raises:
            InputError: A case cannot be read.
            RunError: DALI fails twice at the same batch.
        """
        rules = self._source.rules
        samples, cases = [], []
        for place in range(rules.batch_size):
            sample = index * rules.batch_size + place
            draws = draw_patch(self._generator(sample), sample, rules, self._source.cases, self._facts)
            part = reading(draws, rules)
            image, labels = self._reader.read(draws.case, part)
            samples.append(sample_inputs(image, labels, part, draws, rules, self._source.targets))
            cases.append(draws.case)
        data, *target = self._run(index, {name: [sample[name] for sample in samples] for name in samples[0]})
        data = data[..., 0]
        if rules.slices:
            data, target = data[:, :, 0], [one[:, :, 0] for one in target]
        return Batch(data, target if self._source.targets.several else target[0], tuple(cases))

    def _facts(self, case: str) -> Case:
        self._case = case
        return self._reader.case(case)

    def _run(self, index: int, inputs: Mapping[str, list[np.ndarray]]) -> list[Tensor]:
        """Image and targets of a batch. After an error a pipeline is of no more use: a new one tries once more."""
        for attempt in range(2):
            if self._pipeline is None:
                self._pipeline = build(self._source.rules, self._source.targets, self._device)
            try:
                outputs = self._pipeline.run(**inputs)
                return self._lent.hand_over(index, [output.as_tensor() for output in outputs])
            except (RuntimeError, ValueError, TypeError, IndexError) as error:  # DALI raises all of these
                self._pipeline = None
                if attempt == 1:
                    raise RunError(f"{self.doing()}: DALI failed at the batch with it: {error}") from error
        raise AssertionError("unreachable")


class _Lent:
    """DALI's output buffers that torch reads in place.

    DALI may use a buffer again as soon as nobody refers to it, but the GPU may then still have work to do on it. So
    buffers are kept until all work that was submitted when they were no longer in use has been done.
    """

    def __init__(self, device: torch.device, ahead: int) -> None:
        self._device, self._ahead = device, ahead
        self._buffers: deque[tuple[int, list[Any]]] = deque()
        self._fences: deque[tuple[int, torch.cuda.Event]] = deque()

    def hand_over(self, index: int, buffers: list[Any]) -> list[Tensor]:
        """Tensors on the buffers of a batch: nothing is copied."""
        if self._device.type != "cuda":
            return [torch.from_dlpack(buffer) for buffer in buffers]
        stream = torch.cuda.default_stream(self._device)
        with torch.cuda.stream(stream):  # the trainer's; `run` has already waited for DALI's work, in this thread
            tensors = [torch.from_dlpack(buffer) for buffer in buffers]
        fence = torch.cuda.Event()
        fence.record(stream)
        # A batch is asked for when the one `ahead` + 1 before it is in use: all earlier ones have been used.
        self._fences.append((index - self._ahead - 2, fence))
        while self._fences and self._fences[0][1].query():
            done = self._fences.popleft()[0]
            while self._buffers and self._buffers[0][0] <= done:
                self._buffers.popleft()
        self._buffers.append((index, buffers))
        return tensors


@dataclass(frozen=True)
class _Neutral:
    """What stands for changes that are not drawn, so that every sample has the same inputs."""

    channels: int

    def factors(self, drawn: tuple[float, ...]) -> np.ndarray:
        """`[C, 1, 1, 1, 1]`."""
        return np.asarray(drawn or (1.0,) * self.channels, np.float32).reshape(-1, 1, 1, 1, 1)

    def blur(self, drawn: tuple[tuple[float, float, float] | None, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Standard deviations and numbers of taps, `[C, 3]` each; one tap changes nothing."""
        sigmas = np.array([sigma or (0.0, 0.0, 0.0) for sigma in drawn or (None,) * self.channels], np.float32)
        taps = [[len(ops.gaussian_taps(float(sigma))) if sigma > 0 else 1 for sigma in row] for row in sigmas]
        return np.where(sigmas > 0, sigmas, 1.0).astype(np.float32), np.array(taps, np.int32)


def sample_inputs(
    image: Image, labels: Labels, part: Reading, draws: Draws, rules: PatchRules, wanted: TargetRules
) -> _Inputs:
    """What the graph reads for one sample: the image as read, the targets as they are to be, and what to do.

    Args:
        image: `[C, d, h, w]`.
        labels: `[d, h, w]`.
        part: How the patch lies in them.
        draws: What to do.
        rules: The client's.
        wanted: How label maps become targets.
    """
    neutral, size = _Neutral(rules.channels), rules.patch_size
    if part.affine is not None:
        nothing = torch.empty(0, *labels.shape)
        labels = ops.warp_patch(nothing, torch.from_numpy(labels)[None], part.affine, size)[1][0].numpy()
    labels = labels[tuple(slice(None, None, -1 if axis in draws.mirror else None) for axis in range(3))]
    noise = standard_noise(rules.channels, size, draws.noise_seed).numpy() if draws.noise > 0 else np.zeros((1,) * 4)
    sigmas, taps = neutral.blur(draws.blur)
    thinned = [kept or (0, 0, 0) for kept in draws.low_resolution or (None,) * rules.channels]
    inputs = {
        "image": image[..., None],
        "warps": np.array(part.affine is not None),
        "matrix": _matrix(np.eye(3, 4) if part.affine is None else part.affine),
        "adds_noise": np.array(draws.noise > 0),
        "noise": np.asarray(noise, np.float32)[..., None],
        "deviation": np.array(draws.noise, np.float32),
        "blurs": np.array(bool(draws.blur)),
        "sigmas": sigmas,
        "taps": taps,
        "brightness": neutral.factors(draws.brightness),
        "stretches": np.array(bool(draws.contrast)),
        "contrast": neutral.factors(draws.contrast),
        "thins": np.array(bool(draws.low_resolution)),
        "thinned": np.array(thinned, np.float32),
        "nudges": np.array([_nudges(size, kept) if any(kept) else (0, 0, 0) for kept in thinned], np.float32),
        "raises_negated": np.array(bool(draws.gamma_inverted)),
        "exponents_negated": neutral.factors(draws.gamma_inverted),
        "raises": np.array(bool(draws.gamma)),
        "exponents": neutral.factors(draws.gamma),
        "mirrors": np.array([axis in draws.mirror for axis in range(3)], np.int32),
        **{f"target{k}": np.ascontiguousarray(one) for k, one in enumerate(targets(labels, wanted))},
    }
    if wanted.masked_channels:
        kept = np.ones((rules.channels, *size, 1), np.float32)
        kept[list(wanted.masked_channels)] = (labels >= 0)[..., None]
        inputs["kept"] = kept
    return inputs


def _nudges(size: Size, kept: Size) -> list[float]:
    """Which way ties between two nearest voxels go, along each axis: a shift that decides them as torch does.

    Of 256 voxels and fewer, 1 % of the sizes that nnU-Net may thin to have ties of both kinds in torch's float32; then
    the more frequent kind decides.
    """
    shifts = []
    for whole, few in zip(size, kept, strict=True):
        place = np.arange(few)
        exact, rest = np.divmod((2 * place + 1) * whole, 2 * few)
        lower = (nearest_exact(whole, few) < exact)[rest == 0]
        shifts.append((-1 if lower.sum() * 2 > lower.size else 1) / (8 * few))
    return shifts


def _matrix(affine: np.ndarray) -> np.ndarray:
    """DALI's `[3, 4]`: axes in the order x, y, z, and a voxel's centre at its index + 0.5."""
    linear, shift = affine[:, :3], affine[:, 3]
    centred = shift + 0.5 - linear @ np.full(3, 0.5)
    return np.concatenate([linear[::-1, ::-1], centred[::-1, None]], axis=1).astype(np.float32)


# name -> (type, layout) of what the graph reads for a sample; masks and targets come on top.
_INPUTS: dict[str, tuple[types.DALIDataType, str]] = {
    "image": (types.FLOAT, _LAYOUT),
    "warps": (types.BOOL, ""),
    "matrix": (types.FLOAT, ""),
    "adds_noise": (types.BOOL, ""),
    "noise": (types.FLOAT, _LAYOUT),
    "deviation": (types.FLOAT, ""),
    "blurs": (types.BOOL, ""),
    "sigmas": (types.FLOAT, "F*"),
    "taps": (types.INT32, "F*"),
    "brightness": (types.FLOAT, ""),
    "stretches": (types.BOOL, ""),
    "contrast": (types.FLOAT, ""),
    "thins": (types.BOOL, ""),
    "thinned": (types.FLOAT, ""),
    "nudges": (types.FLOAT, ""),
    "raises_negated": (types.BOOL, ""),
    "exponents_negated": (types.FLOAT, ""),
    "raises": (types.BOOL, ""),
    "exponents": (types.FLOAT, ""),
    "mirrors": (types.INT32, ""),
}
_ON_DEVICE = ("image", "noise", "brightness", "contrast", "exponents_negated", "exponents")


def build(rules: PatchRules, wanted: TargetRules, device: torch.device) -> Pipeline:
    """A pipeline whose run takes `sample_inputs` of every sample and gives images `[N, C, D, H, W, 1]` and targets.

    Predicates and sizes stay on the CPU; ``.gpu()`` and the device's number are all that differs between devices.
    """
    on_gpu = device.type == "cuda"
    number = (torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None
    kind = types.INT16 if wanted.regions is None else types.BOOL

    @pipeline_def(
        batch_size=rules.batch_size, num_threads=1, device_id=number, enable_conditionals=True, prefetch_queue_depth=1
    )
    def graph() -> tuple[Any, ...]:
        given = {name: _input(name, *of, on_gpu and name in _ON_DEVICE) for name, of in _INPUTS.items()}
        image = _augmented(given, rules)
        if wanted.masked_channels:
            image = image * _input("kept", types.FLOAT, _LAYOUT, on_gpu)
        return image, *(_input(f"target{k}", kind, "CDHW", on_gpu) for k in range(len(wanted.sizes)))

    pipeline = graph()
    pipeline.build()
    return pipeline


def _input(name: str, kind: types.DALIDataType, layout: str, on_gpu: bool) -> Any:
    node = fn.external_source(name=name, dtype=kind, layout=layout or None)
    return node.gpu() if on_gpu else node


def _augmented(given: Mapping[str, Any], rules: PatchRules) -> Any:
    """The graph from an image as read to one as trained on; DALI makes its conditions out of the `if`s."""
    image = given["image"]
    if given["warps"]:
        image = _warped(image, given["matrix"], rules)
    if given["adds_noise"]:
        image = image + given["noise"] * given["deviation"]
    if given["blurs"]:
        image = _blurred(image, given["sigmas"], given["taps"])
    image = image * given["brightness"]
    if given["stretches"]:
        image = _stretched(image, given["contrast"])
    if given["thins"]:
        image = _thinned(image, given["thinned"], given["nudges"], rules)
    if given["raises_negated"]:
        image = -_raised(-image, given["exponents_negated"])
    if given["raises"]:
        image = _raised(image, given["exponents"])
    mirrors = given["mirrors"]
    return fn.flip(image, depthwise=mirrors[0], vertical=mirrors[1], horizontal=mirrors[2])


def _warped(image: Any, matrix: Any, rules: PatchRules) -> Any:
    """Trilinear, 0 outside."""
    return fn.warp_affine(
        image, matrix=matrix, size=list(rules.patch_size), fill_value=0.0, interp_type=types.INTERP_LINEAR
    )


def _blurred(image: Any, sigmas: Any, taps: Any) -> Any:
    """Each channel, a frame, with sigmas of its own."""
    return fn.gaussian_blur(image, sigma=fn.per_frame(sigmas), window_size=fn.per_frame(taps))


def _stretched(image: Any, factor: Any) -> Any:
    low, high, mean = (
        reduce(image, axes=_SPATIAL, keep_dims=True)
        for reduce in (fn.reductions.min, fn.reductions.max, fn.reductions.mean)
    )
    return math.clamp((image - mean) * factor + mean, low, high)


def _thinned(image: Any, sizes: Any, nudges: Any, rules: PatchRules) -> Any:
    """To the nearest voxels and back, channel by channel: each has a size of its own, or stays as it is."""
    channels = []
    for number in range(rules.channels):
        channel = image[number : number + 1]
        if sizes[number, 0] > 0:
            nudge = nudges[number]
            small = fn.resize(
                channel,
                size=sizes[number],
                roi_start=nudge,
                roi_end=nudge + np.array(rules.patch_size, np.float32),
                interp_type=types.INTERP_NN,
                antialias=False,
            )
            channel = fn.resize(small, size=list(rules.patch_size), interp_type=types.INTERP_LINEAR, antialias=False)
        channels.append(channel)
    return channels[0] if rules.channels == 1 else fn.cat(*channels, axis=0)


def _raised(image: Any, exponent: Any) -> Any:
    """The place within the range to a power, then back to the old mean and standard deviation."""
    low = fn.reductions.min(image, axes=_SPATIAL, keep_dims=True)
    width = fn.reductions.max(image, axes=_SPATIAL, keep_dims=True) - low
    mean = fn.reductions.mean(image, axes=_SPATIAL, keep_dims=True)
    deviation = fn.reductions.std_dev(image, mean, axes=_SPATIAL, keep_dims=True, ddof=1)
    raised = (((image - low) / math.max(width, _LEAST_WIDTH)) ** exponent) * width
    new_mean = fn.reductions.mean(raised, axes=_SPATIAL, keep_dims=True)
    new_deviation = fn.reductions.std_dev(raised, new_mean, axes=_SPATIAL, keep_dims=True, ddof=1)
    return (raised - new_mean) * (deviation / math.max(new_deviation, _LEAST_WIDTH)) + mean
