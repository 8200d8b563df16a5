"""Every file of a workspace: where it stands, what commits a round, and the export to an nnU-Net model folder."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedcmt.config import Checkpoint, FederationConfig
from fedcmt.errors import InputError
from fedcmt.files import check_same_tensors, hold, read_json, read_tensors, write_bytes, write_json, write_text
from fedcmt.model_checks import check_model, check_topology
from fedcmt.network import CONFIGURATION, build_network, configuration_name
from fedcmt.topology import contract_digest

FACTS = "model.json"  # of a client, and of an exported model folder
CROSS_FILE = "cross_evaluation.json"
_STATE = re.compile(r"round-(\d{4,})\.safetensors")
_KEPT_ROUNDS = 2  # should the newest be damaged, the one before still stands


def _state_file(folder: Path, round_index: int) -> Path:
    return folder / f"round-{round_index:04d}.safetensors"


def _saved_rounds(folder: Path) -> dict[int, Path]:
    found = {int(match[1]): path for path in folder.glob("round-*") if (match := _STATE.fullmatch(path.name))}
    return dict(sorted(found.items()))


def _discard(folder: Path, round_index: int) -> None:
    for saved, path in _saved_rounds(folder).items():
        if saved <= round_index - _KEPT_ROUNDS or saved > round_index:
            path.unlink()


@dataclass(frozen=True)
class ClientFolder:
    """A client's files.

    Attributes:
        path: The folder.
        checkpoint: Which of its models to use; None for the one that the federation was told to use.
    """

    path: Path
    checkpoint: Checkpoint | None = None

    @property
    def weights(self) -> Path:
        """The model to use."""
        facts = read_json(self.facts)
        chosen = self.checkpoint or (facts.get("checkpoint") if isinstance(facts, dict) else None)
        return self.best if chosen == "best" else self.last

    @property
    def best(self) -> Path:
        """The model with the best validation score."""
        return self.path / "best.safetensors"

    @property
    def last(self) -> Path:
        """The model after the last round."""
        return self.path / "last.safetensors"

    @property
    def decoder(self) -> Path:
        """The personal part of the last model."""
        return self.path / "decoder.safetensors"

    @property
    def plans(self) -> Path:
        """nnU-Net's plans with the topology contract."""
        return self.path / "plans.json"

    @property
    def dataset_json(self) -> Path:
        """Channels, labels, classes."""
        return self.path / "dataset.json"

    @property
    def facts(self) -> Path:
        """What inference must know beyond the plans: task, mirroring."""
        return self.path / FACTS

    @property
    def model(self) -> Path:
        """nnU-Net model folder of the model to use."""
        return self.path / "model"

    @property
    def states(self) -> Path:
        """Folder of the states that resuming starts from."""
        return self.path / "state"

    @property
    def results(self) -> Path:
        """Scores of the model to use, kept at the client's site."""
        return self.path / "results.json"

    def state(self, round_index: int) -> Path:
        """State after a round."""
        return _state_file(self.states, round_index)

    def saved_rounds(self) -> list[int]:
        """Rounds whose states are there, newest first."""
        return sorted(_saved_rounds(self.states), reverse=True)

    def discard_old_states(self, round_index: int) -> None:
        """Delete states but the newest two up to a round that the client has just saved."""
        for saved in [saved for saved in self.saved_rounds() if saved <= round_index][_KEPT_ROUNDS:]:
            self.state(saved).unlink()


@dataclass(frozen=True)
class Workspace:
    """A federation's folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def contract(self) -> Path:
        """The topology contract with its digest, and what it was chosen from."""
        return self.path / "contract.json"

    @property
    def metrics(self) -> Path:
        """One line a round and client, one a round for the server."""
        return self.path / "metrics.jsonl"

    @property
    def results(self) -> Path:
        """Scores of the clients' models."""
        return self.path / "results.json"

    @property
    def cross_evaluation(self) -> Path:
        """Scores of every model on every test set."""
        return self.path / CROSS_FILE

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def server(self) -> Path:
        """Folder of the server's states."""
        return self.path / "server"

    def server_state(self, round_index: int) -> Path:
        """The server after a round; its presence commits the round."""
        return _state_file(self.server, round_index)

    @property
    def known_clients(self) -> Path:
        """What clients of a distributed run have told of themselves."""
        return self.server / "clients.json"

    @property
    def log(self) -> Path:
        """What a distributed run's server has to say, line by line."""
        return self.server / "log.txt"

    @property
    def status(self) -> Path:
        """Where a distributed run stands: running, paused with the reason, finished."""
        return self.path / "status.json"

    def saved_server_rounds(self) -> list[int]:
        """Rounds whose server states are there, newest first; where clients keep their own, these commit alone."""
        return sorted(_saved_rounds(self.server), reverse=True)

    def discard_old_server_states(self, round_index: int) -> None:
        """Delete the server's states that neither resuming nor its fallback needs after a commit."""
        _discard(self.server, round_index)

    def client(self, name: str) -> ClientFolder:
        """A client's folder."""
        return ClientFolder(self.path / "clients" / name)

    def predictions(self, name: str) -> Path:
        """Folder of a client's predictions."""
        return self.path / "predictions" / name

    @contextmanager
    def locked(self, patience: float = 0.0) -> Iterator[None]:
        """Keep a second process from writing here.

        Args:
            patience: Seconds to wait for one that does already.

        Raises:
            InputError: It still does.
        """
        file = hold(self.path / ".lock", patience)
        if file is None:
            raise InputError(
                f"{self.path} is in use by another run",
                field="workspace",
                fix="wait for it or choose another workspace",
            )
        with file:
            yield

    def clear(self) -> None:
        """Delete what a run left here, and nothing else."""
        for folder in ("server", "clients", "predictions", "tensorboard"):
            shutil.rmtree(self.path / folder, ignore_errors=True)
        for path in (
            self.config, self.contract, self.metrics, self.results, self.path / "report.html", self.cross_evaluation,
            self.status,
        ):  # fmt: skip
            path.unlink(missing_ok=True)

    def committed_rounds(self, first_rounds: Mapping[str, int]) -> list[int]:
        """Rounds that server and all clients have saved completely, newest first.

        Args:
            first_rounds: Client -> first round it takes part in.
        """
        saved = {name: set(_saved_rounds(self.client(name).states)) for name in first_rounds}
        complete = [
            round_index
            for round_index in _saved_rounds(self.server)
            if all(first > round_index or round_index in saved[name] for name, first in first_rounds.items())
        ]
        return sorted(complete, reverse=True)

    def discard_old_states(self, round_index: int) -> None:
        """Delete states that neither resuming nor its fallback needs after a commit."""
        for folder in [self.server, *(self.path / "clients").glob("*/state")]:
            _discard(folder, round_index)

    def read_metrics(self, up_to_round: int) -> list[dict[str, Any]]:
        """Lines of committed rounds; later ones belong to a round that was cut off."""
        if not self.metrics.is_file():
            return []
        lines = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        return [line for line in lines if line["round"] <= up_to_round]

    def write_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write all lines."""
        write_text(self.metrics, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def results_of(config: FederationConfig, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of ``results.json``."""
    return {
        "federation": config.name,
        "strategy": config.strategy.name,
        "rounds": config.rounds,
        "inference": config.inference.model_dump(mode="json"),
        "clients": list(entries),
    }


def existing_client(workspace: Path, name: str, checkpoint: Checkpoint | None = None) -> ClientFolder:
    """The folder of a client that has a model.

    Args:
        workspace: The federation's folder.
        name: The client's.
        checkpoint: Which of its models; None for the one that the federation was told to use.

    Raises:
        InputError: No workspace, no such client, or no model yet.
    """
    root = workspace / "clients"
    if not root.is_dir():
        raise InputError(f"{workspace} is no workspace of a federation", field="workspace")
    known = sorted(path.name for path in root.iterdir() if path.is_dir())
    if name not in known:
        raise InputError(
            f"no such client in {workspace}", client=name, field="client", fix=f"use one of {', '.join(known)}"
        )
    folder = ClientFolder(root / name, checkpoint)
    if not folder.best.is_file():
        raise InputError(
            f"{workspace} holds no model of it yet", client=name, field="client", fix="finish a round first"
        )
    return folder


def load_model(folder: ClientFolder) -> tuple[torch.nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A client's model, ready to predict.

    Returns:
        Network, plans, dataset.json, facts.

    Raises:
        InputError: A file is missing, damaged or does not fit the others.
    """
    plans, dataset_json, facts = (read_json(path) for path in (folder.plans, folder.dataset_json, folder.facts))
    weights = folder.weights
    tensors, stored = read_tensors(weights)
    files = {"plans": folder.plans, "dataset_json": folder.dataset_json, "facts": folder.facts, "weights": weights}
    try:
        configuration = configuration_name(plans)
    except (LookupError, TypeError, StopIteration):
        configuration = CONFIGURATION  # the check says that it is not there
    check_model(files, plans, dataset_json, facts, configuration, tensors)
    try:
        architecture = plans["configurations"][configuration]["architecture"]
        check_topology(stored.get("topology"), contract_digest(architecture), weights)
        with torch.device("meta"):  # the file's tensors become the network's, so none are made here
            network = build_network(
                architecture, len(dataset_json["channel_names"]), facts["num_heads"], initialize=False
            )
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        raise InputError(f"{folder.plans} describes no FedCMT network ({error})", field="plans") from None
    named = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    check_same_tensors(named, tensors, source=weights)
    # A state dict also names modules that stand in two places; the file has each tensor once.
    names = {id(tensor): name for name, tensor in named.items()}
    state = {key: tensors[names[id(tensor)]] for key, tensor in network.state_dict(keep_vars=True).items()}
    network.load_state_dict(state, assign=True)
    return network.eval(), plans, dataset_json, facts


def export_nnunet_model(folder: ClientFolder, target: Path) -> None:
    """Write a client's model as an nnU-Net model folder, replacing an older one.

    Stock ``nnUNetv2_predict_from_modelfolder -f 0`` reads it wherever ``fedcmt`` can be imported (segmentation). The
    checkpoint holds four plain entries and loads with ``weights_only=True``; ``model.json`` names task and classes,
    which nnU-Net has no place for.
    """
    network, plans, dataset_json, facts = load_model(folder)
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    write_json(part / "plans.json", plans)
    # A list of training cases is of no use elsewhere and names the site's folders.
    write_json(part / "dataset.json", {key: value for key, value in dataset_json.items() if key != "dataset"})
    write_json(part / FACTS, facts)
    checkpoint = io.BytesIO()
    torch.save(
        {
            "network_weights": network.state_dict(),
            "trainer_name": "nnUNetTrainer",
            "init_args": {"configuration": configuration_name(plans)},
            "inference_allowed_mirroring_axes": tuple(facts["mirror_axes"]),
        },
        checkpoint,
    )
    write_bytes(part / "fold_0" / "checkpoint_final.pth", checkpoint.getvalue())
    shutil.rmtree(target, ignore_errors=True)
    os.replace(part, target)
