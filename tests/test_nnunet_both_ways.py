"""Federations on residual, anisotropic and two-dimensional networks: exported, predicted by stock nnU-Net, reused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from phantoms import AFFINE, TINY_TRAINING, write_dataset, write_slices

from fedcmt import run_federation
from fedcmt.checkpoint import existing_client, load_model
from fedcmt.cli import main
from fedcmt.config import ClientConfig, TopologyConfig, load_config
from fedcmt.dataset import load_dataset
from fedcmt.errors import InputError
from fedcmt.exchange import ShapeSummary
from fedcmt.files import read_tensors
from fedcmt.infer import Predictor
from fedcmt.network import build_network
from fedcmt.plans import prepare_client
from fedcmt.topology import TopologyContract
from fedcmt.volume import read_volume

ANISOTROPIC = {
    "features": [4, 6, 8, 8],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]],
    "kernel_sizes": [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "adaptor_width": 4,
    "encoder": "residual",
    "blocks_per_stage": [1, 1, 2, 1],
}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume dataset, slices to segment, slices to classify, and the older form of classification."""
    root = tmp_path_factory.mktemp("raw")
    write_dataset(root, "Dataset881_Volumes", modality="CT")
    write_slices(root, "Dataset882_Slices", modality="MR", train=3)
    write_slices(root, "Dataset883_Classes", modality="MR", train=4, test=2, classification=True)
    write_slices(root, "Dataset886_Regions", modality="MR", train=2, channels=2, regions=True, ignore=True)
    older_classification(write_dataset(root, "Dataset884_Older", modality="MR", train=4, test=2))
    return root


def older_classification(folder: Path) -> None:
    """Every second case has no lesion, and no file says so but the label maps."""
    document = json.loads((folder / "dataset.json").read_text())
    labels = {"background": 0, "lesion": 1}
    (folder / "dataset.json").write_text(json.dumps(document | {"is_classification_dataset": True, "labels": labels}))
    for path in [*(folder / "labelsTr").iterdir(), *(folder / "labelsTs").iterdir()]:
        image = nibabel.load(path)
        lesion = (np.asarray(image.dataobj) == 2) & (int(path.name[5:7]) % 2 == 1)
        nibabel.save(nibabel.Nifti1Image(lesion.astype(np.uint8), image.affine), path)


def settings(raw: Path, workspace: Path, clients: list[dict[str, object]], **changes: object) -> dict[str, object]:
    return {
        "name": "both",
        "rounds": 1,
        "threads": 1,
        "raw": str(raw),
        "preprocessed": str(raw.parent / f"{raw.name}_preprocessed"),
        "workspace": str(workspace),
        "training": {**TINY_TRAINING, "learning_rate": 0.01},
        "inference": {"mirroring": False},
        "clients": clients,
        **changes,
    }


@pytest.fixture(scope="module")
def volumes(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation with a residual, anisotropic network of four stages."""
    workspace = tmp_path_factory.mktemp("volumes") / "w"
    clients = [
        {"name": "ct", "dataset": 881, "modality": "CT", "patch_size": [8, 16, 24]},
        {"name": "older", "dataset": 884, "modality": "MR", "task": "classification"},
    ]
    run_federation(settings(raw, workspace, clients, topology=ANISOTROPIC))
    return workspace


@pytest.fixture(scope="module")
def slices(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clients of slices and one of volumes that are cut, with a topology chosen for them."""
    workspace = tmp_path_factory.mktemp("slices") / "w"
    clients = [
        {"name": "slices", "dataset": 882, "modality": "MR", "patch_size": [1, 32, 32]},
        {"name": "classes", "dataset": 883, "modality": "MR"},
        {"name": "regions", "dataset": 886, "modality": "MR", "channels": 2, "patch_size": [1, 32, 32]},
        {"name": "cut", "dataset": 881, "modality": "CT", "configuration": "2d"},
    ]
    topology = {"auto": True, "features": [4, 8, 8], "adaptor_width": 4}
    run_federation(settings(raw, workspace, clients, topology=topology))
    return workspace


def stock_labels(model: Path, channels: list[Path], output: Path) -> np.ndarray:
    """What stock nnU-Net makes of a case with a model folder."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    stock = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(model), (0,))
    stock.predict_from_files_sequential([[str(path) for path in channels]], [str(output)])
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(f"{output}.nii.gz"))


@pytest.mark.parametrize(
    ("federation", "client", "dataset"),
    [
        ("volumes", "ct", "Dataset881_Volumes"),
        ("slices", "slices", "Dataset882_Slices"),
        ("slices", "regions", "Dataset886_Regions"),
        ("slices", "cut", "Dataset881_Volumes"),
    ],
)
def test_exported_models_give_stock_nnunets_labels(
    federation: str, client: str, dataset: str, raw: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    workspace = request.getfixturevalue(federation)
    assert main(["export", str(workspace), "--client", client, "-o", str(tmp_path / "model")]) == 0
    channels = sorted((raw / dataset / "imagesTs").iterdir())
    theirs = stock_labels(tmp_path / "model", channels, tmp_path / "stock")
    ours = Predictor.from_workspace(workspace, client, device="cpu", mirroring=False).predict(read_volume(channels))
    assert len(np.unique(theirs)) > 1
    assert np.array_equal(ours.data[0], theirs)


def test_exported_logits_equal_the_models(volumes: Path) -> None:
    """Stock nnU-Net's own way from the plans to the network."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    folder = existing_client(volumes, "ct")
    network, plans, _, facts = load_model(folder)
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    theirs = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        1,
        facts["num_heads"],
        deep_supervision=False,
    ).eval()
    saved = torch.load(folder.model / "fold_0" / "checkpoint_final.pth", weights_only=True)
    theirs.load_state_dict(saved["network_weights"])
    x = torch.randn(1, 1, 8, 16, 24)
    with torch.no_grad():
        assert torch.equal(theirs(x), network(x))


def test_a_slice_of_a_volume_is_predicted_as_by_itself(slices: Path, raw: Path) -> None:
    """nnU-Net's 2D handling: slices do not see each other beyond the normalisation of the whole case."""
    network, _, _, _ = load_model(existing_client(slices, "cut"))
    image = torch.from_numpy(read_volume(next((raw / "Dataset881_Volumes" / "imagesTs").iterdir())).data[None, :, :6])
    image = image[..., :24, :24]
    with torch.no_grad():
        together = network(image[0].transpose(0, 1))
        alone = torch.cat([network(image[:, :, i]) for i in range(6)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_chosen_topology_is_written_and_every_client_has_it(slices: Path) -> None:
    written = json.loads((slices / "contract.json").read_text())
    assert set(written["chosen_from"]) == {"slices", "classes", "regions", "cut"}
    assert all(set(told) == {"num_cases", "spacing", "median_shape"} for told in written["chosen_from"].values())
    assert TopologyContract(written["topology"]).digest() == written["digest"]
    for name in written["chosen_from"]:
        assert read_tensors(slices / "clients" / name / "best.safetensors")[1]["topology"] == written["digest"]
    assert all(stride[0] == 1 for stride in written["topology"]["strides"])


def test_going_on_keeps_the_topology_it_began_with(slices: Path, raw: Path) -> None:
    """A case more or less changes what the clients would tell, and must change nothing here."""
    before = (slices / "contract.json").read_text()
    config = load_config(slices / "config.yaml", ["rounds=2"])
    told = ShapeSummary(9, (1.0, 1.0, 1.0), (96, 96, 96))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedcmt.preparation.shape_summary", lambda *_, **__: told)
        run_federation(config)
        assert (slices / "contract.json").read_text() == before
        damaged = json.loads(before)
        damaged["topology"]["adaptor_width"] = 5
        (slices / "contract.json").write_text(json.dumps(damaged))
        with pytest.raises(InputError, match=r"contract\.json is damaged"):
            run_federation(config)
    (slices / "contract.json").write_text(before)


@pytest.mark.parametrize(("federation", "client"), [("slices", "classes"), ("volumes", "older")])
def test_classification_is_scored_tabulated_and_exported(
    federation: str, client: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = request.getfixturevalue(federation)
    entries = json.loads((workspace / "results.json").read_text())["clients"]
    entry = next(entry for entry in entries if entry["client"] == client)
    assert set(entry["mean"]) == {"accuracy", "balanced_accuracy", "auroc"}
    assert all(0 <= value <= 1 for value in entry["mean"].values())
    assert {case["truth"] for case in entry["cases"]} == set(entry["class_names"])
    with open(workspace / "predictions" / client / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["identifier"] for row in rows] == [case["case"] for case in entry["cases"]]
    for row in rows:
        chances = [float(row[f"probability_{name}"]) for name in entry["class_names"]]
        assert sum(chances) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == entry["class_names"][int(np.argmax(chances))]

    model = tmp_path / "model"
    assert main(["export", str(workspace), "--client", client, "-o", str(model)]) == 0
    assert "nnUNetv2_predict_from_modelfolder" not in capsys.readouterr().out  # it cannot classify
    facts, plans = (json.loads((model / name).read_text()) for name in ("model.json", "plans.json"))
    assert facts["class_names"] == entry["class_names"]
    assert "dataset" in json.loads(existing_client(workspace, client).dataset_json.read_text())
    assert "dataset" not in json.loads((model / "dataset.json").read_text())  # it names the site's folders
    architecture = next(iter(plans["configurations"].values()))["architecture"]
    exported = build_network(architecture, 1, facts["num_heads"]).eval()
    saved = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=True)
    exported.load_state_dict(saved["network_weights"])
    x = torch.randn(1, 1, 8, 16, 24) if federation == "volumes" else torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(exported(x), load_model(existing_client(workspace, client))[0](x))


def test_slices_refuse_a_topology_with_strides_along_the_first_axis(raw: Path) -> None:
    dataset, folder = load_dataset(raw, 882), raw.parent / f"{raw.name}_preprocessed"
    contract = TopologyContract.of(TopologyConfig.model_validate(ANISOTROPIC))
    client = ClientConfig(name="slices", dataset=882, modality="MR")
    with pytest.raises(InputError, match=r"client 'slices', field 'configuration': single slices need .*auto"):
        prepare_client(client, dataset, contract, folder)
    with pytest.raises(InputError, match="has single-slice images, for which nnU-Net plans 2d only; leave it out"):
        prepare_client(client.model_copy(update={"configuration": "3d_fullres"}), dataset, contract, folder)


@pytest.mark.parametrize("spacing", [None, [7, 2, 2]])
def test_slices_thinner_than_their_pixels_are_slices_all_the_same(tmp_path: Path, spacing: list[float] | None) -> None:
    """nnU-Net alone takes the axis of largest spacing for that of the slices, and fails here."""
    folder = write_slices(tmp_path / "raw", "Dataset885_Thin", modality="MR", test=0)
    thin = AFFINE @ np.diag([1, 1, 1 / 6, 1])
    for path in folder.rglob("*.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(np.asarray(nibabel.load(path).dataobj), thin), path)
    contract = TopologyContract.of(
        TopologyConfig(features=[4, 8, 8], strides=[[1, 1, 1], [1, 2, 2], [1, 2, 2]], adaptor_width=4)
    )
    client = ClientConfig.model_validate({"name": "thin", "dataset": 885, "modality": "MR", "spacing": spacing})
    plan = prepare_client(client, load_dataset(tmp_path / "raw", 885), contract, tmp_path / "preprocessed")
    assert list(plan.configuration.spacing) == [2, 2]
    assert plan.plans["transpose_forward"] == [0, 1, 2]


def test_a_federation_starts_from_a_checkpoint_and_says_what_matched(
    raw: Path, volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = volumes / "clients" / "ct" / "model" / "fold_0" / "checkpoint_final.pth"
    client = {"name": "ct", "dataset": 881, "modality": "CT", "patch_size": [8, 16, 24]}
    same = settings(raw, tmp_path / "w", [{**client, "initial_weights": str(exported)}], topology=ANISOTROPIC)
    same |= {"initial_weights": str(exported), "training": {**TINY_TRAINING, "learning_rate": 1e-12}}
    run_federation(same)
    printed = capsys.readouterr().out
    assert "checkpoint_final.pth -> encoder: " in printed
    assert "ct: checkpoint_final.pth -> decoder: " in printed
    assert "keep their random start" not in printed
    before, after = (read_tensors(path / "clients/ct/best.safetensors")[0] for path in (volumes, tmp_path / "w"))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)

    other = {**ANISOTROPIC, "features": [3, 5, 7, 9], "adaptor_width": 3}
    with pytest.raises(InputError, match=r"field 'initial_weights': nothing in .* matches"):
        run_federation({**same, "workspace": str(tmp_path / "v"), "topology": other, "clients": [client]})
    assert not (tmp_path / "v" / "config.yaml").exists()
