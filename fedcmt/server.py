"""The server: sends shared parameters, takes updates, makes the step. Knows no engine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcmt import ops
from fedcmt.errors import InputError, RunError
from fedcmt.exchange import PARTS, ClientDescription, ClientUpdate, Membership, Outgoing
from fedcmt.files import read_tensors, write_tensors
from fedcmt.initial_weights import Matched
from fedcmt.quarantine import Quarantine
from fedcmt.shared import SharedParts
from fedcmt.strategies import Strategy
from fedcmt.strategies.base import Combination, RoundUpdates
from fedcmt.topology import TopologyContract

_UPDATE_DTYPES = (torch.float32, torch.bfloat16)  # as they arrive; parameters are float32


class Server:
    """Shared parameters and the round's protocol: ``begin``, ``outgoing``, ``accept`` per update, ``finish``.

    Args:
        strategy: How updates become the next step.
        contract: The topology all clients must agree on.
        clients: Who takes part, those included who join later.
        seed: The federation's seed; gives the common start.
        rounds: Of the whole federation; schedules end there.
        initial_weights: Tensors that the common start takes where name and shape match; see ``matched``.
        quarantine_ratio: Updates larger by this factor than the median of the others' are not used; None for no limit.
        device: Where the shared parameters live.
        backend: Of :mod:`fedcmt.ops`.
        one_process: All clients stand in this process, so that strategies may pool their data.

    Raises:
        InputError: A client has another topology, or the strategy fits neither the clients nor the engine.
    """

    def __init__(
        self,
        strategy: Strategy,
        contract: TopologyContract,
        clients: Sequence[ClientDescription],
        *,
        seed: int,
        rounds: int,
        device: torch.device,
        backend: ops.Backend = "auto",
        quarantine_ratio: float | None = None,
        initial_weights: Mapping[str, Tensor] | None = None,
        one_process: bool = False,
    ) -> None:
        if strategy.pooled and not one_process:
            raise InputError(
                f"strategy '{strategy.name}' pools all clients' data, which never leave them here",
                field="strategy",
                fix="run it in one process with fedcmt run or fedcmt compare, or choose a federated strategy",
            )
        self._strategy, self._topology, self._seed, self._rounds = strategy, contract.digest(), seed, rounds
        self._backend: ops.Backend = backend
        self._device = device
        self._clients = {client.name: client for client in sorted(clients, key=lambda c: c.name)}
        self._sends_decoder = {client.name: strategy.sends_decoder(client, clients) for client in clients}
        self._shared = SharedParts(
            strategy,
            contract,
            clients,
            seed=seed,
            device=device,
            backend=backend,
            initial_weights=initial_weights,
        )
        strategy.check([client.name for client in clients])
        for client in clients:
            self._check(client)
        self.round_index = 0  # the last finished round
        self._begun = 0
        self._members: dict[str, ClientDescription] = {}
        self._accepted: dict[str, ClientUpdate] = {}
        self._refused: dict[str, str] = {}
        self._gram: Tensor | None = None
        self._rows: list[str] = []  # clients whose updates the Gram matrix holds
        self._started = 0.0
        self._quarantine = Quarantine(quarantine_ratio)

    def _check(self, client: ClientDescription) -> None:
        if client.topology != self._topology or client.encoder_layout != self._shared.layout.digest():
            raise InputError(
                f"its network differs from the federation's: expected topology {self._topology[:12]}, "
                f"got {client.topology[:12]}",
                client=client.name,
                field="topology",
                fix="give every client the federation's topology",
            )

    @property
    def pooled(self) -> bool:
        """Whether the strategy trains one model on all clients' data."""
        return self._strategy.pooled

    @property
    def remarks(self) -> list[str]:
        """What whoever runs the federation should know, in lines."""
        return self._strategy.remarks(list(self._clients.values()))

    @property
    def matched(self) -> Mapping[str, Matched]:
        """Encoder and adaptors -> what they took from the initial weights."""
        return self._shared.matched

    def begin(self, round_index: int) -> None:
        """Open a round.

        Raises:
            ValueError: It is not the next one.
        """
        if round_index != self.round_index + 1:
            raise ValueError(f"round should be {self.round_index + 1}, found {round_index}")
        self._begun, self._started = round_index, time.perf_counter()
        self._accepted, self._refused = {}, {}
        self._gram, self._rows = None, []
        self._quarantine.begin()
        self._members = {n: c for n, c in self._clients.items() if c.membership.takes_part(round_index)}
        if self._strategy.federated:
            for client in self._members.values():
                if client.membership.joins_at_round == round_index > 1:
                    self._shared.welcome(client)

    def outgoing(self, client: str) -> Outgoing | None:
        """What the client starts from or is scored with; None where nothing is exchanged any more."""
        first = self._clients[client].membership.joins_at_round
        if not self._strategy.federated and (self._begun > first or self.round_index >= first):
            return None
        shared = self._shared
        return Outgoing(
            self.round_index,
            shared.encoder(client),
            shared.adaptor(client),
            shared.decoder(client),
            self._trained(client),
            self._sends_decoder[client],
        )

    def _trained(self, client: str) -> tuple[str, ...]:
        if not self._strategy.federated or not self._warms_up(client):
            return PARTS
        return ("adaptor", "decoder") if self._has_new_adaptor(client) else ("decoder",)

    def _warms_up(self, client: str) -> bool:
        return self._clients[client].membership.warms_up(self._begun)

    def _has_new_adaptor(self, client: str) -> bool:
        """Whether nobody has trained its adaptor, and all who share it now are warming up."""
        keys = self._shared.adaptor_keys
        sharing = [name for name in self._members if keys[name] == keys[client]]
        return keys[client] not in self._shared.trained_adaptors and all(map(self._warms_up, sharing))

    def accept(self, update: ClientUpdate) -> str | None:
        """Take an update, wherever its tensors are, or say why not: wrong round, sent twice, wrong size or not finite.

        Returns:
            None, or the reason for refusing it; the client then counts as absent this round.
        """
        update = update.to(self._device)
        reason = self._fault(update)
        if reason is None:
            self._accepted[update.client] = update
            self._refused.pop(update.client, None)
            self._grow_gram(wait=True)
        elif update.client not in self._accepted:
            self._refused[update.client] = reason
        return reason

    def _fault(self, update: ClientUpdate) -> str | None:
        if update.client not in self._clients:
            return "not a client of this federation"
        if update.round_index != self._begun:
            return f"update of round {update.round_index} in round {self._begun}"
        if update.client not in self._members:
            return f"takes no part in round {self._begun}"
        if update.client in self._accepted:
            return "second update in this round"
        expected = {"encoder": self._shared.encoder(update.client), "adaptor": self._shared.adaptor(update.client)}
        layout = self._clients[update.client].decoder_layout
        if self._sends_decoder[update.client] and layout is not None:
            expected["decoder"] = expected["encoder"].new_empty(layout.size, device="meta")
            if self._shared.decoder(update.client) is None:
                expected["decoder_start"] = expected["decoder"]
        elif update.decoder is not None:
            return "decoder update was not asked for"
        for part, shared in expected.items():
            tensor = getattr(update, part)
            dtypes = self._encoder_dtypes() if part == "encoder" else (shared.dtype,)
            if tensor is None or tensor.shape != shared.shape or tensor.dtype not in dtypes:
                found = "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
                return f"{part} update is {found}, expected {tuple(shared.shape)} {dtypes[0]}"
            stats = ops.screen(tensor, backend=self._backend)
            if stats.nonfinite:
                return f"{part} update holds values that are not finite"
            self._quarantine.note(part, update.client, stats, tensor.numel())
        return None

    def _encoder_dtypes(self) -> tuple[torch.dtype, ...]:
        """Types that an encoder's update may have: of one round all have the same, so that they combine."""
        seen = tuple(update.encoder.dtype for update in self._accepted.values())
        return seen[:1] or _UPDATE_DTYPES

    @property
    def refused(self) -> Mapping[str, str]:
        """Why updates of the round were not used, by client."""
        return self._refused

    def refuse(self, client: str, reason: str) -> None:
        """Record why an update that cannot even be read is not used."""
        if client not in self._accepted:
            self._refused[client] = reason

    def membership(self, client: str) -> Membership:
        """When a client belongs to the federation."""
        return self._clients[client].membership

    @property
    def members(self) -> Sequence[str]:
        """Who belongs to the federation in the round that was begun."""
        return list(self._members)

    @property
    def accepted(self) -> Sequence[str]:
        """Whose updates of the round have been taken so far."""
        return sorted(self._accepted)

    def set_aside(self) -> None:
        """Refuse updates that are out of all proportion to the others."""
        for name, reason in self._quarantine.outsized(sorted(self._accepted)).items():
            del self._accepted[name]
            self._refused[name] = reason
            if name in self._rows:
                kept = torch.tensor([i for i, row in enumerate(self._rows) if row != name], dtype=torch.long)
                self._rows.remove(name)
                if self._gram is not None:
                    kept = kept.to(self._gram.device)
                    self._gram = self._gram.index_select(-1, kept).index_select(-2, kept).contiguous()

    def _grow_gram(self, *, wait: bool) -> None:
        """Add rows in the order of the clients' names, so that no bit depends on the order of arrival.

        Args:
            wait: Stop before a client whose update may still come.
        """
        if not self._strategy.federated:
            return
        for name in self._members:
            if name in self._rows or self._warms_up(name):
                continue
            if name not in self._accepted:
                if wait:
                    return
                continue
            deltas = [self._accepted[row].encoder for row in self._rows]
            self._gram = self._shared.grow_gram(self._gram, deltas, self._accepted[name].encoder)
            self._rows.append(name)

    def finish(self) -> dict[str, Any]:
        """Make the step with the accepted updates and close the round.

        Returns:
            The server's line of ``metrics.jsonl``.

        Raises:
            RunError: No update was accepted.
        """
        self.set_aside()
        if not self._accepted:
            refusals = "; ".join(f"{name}: {reason}" for name, reason in self._refused.items())
            raise RunError(f"round {self._begun}: no update was accepted ({refusals})")
        self._grow_gram(wait=False)
        line = self._summary()
        if self._strategy.federated:
            line |= self._step()
        self.round_index = self._begun
        self._quarantine.remember(sorted(self._accepted))
        self._accepted, self._gram = {}, None
        return line | {"seconds": time.perf_counter() - self._started}

    def _summary(self) -> dict[str, Any]:
        names = sorted(self._accepted)
        warming = [name for name in names if self._strategy.federated and self._warms_up(name)]
        return {
            "kind": "server",
            "round": self._begun,
            "strategy": self._strategy.name,
            "members": list(self._members),
            "clients": [name for name in names if name not in warming],
            "warming_up": warming,
            "weights": None,
            "cosines": None,
            "step_norm": None,
            "groups": {},
            "refused": dict(self._refused),
        }

    def _step(self) -> dict[str, Any]:
        counted = [self._accepted[name] for name in self._rows]
        line = self._step_encoders(counted) if counted else {}
        keys = self._shared.adaptor_keys
        warming = [self._accepted[name] for name in sorted(self._accepted) if self._warms_up(name)]
        adaptors = counted + [update for update in warming if self._has_new_adaptor(update.client)]
        if adaptors:
            line["groups"] = self._shared.step_adaptors(adaptors)
        self._shared.trained_adaptors |= {keys[update.client] for update in counted}
        self._shared.step_decoders(counted, warming)
        return line

    def _step_encoders(self, counted: Sequence[ClientUpdate]) -> dict[str, Any]:
        assert self._gram is not None
        deltas = [update.encoder for update in counted]
        keys, gram = self._shared.encoder_keys, self._gram.cpu()
        updates = RoundUpdates(
            seed=self._seed,
            round_index=self._begun,
            clients=tuple(self._clients[update.client] for update in counted),
            members=tuple(self._members.values()),
            targets=tuple(sorted({keys[name] for name in self._members})),
            gram=gram,
            along_kept=self._shared.along_kept(self._gram, deltas),
        )
        combination = self._strategy.combine(updates)
        optimizer = self._strategy.server_optimizer(self._begun, self._rounds)
        stats = self._shared.step_encoders(updates.targets, deltas, combination, optimizer, self._gram)
        nonfinite = sum(one.nonfinite for one in stats)
        if nonfinite:
            raise RunError(f"round {self._begun}: {nonfinite} values of the combined step are not finite")
        self._shared.trained_encoders |= {keys[update.client] for update in counted}
        norms = dict(zip(updates.targets, [one.norm for one in stats], strict=True))
        return _weights_line(updates.targets, combination) | {
            "cosines": cosines(updates.total_gram),
            "step_norm": sum(norms.values()) / len(norms),
            "step_norms": norms,
            "server_learning_rate": optimizer.lr,
        }

    def save(self, path: Path) -> None:
        """Write the state after the last finished round, atomically."""
        write_tensors(
            path,
            self._shared.tensors(),
            {
                "round": self.round_index,
                "topology": self._topology,
                "strategy": self._strategy.name,
                "trained_encoders": sorted(self._shared.trained_encoders),
                "trained_adaptors": sorted(self._shared.trained_adaptors),
                "usual_sizes": self._quarantine.usual,
            },
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
        self._shared.restore(tensors, facts["round"], source=path)
        self._shared.trained_encoders = set(facts["trained_encoders"])
        self._shared.trained_adaptors = set(facts["trained_adaptors"])
        self._quarantine.usual = facts.get("usual_sizes", {})
        self.round_index = self._begun = facts["round"]


def _weights_line(targets: Sequence[str], combination: Combination) -> dict[str, Any]:
    """One weight a client where all share an encoder; else a row for each encoder, by stage where asked."""
    weights = combination.weights
    if weights.dim() == 1:
        return {"weights": weights.tolist()}
    return {"weights_by_encoder": dict(zip(targets, weights.tolist(), strict=True))}


def cosines(gram: Tensor) -> list[list[float | None]]:
    """Cosines `[N, N]` of the updates; None where one is zero."""
    lengths = gram.diagonal().clamp_min(0).sqrt()
    table = gram / lengths[:, None] / lengths[None, :]
    return [[float(value) if torch.isfinite(value) else None for value in row] for row in table]
