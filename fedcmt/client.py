"""One client: describe, fit, evaluate. Knows no engine; its optimizer never leaves its folder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedcmt import ops
from fedcmt.checkpoint import ClientFolder
from fedcmt.config import ClientConfig, FederationConfig
from fedcmt.errors import InputError
from fedcmt.exchange import PARTS, ClientDescription, ClientUpdate, Outgoing
from fedcmt.files import read_tensors, write_tensors
from fedcmt.initial_weights import Matched, start_from
from fedcmt.layout import FlatLayout, Segment
from fedcmt.objective import Objective, Validation
from fedcmt.plans import ClientPlan
from fedcmt.strategies.client_work import ClientWork
from fedcmt.strategies.matching import part
from fedcmt.topology import contract_digest
from fedcmt.trainer import FitResult, Trainer

_SHARE_STEP = 0.25  # by which a learned share may change in a round


class Client:
    """A site with its data, network and best model.

    Attributes:
        steps: Local steps a round.
        trainer: Holds its network.

    Args:
        config: The client's settings.
        federation: The federation's.
        plan: The client's plan with the topology contract.
        folder: Where its files go.
        device: Where it trains.
        work: What the strategy asks of clients.
    """

    def __init__(
        self,
        config: ClientConfig,
        federation: FederationConfig,
        plan: ClientPlan,
        folder: ClientFolder,
        device: torch.device,
        work: ClientWork | None = None,
    ) -> None:
        self.name, self.plan, self._folder = config.name, plan, folder
        self.membership = config.membership
        self._target = config.target or target_of(plan)
        self.steps = config.local_steps or federation.training.local_steps
        self._work = work or ClientWork()
        if self._work.decoder_steps >= self.steps:
            raise InputError(
                f"{self._work.decoder_steps} steps of the decoder alone leave none of {self.steps} local steps",
                client=config.name,
                field="strategy.decoder_steps",
                fix="use fewer",
            )
        self.trainer = self._new_trainer(config, federation, self._work, device)
        self._personal: Trainer | None = None
        if self._work.personal is not None:
            proximal = ClientWork(proximal=self._work.personal)
            self._personal = self._new_trainer(config, federation, proximal, device, self.trainer.objective)
        self._topology = contract_digest(plan.architecture)
        self._best: Validation | None = None
        self._best_facts: dict[str, Any] = {}
        self._last_facts: dict[str, Any] = {}
        self._best_model: dict[str, Tensor] | None = None  # of this round, until saved
        self._local: Validation | None = None  # of this round's local training
        self._began: dict[str, Tensor] = {}  # the parts that travel, before it
        self._own_share = 0.0  # of its own model in the one that it goes on from; the rest is the server's
        self._line: dict[str, Any] = {}

    def _new_trainer(
        self,
        config: ClientConfig,
        federation: FederationConfig,
        work: ClientWork,
        device: torch.device,
        objective: Objective | None = None,
    ) -> Trainer:
        return Trainer(
            self.plan,
            federation.training,
            client=config.name,
            seed=federation.seed,
            rounds=federation.rounds,
            device=device,
            work=work,
            data=federation.data,
            objective=objective,
        )

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
            self.trainer.encoder_layout.digest(),
            self._target,
            outputs_of(self.plan),
            self.trainer.decoder_layout,
            self.membership,
        )

    @property
    def layouts(self) -> dict[str, FlatLayout]:
        """Of the parts of an update: which parameter stands where."""
        return {name: layout for name, (_, layout) in self.trainer.exchanged.items()}

    def start_from(self, weights: Mapping[str, Tensor]) -> Matched:
        """Start the client's own decoder from a checkpoint; encoder and adaptor come from the server."""
        if self._personal is not None:
            start_from(self._personal.network, weights, ["decoder"])
        return start_from(self.trainer.network, weights, ["decoder"])

    def fit(
        self, outgoing: Outgoing | None, round_index: int, on_step: Callable[[str, int, int, float], None]
    ) -> ClientUpdate:
        """Train locally from the received parameters, and validate the result.

        Args:
            outgoing: Shared parameters; None to go on from the client's own.
            round_index: 1 for the first.
            on_step: Called with client, step, number of steps and loss.

        Returns:
            The update: what local training changed.
        """
        self.begin(outgoing)
        fitted = self.trainer.fit(
            round_index, self.steps, lambda step, loss: on_step(self.name, step, self.steps, loss)
        )
        return self.finish(fitted, round_index, outgoing)

    def begin(self, outgoing: Outgoing | None) -> None:
        """Receive what local training starts from; None for the client's own."""
        if outgoing is not None:
            if not self._own_share:
                self._receive(outgoing)
            self.trainer.receive(outgoing.encoder, outgoing.adaptor)
            self.trainer.trained = outgoing.trained
        self._began = {name: ops.copy_buffer(flat) for name, (flat, _) in self.trainer.exchanged.items()}

    def finish(self, fitted: FitResult, round_index: int, outgoing: Outgoing | None) -> ClientUpdate:
        """Validate what training made, and train the personal model where there is one.

        Args:
            fitted: What training reported.
            round_index: Its round.
            outgoing: As in :meth:`begin`.

        Returns:
            The update: what training changed since :meth:`begin`.
        """
        update, self._began = self._began, {}
        start = None
        if outgoing is None or not outgoing.sends_decoder:
            update.pop("decoder", None)
        elif outgoing.decoder is None:
            start = update["decoder"].clone()
        for name, began in update.items():
            flat, layout = self.trainer.exchanged[name]
            torch.sub(flat, began, out=began)
            for segment in self._local_segments(layout):
                part(began, segment).zero_()
        self._local, seconds = self._validate("local", round_index)
        self._line = self._fit_line(round_index, fitted, update["encoder"]) | {
            "local": self._local.as_json(),
            "seconds": {**_seconds(fitted), "validate": seconds},
        }
        if outgoing is not None and self._personal is not None:
            self._fit_personal(self._personal, outgoing, round_index)
        return ClientUpdate(self.name, round_index, len(self.plan.train), **update, decoder_start=start)

    def _fit_line(self, round_index: int, fitted: FitResult, update: Tensor) -> dict[str, Any]:
        return {
            "kind": "client",
            "round": round_index,
            "client": self.name,
            "group": self.plan.group,
            "task": self.plan.task,
            "phase": "warm-up" if self.trainer.trained != PARTS else "training",
            "validated_on": "training cases" if self.plan.validates_on_training else "held-out cases",
            "num_cases": len(self.plan.train),
            "local_steps": fitted.steps,
            "train_loss": fitted.loss,
            "learning_rate": fitted.learning_rate,
            "update_norm": float(update.norm()),
        }

    def _fit_personal(self, trainer: Trainer, outgoing: Outgoing, round_index: int) -> None:
        if round_index == self.membership.joins_at_round:  # it begins as the shared model does
            trainer.encoder.copy_(outgoing.encoder)
            trainer.adaptor.copy_(outgoing.adaptor)
        trainer.receive(outgoing.encoder, outgoing.adaptor)
        trainer.trained = outgoing.trained
        fitted = trainer.fit(round_index, self._work.personal_steps or self.steps, lambda step, loss: None)
        personal, seconds = self._validate("personal", round_index)
        self._line |= {"personal": personal.as_json(), "personal_steps": fitted.steps}
        for activity, spent in {**_seconds(fitted), "validate": seconds}.items():
            self._line["seconds"][activity] += spent

    def evaluate(self, outgoing: Outgoing | None, refused: str | None = None) -> dict[str, Any]:
        """Validate with the server's new parameters and close the round.

        Args:
            outgoing: Shared parameters after the round; None where nothing is exchanged.
            refused: Why the server did not use this client's update.

        Returns:
            The client's line of ``metrics.jsonl``.
        """
        counts = refused is None and self._line["phase"] == "training"
        line = self._line | {"participated": counts} | ({"refused": refused} if refused else {})
        if outgoing is not None:
            adopts = self._work.adoption != "always"
            own = self._exchanged_copies() if adopts else {}
            self._receive(outgoing)
            aggregated, seconds = self._validate("aggregated", line["round"])
            line["aggregated"] = aggregated.as_json()
            if adopts:
                adopted, share, more = self._adopt(own, aggregated, line["round"])
                line |= {"adopted": adopted.as_json(), "own_share": share}
                seconds += more
            line["seconds"] = line["seconds"] | {"validate": line["seconds"]["validate"] + seconds}
        return line | {"best": dict(self._best_facts)}

    def _adopt(
        self, own: Mapping[str, Tensor], aggregated: Validation, round_index: int
    ) -> tuple[Validation, float, float]:
        """Take the best of the server's model, the client's own and, where asked for, means of both.

        Returns:
            Its validation, the share of the client's own model in it, and the seconds spent.
        """
        assert self._local is not None
        server = self._exchanged_copies()
        seen, seconds = {0.0: aggregated, 1.0: self._local}, 0.0
        for share in set(self._shares()) - set(seen):
            self._blend(server, own, share)
            seen[share], more = self._validate("mixed", round_index)
            seconds += more
        candidates = [(share, seen[share]) for share in self._shares()]
        best = candidates[0]
        for candidate in candidates[1:]:
            if self._prefers(candidate[1], best[1]):
                best = candidate
        self._own_share = best[0]
        self._blend(server, own, self._own_share)
        stage = {0.0: "aggregated", 1.0: "local"}.get(self._own_share, "mixed")
        self._last_facts = {"round": round_index, "stage": stage, "score": best[1].score}
        return best[1], self._own_share, seconds

    def _shares(self) -> tuple[float, ...]:
        """Shares of its own model that a client may take, the server's model first."""
        if self._work.adoption != "learned":
            return (0.0, 0.5, 1.0) if self._work.adoption == "mixed" else (0.0, 1.0)
        steps = (self._own_share + step for step in (-_SHARE_STEP, 0.0, _SHARE_STEP))
        return tuple(share for share in steps if 0 <= share <= 1)

    def _prefers(self, one: Validation, other: Validation) -> bool:
        if self._work.adoption != "learned":
            return one.better_than(other)
        # Scores of a few cases jump; the loss tells neighbouring shares apart.
        return one.loss < other.loss or math.isfinite(one.loss) > math.isfinite(other.loss)

    def _exchanged_copies(self) -> dict[str, Tensor]:
        return {name: flat.clone() for name, (flat, _) in self.trainer.exchanged.items()}

    def _blend(self, server: Mapping[str, Tensor], own: Mapping[str, Tensor], share: float) -> None:
        for name, (flat, _) in self.trainer.exchanged.items():
            torch.lerp(server[name], own[name], share, out=flat)

    def _local_segments(self, layout: FlatLayout) -> list[Segment]:
        return [s for s in layout.segments if any(mark in s.name for mark in self._work.stays_local)]

    def _receive(self, outgoing: Outgoing) -> None:
        for name, (flat, layout) in self.trainer.exchanged.items():
            value = getattr(outgoing, name)
            if value is None:
                continue
            kept = [(segment, part(flat, segment).clone()) for segment in self._local_segments(layout)]
            flat.copy_(value)
            for segment, own in kept:
                part(flat, segment).copy_(own)

    def _validate(self, stage: str, round_index: int) -> tuple[Validation, float]:
        started = time.perf_counter()
        trainer = self.trainer if stage != "personal" or self._personal is None else self._personal
        result = trainer.validate()
        # A client with a personal model uses no other.
        if trainer is self._final:
            self._last_facts = {"round": round_index, "stage": stage, "score": result.score}
            if result.better_than(self._best):
                self._best, self._best_facts = result, self._last_facts
                self._best_model = {name: tensor.clone() for name, tensor in trainer.model().items()}
        return result, time.perf_counter() - started

    @property
    def _final(self) -> Trainer:
        """Holds the model that the client uses."""
        return self._personal or self.trainer

    def save(self, round_index: int) -> None:
        """Write what resuming needs, then the models. Not committed until the server's state is written."""
        facts = {"client": self.name, "round": round_index, "topology": self._topology}
        best = None if self._best is None else self._best.as_json()
        state = self.trainer.state()
        if self._personal is not None:
            state |= {f"personal.{name}": tensor for name, tensor in self._personal.state().items()}
        write_tensors(
            self._folder.state(round_index),
            state,
            facts | {"best": best, "best_facts": self._best_facts, "own_share": self._own_share},
        )
        if not self.membership.takes_part(round_index):
            return  # it has left; its models are written
        if self._best_model is not None:
            write_tensors(self._folder.best, self._best_model, facts | self._best_facts)
            self._best_model = None
        model = self._final.model()
        write_tensors(self._folder.last, model, facts | self._last_facts)
        decoder = {name: tensor for name, tensor in model.items() if name.startswith("decoder.")}
        write_tensors(self._folder.decoder, decoder, facts)

    def restore(self, round_index: int) -> None:
        """Continue after a saved round.

        Raises:
            InputError: The state is damaged or of another network.
        """
        path = self._folder.state(round_index)
        tensors, facts = read_tensors(path)
        if self._personal is not None:
            personal = {k.removeprefix("personal."): t for k, t in tensors.items() if k.startswith("personal.")}
            self._personal.restore(personal, source=path)
        self.trainer.restore({k: t for k, t in tensors.items() if not k.startswith("personal.")}, source=path)
        self._best = None if facts["best"] is None else Validation.from_json(facts["best"])
        self._best_facts, self._own_share = facts["best_facts"], facts["own_share"]


def _seconds(fitted: FitResult) -> dict[str, float]:
    return {"train": fitted.seconds, "data_wait": fitted.data_wait, "data_work": fitted.data_work}


def target_of(plan: ClientPlan) -> str:
    """What a client predicts, by the names of its labels or classes."""
    return "+".join(sorted(_output_names(plan)))


def outputs_of(plan: ClientPlan) -> tuple[int, ...]:
    """Place of each output's name among all of them in the order of names, from the first output on.

    Equal for clients of equal target whose outputs mean the same.
    """
    names = _output_names(plan)
    return tuple(sorted(names).index(name) for name in names)


def _output_names(plan: ClientPlan) -> list[str]:
    """Classes or labels without background, from the first output on."""
    if plan.task == "classification":
        return list(plan.dataset.class_names or ())
    labels = {name: value for name, value in plan.dataset.labels.items() if name not in ("background", "ignore")}
    # Plain labels are outputs by their value, regions as they stand.
    return list(labels) if plan.dataset.regions_class_order else sorted(labels, key=lambda name: labels[name])
