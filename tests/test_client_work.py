"""What clients do besides local training: distillation, proximal term, personal model, adoption, local parts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from phantoms import federation
from torch import Tensor, nn

from fedcmt import federation as engine
from fedcmt import run_federation
from fedcmt.client import Client
from fedcmt.config import DataConfig, TrainingConfig, load_config
from fedcmt.distillation import Teacher
from fedcmt.exchange import Outgoing
from fedcmt.federation import prepare_clients
from fedcmt.files import read_tensors
from fedcmt.objective import Validation, make_objective
from fedcmt.plans import ClientPlan
from fedcmt.strategies.client_work import ClientWork, DistillationSettings
from fedcmt.strategies.matching import part
from fedcmt.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plans(raw_datasets: Path, preprocessed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ClientPlan]:
    return prepare_clients(load_config(federation(raw_datasets, preprocessed, tmp_path_factory.mktemp("none"))))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def trainer(plan: ClientPlan, work: ClientWork | None = None, **settings: object) -> Trainer:
    training = TrainingConfig.model_validate({"learning_rate": 0.01, "validation_batches": 1, **settings})
    return Trainer(plan, training, client="site", seed=1, rounds=20, device=CPU, work=work)


def quiet(step: int, loss: float) -> None:
    """Nobody watches."""


def calls_of(network: nn.Module) -> list[bool]:
    """One entry a call of the network from now on: whether gradients were on."""
    calls: list[bool] = []
    network.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


DISTILLING = ClientWork(distillation=DistillationSettings(weight=0.5))


@pytest.mark.parametrize("client", ["ct_plain", "ct_regions", "mr_two", "mr_class"])
def test_a_teacher_costs_one_forward_pass_a_step_and_gets_no_gradient(
    plans: dict[str, ClientPlan], client: str
) -> None:
    each = trainer(plans[client], DISTILLING)
    student, teacher = calls_of(each.network), calls_of(each._teacher.network)
    received = torch.randn_like(each.encoder) * 0.1, torch.randn_like(each.adaptor) * 0.1
    each.receive(*received)
    before = {name: p.clone() for name, p in each._teacher.network.named_parameters()}
    each.fit(1, 3, quiet)
    assert student == [True] * 3
    assert teacher == [False] * 3
    assert not each._teacher.network.training
    for name, parameter in each._teacher.network.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_the_teacher_is_the_received_model_with_the_clients_decoder(plans: dict[str, ClientPlan]) -> None:
    each = trainer(plans["ct_plain"], DISTILLING)
    own = each.encoder.clone()
    each.receive(torch.full_like(each.encoder, 0.25), torch.full_like(each.adaptor, 0.5))
    taught = dict(each._teacher.network.named_parameters())
    for name, parameter in each.network.named_parameters():
        expected = {"encoder": 0.25, "adaptor": 0.5}.get(name.split(".")[0])
        same = torch.equal(taught[name], parameter) if expected is None else bool((taught[name] == expected).all())
        assert same, name
    assert torch.equal(each.encoder, own)  # only the teacher takes what was received


@pytest.mark.parametrize("client", ["ct_plain", "mr_two", "mr_class"])
def test_a_lean_teacher_says_the_same(plans: dict[str, ClientPlan], client: str) -> None:
    each = trainer(plans[client], mixed_precision="off")
    plain, lean = (Teacher(each.network, DISTILLING.distillation, lean=lean) for lean in (False, True))
    with torch.no_grad():
        for parameter in each.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    outputs = []
    for teacher in (plain, lean):
        teacher.learn(each.network)
        with each.objective.batches(1, 1) as batches, torch.no_grad():
            answer = each.objective.outputs(teacher.network, next(batches))
        outputs.append(answer if isinstance(answer, list) else [answer])
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.std()))


def test_distillation_changes_training_and_its_absence_nothing(plans: dict[str, ClientPlan]) -> None:
    results = []
    for work in (None, ClientWork(), DISTILLING):
        each = trainer(plans["ct_plain"], work)
        each.receive(each.encoder * 0.5, each.adaptor)
        each.fit(1, 2, quiet)
        results.append(each.encoder.clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("client", ["ct_plain", "ct_regions", "mr_class"])
def test_divergence_and_coefficient_are_those_of_the_formula(plans: dict[str, ClientPlan], client: str) -> None:
    plan, temperature = plans[client], 2.0
    training = TrainingConfig(validation_batches=1, deep_supervision=False)
    objective = make_objective(plan, training, CPU, client="site", seed=1, data=DataConfig())
    shape = (2, 2) if client == "mr_class" else (2, 2 if client == "ct_regions" else 3, 3, 4, 5)
    student, teacher = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    found = objective.divergence(student, teacher, temperature)
    if client == "ct_regions":
        ps, pt = (torch.sigmoid(x.double() / temperature) for x in (student, teacher))
        terms = ps * (ps / pt).log() + (1 - ps) * ((1 - ps) / (1 - pt)).log()
    else:
        ps, pt = ((x.double() / temperature).softmax(1) for x in (student, teacher))
        terms = ps * (ps / pt).log()
    assert float(found) == pytest.approx(float(terms.sum(1).mean()), rel=1e-5)
    assert float(objective.divergence(student, student, temperature)) == pytest.approx(0, abs=1e-7)
    if client != "mr_class":  # with deep supervision the finest output counts
        assert torch.equal(objective.divergence([student, None], [teacher, None], temperature), found)


class Linear:
    """An objective of one number: outputs are the network's, the loss is their distance from the batch."""

    smallest_loss = -1.0

    def outputs(self, network: nn.Module, batch: dict) -> Tensor:
        return network(batch["x"])

    def loss(self, outputs: Tensor, batch: dict) -> Tensor:
        return (outputs - batch["y"]).abs().sum() - 1.0

    def divergence(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return (student - teacher).square().sum() / temperature


def test_the_term_is_the_weighted_divergence() -> None:
    student, teaching = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(student.weight, 3.0)
    nn.init.constant_(teaching.weight, 1.5)
    teacher = Teacher(teaching, DistillationSettings(weight=0.7, temperature=4.0))
    batch, objective = {"x": torch.ones(1, 1), "y": torch.ones(1, 1)}, Linear()
    outputs = objective.outputs(student, batch)
    term = teacher.term(objective, outputs, objective.loss(outputs, batch), batch)
    weight = 0.7 * math.exp(-0.5) * 2.0 / 2.5  # losses from the smallest: teacher 0.5, student 2
    assert float(term.detach()) == pytest.approx(weight * 16 * 1.5**2 / 4)
    term.backward()
    assert float(student.weight.grad) == pytest.approx(weight * 16 * 2 * 1.5 / 4)  # the coefficient is a constant


def test_the_proximal_gradient_pulls_towards_what_was_received(plans: dict[str, ClientPlan]) -> None:
    """Plain SGD, one step, no clipping: theta moves by a further -lr mu (theta - received)."""
    plain: dict[str, object] = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip_norm": 1e9}
    moved = []
    for work in (ClientWork(), ClientWork(proximal=0.5)):
        each = trainer(plans["mr_two"], work, **plain)
        start = each.encoder.clone()
        each.receive(start - 2.0, each.adaptor)
        each.fit(20, 1, quiet)
        moved.append(each.encoder - start)
    rate = trainer(plans["mr_two"], **plain)._learning_rate(20)
    pull = moved[1] - moved[0]
    for segment in trainer(plans["mr_two"]).encoder_layout.segments:
        assert torch.allclose(part(pull, segment), torch.tensor(-rate * 0.5 * 2.0), atol=2e-6), segment.name


@pytest.mark.parametrize("trained", [("decoder",), ("adaptor", "decoder")])
def test_warm_up_leaves_the_other_parts_bit_for_bit(plans: dict[str, ClientPlan], trained: tuple[str, ...]) -> None:
    each = trainer(plans["ct_plain"], weight_decay=0.1)
    each.fit(1, 1, quiet)  # moments that could move a frozen part
    before = {name: tensor.clone() for name, tensor in each.network.named_parameters()}
    each.trained = trained
    each.fit(2, 2, quiet)
    moved = set()
    for name, parameter in each.network.named_parameters():
        assert parameter.requires_grad
        if not torch.equal(parameter, before[name]):
            moved.add(name.split(".")[0])
    assert moved == set(trained)


def client_of(plan: ClientPlan, config: object, tmp_path: Path, work: ClientWork) -> Client:
    from fedcmt.checkpoint import ClientFolder

    chosen = next(c for c in config.clients if c.name == plan_name(plan))
    return Client(chosen, config, plan, ClientFolder(tmp_path), CPU, work)


def plan_name(plan: ClientPlan) -> str:
    return {"Dataset801_Plain": "ct_plain", "Dataset803_TwoChannels": "mr_two"}[plan.dataset.name]


@pytest.mark.parametrize(
    ("adoption", "scores", "share"),
    [
        ("safeguard", {"local": 0.5, "aggregated": 0.5}, 0.0),
        ("safeguard", {"local": 0.6, "aggregated": 0.5}, 1.0),
        ("mixed", {"local": 0.6, "aggregated": 0.5, "mixed": 0.7}, 0.5),
        ("mixed", {"local": 0.6, "aggregated": 0.7, "mixed": 0.6}, 0.0),
    ],
)
def test_a_client_takes_the_best_and_goes_on_from_it(
    adoption: str, scores: dict, share: float, plans: dict[str, ClientPlan], raw_datasets: Path, preprocessed: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = load_config(federation(raw_datasets, preprocessed, tmp_path / "run"))
    client = client_of(plans["ct_plain"], config, tmp_path, ClientWork(adoption=adoption))

    def validate(stage: str, round_index: int) -> tuple[Validation, float]:
        return Validation("dice", scores[stage], 0.0, {}), 0.0

    monkeypatch.setattr(client, "_validate", validate)
    out = Outgoing(0, client.trainer.encoder.clone(), client.trainer.adaptor.clone())
    client.fit(out, 1, lambda *_: None)
    own = client.trainer.encoder.clone()
    server = Outgoing(1, out.encoder + 0.5, out.adaptor - 0.5)
    line = client.evaluate(server)
    assert line["own_share"] == share
    assert line["adopted"]["score"] == max(scores.values())
    expected = torch.lerp(server.encoder, own, share)
    assert torch.equal(client.trainer.encoder, expected)
    client.save(1)
    other = client_of(plans["ct_plain"], config, tmp_path, ClientWork(adoption=adoption))
    other.restore(1)
    monkeypatch.setattr(other, "_validate", validate)
    update = other.fit(server, 2, lambda *_: None)
    # The update is what its own training changed, wherever it began.
    began = other.trainer.encoder - update.encoder
    for segment in other.trainer.encoder_layout.segments:
        assert torch.allclose(part(began, segment), part(expected, segment), atol=1e-6), segment.name


def test_normalisation_stays_with_the_client(
    plans: dict[str, ClientPlan], raw_datasets: Path, preprocessed: Path, tmp_path: Path
) -> None:
    config = load_config(federation(raw_datasets, preprocessed, tmp_path / "run"))
    client = client_of(plans["mr_two"], config, tmp_path, ClientWork(stays_local=(".norm.",)))
    own = client.trainer
    out = Outgoing(0, torch.full_like(own.encoder, 0.125), torch.full_like(own.adaptor, 0.125))
    update = client.fit(out, 1, lambda *_: None)
    client._receive(out)
    for flat, delta, layout in (
        (own.encoder, update.encoder, own.encoder_layout),
        (own.adaptor, update.adaptor, own.adaptor_layout),
    ):
        for segment in layout.segments:
            values, change = part(flat, segment), part(delta, segment)
            if ".norm." in segment.name:
                assert torch.count_nonzero(change) == 0
                assert not bool((values == 0.125).any())
            else:
                assert bool((values == 0.125).all())


def test_ditto_ends_with_its_personal_model_and_resumes_exactly(
    raw_datasets: Path, preprocessed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_membership import lines_of, run_cut_after

    for ending in ("_score", "_present"):
        monkeypatch.setattr(engine, ending, lambda *_: {})
    ditto = {"name": "ditto", "personal": 0.5, "personal_steps": 3}
    settings = federation(raw_datasets, preprocessed, tmp_path / "whole", strategy=ditto)
    settings["clients"] = settings["clients"][:2]
    run_federation(settings)
    again = {**settings, "workspace": str(tmp_path / "cut")}
    run_cut_after(1, again, monkeypatch)
    run_federation(again)
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "cut")
    last = [tmp_path / run / "clients" / "ct_plain" / "last.safetensors" for run in ("whole", "cut")]
    assert last[0].read_bytes() == last[1].read_bytes()
    lines = [line for line in lines_of(tmp_path / "whole") if line.get("client") == "ct_plain"]
    assert all(line["personal_steps"] == 3 and line["best"]["stage"] == "personal" for line in lines)
    other = read_tensors(tmp_path / "whole" / "clients" / "ct_regions" / "last.safetensors")[0]
    model, name = read_tensors(last[0])[0], "encoder.stages.0.0.convs.0.conv.weight"
    assert not torch.equal(model[name], other[name])
