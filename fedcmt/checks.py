"""``fedcmt check``: everything that can be wrong with datasets, before anything is preprocessed or trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedcmt.config import FederationConfig
from fedcmt.dataset import ImageFindings, RawDataset, inspect_dataset, inspect_images
from fedcmt.errors import InputError, Problems
from fedcmt.plans import check_client, client_folds


def check_datasets(raw: Path, datasets: Sequence[str]) -> Iterator[str]:
    """Check raw datasets as they are.

    Args:
        raw: nnU-Net's raw folder.
        datasets: Numbers or names.

    Yields:
        A line for each dataset without problems and one for each warning.

    Raises:
        InputError: After the last dataset, everything that was wrong with any of them.
    """
    problems = Problems()
    for name in datasets:
        before = len(problems.errors)
        dataset = inspect_dataset(raw, name, problems)
        if dataset is not None:
            findings = inspect_images(dataset, problems)
            sound = len(problems.errors) == before
            task = "classification" if dataset.class_names else "segmentation"
            yield from _lines(dataset, task, findings, sound, None)
    problems.raise_any()


def check_federation(config: FederationConfig) -> Iterator[str]:
    """Check the dataset of every client, and each client's settings against it.

    Yields:
        A line for each client without problems and one for each warning.

    Raises:
        InputError: After the last client, everything that was wrong with any of them.
    """
    problems = Problems()
    for client in config.clients:
        before = len(problems.errors)
        dataset = inspect_dataset(config.folder("raw"), client.dataset, problems, client=client.name)
        if dataset is None:
            continue
        findings = inspect_images(dataset, problems, client=client.name)
        task: str = client.task or ("classification" if dataset.class_names else "segmentation")
        if len(problems.errors) == before:
            with problems.caught(client=client.name):
                task = check_client(client, dataset)
                client_folds(client, dataset, task, config.folder("preprocessed") / dataset.name)
        yield from _lines(dataset, task, findings, len(problems.errors) == before, client.name)
    problems.raise_any()


def _lines(dataset: RawDataset, task: str, findings: ImageFindings, sound: bool, client: str | None) -> Iterator[str]:
    if sound:
        name = dataset.name if client is None else f"{client}: {dataset.name}"
        cases = f"{len(dataset.train)} training and {len(dataset.test)} test cases"
        yield f"{name}: {task}, {cases}, channels {', '.join(dataset.channel_names)}: no problem found"
    warnings = [*findings.warnings, *(str(InputError(text, client=client)) for text in _few_cases(dataset, task))]
    yield from (f"warning: {warning}" for warning in warnings)


def _few_cases(dataset: RawDataset, task: str) -> Iterator[str]:
    """What there is too little of to hold a case out for validation."""
    if len(dataset.train) == 1:
        yield f"{dataset.name} has one training case; the model will be validated on the case it was trained on"
    elif task == "classification":
        classes = [dataset.case_class.get(identifier) for identifier in dataset.train]
        for class_id, name in enumerate(dataset.class_names or ()):
            if classes.count(class_id) < 2:
                yield (
                    f"class '{name}' of {dataset.name} has {classes.count(class_id)} training cases; the model will be "
                    "validated on the cases it was trained on"
                )
