"""Local training of one client: steps from the received encoder and adaptor, with nnU-Net's losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fedcmt.config import DataConfig, TrainingConfig
from fedcmt.data.readahead import ReadAhead
from fedcmt.data.torch_pipeline import Batch
from fedcmt.device import trains_in_bfloat16
from fedcmt.distillation import Teacher
from fedcmt.errors import RunError
from fedcmt.exchange import PARTS
from fedcmt.files import copy_into
from fedcmt.layout import FlatLayout
from fedcmt.network import AdaptedEncoder, Part, build_network, parameters_of
from fedcmt.objective import Objective, Validation, make_objective
from fedcmt.plans import ClientPlan
from fedcmt.seeding import derive_seed, seeded
from fedcmt.strategies.client_work import ClientWork

_POLY_EXPONENT = 0.9


@dataclass(frozen=True)
class FitResult:
    """What one round of local training reports."""

    steps: int
    loss: float  # mean over the steps, of the task alone
    learning_rate: float
    seconds: float
    data_wait: float  # seconds of those in which training stood still for want of a batch
    data_work: float  # CPU seconds of the threads that made batches meanwhile


class Trainer:
    """A client's network, optimizer and data.

    Attributes:
        seed: The federation's.
        encoder: The encoder's parameters as one flat buffer, `[P]`; the network computes in views of it.
        adaptor: The adaptor's, `[A]`.
        decoder: The decoder's, `[D]`; None where it does not travel.
        optimizer: Of the network's parameters; may hold those of other networks too.
        trained: Parts that the next :meth:`fit` changes.
    """

    def __init__(
        self,
        plan: ClientPlan,
        training: TrainingConfig,
        *,
        client: str,
        seed: int,
        rounds: int,
        device: torch.device,
        work: ClientWork | None = None,
        data: DataConfig | None = None,
        objective: Objective | None = None,
    ) -> None:
        work = work or ClientWork()
        self._training, self._client, self.seed, self._rounds, self._device = training, client, seed, rounds, device
        with seeded(derive_seed(seed, client=client, purpose="initialisation")):
            network = build_network(
                plan.architecture,
                len(plan.dataset.channel_names),
                plan.num_heads,
                deep_supervision=training.deep_supervision,
            )
        # Decoders begin alike, so that those of the same task can be averaged.
        with seeded(derive_seed(seed, purpose="initial decoder")):
            network.get_submodule("decoder").apply(AdaptedEncoder.initialize)
        self.network = network.to(device).to(memory_format=torch.channels_last_3d)
        self.encoder, self.encoder_layout = self._share("encoder")
        self.adaptor, self.adaptor_layout = self._share("adaptor")
        self.decoder: Tensor | None = None
        self.decoder_layout: FlatLayout | None = None
        if work.sends_decoder:
            self.decoder, self.decoder_layout = self._share("decoder")
        self.trained: tuple[str, ...] = PARTS
        self._proximal, self._decoder_steps = work.proximal, work.decoder_steps
        self._anchors: list[tuple[torch.nn.Parameter, Tensor]] = []
        # bfloat16 needs no loss scaling, so there is no scaler state to carry across rounds.
        self._mixed_precision = training.mixed_precision == "auto" and trains_in_bfloat16(device)
        self._teacher: Teacher | None = None
        if work.distillation.weight > 0:
            lean = device.type == "cpu" and not self._mixed_precision
            self._teacher = Teacher(self.network, work.distillation, lean=lean)
        self.objective = objective or make_objective(
            plan, training, device, client=client, seed=seed, data=data or DataConfig()
        )
        self.optimizer = self.new_optimizer(list(self.network.parameters()))
        self._round = 0
        self._batches: ReadAhead[Batch] | None = None  # while a round's training lasts
        self._fitted = FitResult(0, 0.0, training.learning_rate, 0.0, 0.0, 0.0)  # sums over the steps of this round
        if device.type == "cuda":
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False

    def _share(self, part: Part) -> tuple[Tensor, FlatLayout]:
        parameters = parameters_of(self.network, part)
        layout = FlatLayout.of(parameters.items())
        return layout.bind(parameters, self._device), layout

    @property
    def exchanged(self) -> dict[str, tuple[Tensor, FlatLayout]]:
        """The parts that travel, flat, with their layouts."""
        parts = {"encoder": (self.encoder, self.encoder_layout), "adaptor": (self.adaptor, self.adaptor_layout)}
        if self.decoder is not None and self.decoder_layout is not None:
            parts["decoder"] = (self.decoder, self.decoder_layout)
        return parts

    def share(self, part: Part, owner: Trainer) -> None:
        """Compute with another trainer's parameters of a part from now on; running statistics stay."""
        for name, parameter in parameters_of(owner.network, part).items():
            module, _, leaf = name.rpartition(".")
            setattr(self.network.get_submodule(module), leaf, parameter)
        if part == "encoder":
            self.encoder = owner.encoder
        elif part == "adaptor":
            self.adaptor = owner.adaptor

    def new_optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The local optimizer of the settings."""
        settings = self._training
        if settings.optimizer == "sgd":
            return torch.optim.SGD(
                parameters,
                settings.learning_rate,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
                nesterov=settings.momentum > 0,
            )
        # Fused, a step of a small network takes a tenth less.
        return torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.weight_decay, fused=True)

    def _learning_rate(self, round_index: int) -> float:
        if self._training.learning_rate_schedule == "constant":
            return self._training.learning_rate
        return self._training.learning_rate * (1 - (round_index - 1) / self._rounds) ** _POLY_EXPONENT

    def receive(self, encoder: Tensor, adaptor: Tensor) -> None:
        """Let proximal term and distillation refer to these parameters and the client's decoder as it is.

        Args:
            encoder: `[P]` as received.
            adaptor: `[A]` as received.
        """
        received = ((self.encoder, self.encoder_layout, encoder), (self.adaptor, self.adaptor_layout, adaptor))
        if self._proximal > 0:
            parameters = dict(self.network.named_parameters())
            copies = [(layout, value.to(flat.device, copy=True)) for flat, layout, value in received]
            self._anchors = [(parameters[s.name], s.view(flat)) for layout, flat in copies for s in layout.segments]
        if self._teacher is not None:
            own = [flat.clone() for flat, _, _ in received]
            for flat, _, value in received:
                flat.copy_(value)
            self._teacher.learn(self.network)
            for (flat, _, _), value in zip(received, own, strict=True):
                flat.copy_(value)

    def fit(self, round_index: int, steps: int, on_step: Callable[[int, float], None]) -> FitResult:
        """Train for a number of steps.

        Args:
            round_index: 1 for the first; gives learning rate and random numbers.
            steps: Optimizer steps.
            on_step: Called with step (from 1) and loss.

        Raises:
            RunError: The loss is no finite number.
        """
        with self.training(round_index, steps):
            for step in range(1, steps + 1):
                on_step(step, self.step())
        return self.fitted()

    @contextmanager
    def training(self, round_index: int, steps: int) -> Iterator[None]:
        """Read ahead and be ready for the steps of a round.

        Args:
            round_index: 1 for the first.
            steps: That :meth:`step` will be called for.
        """
        if self._training.optimizer_state == "reset":
            self.optimizer.state.clear()
        rate = self._learning_rate(round_index)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.network.train()
        self._freeze(("decoder",) if self._decoder_steps else self.trained)
        self._round, self._fitted = round_index, FitResult(0, 0.0, rate, 0.0, 0.0, 0.0)
        try:
            with self.objective.batches(round_index, steps) as self._batches:
                yield
                self._fitted = replace(self._fitted, data_work=self._batches.seconds_worked)
        finally:
            self._batches = None
            self._freeze(PARTS)

    def step(self) -> float:
        """One step on the next batch, within :meth:`training`.

        Returns:
            The task's loss.

        Raises:
            RunError: It is no finite number.
        """
        assert self._batches is not None
        started, past = time.perf_counter(), self._fitted
        if 0 < past.steps == self._decoder_steps:
            self._freeze(self.trained)
        batch = next(self._batches)
        loss = self._optimize(batch)
        if not math.isfinite(loss):
            raise RunError(
                f"client '{self._client}', round {self._round}, step {past.steps + 1}: loss {loss}; lower "
                f"training.learning_rate or look at the images of {', '.join(batch.cases)}"
            )
        self._fitted = replace(
            past,
            steps=past.steps + 1,
            loss=past.loss + loss,
            seconds=past.seconds + time.perf_counter() - started,
            data_wait=self._batches.seconds_waited,
        )
        return loss

    def fitted(self) -> FitResult:
        """What the round's training made, once it is over."""
        return replace(self._fitted, loss=self._fitted.loss / self._fitted.steps)

    def _freeze(self, trained: tuple[str, ...]) -> None:
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name.split(".", 1)[0] in trained)

    def _optimize(self, batch: Batch) -> float:
        # Without a gradient a frozen part, or another network's, sees neither momentum nor weight decay.
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            outputs = self.objective.outputs(self.network, batch)
            total = loss = self.objective.loss(outputs, batch)
            if self._teacher is not None:
                total = loss + self._teacher.term(self.objective, outputs, loss, batch)
        total.backward()
        for parameter, anchor in self._anchors:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=self._proximal)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self._training.clip_norm)
        self.optimizer.step()
        return float(loss.detach())

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._mixed_precision)

    @torch.no_grad()
    def validate(self) -> Validation:
        """Score the network as it is; the same validation patches every time."""
        self.network.eval()
        with self._autocast():
            return self.objective.validate(self.network)

    def model(self) -> dict[str, Tensor]:
        """Parameters and running statistics by name, aliases left out. Changing a tensor changes the network."""
        return {**{name: p.data for name, p in self.network.named_parameters()}, **dict(self.network.named_buffers())}

    def state(self) -> dict[str, Tensor]:
        """Model and optimizer state as named tensors: all that training must remember."""
        names = [name for name, _ in self.network.named_parameters()]
        state = {f"model.{name}": tensor for name, tensor in self.model().items()}
        for name, parameter in zip(names, self.network.parameters(), strict=True):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    state[f"optimizer.{key}.{name}"] = value
        return state

    def restore(self, state: Mapping[str, Tensor], *, source: Path) -> None:
        """Continue from what :meth:`state` returned.

        Raises:
            InputError: The state belongs to another network.
        """
        model = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
        copy_into(self.model(), model, source=source)
        parameters = dict(self.network.named_parameters())
        for parameter in parameters.values():
            self.optimizer.state.pop(parameter, None)
        for name, value in state.items():
            if name.startswith("optimizer."):
                _, key, parameter_name = name.split(".", 2)
                parameter = parameters[parameter_name]
                # Moments stand in their parameter's memory order; a fused optimizer counts steps on its device.
                if value.shape == parameter.shape:
                    kept = torch.empty_like(parameter).copy_(value)
                else:
                    kept = value.to(parameter.device, copy=True)
                self.optimizer.state[parameter][key] = kept
