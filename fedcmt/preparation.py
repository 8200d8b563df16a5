"""What comes before the rounds: datasets checked, topology agreed, clients planned, starts reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedcmt.checkpoint import ClientFolder, Workspace
from fedcmt.config import Checkpoint, ClientConfig, FederationConfig
from fedcmt.data.nnunet_rules import NnunetRules
from fedcmt.dataset import RawDataset, load_dataset
from fedcmt.errors import Problems
from fedcmt.files import write_json
from fedcmt.plans import ClientPlan, check_client, prepare_client, shape_summary
from fedcmt.preprocessing import preprocessing_warnings
from fedcmt.topology import AgreedTopology, TopologyContract

Note = Callable[[str], None]  # shows one line to the user


def load_datasets(config: FederationConfig) -> list[RawDataset]:
    """Read every client's dataset and compare it with the client's settings; all mistakes are raised at once."""
    problems, datasets = Problems(), []
    for client in config.clients:
        with problems.caught(client=client.name):
            datasets.append(load_client_dataset(config, client))
    problems.raise_any()
    return datasets


def load_client_dataset(config: FederationConfig, client: ClientConfig) -> RawDataset:
    """Read one client's dataset and compare it with the client's settings.

    Raises:
        InputError: They do not fit, or the dataset is at fault.
    """
    dataset = load_dataset(config.folder("raw"), client.dataset, client=client.name)
    check_client(client, dataset)
    return dataset


def prepare(
    config: FederationConfig, datasets: Sequence[RawDataset], note: Note, workspace: Workspace | None
) -> tuple[AgreedTopology, dict[str, ClientPlan]]:
    """Agree on the topology, then plan and preprocess every client's dataset."""
    contract = _contract(config, datasets, note, workspace)
    plans = {
        client.name: plan_client(config, client, dataset, contract.topology, note)
        for client, dataset in zip(config.clients, datasets, strict=True)
    }
    return contract, plans


def plan_client(
    config: FederationConfig, client: ClientConfig, dataset: RawDataset, contract: TopologyContract, note: Note
) -> ClientPlan:
    """Plan and preprocess one client's dataset; see :func:`fedcmt.plans.prepare_client`."""
    note(f"{client.name}: {dataset.name}, checking, planning and preprocessing what is new")
    plan = prepare_client(
        client, dataset, contract, config.folder("preprocessed"), workers=config.preprocessing_workers
    )
    for warning in preprocessing_warnings(plan.folder):
        note(f"{client.name}: warning: {warning}")
    if plan.validates_on_training:
        note(f"{client.name}: too few cases to hold one out, validating on training cases")
    return plan


def _contract(
    config: FederationConfig, datasets: Sequence[RawDataset], note: Note, workspace: Workspace | None
) -> AgreedTopology:
    """The given topology, the one this workspace began with, or one chosen from what every client tells."""
    if not config.topology.auto:
        return AgreedTopology(TopologyContract.of(config.topology), {})
    if workspace is not None and workspace.contract.is_file():
        return AgreedTopology.from_json(workspace.contract)
    told = {}
    for client, dataset in zip(config.clients, datasets, strict=True):
        note(f"{client.name}: {dataset.name}, shapes and spacings for the topology")
        told[client.name] = shape_summary(
            client, dataset, config.folder("preprocessed"), workers=config.preprocessing_workers
        )
    contract = TopologyContract.of(config.topology, list(told.values()))
    note(f"topology chosen: strides {contract.arch_kwargs['strides']}, digest {contract.digest()[:12]}")
    return AgreedTopology(contract, told)


def write_client_description(folder: ClientFolder, plan: ClientPlan, checkpoint: Checkpoint) -> None:
    """Write what prediction must know of a client besides its weights."""
    write_json(folder.plans, plan.plans)
    write_json(folder.dataset_json, plan.dataset_json)
    mirror_axes = NnunetRules(plan, deep_supervision=False).mirror_axes()
    write_json(
        folder.facts,
        {
            "task": plan.task,
            "num_heads": plan.num_heads,
            "mirror_axes": list(mirror_axes),
            "class_names": list(plan.dataset.class_names or ()),
            "checkpoint": checkpoint,
        },
    )
