"""What a step of local training costs with distillation or a proximal term, beside a plain one.

    python benchmarks/bench_training.py [--steps 40] [--write]

The clients of the phantoms' preset `ci`, two patch sizes, both precisions. The contenders of a client see the same
batches, one step of each in every cycle, each cycle in another order, after three that do not count. CPU milliseconds
are those of the training thread, torch on one thread: what makes batches meanwhile is not in them, and is the same for
all. --write puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from report import table, write_tables

from fedcmt.config import TrainingConfig, load_config
from fedcmt.device import trains_in_bfloat16
from fedcmt.federation import prepare_clients
from fedcmt.plans import ClientPlan
from fedcmt.strategies.client_work import ClientWork, DistillationSettings
from fedcmt.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "benchmarks.md"
CPU = torch.device("cpu")
WARM_UP = 3
PLAIN = "plain"
CONTENDERS = {
    PLAIN: ClientWork(),
    "distilled": ClientWork(distillation=DistillationSettings(weight=0.5)),
    "proximal": ClientWork(proximal=0.01),
}
SIZES = {  # edge of a segmenting client's patch -> spacing in mm, features of the topology
    16: (4, [8, 16, 32]),
    32: (2, [16, 32, 64, 128]),
}


def clients_of(size: int, folder: Path) -> dict[str, ClientPlan]:
    """The preset's clients with patches of a size, preprocessed in the folder."""
    sys.path.append(str(ROOT / "benchmarks" / "phantoms"))
    from raw_datasets import preset_file, write_preset

    spacing, features = SIZES[size]
    config = preset_file("ci")
    overrides = [
        f"raw={folder / 'raw'}",
        f"preprocessed={folder / str(size)}",
        f"topology.features={features}",
        f"clients.*.spacing={[spacing] * 3}",
        *(f"clients.{c.name}.patch_size={[size] * 3}" for c in load_config(config).clients if c.patch_size),
    ]
    write_preset("ci", 1, folder / "raw")
    return prepare_clients(load_config(config, overrides))


def measure(plan: ClientPlan, precision: str, steps: int) -> dict[str, list[float]]:
    """CPU seconds of each step of each contender."""
    training = TrainingConfig.model_validate({"mixed_precision": precision})
    spent: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    order = random.Random(0)
    with ExitStack() as stack:
        trainers = {}
        for name, work in CONTENDERS.items():
            trainer = Trainer(plan, training, client="bench", seed=1, rounds=2, device=CPU, work=work)
            trainer.receive(trainer.encoder.clone(), trainer.adaptor.clone())
            stack.enter_context(trainer.training(1, WARM_UP + steps))
            trainers[name] = trainer
        for cycle in range(WARM_UP + steps):
            for name in order.sample(list(trainers), len(trainers)):
                begin = time.thread_time()
                trainers[name].step()
                if cycle >= WARM_UP:
                    spent[name].append(time.thread_time() - begin)
    return spent


def rows(steps: int) -> Iterator[Sequence[str]]:
    """One for each client and precision."""
    precisions = ("off", "auto") if trains_in_bfloat16(CPU) else ("off",)
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            for client, plan in clients_of(size, Path(folder)).items():
                patch = " x ".join(map(str, plan.configuration.patch_size))
                for precision in precisions:
                    spent = measure(plan, precision, steps)
                    plain = spent.pop(PLAIN)
                    shares = (
                        statistics.median(s / p for s, p in zip(own, plain, strict=True)) for own in spent.values()
                    )
                    shown = "float32" if precision == "off" else "bfloat16"
                    yield client, patch, shown, f"{1e3 * statistics.median(plain):.1f}", *(f"{s:.2f}" for s in shares)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a training step costs with and without distillation.")
    parser.add_argument("--steps", type=int, default=40, help="of each contender")
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.relative_to(ROOT)}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    columns = (
        "client",
        "patch",
        "precision",
        "a step, CPU ms",
        *(f"{name}, times that" for name in list(CONTENDERS)[1:]),
    )
    lines = list(table(columns, rows(arguments.steps)))
    print("\n".join(lines))
    if arguments.write:
        write_tables(DOCUMENT, {"steps": iter(lines)})


if __name__ == "__main__":
    main()
