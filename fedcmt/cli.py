"""The ``fedcmt`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from fedcmt import __version__
from fedcmt.cli_nvflare import add_nvflare_commands
from fedcmt.command import run_command
from fedcmt.config import Checkpoint, ClientConfig, TopologyConfig, load_config
from fedcmt.errors import InputError
from fedcmt.settings import validated


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``fedcmt run`` and ``scripts/run_fed.py``."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the federation")
    parser.add_argument("--workspace", type=Path, help="where everything is written (default workspace/NAME)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        dest="overrides",
        help="override a setting; may be repeated",
    )
    parser.add_argument("--fresh", action="store_true", help="start over instead of going on")
    parser.add_argument(
        "--engine",
        choices=["inprocess", "nvflare", "nvflare-poc"],
        default="inprocess",
        help="inprocess; NVFlare's simulator; or separate local processes of a provisioned NVFlare (default inprocess)",
    )


def run(options: argparse.Namespace) -> None:
    """Run or resume a federation."""
    overrides = list(options.overrides)
    if options.workspace:
        overrides.append(f"workspace={str(options.workspace)!r}")
    config = load_config(options.config, overrides)
    if options.engine == "inprocess":
        from fedcmt.federation import run_federation

        result = run_federation(config, fresh=options.fresh)
    else:
        from fedcmt.engines.launch import run_on

        result = run_on(options.engine, config, fresh=options.fresh, show=lambda line: print(line, flush=True))
    print(f"finished {result.rounds} rounds; open {result.workspace / 'report.html'}")


def preprocess(options: argparse.Namespace) -> None:
    """Check, plan and preprocess datasets through nnU-Net."""
    if options.config:
        from fedcmt.federation import prepare_clients

        for name, plan in prepare_clients(load_config(options.config)).items():
            print(f"{name}: {_described(plan)}")
        return
    if not options.datasets:
        raise InputError(
            "nothing to preprocess", field="-d", fix="name datasets with -d ID ... or a federation with --config"
        )
    _preprocess_datasets(options)


def _preprocess_datasets(options: argparse.Namespace) -> None:
    from fedcmt.dataset import load_dataset
    from fedcmt.plans import TopologyContract, prepare_client, shape_summary

    for identifier in options.datasets:
        dataset = load_dataset(_folder(options.raw, "raw"), identifier)
        modality = "CT" if "ct" in [name.lower() for name in dataset.channel_names] else "MR"
        client = validated(
            ClientConfig,
            {"name": dataset.name, "dataset": dataset.name, "modality": modality, "spacing": options.spacing},
        )
        folder = _folder(options.preprocessed, "preprocessed")
        summary = shape_summary(client, dataset, folder, workers=options.workers)
        contract = TopologyContract.of(TopologyConfig(auto=True), [summary])
        plan = prepare_client(client, dataset, contract, folder, workers=options.workers)
        print(f"{dataset.name}: {_described(plan)}")


def check(options: argparse.Namespace) -> None:
    """Look for everything that is wrong with datasets, and change nothing."""
    from fedcmt.checks import check_datasets, check_federation

    if not options.config and not options.datasets:
        raise InputError(
            "nothing to check", field="-d", fix="name datasets with -d ID ... or a federation with --config"
        )
    if options.config:
        lines = check_federation(load_config(options.config))
    else:
        lines = check_datasets(_folder(options.raw, "raw"), options.datasets)
    for line in lines:
        print(line, flush=True)


def _folder(given: Path | None, which: str) -> Path:
    import os

    folder = given or os.environ.get(f"nnUNet_{which}")
    if not folder:
        raise InputError(
            f"no folder of {which} datasets",
            field=f"--{which}",
            fix=f"give --{which} or set the environment variable nnUNet_{which}",
        )
    return Path(folder)


def _described(plan: Any) -> str:
    configuration = plan.configuration
    return (
        f"{plan.task}, {len(plan.dataset.train)} cases, spacing {[round(s, 3) for s in configuration.spacing]} mm, "
        f"patch {list(configuration.patch_size)}, batch {configuration.batch_size} -> {plan.folder}"
    )


def evaluate(options: argparse.Namespace) -> None:
    """Score predictions against the truth, in nnU-Net's summary.json form and as CSV."""
    from fedcmt.evaluation_classes import CLASS_FILE, PREDICTIONS_FILE, evaluate_classes, table_at

    predicted = table_at(options.predictions, PREDICTIONS_FILE)
    folder = options.predictions if options.predictions.is_dir() else options.predictions.parent
    output = options.output or folder / "summary.json"
    if predicted is not None:
        truth = table_at(options.truth, CLASS_FILE)
        if truth is None:
            raise InputError(f"{options.truth} has no {CLASS_FILE}", field="-t", fix="name the table of true classes")
        summary = evaluate_classes(predicted, truth, output, chill=options.chill)
        for name, value in summary["mean"].items():
            print(f"{name}: " + ("undefined" if value is None else f"{value:.4f}"))
    else:
        _evaluate_segmentations(options, output)
    print(f"{output}, {output.with_suffix('.csv')}")


def _evaluate_segmentations(options: argparse.Namespace, output: Path) -> None:
    from fedcmt.evaluation import evaluate_segmentations

    summary, classes, warnings = evaluate_segmentations(
        options.predictions,
        options.truth,
        output,
        dataset_json=options.dataset_json,
        chill=options.chill,
        workers=options.workers,
    )
    for warning in warnings:
        print(f"warning: {warning}")
    means = {name: summary["mean"][str(label)] for name, label in classes.items()}
    for name, mean in (means | {"mean over classes": summary["foreground_mean"]}).items():
        print(f"{name}: Dice {mean['Dice']:.4f}, ASSD {mean['ASSD']:.3f} mm, HD95 {mean['HD95']:.3f} mm")


def cross_evaluate(options: argparse.Namespace) -> None:
    """Score every client's model on every other client's test set where tasks and channels agree."""
    from fedcmt import cross_site
    from fedcmt.report import write_report

    content = cross_site.cross_evaluate(options.workspace, raw=options.raw, device=options.device)
    print(
        f"{len(content['pairs'])} pairs scored, {len(content['left_out'])} left out: tasks, channels or labels differ"
    )
    print(write_report(options.workspace))


def report(options: argparse.Namespace) -> None:
    """Write the report of a workspace anew."""
    from fedcmt.report import write_report

    if not (options.workspace / "metrics.jsonl").is_file():
        raise InputError(
            f"{options.workspace} is no workspace of a federation with a finished round", field="workspace"
        )
    print(write_report(options.workspace))


def export(options: argparse.Namespace) -> None:
    """Write a client's model as an nnU-Net model folder."""
    from fedcmt.checkpoint import existing_client, export_nnunet_model
    from fedcmt.files import read_json

    if options.output.exists():
        raise InputError(f"{options.output} exists", field="-o", fix="choose a new folder")
    client = existing_client(options.workspace, options.client, options.checkpoint)
    export_nnunet_model(client, options.output)
    if read_json(client.facts)["task"] == "classification":
        print(f"{options.output}: stock nnU-Net does not classify")
        print(f"python -m fedcmt.infer -m {options.output} -i INPUT -o OUTPUT")
        return
    print(f"{options.output}: nnUNetv2_predict_from_modelfolder -m {options.output} -f 0 -i INPUT -o OUTPUT")


def compare(options: argparse.Namespace) -> None:
    """Run several strategies on several seeds and write how they compare."""
    from fedcmt.compare import compare as run_comparison
    from fedcmt.compare import parse_variants

    result = run_comparison(
        options.config,
        parse_variants(options.strategies),
        options.seeds,
        tuning=options.tuning,
        folder=options.output,
        processes=options.processes,
        score=options.score,
        overrides=options.overrides,
        reports=options.reports,
        budget=options.budget,
    )
    print((result.folder / "comparison.md").read_text())
    print(f"{result.folder}: {', '.join(sorted(path.name for path in result.folder.glob('*.*')))}")


def doctor(options: argparse.Namespace) -> None:
    """Say what was built, what is there and what falls back to what."""
    from fedcmt.doctor import examination

    for line in examination():
        print(line)


def add_compare_options(parser: argparse.ArgumentParser) -> None:
    """All of ``compare`` but the config, which :func:`compare` expects in ``config``."""
    parser.add_argument(
        "--strategies",
        required=True,
        metavar="A,B,...",
        help="names, or name:key=value:config.key=value with settings of strategy and federation; local is always run",
    )
    parser.add_argument("--seeds", type=int, required=True, metavar="N", help="how many test (or tuning) seeds")
    parser.add_argument("--tuning", action="store_true", help="use tuning seeds, which tests never see")
    parser.add_argument("-o", "--output", type=Path, help="where to write (default workspace/NAME-compare)")
    parser.add_argument("--processes", type=int, default=1, metavar="P", help="runs at a time (default 1)")
    parser.add_argument(
        "--score",
        choices=["test", "final"],
        help="test: model in use on test cases; final: last one on held-out cases (default: test where there are some)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", dest="overrides", help="override a setting"
    )
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="start no further run after these")
    parser.add_argument(
        "--reports", action="store_true", help="write each run's report, TensorBoard curves and model folders too"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fedcmt", description="Federated learning across modalities and tasks.")
    parser.add_argument("--version", action="version", version=f"fedcmt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        text = (function.__doc__ or "").strip().rstrip(".")
        added = commands.add_parser(
            function.__name__.replace("_", "-"), help=text[:1].lower() + text[1:], description=function.__doc__
        )
        added.set_defaults(function=function)
        return added

    add_run_arguments(command(run))
    checking = command(check)
    checking.add_argument("-d", "--datasets", nargs="+", metavar="ID", help="numbers or names of raw datasets")
    checking.add_argument("--config", type=Path, help="check the datasets and settings of this federation's clients")
    checking.add_argument("--raw", type=Path, help="folder of raw datasets (default $nnUNet_raw)")
    preparing = command(preprocess)
    preparing.add_argument("-d", "--datasets", nargs="+", metavar="ID", help="numbers or names of raw datasets")
    preparing.add_argument("--config", type=Path, help="preprocess for the clients of this federation instead")
    preparing.add_argument("--raw", type=Path, help="folder of raw datasets (default $nnUNet_raw)")
    preparing.add_argument("--preprocessed", type=Path, help="output (default $nnUNet_preprocessed)")
    preparing.add_argument("--spacing", nargs=3, type=float, metavar=("Z", "Y", "X"), help="target spacing in mm")
    preparing.add_argument("--workers", type=int, default=2, help="threads (default 2)")
    comparing = command(compare)
    comparing.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the federation")
    add_compare_options(comparing)
    evaluating = command(evaluate)
    evaluating.add_argument("-p", "--predictions", type=Path, required=True, help="label maps, or predictions.csv")
    evaluating.add_argument("-t", "--truth", type=Path, required=True, help="true label maps, or cls_data.csv")
    evaluating.add_argument("--dataset-json", type=Path, metavar="FILE", help="says the labels (default: looked for)")
    evaluating.add_argument("-o", "--output", type=Path, metavar="FILE", help="default PREDICTIONS/summary.json")
    evaluating.add_argument("--chill", action="store_true", help="do not mind cases without a prediction")
    evaluating.add_argument("--workers", type=int, default=2, help="threads (default 2)")
    crossing = command(cross_evaluate)
    crossing.add_argument("workspace", type=Path, metavar="DIR")
    crossing.add_argument("--raw", type=Path, help="folder of raw datasets (default: as in the config)")
    crossing.add_argument("--device", default="auto", help="auto, cpu or cuda[:i] (default auto)")
    command(report).add_argument("workspace", type=Path, metavar="DIR")
    exporting = command(export)
    exporting.add_argument("workspace", type=Path, metavar="DIR")
    exporting.add_argument("--client", required=True)
    exporting.add_argument("--checkpoint", choices=get_args(Checkpoint), help="default: what the federation chose")
    exporting.add_argument("-o", "--output", type=Path, required=True, metavar="MODEL_FOLDER")
    command(doctor)
    add_nvflare_commands(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: options.function(options))


if __name__ == "__main__":
    sys.exit(main())
