"""What a client's own process does: answers the server's messages with the client's data, which stay here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TextIO

import torch
from torch import Tensor

from fedcmt import strategies
from fedcmt.checkpoint import ClientFolder, Workspace
from fedcmt.client import Client
from fedcmt.config import ClientConfig, FederationConfig
from fedcmt.data.backend import resolve_backend
from fedcmt.device import choose_device
from fedcmt.engines.entries import Shares, shared
from fedcmt.engines.messages import (
    WIRE_DTYPES,
    Announced,
    Body,
    Close,
    Closed,
    Failed,
    Fit,
    Fitted,
    Message,
    MessageError,
    NotHeld,
    Prepare,
    Prepared,
    Score,
    Scored,
    Shapes,
    TellShapes,
)
from fedcmt.engines.privacy import DESTROYED, UpdateFilters, dequantized
from fedcmt.errors import InputError, RunError
from fedcmt.exchange import ClientDescription, ClientUpdate, Outgoing
from fedcmt.files import hold, write_json
from fedcmt.initial_weights import read_weights, report_matches
from fedcmt.plans import ClientPlan, shape_summary
from fedcmt.preparation import load_client_dataset, plan_client, write_client_description
from fedcmt.scoring import score_and_export, without_nan
from fedcmt.topology import TopologyContract

_PATIENCE = 60  # seconds that a client waits for its own dead process to let go of its folder


class Site:
    """One client at its site.

    Args:
        config: The federation's settings, with the site's own folders and device.
        name: Which client it is.
        shares: What of single cases may be known beyond the site.
        note: Shows a line to the site's engineer.
    """

    def __init__(self, config: FederationConfig, name: str, *, shares: Shares, note: Callable[[str], None]) -> None:
        self._config, self._name, self._shares, self._note = config, name, shares, note
        self._settings = _client_config(config, name)
        self._workspace = Workspace(config.workspace_folder())
        self._folder = self._workspace.client(name)
        self._lock = _lock(self._folder)
        if config.threads:
            torch.set_num_threads(config.threads)
        self._device = choose_device(config.device)
        # What makes the patches is the site's own affair; with it the random numbers of noise may differ.
        self._config = config.with_patches_by(resolve_backend(config.data.backend, self._device).name)
        self._strategy = strategies.create(config.strategy)
        self._filters = UpdateFilters(config.nvflare)
        self._plan: ClientPlan | None = None
        self._client: Client | None = None
        self._stands_after: int | None = None  # round of the state in memory; None while a round is open
        self._held: dict[str, Tensor] = {}  # parameters as received last
        self._held_as: dict[str, Announced] = {}

    def answer(self, message: Message) -> Message:
        """Do what a message asks for; a failure is an answer too."""
        try:
            message.check()
            return self._answer(message)
        except MessageError as error:
            return Message(Failed(reason=f"refused: {error}"[:2000]))
        except InputError as error:
            return Message(Failed(reason=str(error)[:2000], mistake=True))
        except (RunError, MemoryError, OSError) as error:
            return Message(Failed(reason=(str(error) or type(error).__name__)[:2000]))

    def _answer(self, message: Message) -> Message:
        body = message.body
        if isinstance(body, TellShapes):
            return Message(self._shapes())
        if isinstance(body, Prepare):
            return Message(self._prepare(body))
        if isinstance(body, Fit):
            return self._fit(body, message)
        if isinstance(body, Close):
            return Message(self._close(body, message))
        if isinstance(body, Score):
            return Message(self._score())
        return Message(Failed(reason=f"a client does not answer {type(body).__name__}"))

    def _shapes(self) -> Shapes:
        dataset = load_client_dataset(self._config, self._settings)
        summary = shape_summary(
            self._settings,
            dataset,
            self._config.folder("preprocessed"),
            workers=self._config.preprocessing_workers,
        )
        return Shapes(
            num_cases=summary.num_cases, spacing=list(summary.spacing), median_shape=list(summary.median_shape)
        )

    def _prepare(self, body: Prepare) -> Prepared:
        notes: list[str] = []
        contract = TopologyContract(body.topology)
        if contract.digest() != body.digest:
            raise InputError("the topology differs from its digest", client=self._name, field="topology")
        dataset = load_client_dataset(self._config, self._settings)
        self._plan = plan_client(self._config, self._settings, dataset, contract, notes.append)
        self._begin()
        write_client_description(self._folder, self._plan, self._config.inference.checkpoint)
        if body.starting and self._settings.initial_weights is not None:
            self._start(notes)
        for note in notes:
            self._note(note)
        return _prepared(self._ready().describe(), notes)

    def _begin(self) -> None:
        """A client as it is before its first round."""
        assert self._plan is not None
        self._client = Client(
            self._settings, self._config, self._plan, self._folder, self._device, self._strategy.client_work
        )
        self._stands_after = 0

    def _start(self, notes: list[str]) -> None:
        path = self._settings.initial_weights
        assert path is not None
        matched = self._ready().start_from(read_weights(path))
        report_matches(path, {"decoder": matched}, self._name, notes.append)

    def _ready(self) -> Client:
        if self._client is None:
            raise RunError(f"client '{self._name}' was not asked to prepare")
        return self._client

    def _go_on_after(self, round_index: int) -> int:
        """Bring the client's own state to where it stood after a round.

        Returns:
            The round it really stands after: an older one, or 0, where its files are gone.
        """
        if self._stands_after == round_index:
            return round_index
        for saved in (saved for saved in self._folder.saved_rounds() if saved <= round_index):
            try:
                self._begin()
                self._ready().restore(saved)
            except InputError as error:
                self._note(f"round {saved} cannot be restored ({error}); trying the one before")
                continue
            self._stands_after = saved
            return saved
        self._begin()
        if self._settings.initial_weights is not None:
            self._start([])
        return 0

    def _take(self, wanted: Mapping[Any, Announced] | None, message: Message) -> bool:
        """Keep parameters that came, or look whether those wanted are here."""
        if wanted is None:
            return True
        if message.tensors:
            self._held = {name: tensor.float() for name, tensor in message.tensors.items()}
            self._held_as = dict(message.manifest())
        return self._held_as == dict(wanted)

    def _fit(self, body: Fit, message: Message) -> Message:
        if not self._take(body.parameters, message):
            return Message(NotHeld(round=body.round))
        stood = self._go_on_after(body.after_round)
        client = self._ready()
        client.membership = replace(client.membership, joins_at_round=body.joins_at_round)
        self._stands_after = None
        outgoing = self._outgoing(body.parameters, body.round - 1)
        if outgoing is not None:
            outgoing = replace(outgoing, trained=tuple(body.trained), sends_decoder=body.sends_decoder)
        update = client.fit(outgoing, body.round, lambda *_: None)
        return self._update_message(body, update, stood)

    def _outgoing(self, announced: object, round_index: int) -> Outgoing | None:
        if announced is None:
            return None
        held = self._held
        return Outgoing(round_index, held["encoder"], held["adaptor"], held.get("decoder"))

    def _update_message(self, body: Fit, update: ClientUpdate, stood: int) -> Message:
        parts = {name: getattr(update, name) for name in self._ready().layouts if getattr(update, name) is not None}
        learned = {name: tensor.clone() for name, tensor in parts.items()} if self._filters.active else {}
        self._filters.apply(parts, self._ready().layouts)
        quantized, packed = self._filters.quantize(parts)
        if not self._filters.quantizes:
            packed = {name: tensor.to(WIRE_DTYPES[body.reply_dtype]) for name, tensor in parts.items()}
        cosine = _cosine(learned, _restored(packed, quantized)) if learned else None
        if cosine is not None and cosine < DESTROYED:
            self._note(f"{self._name}: warning: filters leave an update of cosine {cosine:.2f} to what was learned")
        if update.decoder_start is not None:
            packed["decoder_start"] = update.decoder_start.to(WIRE_DTYPES[body.reply_dtype])
        answer = Fitted(
            round=body.round,
            num_cases=update.num_cases,
            went_on_from=stood,
            cosine_after_filters=cosine,
            quantized=quantized,  # type: ignore[arg-type]
        )
        return Message(answer, {name: tensor.detach().cpu().contiguous() for name, tensor in packed.items()})

    def _close(self, body: Close, message: Message) -> Body:
        if not self._take(body.parameters, message):
            return NotHeld(round=body.round)
        client = self._ready()
        line = client.evaluate(self._outgoing(body.parameters, body.round), body.refused)
        client.save(body.round)
        self._folder.discard_old_states(body.round)
        self._stands_after = body.round
        return Closed(line=without_nan(line))

    def _score(self) -> Scored:
        if not self._folder.best.is_file() or self._plan is None:
            return Scored(entry=None)
        entry = score_and_export(self._workspace, self._name, self._plan, self._config.inference, self._config.device)
        write_json(self._folder.results, entry)
        return Scored(entry=shared(entry, self._shares))


def _restored(packed: Mapping[str, Tensor], quantized: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Tensor]:
    """An update as the server will see it."""
    if quantized is None:
        return {name: tensor.float() for name, tensor in packed.items()}
    return {name: dequantized(tensor, quantized[name]) for name, tensor in packed.items()}


def _cosine(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Between an update as learned and as sent; 0 where one of them is zero."""
    products = torch.zeros(3, dtype=torch.float64)
    for name, tensor in before.items():
        one, other = tensor.cpu().double(), after[name].cpu().double()
        products += torch.stack([one @ other, one @ one, other @ other])
    lengths = float((products[1] * products[2]).sqrt())
    cosine = float(products[0]) / lengths if lengths > 0 else 0.0
    return cosine if math.isfinite(cosine) else 0.0


def _client_config(config: FederationConfig, name: str) -> ClientConfig:
    for client in config.clients:
        if client.name == name:
            return client
    names = ", ".join(client.name for client in config.clients)
    raise InputError(f"not a client of this federation ({names})", client=name, field="clients")


def _lock(folder: ClientFolder) -> TextIO:
    """Keep a process of an earlier job, which may take a moment to die, from writing beside this one."""
    file = hold(folder.path / ".lock", _PATIENCE)
    if file is None:
        raise InputError(f"{folder.path} is in use by another process", field="workspace", fix="wait for it or end it")
    return file


def _prepared(description: ClientDescription, notes: list[str]) -> Prepared:
    layout = description.decoder_layout
    return Prepared(
        task=description.task,  # type: ignore[arg-type]
        modality=description.modality,
        channels=description.channels,
        num_cases=description.num_cases,
        topology=description.topology,
        encoder_layout=description.encoder_layout,
        target=description.target,
        outputs=list(description.outputs),
        decoder_segments=None if layout is None else [(s.name, list(s.shape), s.offset) for s in layout.segments],
        decoder_size=None if layout is None else layout.size,
        notes=[note[:2000] for note in notes],
    )
