"""Compressed checkpoints of the benchmarks' models: made once, kept in a directory, and found again there."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flashsvd
from flashsvd.compression.config import METHOD_NAMES
from flashsvd.errors import ConfigError


@dataclass(frozen=True)
class Compression:
    """How a model is compressed."""

    method: str
    ratio: float
    qkv: str

    def __str__(self) -> str:
        return f"{self.method} {self.ratio:g} {self.qkv}"

    def config(self, model: str, **others: Any) -> flashsvd.CompressConfig:
        """What to ask of flashsvd.

        Raises:
            ConfigError: a value cannot be used.
        """
        if self.method not in METHOD_NAMES:
            raise ConfigError(f"the method {self.method!r} is not known; choose from {', '.join(METHOD_NAMES)}")
        return flashsvd.CompressConfig(model, self.method, "similarity", ratio=self.ratio, qkv=self.qkv, **others)


@dataclass(frozen=True)
class Checkpoints:
    """The compressed models in a directory, with the statistics that were collected for them.

    Attributes:
        stsb: training pairs in `train.tsv`, of which 512 are drawn to calibrate on.
        device: what compresses, `cuda` or `cpu`.
    """

    directory: Path
    stsb: Path
    device: str

    def find(self, name: str, model: Path, how: Compression) -> Path:
        """A model's checkpoint, which is made where it is not there yet.

        Args:
            name: of the model, for the names of its checkpoints.
        """
        target = self.directory / f"{name}-{how.method}-{how.ratio:g}-{how.qkv}"
        if not target.is_dir():
            flashsvd.run_compress(
                how.config(
                    str(model), calib_data=str(self.stsb), device=self.device, output=str(target),
                    **self._statistics(name, how.method),
                )
            )  # fmt: skip
        return target

    def _statistics(self, name: str, method: str) -> dict[str, str]:
        """Read those that are there; any method that needs some collects what all of them need."""
        if method == "standard":
            return {}
        directory = self.directory / f"{name}-statistics"
        return {"stats" if directory.is_dir() else "save_stats": str(directory)}


@contextlib.contextmanager
def kept_in(directory: Path | None) -> Iterator[Path]:
    """A directory that is made where it is missing, or for None a temporary one."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
