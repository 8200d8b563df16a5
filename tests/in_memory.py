"""A carrier without a network, where faults can be put in between, and clients that only pretend to train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from fedcmt.config import FederationConfig
from fedcmt.engines.coordinator import Coordinator
from fedcmt.engines.entries import Shares
from fedcmt.engines.messages import (
    Body,
    Close,
    Closed,
    Fit,
    Fitted,
    Message,
    NotHeld,
    Prepare,
    Prepared,
    Score,
    Scored,
    Shapes,
    TellShapes,
    unpack_header,
)
from fedcmt.engines.site import Site
from fedcmt.layout import FlatLayout
from fedcmt.network import build_network, parameters_of
from fedcmt.topology import TopologyContract

Before = Callable[[str, Message], Message | str | None]  # an answer instead, why there is none, or None to go on


class Answers(Protocol):
    def answer(self, message: Message) -> Message: ...

    def lose(self) -> None:
        """The process is killed."""


class PretendingSite:
    """Answers as a site does; its updates are random numbers of (client, round), its states are kept in a mapping."""

    def __init__(self, config: FederationConfig, name: str, disk: dict[tuple[str, int], bool]) -> None:
        self._settings = next(client for client in config.clients if client.name == name)
        self._name, self._disk = name, disk
        self._held: dict[str, Any] = {}

    def lose(self) -> None:
        self._held = {}

    def answer(self, message: Message) -> Message:
        message.check()
        body = message.body
        if isinstance(body, TellShapes):
            return Message(Shapes(num_cases=4, spacing=[3.0, 2.0, 2.0], median_shape=[40, 64, 64]))
        if isinstance(body, Prepare):
            return Message(self._prepared(body))
        if isinstance(body, Fit | Close):
            if message.tensors:
                self._held = dict(message.manifest())
            if self._held != (body.parameters or {}):
                return Message(NotHeld(round=body.round))
            return self._fitted(body) if isinstance(body, Fit) else Message(self._closed(body))
        assert isinstance(body, Score)
        return Message(Scored(entry=self._entry()))

    def _entry(self) -> dict[str, Any]:
        return {
            "client": self._name,
            "group": f"{self._settings.modality}-1",
            "task": "segmentation",
            "dataset": "Dataset800_Pretence",
            "modality": self._settings.modality,
            "num_channels": 1,
            "score_kind": "test",
            "model": {"round": 1, "stage": "local", "score": 0.5},
            "labels": {"organ": 1},
            "cases": [
                {"case": "a", "images": ["/etc/a.nii.gz"], "prediction": "/etc/p", "truth": "/etc/t", "scores": {}}
            ],
            "mean": {"organ": {"Dice": 0.5}},
        }

    def _prepared(self, body: Prepare) -> Prepared:
        network = build_network(TopologyContract(body.topology).architecture("segmentation"), 1, 2)
        return Prepared(
            task="segmentation",
            modality=self._settings.modality,
            channels=self._settings.channels or 1,
            num_cases=4,
            topology=body.digest,
            encoder_layout=FlatLayout.of(parameters_of(network, "encoder").items()).digest(),
            target="organ",
            outputs=[0],
            decoder_segments=None,
            decoder_size=None,
            notes=[],
        )

    def _fitted(self, body: Fit) -> Message:
        stands = max((r for name, r in self._disk if name == self._name and r <= body.after_round), default=0)
        generator = torch.Generator().manual_seed(hash((len(self._name), self._name[-1], body.round)) % 2**31)
        assert body.parameters is not None
        tensors = {p: torch.randn(entry.numel, generator=generator) for p, entry in body.parameters.items()}
        wired = {p: t.to(getattr(torch, body.reply_dtype)) for p, t in tensors.items()}
        return Message(Fitted(round=body.round, num_cases=4, went_on_from=stands), wired)

    def _closed(self, body: Close) -> Closed:
        self._disk[self._name, body.round] = True
        scores = {"score": 0.5, "loss": 1.0, "metric": "dice", "classes": {"organ": 0.5}}
        line = {
            "kind": "client",
            "round": body.round,
            "client": self._name,
            "group": f"{self._settings.modality}-1",
            "task": "segmentation",
            "phase": "training",
            "validated_on": "held-out cases",
            "num_cases": 4,
            "local_steps": 2,
            "train_loss": 0.5,
            "learning_rate": 0.01,
            "update_norm": 1.0,
            "participated": body.refused is None,
            "local": scores,
            "aggregated": scores,
            "best": {"round": 1, "stage": "local", "score": 0.5},
            "seconds": {"train": 1.0, "data_wait": 0.1, "validate": 0.1},
        }
        return Closed(line=line | ({"refused": body.refused} if body.refused else {}))


class RealSite:
    """A :class:`Site` in this process that scores nothing at the end, which would take longest."""

    def __init__(self, config: FederationConfig, name: str, shares: Shares | None = None) -> None:
        self._site = Site(config, name, shares=shares or "no", note=lambda text: None)
        self._scores = shares is not None

    def lose(self) -> None:
        self._site._lock.close()

    def answer(self, message: Message) -> Message:
        if isinstance(message.body, Score) and not self._scores:
            return Message(Scored(entry=None))
        return self._site.answer(message)


class InMemory:
    """Carries messages between a coordinator and sites, each as a header in JSON and copies of its tensors.

    Attributes:
        here: Who is connected.
        before: Looks at every message before a site does.
        after: Looks at every answer.
        asked: All messages.
    """

    def __init__(
        self,
        config: FederationConfig,
        clients: Sequence[str] | None = None,
        make: Callable[[FederationConfig, str], Answers] | None = None,
    ) -> None:
        disk: dict[tuple[str, int], bool] = _DISKS.setdefault(config.workspace_folder(), {})
        self._config = config
        self._make = make or (lambda config, name: PretendingSite(config, name, disk))
        self._sites: dict[str, Answers] = {}
        self._prepare: dict[str, Message] = {}
        self.here = list(clients or [client.name for client in config.clients])
        self.before: Before = lambda name, message: None
        self.after: Callable[[str, Message], Message | str] = lambda name, answer: answer
        self.asked: list[tuple[str, Message]] = []

    def expected(self) -> Sequence[str]:
        return self.here

    def connected(self) -> Sequence[str]:
        return self.here

    def ended(self) -> bool:
        return False

    def kill(self, name: str) -> None:
        """The client's trainer dies; a new one will be prepared as the old one was."""
        self._sites.pop(name).lose()

    def ask(
        self, requests: Mapping[str, Message], *, timeout: float, on_answer: Callable[[str, Message], None]
    ) -> Mapping[str, str]:
        missing: dict[str, str] = {}
        for name, message in sorted(requests.items()):
            self.asked.append((name, message))
            if isinstance(message.body, Prepare):
                self._prepare[name] = message
            answer = self.before(name, message)
            if answer is None:
                answer = self.after(name, through_wire(self._site(name).answer(through_wire(message))))
            if isinstance(answer, str):
                missing[name] = answer
            else:
                on_answer(name, answer)
        return missing

    def _site(self, name: str) -> Answers:
        if name not in self._sites:
            self._sites[name] = self._make(self._config, name)
            if name in self._prepare:
                self._sites[name].answer(self._prepare[name])
        return self._sites[name]

    def close(self) -> None:
        for name in list(self._sites):
            self.kill(name)


_DISKS: dict[Path, dict[tuple[str, int], bool]] = {}


def through_wire(message: Message) -> Message:
    """A message as it arrives."""
    body, announced = unpack_header(message.header())
    return Message(body, {name: tensor.clone() for name, tensor in message.tensors.items()}, announced)


def run(
    carrier: InMemory, config: FederationConfig, *, rounds: int | None = None
) -> tuple[str, list[str], Coordinator]:
    """Run to the end, or for one round.

    Returns:
        State, notes, coordinator.
    """
    notes: list[str] = []
    coordinator = Coordinator(config, carrier, notes.append)
    if rounds == 1:
        coordinator.stop_after_round()
    try:
        return coordinator.run(), notes, coordinator
    finally:
        carrier.close()


def of_kind(message: Message, kind: type[Body], round_index: int) -> bool:
    """Whether a message is of a kind and a round."""
    return isinstance(message.body, kind) and getattr(message.body, "round", None) == round_index
