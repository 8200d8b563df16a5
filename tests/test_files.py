"""Atomic files and what reading a damaged one says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fedcmt.errors import InputError
from fedcmt.files import copy_into, read_json, read_tensors, write_json, write_tensors, write_text


def test_tensors_and_facts_come_back(tmp_path: Path) -> None:
    channels_last = torch.randn(4, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d)
    write_tensors(tmp_path / "a" / "x.safetensors", {"w": channels_last, "n": torch.tensor(3)}, {"round": 2, "é": None})
    tensors, facts = read_tensors(tmp_path / "a" / "x.safetensors")
    assert torch.equal(tensors["w"], channels_last)
    assert tensors["n"].item() == 3
    assert facts == {"round": 2, "é": None}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def disk_full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}


def test_not_a_number_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"score": float("nan")})
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage", "pickle"])
def test_damaged_tensors_are_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.safetensors"
    if damage == "pickle":
        torch.save({"a": torch.zeros(3)}, path)
    elif damage != "missing":
        write_tensors(path, {"w": torch.randn(100)}, {})
        content = path.read_bytes()
        path.write_bytes({"empty": b"", "truncated": content[:-50], "garbage": b"\0" * 100}[damage])
    with pytest.raises(InputError, match=r"x\.safetensors is missing, truncated or no FedCMT file"):
        read_tensors(path)


@pytest.mark.parametrize("text", ["", "{", "nonsense"])
def test_damaged_json_is_one_line(tmp_path: Path, text: str) -> None:
    write_text(tmp_path / "x.json", text)
    with pytest.raises(InputError, match="no valid JSON"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "values",
    [{"a": torch.zeros(3)}, {"a": torch.zeros(2), "b": torch.zeros(1)}, {"a": torch.zeros(2, dtype=torch.float64)}],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, values: dict[str, torch.Tensor]) -> None:
    target = {"a": torch.ones(2)}
    with pytest.raises(InputError, match="does not fit"):
        copy_into(target, values, source=tmp_path)
    assert torch.equal(target["a"], torch.ones(2))
