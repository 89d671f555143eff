"""`flashsvd info`: what a compressed checkpoint is, how large, and how to use it."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashsvd.common.paths import expand
from flashsvd.common.tables import html_table
from flashsvd.data.tasks import OWN_TASKS
from flashsvd.shown import printable, shown
from flashsvd.storage.description import describe
from flashsvd.storage.digests import verify
from flashsvd.storage.metadata import INFO_FILE, CompressionInfo
from flashsvd.storage.verify import check_whole, weight_files

# Stands for data that only the user knows: what was trained on scores nothing.
PLACEHOLDER = "VALIDATION_DATA"

__all__ = ["CheckpointInfo", "read_info", "show_checkpoint_info"]


@dataclass(frozen=True, repr=False)
class CheckpointInfo:
    """A checkpoint's metadata and its files.

    Attributes:
        files: sizes in bytes, by path inside the directory.
    """

    directory: Path
    compression: CompressionInfo
    files: Mapping[str, int]

    @property
    def weight_bytes(self) -> int:
        """Of the model itself; a sentence encoder's other modules have weights of their own."""
        return sum(size for name, size in self.files.items() if name.endswith(".safetensors") and "/" not in name)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready: the metadata, with `directory` and `files` beside it."""
        return {
            "directory": str(self.directory),
            "files": dict(self.files),
            "weight_bytes": self.weight_bytes,
            **dataclasses.asdict(self.compression),
        }

    def _rows(self) -> list[tuple[str, str]]:
        return [("checkpoint", str(self.directory)), *describe(self.compression, self.weight_bytes)]

    def __str__(self) -> str:
        rows = [(name, shown(value)) for name, value in self._rows()]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows]
        lines += ["", "files", *(f"  {size:>13,}  {shown(name)}" for name, size in self.files.items())]
        lines += [
            "",
            "use",
            "  import flashsvd",
            f"  model = flashsvd.load_compressed({str(self.directory)!r})",
            f"  {shown(shlex.join(self._eval_command()))}",
        ]
        return "\n".join(lines)

    def _eval_command(self) -> list[str]:
        """A command that scores the checkpoint, on the data that it was made with where that has a validation file."""
        task = self.compression.task or "TASK"
        abouts = [*reversed(self.compression.trainings), self.compression.calibration or {}]
        used = next((str(about["data"]) for about in abouts if about.get("data")), None)
        command = ["flashsvd", "eval", "--checkpoint", str(self.directory), "--task", task]
        if used is None or used.startswith("hub:"):
            return [*command, "--data", PLACEHOLDER] if task in OWN_TASKS else command
        return [*command, "--data", used if _is_directory(used) else PLACEHOLDER]

    def __repr__(self) -> str:
        c = self.compression
        return f"CheckpointInfo({self.directory}: {c.base_model}, {c.method}, {self.weight_bytes:,} bytes of weights)"

    def _repr_html_(self) -> str:
        rows = [*self._rows(), *((f"file {name}", f"{size:,} bytes") for name, size in self.files.items())]
        return html_table(f"{self.compression.base_model}, compressed", (), rows)


def read_info(directory: str | Path, verify_files: bool = False) -> CheckpointInfo:
    """Read a checkpoint's metadata; its weights are not touched.

    Args:
        verify_files: read its weight and tokenizer files after all, and hold them against the digests that they were
            saved with.

    Raises:
        CheckpointError: the directory holds no compressed checkpoint, its weights are not all there, or a file is not
            the one that was saved.
    """
    directory = expand(directory)
    compression = _compression(directory)
    if verify_files:
        verify(directory, compression.digests)
    for file in weight_files(directory):
        check_whole(file)
    files = {str(f.relative_to(directory)): f.stat().st_size for f in sorted(directory.rglob("*")) if f.is_file()}
    return CheckpointInfo(directory, compression, files)


def show_checkpoint_info(directory: str | Path, verify_files: bool = False) -> None:
    """Print what `read_info` finds."""
    info = read_info(directory, verify_files)
    print(printable(str(info)))
    if verify_files:
        print(f"\nverified: {len(info.compression.digests)} files are as they were saved")


def _is_directory(name: str) -> bool:
    # Names that no system takes raise, and those of a home that nobody has.
    with contextlib.suppress(OSError, ValueError):
        return expand(name).is_dir()
    return False


def _compression(directory: Path) -> CompressionInfo:
    if (directory / INFO_FILE).is_file():
        return CompressionInfo.read_file(directory / INFO_FILE)
    # It has to build the model, for which torch is imported.
    from flashsvd.models.found import find_info

    return find_info(directory)
