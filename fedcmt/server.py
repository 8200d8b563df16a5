"""The server: sends shared parameters, takes updates, makes the step. Knows no engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcmt import ops
from fedcmt.errors import InputError, RunError
from fedcmt.exchange import ClientDescription, ClientUpdate, Outgoing
from fedcmt.files import copy_into, read_tensors, write_tensors
from fedcmt.layout import FlatLayout
from fedcmt.network import Part, build_network, parameters_of
from fedcmt.plans import TopologyContract
from fedcmt.seeding import derive_seed, seeded
from fedcmt.strategies import Strategy


class Server:
    """Shared parameters and the round's protocol: ``begin``, ``outgoing``, ``accept`` per update, ``finish``.

    Args:
        strategy: How updates become the next step.
        contract: The topology all clients must agree on.
        clients: Who takes part.
        seed: The federation's seed; gives the common start.
        device: Where the shared parameters live.
        backend: Of :mod:`fedcmt.ops`.

    Raises:
        InputError: A client has another topology.
    """

    def __init__(
        self,
        strategy: Strategy,
        contract: TopologyContract,
        clients: Sequence[ClientDescription],
        *,
        seed: int,
        device: torch.device,
        backend: ops.Backend = "auto",
    ) -> None:
        self._strategy, self._topology, self._device, self._backend = strategy, contract.digest(), device, backend
        self._clients = {client.name: client for client in clients}
        self._keys = {client.name: strategy.adaptor_key(client) for client in clients}
        self._encoder, layout = _initial_part(contract, 1, "encoder", seed, "encoder", device)
        for client in clients:
            self._check(client, layout)
        channels = {self._keys[client.name]: client.channels for client in clients}
        self._adaptors = {
            key: _initial_part(contract, count, "adaptor", seed, f"adaptor {key}", device)[0]
            for key, count in sorted(channels.items())
        }
        self._momentum = torch.zeros_like(self._encoder) if strategy.server_momentum > 0 else None
        self.round_index = 0  # the last finished round
        self._begun = 0
        self._accepted: dict[str, ClientUpdate] = {}  # in order of arrival
        self._gram: Tensor | None = None  # [N, N], inner products of the accepted encoder updates
        self._refused: dict[str, str] = {}
        self._started = 0.0

    def _check(self, client: ClientDescription, layout: FlatLayout) -> None:
        if client.topology != self._topology or client.encoder_layout != layout.digest():
            raise InputError(
                f"its network differs from the federation's: expected topology {self._topology[:12]}, "
                f"got {client.topology[:12]}",
                client=client.name,
                field="topology",
                fix="give every client the federation's topology",
            )

    def begin(self, round_index: int) -> None:
        """Open a round.

        Raises:
            ValueError: It is not the next one.
        """
        if round_index != self.round_index + 1:
            raise ValueError(f"round should be {self.round_index + 1}, found {round_index}")
        self._begun, self._started = round_index, time.perf_counter()
        self._accepted, self._refused, self._gram = {}, {}, None

    def outgoing(self, client: str) -> Outgoing | None:
        """What the client starts from or is scored with; None where nothing is exchanged any more."""
        if not self._strategy.federated and (self._begun > 1 or self.round_index >= 1):
            return None
        return Outgoing(self.round_index, self._encoder, self._adaptors[self._keys[client]])

    def accept(self, update: ClientUpdate) -> str | None:
        """Take an update, or say why not: wrong round, sent twice, wrong size or not finite.

        Returns:
            None, or the reason for refusing it; the client then counts as absent this round.
        """
        reason = self._fault(update)
        if reason is None:
            if self._strategy.federated:
                arrived = [other.encoder for other in self._accepted.values()]
                self._gram = ops.gramian_append(self._gram, arrived, update.encoder, backend=self._backend)
            self._accepted[update.client] = update
        elif update.client not in self._accepted:
            self._refused[update.client] = reason
        return reason

    def _fault(self, update: ClientUpdate) -> str | None:
        if update.client not in self._clients:
            return "not a client of this federation"
        if update.round_index != self._begun:
            return f"update of round {update.round_index} in round {self._begun}"
        if update.client in self._accepted:
            return "second update in this round"
        expected = {"encoder": self._encoder, "adaptor": self._adaptors[self._keys[update.client]]}
        for part, shared in expected.items():
            tensor = getattr(update, part)
            if tensor.shape != shared.shape or tensor.dtype != shared.dtype:
                return f"{part} update is {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(shared.shape)}"
            if ops.screen(tensor, backend=self._backend).nonfinite:
                return f"{part} update holds values that are not finite"
        return None

    def finish(self) -> dict[str, Any]:
        """Make the step with the accepted updates and close the round.

        Returns:
            The server's line of ``metrics.jsonl``.

        Raises:
            RunError: No update was accepted.
        """
        # The order of the clients' names, whatever order the updates arrived in.
        updates = [self._accepted[name] for name in sorted(self._accepted)]
        if not updates:
            refusals = "; ".join(f"{name}: {reason}" for name, reason in self._refused.items())
            raise RunError(f"round {self._begun}: no update was accepted ({refusals})")
        line = self._summary(updates)
        if self._strategy.federated:
            line |= self._step(updates)
        self.round_index = self._begun
        self._accepted, self._gram = {}, None
        return line | {"seconds": time.perf_counter() - self._started}

    def _summary(self, updates: Sequence[ClientUpdate]) -> dict[str, Any]:
        return {
            "kind": "server",
            "round": self._begun,
            "strategy": self._strategy.name,
            "clients": [update.client for update in updates],
            "weights": None,
            "cosines": None,
            "step_norm": None,
            "groups": {},
            "refused": dict(self._refused),
        }

    def _step(self, updates: Sequence[ClientUpdate]) -> dict[str, Any]:
        deltas = [update.encoder for update in updates]
        num_cases = torch.tensor([update.num_cases for update in updates])
        gram = self._sorted_gram(updates)
        weights = self._strategy.weights(gram, num_cases)
        stats = ops.server_step(
            self._encoder,
            self._momentum,
            deltas,
            weights,
            backend=self._backend,
            lr=self._strategy.server_learning_rate,
            beta=self._strategy.server_momentum,
        )
        if stats.nonfinite:
            raise RunError(f"round {self._begun}: {stats.nonfinite} values of the combined step are not finite")
        groups = self._step_adaptors(updates)
        return {"weights": weights.tolist(), "cosines": cosines(gram), "step_norm": stats.norm, "groups": groups}

    def _sorted_gram(self, updates: Sequence[ClientUpdate]) -> Tensor:
        """The Gram matrix, grown as updates arrived, in the order of the updates given; on the CPU."""
        assert self._gram is not None
        arrived = list(self._accepted)
        order = [arrived.index(update.client) for update in updates]
        return self._gram.cpu()[order][:, order]

    def _step_adaptors(self, updates: Sequence[ClientUpdate]) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for update in updates:
            groups.setdefault(self._keys[update.client], []).append(update.client)
        masks = [[update.client in members for update in updates] for members in groups.values()]
        cases = [update.num_cases for update in updates]
        means = ops.weighted_mean([update.adaptor for update in updates], cases, masks, backend=self._backend)
        for key, mean in zip(groups, means, strict=True):
            self._adaptors[key].add_(mean)
        return groups

    def _tensors(self) -> dict[str, Tensor]:
        momentum = {} if self._momentum is None else {"momentum": self._momentum}
        return {
            "encoder": self._encoder,
            **momentum,
            **{f"adaptor.{key}": adaptor for key, adaptor in self._adaptors.items()},
        }

    def save(self, path: Path) -> None:
        """Write the state after the last finished round, atomically."""
        write_tensors(
            path,
            self._tensors(),
            {"round": self.round_index, "topology": self._topology, "strategy": self._strategy.name},
        )

    def restore(self, path: Path) -> None:
        """Continue from a saved state.

        Raises:
            InputError: It is damaged or of another federation.
        """
        tensors, facts = read_tensors(path)
        if facts["topology"] != self._topology:
            raise InputError(
                f"{path} holds a federation of another topology",
                field="topology",
                fix="use another workspace, or --fresh to start over",
            )
        copy_into(self._tensors(), {name: t.to(self._device) for name, t in tensors.items()}, source=path)
        self.round_index = self._begun = facts["round"]


def cosines(gram: Tensor) -> list[list[float | None]]:
    """Cosines `[N, N]` of the updates; None where one is zero."""
    lengths = gram.diagonal().clamp_min(0).sqrt()
    table = gram / lengths[:, None] / lengths[None, :]
    return [[float(value) if torch.isfinite(value) else None for value in row] for row in table]


def _initial_part(
    contract: TopologyContract, channels: int, part: Part, seed: int, purpose: str, device: torch.device
) -> tuple[Tensor, FlatLayout]:
    with seeded(derive_seed(seed, purpose=f"initial {purpose}")):
        network = build_network(contract.architecture("segmentation"), channels, 2)
    parameters = parameters_of(network, part)
    layout = FlatLayout.of(parameters.items())
    return layout.bind(parameters, device), layout
