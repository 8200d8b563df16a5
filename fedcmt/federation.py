"""The in-process engine: a whole federation in one process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcmt import joint, strategies
from fedcmt.checkpoint import Workspace, export_nnunet_model, results_of
from fedcmt.client import Client
from fedcmt.config import FederationConfig, dump_config, load_config
from fedcmt.continuing import check_same_federation, first_rounds, go_on, patch_backend
from fedcmt.curves import Curves
from fedcmt.device import choose_device
from fedcmt.display import Display, open_display
from fedcmt.errors import InputError
from fedcmt.exchange import ClientUpdate
from fedcmt.files import read_json, write_json, write_text
from fedcmt.initial_weights import read_weights, report_matches
from fedcmt.plans import ClientPlan
from fedcmt.preparation import load_datasets, prepare, write_client_description
from fedcmt.report import write_report
from fedcmt.scoring import score_client
from fedcmt.server import Server
from fedcmt.topology import AgreedTopology


@dataclass(frozen=True)
class FederationResult:
    """Where everything stands, and the scores of every client's model (the content of ``results.json``)."""

    workspace: Path
    rounds: int
    results: dict[str, Any]


def run_federation(
    config: FederationConfig | Mapping[str, Any] | Path | str, *, fresh: bool = False, scores_only: bool = False
) -> FederationResult:
    """Run a federation in this process, or go on with one that was interrupted.

    Args:
        config: A config, a mapping of its settings, or a YAML file.
        fresh: Start over instead of resuming.
        scores_only: Leave out the report page, the curves for TensorBoard and the nnU-Net model folders.

    Raises:
        InputError: A mistake in the config or the data; nothing was written then.
    """
    config = load_config(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    strategy = strategies.create(config.strategy)
    strategy.check([client.name for client in config.clients])
    if strategy.pooled:
        joint.check_clients(config.clients)
    device = choose_device(config.device)
    workspace = Workspace(config.workspace_folder())
    datasets = load_datasets(config)
    if not fresh:
        check_same_federation(workspace, config)
    backend = patch_backend(config, device, None if fresh else workspace)
    config = config.with_patches_by(backend.name)
    with ExitStack() as stack:
        names = [client.name for client in config.clients]
        first = 1 if fresh else max(workspace.committed_rounds(first_rounds(config)), default=0) + 1
        weights = _initial_weights(config, first)
        display: Display = open_display(config.rounds, names, first_round=first)
        stack.enter_context(display)
        display.note(f"patches: {backend.name} backend, {backend.reason}")
        contract, plans = prepare(config, datasets, display.note, None if fresh else workspace)
        stack.enter_context(workspace.locked())
        work = strategy.client_work
        clients = [Client(c, config, plans[c.name], workspace.client(c.name), device, work) for c in config.clients]
        server = Server(
            strategy,
            contract.topology,
            [client.describe() for client in clients],
            seed=config.seed,
            rounds=config.rounds,
            device=device,
            backend=config.backend,
            quarantine_ratio=config.quarantine_ratio,
            initial_weights=weights.get(config.initial_weights) if first == 1 else None,
            one_process=True,
        )
        if server.pooled:
            joint.pool(clients)
        _start(config, weights, first, server, clients, display)
        if fresh:
            workspace.clear()
        _describe(workspace, config, contract, plans)
        lines = _resume(workspace, server, clients, display)
        curves = None if scores_only else stack.enter_context(Curves(workspace.tensorboard, server.round_index))
        for round_index in range(server.round_index + 1, config.rounds + 1):
            new = run_round(server, clients, round_index, display)
            lines += new
            commit(workspace, server, clients, lines)
            if curves is not None:
                curves.add(new)
        results = _score(workspace, config, plans, display)
        if not scores_only:
            _present(workspace, display)
    return FederationResult(workspace.path, config.rounds, results)


def _describe(
    workspace: Workspace, config: FederationConfig, contract: AgreedTopology, plans: Mapping[str, ClientPlan]
) -> None:
    """Write down what does not change from round to round."""
    write_text(workspace.config, dump_config(config))
    write_json(workspace.contract, contract.as_json())
    for name, plan in plans.items():
        write_client_description(workspace.client(name), plan, config.inference.checkpoint)


def run_round(server: Server, clients: Sequence[Client], round_index: int, display: Display) -> list[dict[str, Any]]:
    """One round: every client trains, the server makes its step, every client is scored with the result.

    Returns:
        The round's lines of ``metrics.jsonl``, the server's last.
    """
    clients = [client for client in clients if client.membership.takes_part(round_index)]
    display.round_started(round_index, [client.name for client in clients])
    server.begin(round_index)
    for update in _updates(server, clients, round_index, display):
        server.accept(update)
    server_line = server.finish()
    lines = []
    for client in clients:
        lines.append(client.evaluate(server.outgoing(client.name), server.refused.get(client.name)))
        display.client_finished(lines[-1])
    display.round_finished(server_line)
    return [*lines, server_line]


def _updates(server: Server, clients: Sequence[Client], round_index: int, display: Display) -> Iterator[ClientUpdate]:
    """Local training of one client after the other, or of all as one."""
    if server.pooled:
        received = {client.name: server.outgoing(client.name) for client in clients}
        yield from joint.fit(clients, received, round_index, display.step)
        return
    for client in clients:
        yield client.fit(server.outgoing(client.name), round_index, display.step)


def commit(workspace: Workspace, server: Server, clients: Sequence[Client], lines: Sequence[Mapping[str, Any]]) -> None:
    """Make a round durable. The server's state comes last: until it stands, the round did not happen."""
    for client in _joined(clients, server.round_index):
        client.save(server.round_index)
    workspace.write_metrics(lines)
    server.save(workspace.server_state(server.round_index))
    workspace.discard_old_states(server.round_index)


def _joined(clients: Sequence[Client], round_index: int) -> list[Client]:
    """Those who have been in the federation until a round; one that left keeps its state."""
    return [client for client in clients if client.membership.joins_at_round <= round_index]


def prepare_clients(config: FederationConfig) -> dict[str, ClientPlan]:
    """Preprocess and plan every client's dataset; see :func:`fedcmt.plans.prepare_client`."""
    datasets = load_datasets(config)
    display: Display = open_display(config.rounds, [client.name for client in config.clients])
    with display:
        return prepare(config, datasets, display.note, None)[1]


def _initial_weights(config: FederationConfig, first: int) -> dict[Path | None, dict[str, Tensor]]:
    """The checkpoints that the federation and those clients start from who have not begun yet, each read once."""
    weights: dict[Path | None, dict[str, Tensor]] = {}
    starting: list[tuple[str | None, Path | None]] = [(None, config.initial_weights)] if first == 1 else []
    starting += [(c.name, c.initial_weights) for c in config.clients if c.joins_at_round >= first]
    for name, path in starting:
        if path is None or path in weights:
            continue
        try:
            weights[path] = read_weights(path)
        except InputError as error:
            raise error.located(client=name, field="initial_weights") from None
    return weights


def _start(
    config: FederationConfig,
    weights: Mapping[Path | None, Mapping[str, Tensor]],
    first: int,
    server: Server,
    clients: Sequence[Client],
    display: Display,
) -> None:
    """Start the clients' decoders, and print what everybody took from the checkpoints, and the strategy's remarks."""
    for remark in server.remarks:
        display.note(remark)
    if config.initial_weights and first == 1:
        report_matches(config.initial_weights, server.matched, None, display.note)
    for settings, client in zip(config.clients, clients, strict=True):
        if settings.initial_weights and settings.joins_at_round >= first:
            matched = client.start_from(weights[settings.initial_weights])
            report_matches(settings.initial_weights, {"decoder": matched}, client.name, display.note)


def _resume(workspace: Workspace, server: Server, clients: Sequence[Client], display: Display) -> list[dict[str, Any]]:
    """Restore the newest round that was committed whole; an older one if its files are damaged."""

    def restore(round_index: int) -> None:
        server.restore(workspace.server_state(round_index))
        for client in _joined(clients, round_index):
            client.restore(round_index)

    rounds = workspace.committed_rounds({client.name: client.membership.joins_at_round for client in clients})
    return go_on(workspace, rounds, restore, display.note)


def _score(
    workspace: Workspace, config: FederationConfig, plans: Mapping[str, ClientPlan], display: Display
) -> dict[str, Any]:
    """Predict and score, unless that was done after these rounds with these settings."""
    if workspace.results.is_file():
        done, wanted = read_json(workspace.results), results_of(config, ())
        if all(done.get(key) == wanted[key] for key in ("rounds", "inference")):
            return done
    entries = []
    for name, plan in plans.items():
        shutil.rmtree(workspace.client(name).model, ignore_errors=True)  # of earlier rounds
        if not workspace.client(name).best.is_file():
            display.note(f"{name}: joins after these rounds and has no model")
            continue
        display.note(f"{name}: predicting with its {config.inference.checkpoint} model")
        entries.append(score_client(workspace, name, plan, config.inference, config.device))
    results = results_of(config, entries)
    write_json(workspace.results, results)
    return results


def _present(workspace: Workspace, display: Display) -> None:
    """Export the models and write the report."""
    for entry in read_json(workspace.results)["clients"]:
        folder = workspace.client(entry["client"])
        if not folder.model.is_dir():
            export_nnunet_model(folder, folder.model)
    display.note(f"report: {write_report(workspace.path)}")
