"""Training on all clients' data at once, as if they stood in one place: strategy ``joint``.

The upper reference that a federation is measured against. Clients hold the same encoder, those of a group the same
adaptor, those of equal task and target the same decoder, and one optimizer steps them all. In a round each client's
data are visited for as many batches as in a federation, one optimizer step a batch, in an order drawn anew: a decoder
of one client makes as many steps as it would alone, the encoder as many as all clients together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from fedcmt.client import Client
from fedcmt.config import ClientConfig
from fedcmt.errors import InputError
from fedcmt.exchange import ClientUpdate, Outgoing
from fedcmt.network import Part
from fedcmt.seeding import derive_seed
from fedcmt.trainer import Trainer


def check_clients(clients: Sequence[ClientConfig]) -> None:
    """Look whether all clients take part from the first round.

    Raises:
        InputError: One joins later.
    """
    for client in clients:
        if client.joins_at_round > 1:
            raise InputError(
                "strategy 'joint' trains all clients from the first round",
                client=client.name,
                field="joins_at_round",
                fix="leave it out, or use another strategy",
            )


def pool(clients: Sequence[Client]) -> None:
    """Give the clients the same parameters where they are to share them, and one optimizer.

    Running statistics of batch norm stay with each client, as in a federation.
    """
    owners: dict[tuple[Part, Any], Trainer] = {}
    for client in clients:
        keys: dict[Part, Any] = {"encoder": None, "adaptor": client.plan.group, "decoder": _job(client)}
        for part, key in keys.items():
            owner = owners.setdefault((part, key), client.trainer)
            if owner is not client.trainer:
                client.trainer.share(part, owner)
    parameters = {id(p): p for client in clients for p in client.trainer.network.parameters()}
    optimizer = clients[0].trainer.new_optimizer(list(parameters.values()))
    for client in clients:
        client.trainer.optimizer = optimizer


def _job(client: Client) -> tuple[Any, ...]:
    """Equal for clients of equal task and target whose outputs mean the same, in number and order."""
    told = client.describe()
    return told.task, told.target, told.outputs


def fit(
    clients: Sequence[Client],
    received: Mapping[str, Outgoing | None],
    round_index: int,
    on_step: Callable[[str, int, int, float], None],
) -> Iterator[ClientUpdate]:
    """A round of the pooled clients.

    Args:
        clients: After :func:`pool`.
        received: Name -> the common start; None after the first round.
        round_index: 1 for the first.
        on_step: Called with client, step, number of steps and loss.

    Yields:
        For each client what training changed, which is the same encoder for all.
    """
    seed, done = clients[0].trainer.seed, [0] * len(clients)
    with ExitStack() as training:
        for client in clients:
            client.begin(received[client.name])
            training.enter_context(client.trainer.training(round_index, client.steps))
        for index in order([client.steps for client in clients], seed, round_index):
            client = clients[index]
            loss = client.trainer.step()
            done[index] += 1
            on_step(client.name, done[index], client.steps, loss)
    for client in clients:
        yield client.finish(client.trainer.fitted(), round_index, received[client.name])


def order(steps: Sequence[int], seed: int, round_index: int) -> list[int]:
    """Indices of clients, each as often as it has steps, spread evenly over the round and else at random."""
    generator = torch.Generator().manual_seed(derive_seed(seed, round_index=round_index, purpose="order of clients"))
    times, owners = [], []
    for index, count in enumerate(steps):
        times.append((torch.arange(count) + torch.rand(count, generator=generator)) / count)
        owners += [index] * count
    return [owners[i] for i in torch.cat(times).argsort(stable=True).tolist()]
