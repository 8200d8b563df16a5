"""Floors: a file imports from its own or lower ones, and never in a circle."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "fedcmt"
DOCUMENT = PACKAGE.parent / "docs" / "architecture.md"


def modules() -> dict[str, Path]:
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = [p for p in path.relative_to(PACKAGE).with_suffix("").parts if p != "__init__"]
        if parts:
            names[".".join(["fedcmt", *parts])] = path
    return names


def imports_of(path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file needs on import; those inside functions are resolved later."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fedcmt"):
            submodules = {full for name in node.names if (full := f"{node.module}.{name.name}") in known}
            found |= submodules
            if len(submodules) < len(node.names):  # otherwise nothing of the package's own file is asked for
                found |= {node.module} & known
    return found


def floors() -> dict[str, int]:
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", DOCUMENT.read_text(), re.M)
    return {name.rstrip("/").removesuffix(".py"): int(floor) for floor, names in rows for name in
            re.findall(r"`([^`]+)`", names)}  # fmt: skip


def test_every_module_has_a_floor() -> None:
    assert {name.split(".")[1] for name in modules()} == set(floors())


def test_imports_go_down() -> None:
    known, floor = modules(), floors()
    for name, path in known.items():
        for other in imports_of(path, set(known)):
            assert floor[other.split(".")[1]] <= floor[name.split(".")[1]], f"{name} imports {other}"


def test_no_circles() -> None:
    known = modules()
    graph = {name: imports_of(path, set(known)) - {name} for name, path in known.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(known)  # raises CycleError, naming the circle
