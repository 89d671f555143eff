"""What a benchmark leaves behind: rows, and the CSV that keeps them under the GPU's name."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from flashsvd.storage.atomic import write_text

# The dataclasses below have fields called torch.
Device = torch.device
Status = Literal["ok", "refused", "skipped", "failed", "quoted"]
RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Environment:
    """What was measured on; the commit is empty where git cannot say it."""

    gpu: str
    torch: str
    triton: str
    transformers: str
    commit: str

    @classmethod
    def of(cls, device: Device, commit: str = "") -> Environment:
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        return cls(gpu, *(_version(name) for name in ("torch", "triton", "transformers")), commit or git_commit())


@dataclass(frozen=True)
class Row:
    """One variant of one case.

    Attributes:
        shapes: the sizes, as `B=64 S=512`.
        status: `ok`; `refused`, which failed its check and was not timed; `skipped`, `failed`, each with a reason in
            `note`; `quoted`, which is somebody else's figure.
        mib: peak above what was allocated before the first call: what stays for later calls counts, such as the whole
            memory of captured graphs.
        mib_call: peak of a later call above what was allocated before that call.
        setup_s, first_s, capture_s: making the variant, its first call (which compiles, measures, captures), and
            where it has graphs, capturing them once everything is compiled and measured.
        timing: `events` around each run, `graph` where many runs were replayed as one CUDA graph, or `wall`.
        error: against fp64, the largest as a share of the largest number; `plain_error` is that of plain torch.
        speedups: `baseline=times` for each named baseline.
    """

    case: str
    shapes: str
    variant: str
    status: Status
    dtype: str = ""
    ms: float | None = None
    tflops: float | None = None
    mib: float | None = None
    mib_call: float | None = None
    setup_s: float | None = None
    first_s: float | None = None
    capture_s: float | None = None
    runs: int = 0
    timing: str = ""
    error: float | None = None
    plain_error: float | None = None
    speedups: str = ""
    note: str = ""
    gpu: str = ""
    torch: str = ""
    triton: str = ""
    transformers: str = ""
    commit: str = ""

    @property
    def sizes(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for pair in self.shapes.split())


def csv_file(script: str, gpu: str, directory: Path = RESULTS) -> Path:
    """Where a script's rows on a GPU go: `benchmark_classifier.py` on an H200 writes `classifier_nvidia-h200.csv`."""
    return directory / f"{script.removeprefix('benchmark_')}_{slug(gpu)}.csv"


def slug(name: str) -> str:
    """A device's name as a part of file names."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read_rows(file: Path, kind: type[Any] = Row) -> list[Any]:
    """The rows of a CSV that a benchmark wrote.

    Args:
        kind: their dataclass, whose fields are texts, whole numbers, and numbers that may be missing.

    Raises:
        SystemExit: it is anything else, which must not be written over.
    """
    with file.open(newline="", errors="replace") as handle:
        reader = csv.DictReader(handle)
        if tuple(reader.fieldnames or ()) != _columns(kind):
            raise SystemExit(f"{file} holds no rows of a benchmark; move it, or choose another --out")
        return [_parse(record, kind) for record in reader]


def write_rows(rows: Sequence[Any], file: Path) -> None:
    """Dataclasses of one kind, a line each.

    Args:
        rows: at least one.
    """
    write_text(file, _lines(rows, header=True))


def append_rows(rows: Sequence[Any], file: Path) -> None:
    """Rows behind those that a file has, in one write: whoever is killed after it has lost none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="") as handle:
        handle.write(_lines(rows, header=handle.tell() == 0))


def merge(earlier: list[Row], rows: list[Row]) -> list[Row]:
    """The rows, and those of cases that were only measured earlier; ratios of one case stay those of one run."""
    measured = {(row.case, row.shapes) for row in rows}
    return [row for row in earlier if (row.case, row.shapes) not in measured] + rows


def git_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _lines(rows: Sequence[Any], header: bool) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=_columns(type(rows[0])))
    if header:
        writer.writeheader()
    writer.writerows({name: _text(value) for name, value in dataclasses.asdict(row).items()} for row in rows)
    return text.getvalue()


def _text(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def _columns(kind: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def _parse(record: dict[str, str], kind: type[Any]) -> Any:
    return kind(**{field.name: _value(record[field.name], str(field.type)) for field in dataclasses.fields(kind)})


def _value(text: str, kind: str) -> Any:
    """A field's value, by the annotation that it has in the source."""
    match kind:
        case "int":
            return int(text)
        case "float":
            return float(text)
        case "float | None":
            return float(text) if text else None
    return text
