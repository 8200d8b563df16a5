"""What `fedcmt` and `affinity` may ask of clients: decoder first, a learned share, a personal model, own norms."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from phantoms import federation
from test_client_work import client_of, plans, quiet, trainer  # noqa: F401 (fixture)
from test_strategies import make

from fedcmt.config import load_config
from fedcmt.errors import InputError
from fedcmt.exchange import Outgoing
from fedcmt.objective import Validation
from fedcmt.plans import ClientPlan
from fedcmt.strategies.client_work import ClientWork


def test_the_decoder_goes_first(plans: dict[str, ClientPlan]) -> None:  # noqa: F811
    each = trainer(plans["ct_plain"], ClientWork(decoder_steps=2), weight_decay=0.1)
    each.fit(1, 3, quiet)  # moments that could move a frozen part
    before, moved = each.encoder.clone(), []
    decoder = each.network.decoder.seg_layers[-1].weight
    heads = [decoder.detach().clone()]

    def watch(step: int, loss: float) -> None:
        moved.append(not torch.equal(each.encoder, before))
        heads.append(decoder.detach().clone())

    each.fit(2, 4, watch)
    assert moved == [False, False, True, True]
    assert all(not torch.equal(one, other) for one, other in pairwise(heads))
    assert all(parameter.requires_grad for parameter in each.network.parameters())
    each.trained = ("decoder",)  # in a warm-up the encoder rests all the time
    before = each.encoder.clone()
    each.fit(3, 4, watch)
    assert moved[4:] == [False] * 4


def test_steps_of_the_decoder_leave_some_for_the_rest(
    plans: dict[str, ClientPlan], raw_datasets: Path, preprocessed: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    config = load_config(federation(raw_datasets, preprocessed, tmp_path / "run"))
    with pytest.raises(InputError, match=r"client 'ct_plain', field 'strategy.decoder_steps'.*leave none of 2"):
        client_of(plans["ct_plain"], config, tmp_path, ClientWork(decoder_steps=2))


def test_a_learned_share_climbs_by_the_loss_and_is_remembered(
    plans: dict[str, ClientPlan], raw_datasets: Path, preprocessed: Path, tmp_path: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = load_config(federation(raw_datasets, preprocessed, tmp_path / "run", rounds=6))
    server, shares = 5.0, []
    for round_index in range(1, 5):
        client = client_of(plans["ct_plain"], config, tmp_path, ClientWork(adoption="learned"))
        if round_index > 1:
            client.restore(round_index - 1)
        own = client.trainer.encoder

        def validate(stage: str, index: int, own: torch.Tensor = own) -> tuple[Validation, float]:
            share = 1 - float(own[0]) / server  # own models are about 0
            return Validation("dice", 0.5, (share - 0.5) ** 2, {}), 0.0

        monkeypatch.setattr(client, "_validate", validate)
        out = Outgoing(round_index - 1, torch.zeros_like(own), torch.zeros_like(client.trainer.adaptor))
        client._own_share, kept = 0.0, client._own_share  # receive zeros in every round
        client.fit(out, round_index, lambda *_: None)
        client._own_share = kept
        line = client.evaluate(Outgoing(round_index, torch.full_like(own, server), out.adaptor))
        shares.append(line["own_share"])
        client.save(round_index)
    assert shares == [0.25, 0.5, 0.5, 0.5]


def test_settings_say_what_clients_do() -> None:
    for name in ("fedcmt", "affinity"):
        work = make(name, personal=0.5, personal_steps=3, decoder_steps=2, normalisation="local").client_work
        assert (work.personal, work.personal_steps, work.decoder_steps) == (0.5, 3, 2)
        assert work.stays_local == make("fedbn").client_work.stays_local
        assert replace(make(name).client_work, sends_decoder=False) == ClientWork()
    for settings, message in (
        ({"personal_steps": 3}, "personal_steps has no use"),
        ({"personal": 0.1, "adoption": "mixed"}, "adoption should be always"),
        ({"shared_stages": 1, "encoders": "shared"}, "shared_stages has no use"),
        ({"beta2": 0.5}, "beta2 has no use"),
    ):
        with pytest.raises(InputError, match=message):
            make("fedcmt", **settings)
