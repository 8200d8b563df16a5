"""The topology contract: anisotropic and residual networks, the choice for all clients, and what is told for it."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phantoms import write_dataset

from fedcmt.config import ClientConfig, TopologyConfig, load_config
from fedcmt.dataset import load_dataset
from fedcmt.errors import InputError
from fedcmt.exchange import ShapeSummary
from fedcmt.network import build_network, parameters_of
from fedcmt.plans import prepare_client, shape_summary
from fedcmt.topology import TopologyContract, choose_stages, merged_geometry

ANISOTROPIC = {
    "features": [4, 6, 8, 8],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]],
    "kernel_sizes": [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "adaptor_width": 5,
}
CT = ShapeSummary(30, (5.0, 0.8, 0.8), (104, 512, 512))
MR = ShapeSummary(10, (2.0, 1.0, 1.0), (80, 192, 192))
BRAIN = ShapeSummary(100, (1.0, 1.0, 1.0), (144, 176, 144))
SLICES = ShapeSummary(5, (0.5, 0.5), (512, 512))


def contract(**changes: object) -> TopologyContract:
    return TopologyContract.of(TopologyConfig.model_validate({**ANISOTROPIC, **changes}))


@pytest.mark.parametrize("encoder", ["plain", "residual"])
@pytest.mark.parametrize("stages", [3, 4, 6])
def test_networks_of_every_depth_give_logits_of_the_inputs_size(encoder: str, stages: int) -> None:
    strides = [[1, 1, 1], *[[1, 2, 2]] * (stages - 3), [2, 2, 2], [2, 2, 2]]
    kernels = [[1, 3, 3]] * 2 + [[3, 3, 3]] * (stages - 2)
    made = contract(features=[4] * stages, strides=strides, kernel_sizes=kernels, encoder=encoder)
    network = build_network(made.architecture("segmentation"), 2, 3, deep_supervision=True)
    size = [int(n) for n in 2 * made.divisor]
    outputs = network(torch.randn(1, 2, *size))
    assert len(outputs) == stages - 1
    assert outputs[0].shape == (1, 3, *size)
    assert tuple(outputs[1].shape[2:]) == tuple(np.asarray(size) // strides[1])
    classes = build_network(made.architecture("classification"), 2, 4)(torch.randn(2, 2, *size))
    assert classes.shape == (2, 4)


def test_the_residual_encoder_is_nnunets_with_the_adaptor_before_its_stem() -> None:
    made = contract(encoder="residual")
    assert made.arch_kwargs["n_blocks_per_stage"] == [1, 3, 4, 6]
    names = list(parameters_of(build_network(made.architecture("segmentation"), 1, 2), "encoder"))
    assert names[0] == "encoder.stem.convs.0.conv.weight"
    assert sum(name.endswith("conv2.conv.weight") for name in names) == 1 + 3 + 4 + 6
    assert contract(encoder="residual", blocks_per_stage=2).arch_kwargs["n_blocks_per_stage"] == [2, 2, 2, 2]
    assert made.digest() != contract().digest()


@pytest.mark.parametrize("encoder", ["plain", "residual"])
def test_no_tensor_of_a_model_has_two_names(encoder: str) -> None:
    network = build_network(contract(encoder=encoder, norm="batch").architecture("segmentation"), 1, 2)
    tensors = [*network.named_parameters(), *network.named_buffers()]
    assert len({tensor.data_ptr() for _, tensor in tensors}) == len(tensors)
    assert not any(".all_modules." in name or name.startswith("decoder.encoder.") for name, _ in tensors)


def test_slices_pass_as_volumes_of_one_slice() -> None:
    made = contract(strides=[[1, 1, 1], [1, 2, 2], [1, 2, 2], [1, 2, 2]])
    network = build_network(made.architecture("segmentation"), 1, 2, deep_supervision=True).eval()
    x = torch.randn(2, 1, 16, 24)
    for flat, deep in zip(network(x), network(x[:, :, None]), strict=True):
        assert torch.equal(flat, deep[:, :, 0])
    classifier = build_network(made.architecture("classification"), 1, 2).eval()
    assert torch.equal(classifier(x), classifier(x[:, :, None]))


def test_patches_are_rounded_to_anisotropic_strides_and_the_rest_stays_the_clients(
    raw_datasets: Path, preprocessed: Path
) -> None:
    dataset, made = load_dataset(raw_datasets, 801), contract()
    client = {"name": "site", "dataset": 801, "modality": "CT", "batch_size": 3}
    plan = prepare_client(ClientConfig.model_validate(client), dataset, made, preprocessed)
    assert made.divisor.tolist() == [2, 8, 8]
    assert np.all(np.asarray(plan.configuration.patch_size) % made.divisor == 0)
    planned = json.loads((preprocessed / "Dataset801_Plain" / "fedcmt_planned.json").read_text())
    size = np.asarray(planned["configurations"]["3d_fullres"]["patch_size"])
    assert plan.configuration.patch_size == (size // made.divisor * made.divisor).tolist()
    assert plan.configuration.batch_size == 3
    wrong = ClientConfig.model_validate({**client, "patch_size": [16, 20, 24]})
    with pytest.raises(InputError, match=r"field 'patch_size'.*\[2, 8, 8\]; use \[16, 16, 24\]"):
        prepare_client(wrong, dataset, made, preprocessed)
    good = ClientConfig.model_validate({**client, "patch_size": [6, 16, 24]})
    assert prepare_client(good, dataset, made, preprocessed).configuration.patch_size == [6, 16, 24]


def test_the_choice_follows_the_clients_images() -> None:
    assert choose_stages([BRAIN]) == ([[1, 1, 1], *[[2, 2, 2]] * 5], [[3, 3, 3]] * 6)
    strides, kernels = choose_stages([CT])
    assert strides == [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]]
    assert kernels == [[1, 3, 3], [1, 3, 3], *[[3, 3, 3]] * 5]
    assert choose_stages([CT, MR])[0] == strides  # most cases are of CT
    strides, kernels = choose_stages([SLICES])
    assert len(strides) == 8
    assert {tuple(stride) for stride in strides[1:]} == {(1, 2, 2)}
    assert {tuple(kernel) for kernel in kernels} == {(1, 3, 3)}
    assert all(stride[0] == 1 for stride in choose_stages([CT, SLICES])[0])
    with pytest.raises(InputError, match="too small"):
        choose_stages([ShapeSummary(1, (1.0, 1.0, 1.0), (4, 4, 4))])


@settings(max_examples=60, deadline=None)
@given(st.permutations([CT, MR, BRAIN, SLICES, ShapeSummary(7, (3.0, 2.0, 2.0), (24, 96, 96))]), st.integers(1, 5))
def test_the_choice_does_not_depend_on_the_clients_order(order: list[ShapeSummary], count: int) -> None:
    some = order[:count]
    config = TopologyConfig(auto=True)
    assert TopologyContract.of(config, some).digest() == TopologyContract.of(config, some[::-1]).digest()
    divisor = TopologyContract.of(config, some).divisor
    # Nobody's patch grows to more than twice its images by rounding up to the strides' product.
    for summary in some:
        assert all(d <= 2 * n for d, n in zip(divisor[-len(summary.median_shape) :], summary.median_shape, strict=True))
    assert merged_geometry(some) == merged_geometry(some[::-1])


def test_auto_takes_widths_and_depths_from_the_lists() -> None:
    config = TopologyConfig.model_validate({"auto": True, "features": [4, 8, 16], "encoder": "residual"})
    made = TopologyContract.of(config, [BRAIN]).arch_kwargs
    assert made["features_per_stage"] == [4, 8, 16, 16, 16, 16]
    assert made["n_blocks_per_stage"] == [1, 3, 4, 6, 6, 6]
    assert load_config({**FEDERATION, "topology": "auto"}, ["topology.encoder=residual"]).topology == TopologyConfig(
        auto=True, encoder="residual"
    )


def test_a_client_tells_nothing_but_the_documented_numbers(raw_datasets: Path, preprocessed: Path) -> None:
    client = ClientConfig.model_validate({"name": "site", "dataset": 801, "modality": "CT"})
    told = shape_summary(client, load_dataset(raw_datasets, 801), preprocessed)
    assert asdict(told) == {"num_cases": 2, "spacing": (3.0, 2.0, 2.0), "median_shape": (16, 32, 32)}
    text = (Path(__file__).parent.parent / "docs" / "nnunet.md").read_text()
    assert all(f"`{field.name}`" in text for field in fields(ShapeSummary))


def test_what_a_client_tells_does_not_depend_on_intensities_or_identifiers(tmp_path: Path) -> None:
    told = []
    for name, factor in (("Dataset861_Dark", 1), ("Dataset862_Bright", 7)):
        folder = write_dataset(tmp_path / "raw", name, modality="CT", shape=(20, 18, 16), test=0)
        for path in (folder / "imagesTr").iterdir():
            image = nibabel.load(path)
            data = np.asarray(image.dataobj, np.float32) * factor
            path.unlink()
            renamed = path.with_name(path.name.replace("case", f"patient{factor}"))
            nibabel.save(nibabel.Nifti1Image(data, image.affine), renamed)
        for path in list((folder / "labelsTr").iterdir()):
            path.rename(path.with_name(path.name.replace("case", f"patient{factor}")))
        client = ClientConfig.model_validate({"name": "site", "dataset": name, "modality": "CT"})
        told.append(shape_summary(client, load_dataset(tmp_path / "raw", name), tmp_path / "preprocessed"))
    assert told[0] == told[1]


FEDERATION = {"name": "study", "clients": [{"name": "ct_a", "dataset": 901, "modality": "CT"}]}


@pytest.mark.parametrize(
    ("topology", "parts"),
    [
        ({"auto": True, "strides": [[1, 1, 1]] * 5}, ["left out with auto"]),
        ({"blocks_per_stage": 2}, ["blocks_per_stage", "residual"]),
        ({"encoder": "residual", "convs_per_stage": 3}, ["convs_per_stage", "plain"]),
        ({"encoder": "residual", "blocks_per_stage": [1, 2]}, ["blocks_per_stage", "5", "found 2"]),
        ({"convs_per_stage": [2, 2]}, ["convs_per_stage", "found 2"]),
        ({"encoder": "dense"}, ["encoder", "dense"]),
        ("automatic", ["topology"]),
    ],
)
def test_a_contradiction_is_one_line(topology: object, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_config({**FEDERATION, "topology": topology})
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("name", "depth"), [("PlainConvUNet", "n_conv_per_stage"), ("ResidualEncoderUNet", "n_blocks_per_stage")]
)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_contract_of_a_stock_plan_has_its_stages(name: str, depth: str, dimensions: int) -> None:
    kwargs = {
        "n_stages": 3,
        "features_per_stage": [4, 8, 8],
        "kernel_sizes": [[3] * dimensions] * 3,
        "strides": [[1] * dimensions, [2] * dimensions, [2] * dimensions],
        depth: [1, 2, 2],
        "n_conv_per_stage_decoder": [1, 2],
        "dropout_op": None,
    }
    architecture = {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
        "arch_kwargs": kwargs,
        "_kw_requires_import": [],
    }
    made = TopologyContract.of_nnunet(json.loads(json.dumps(architecture)), 6)
    assert made.divisor.tolist() == [1 if dimensions == 2 else 4, 4, 4]
    assert made.arch_kwargs[depth] == [1, 2, 2]
    x = torch.randn(1, 1, *[8] * dimensions)
    assert build_network(made.architecture("segmentation"), 1, 2)(x).shape == (1, 2, *[8] * dimensions)
    with pytest.raises(InputError, match="Primus"):
        TopologyContract.of_nnunet({**architecture, "network_class_name": "x.Primus"}, 6)
