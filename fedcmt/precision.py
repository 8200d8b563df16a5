"""How exactly a network is computed: as nnU-Net does, or faster on CPUs through OpenVINO or in bfloat16."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fedcmt.errors import InputError
from fedcmt.windows import Network

Precision = Literal["exact", "fast", "bf16"]
LEAST_AGREEMENT = 0.99
PARITY_TILES = 2


def check_precision(precision: str, device: torch.device) -> None:
    """Whether a precision can be had here.

    Raises:
        InputError: No such precision, not on this device, or a package is missing.
    """
    if precision not in get_args(Precision):
        raise InputError(
            f"unknown precision '{precision}'", field="--precision", fix=f"use {', '.join(get_args(Precision))}"
        )
    if precision != "exact" and device.type != "cpu":
        raise InputError(
            f"{precision} is for CPUs; on {device.type} the network runs in mixed precision as nnU-Net's does",
            field="--precision",
            fix="leave it out, or add --device cpu",
        )
    if precision == "fast" and find_spec("openvino") is None:
        raise InputError("fast needs OpenVINO", field="--precision", fix="pip install 'fedcmt[openvino]'")


def faster_network(network: nn.Module, precision: Precision, shape: Sequence[int]) -> Network:
    """The network for CPUs: OpenVINO float32 (fast), or bfloat16 through OpenVINO where installed, else through torch.

    Args:
        network: With its weights, which are copied.
        precision: ``fast`` or ``bf16``.
        shape: Of every input, `[1, C, ...]`.
    """
    if find_spec("openvino") is not None:
        return _openvino_network(network, shape, "f32" if precision == "fast" else "bf16")

    def autocast(patch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return network(patch).float()

    return autocast


def _openvino_network(network: nn.Module, shape: Sequence[int], hint: str) -> Network:
    import openvino

    # Not `openvino.convert_model`, which reports its use over the network.
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # OpenVINO reads TorchScript, which torch deprecates
        decoder = TorchScriptPythonDecoder(torch.jit.trace(network, torch.zeros(tuple(shape)), check_trace=False))
    frontend = FrontEndManager().load_by_framework("pytorch")
    read = frontend.load(decoder)
    model: Any = frontend.convert(read)
    model.reshape(list(shape))
    options = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def infer(patch: Tensor) -> Tensor:
        return torch.from_numpy(request.infer([patch.numpy()], share_inputs=True, share_outputs=False)[0])

    return infer


def agreement(exact: Network, other: Network, patches: Sequence[Tensor], decide: Callable[[Tensor], Tensor]) -> float:
    """Share of voxels on whose labels two networks agree.

    Args:
        exact: The network as trained.
        other: The faster one.
        patches: Inputs `[1, C, ...]`.
        decide: Logits `[1, K, ...]` -> labels or regions.
    """
    with torch.inference_mode():
        same = [(decide(exact(patch)) == decide(other(patch))).float().mean() for patch in patches]
    return float(torch.stack(same).mean())
