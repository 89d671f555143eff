"""`flashsvd info`: what a compressed checkpoint is, how large, and how to use it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashsvd.common.tables import html_table
from flashsvd.data.tasks import OWN_TASKS
from flashsvd.storage.metadata import CompressionInfo
from flashsvd.storage.places import LayerPlace, place_of

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
        return sum(size for name, size in self.files.items() if name.endswith(".safetensors"))

    def to_json(self) -> dict[str, Any]:
        """JSON-ready: the metadata, with `directory` and `files` beside it."""
        return {
            "directory": str(self.directory),
            "files": dict(self.files),
            "weight_bytes": self.weight_bytes,
            **dataclasses.asdict(self.compression),
        }

    def _rows(self) -> list[tuple[str, str]]:
        c, p = self.compression, self.compression.parameters
        rows = [
            ("checkpoint", str(self.directory)),
            ("base model", c.base_model),
            ("architecture", f"{c.architecture} ({c.model_type})"),
            ("task", c.task or "none given"),
            ("method", ", ".join([c.method, *_options(c.method_options), f"Q/K/V {c.qkv}"])),
            ("asked", _asked(c)),
            ("ranks", _rank_summary(c.module_ranks, c.module_places)),
            ("factored layers", _reduction(p["target_dense"], p["target_compressed"], "parameters")),
            ("whole model", _reduction(p["dense"], p["compressed"], "parameters")),
            ("weights", f"{_reduction(c.dense_bytes, self.weight_bytes, 'bytes')}, {c.dtype}"),
            ("made", f"{c.timestamp} by flashsvd {c.versions.get('flashsvd')}, commit {c.git_commit or 'unknown'}"),
        ]
        if c.calibration:
            rows.append(("calibrated on", _calibration(c.calibration)))
        rows += [("trained", _training(training)) for training in c.trainings]
        if c.untrained:
            rows.append(("random weights", ", ".join(c.untrained)))
        return rows

    def __str__(self) -> str:
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows]
        lines += ["", "files", *(f"  {size:>13,}  {name}" for name, size in self.files.items())]
        lines += [
            "",
            "use",
            "  import flashsvd",
            f"  model = flashsvd.load_compressed({str(self.directory)!r})",
            f"  {shlex.join(self._eval_command())}",
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
        return [*command, "--data", used if Path(used).expanduser().is_dir() else PLACEHOLDER]

    def __repr__(self) -> str:
        c = self.compression
        return f"CheckpointInfo({self.directory}: {c.base_model}, {c.method}, {self.weight_bytes:,} bytes of weights)"

    def _repr_html_(self) -> str:
        rows = [*self._rows(), *((f"file {name}", f"{size:,} bytes") for name, size in self.files.items())]
        return html_table(f"{self.compression.base_model}, compressed", (), rows)


def read_info(directory: str | Path) -> CheckpointInfo:
    """Read a checkpoint's metadata; its weights are not touched.

    Raises:
        CheckpointError: the directory holds no compressed checkpoint.
    """
    directory = Path(directory).expanduser()
    compression = CompressionInfo.read(directory)
    files = {str(f.relative_to(directory)): f.stat().st_size for f in sorted(directory.rglob("*")) if f.is_file()}
    return CheckpointInfo(directory, compression, files)


def show_checkpoint_info(directory: str | Path) -> None:
    """Print what `read_info` finds."""
    print(read_info(directory))


def _asked(c: CompressionInfo) -> str:
    if c.ratio is not None:
        return f"keep {c.ratio:g} of the factored layers' parameters"
    if c.ranks_json is not None:
        return f"the ranks of {c.ranks_json}"
    return ", ".join(f"{role} {rank}" for role, rank in c.ranks.items())


def _options(options: Mapping[str, Any]) -> list[str]:
    return [f"{name.replace('_', ' ')} {value}" for name, value in options.items() if value is not False]


def _calibration(about: Mapping[str, Any]) -> str:
    return (
        f"{about.get('samples')} samples, {about.get('tokens')} tokens of {about.get('data')}, seed {about.get('seed')}"
    )


def _training(about: Mapping[str, Any]) -> str:
    """`sst2, 3 epochs, learning rate 5e-05, seed 0: accuracy 0.8761`."""
    frozen = about.get("frozen") if isinstance(about.get("frozen"), list) else []
    parts = [
        str(about.get("task") or about.get("mode")),
        f"{about.get('epochs')} epochs of {about.get('data')}",
        f"learning rate {about.get('learning_rate')}",
        *([f"teacher {about['teacher']}"] if about.get("teacher") else []),
        *([f"frozen {', '.join(map(str, frozen))}"] if frozen else []),
        f"seed {about.get('seed')}",
    ]
    score = about.get("score")
    result = f": {about.get('metric')} {score:.4f}" if isinstance(score, (int, float)) else ""
    return ", ".join(parts) + result


def _rank_summary(module_ranks: Mapping[str, int | None], places: Mapping[str, LayerPlace]) -> str:
    """Ranks by what the matrices are called within a layer: `attention.self.query 96, output.dense 152`."""
    by_name: dict[str, list[int | None]] = {}
    for path, rank in module_ranks.items():
        by_name.setdefault(place_of(path, places).kind, []).append(rank)
    return ", ".join(f"{name} {_range(ranks)}" for name, ranks in by_name.items())


def _range(ranks: list[int | None]) -> str:
    numbers = sorted({rank for rank in ranks if rank is not None})
    if not numbers:
        return "dense"
    text = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
    dense = sum(rank is None for rank in ranks)
    return f"{text} ({dense} dense)" if dense else text


def _reduction(before: int, after: int, unit: str) -> str:
    return f"{before:,} -> {after:,} {unit} ({after / before:.1%})"
