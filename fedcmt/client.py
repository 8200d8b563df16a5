"""One client: describe, fit, evaluate. Knows no engine; its decoder and optimizer never leave its folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedcmt.checkpoint import ClientFolder
from fedcmt.config import ClientConfig, FederationConfig
from fedcmt.exchange import ClientDescription, ClientUpdate, Outgoing
from fedcmt.files import read_tensors, write_tensors
from fedcmt.initial_weights import Matched, start_from
from fedcmt.objective import Validation
from fedcmt.plans import ClientPlan
from fedcmt.topology import contract_digest
from fedcmt.trainer import Trainer


class Client:
    """A site with its data, network and best model.

    Args:
        config: The client's settings.
        federation: The federation's.
        plan: The client's plan with the topology contract.
        folder: Where its files go.
        device: Where it trains.
    """

    def __init__(
        self,
        config: ClientConfig,
        federation: FederationConfig,
        plan: ClientPlan,
        folder: ClientFolder,
        device: torch.device,
    ) -> None:
        self.name, self.plan, self._folder = config.name, plan, folder
        self._steps = config.local_steps or federation.training.local_steps
        self._trainer = Trainer(
            plan, federation.training, client=config.name, seed=federation.seed, rounds=federation.rounds, device=device
        )
        self._topology = contract_digest(plan.architecture)
        self._best: Validation | None = None
        self._best_facts: dict[str, Any] = {}
        self._best_model: dict[str, Tensor] | None = None  # of this round, until saved
        self._line: dict[str, Any] = {}

    def describe(self) -> ClientDescription:
        """What the server must know."""
        modality, channels = self.plan.group.rsplit("-", 1)
        return ClientDescription(
            self.name,
            self.plan.task,
            modality,
            int(channels),
            len(self.plan.train),
            self._topology,
            self._trainer.encoder_layout.digest(),
        )

    def start_from(self, weights: Mapping[str, Tensor]) -> Matched:
        """Start the personal part from a checkpoint; encoder and adaptor come from the server."""
        return start_from(self._trainer.network, weights, ["decoder"])

    def fit(
        self, outgoing: Outgoing | None, round_index: int, on_step: Callable[[str, int, int, float], None]
    ) -> ClientUpdate:
        """Train locally from the received parameters, and validate the result.

        Args:
            outgoing: Shared parameters; None to go on from the client's own.
            round_index: 1 for the first.
            on_step: Called with client, step, number of steps and loss.

        Returns:
            The update: local minus received parameters.
        """
        self._receive(outgoing)
        encoder, adaptor = self._trainer.encoder.clone(), self._trainer.adaptor.clone()
        fitted = self._trainer.fit(
            round_index, self._steps, lambda step, loss: on_step(self.name, step, self._steps, loss)
        )
        torch.sub(self._trainer.encoder, encoder, out=encoder)
        torch.sub(self._trainer.adaptor, adaptor, out=adaptor)
        local, seconds = self._validate("local", round_index)
        self._line = {
            "kind": "client",
            "round": round_index,
            "client": self.name,
            "group": self.plan.group,
            "task": self.plan.task,
            "validated_on": "training cases" if self.plan.validates_on_training else "held-out cases",
            "num_cases": len(self.plan.train),
            "local_steps": fitted.steps,
            "train_loss": fitted.loss,
            "learning_rate": fitted.learning_rate,
            "update_norm": float(encoder.norm()),
            "local": local,
            "seconds": {"train": fitted.seconds, "data_wait": fitted.data_wait, "validate": seconds},
        }
        return ClientUpdate(self.name, round_index, len(self.plan.train), encoder, adaptor)

    def evaluate(self, outgoing: Outgoing | None, refused: str | None = None) -> dict[str, Any]:
        """Validate with the server's new parameters and close the round.

        Args:
            outgoing: Shared parameters after the round; None where nothing is exchanged.
            refused: Why the server did not use this client's update.

        Returns:
            The client's line of ``metrics.jsonl``.
        """
        line = self._line | {"participated": refused is None} | ({"refused": refused} if refused else {})
        if outgoing is not None:
            self._receive(outgoing)
            line["aggregated"], seconds = self._validate("aggregated", line["round"])
            line["seconds"] = line["seconds"] | {"validate": line["seconds"]["validate"] + seconds}
        return line | {"best": dict(self._best_facts)}

    def _receive(self, outgoing: Outgoing | None) -> None:
        if outgoing is not None:
            self._trainer.encoder.copy_(outgoing.encoder)
            self._trainer.adaptor.copy_(outgoing.adaptor)

    def _validate(self, stage: str, round_index: int) -> tuple[dict[str, Any], float]:
        started = time.perf_counter()
        result = self._trainer.validate()
        if result.better_than(self._best):
            self._best = result
            self._best_facts = {"round": round_index, "stage": stage, "score": result.score}
            self._best_model = {name: tensor.clone() for name, tensor in self._trainer.model().items()}
        return result.as_json(), time.perf_counter() - started

    def save(self, round_index: int) -> None:
        """Write what resuming needs, then the models. Not committed until the server's state is written."""
        facts = {"client": self.name, "round": round_index, "topology": self._topology}
        best = None if self._best is None else self._best.as_json()
        write_tensors(
            self._folder.state(round_index),
            self._trainer.state(),
            facts | {"best": best, "best_facts": self._best_facts},
        )
        if self._best_model is not None:
            write_tensors(self._folder.best, self._best_model, facts | self._best_facts)
            self._best_model = None
        model = self._trainer.model()
        write_tensors(self._folder.last, model, facts)
        decoder = {name: tensor for name, tensor in model.items() if name.startswith("decoder.")}
        write_tensors(self._folder.decoder, decoder, facts)

    def restore(self, round_index: int) -> None:
        """Continue after a saved round.

        Raises:
            InputError: The state is damaged or of another network.
        """
        path = self._folder.state(round_index)
        tensors, facts = read_tensors(path)
        self._trainer.restore(tensors, source=path)
        self._best = None if facts["best"] is None else Validation.from_json(facts["best"])
        self._best_facts = facts["best_facts"]
