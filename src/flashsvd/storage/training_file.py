"""What a fine-tuning leaves beside the weights: a record of it, and the curve of its loss.

A compressed checkpoint has the record in its `compression_info.json`, a dense model in a file of its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashsvd.common.json_file import read_object
from flashsvd.errors import CheckpointError, described

TRAINING_FILE = "flashsvd_training.json"
CURVE_CSV, CURVE_PNG = "loss.csv", "loss.png"


@dataclass(frozen=True)
class TrainingRecord:
    """What a model's metadata says of one training.

    Attributes:
        model: what was trained, as the user named it.
        epochs, steps: how far it went, which early stopping may have made less than was asked.
        batch_size: examples between two steps of the optimiser, over all processes.
        frozen: the parts that were kept as they were.
        teacher: the model that was imitated; None where none was.
        metric: the name of the metric that the weights were chosen by, None where nothing was evaluated.
        score: its value with these weights; None where it is not defined.
    """

    mode: str
    task: str | None
    model: str
    data: str
    epochs: float
    steps: int
    batch_size: int
    learning_rate: float
    frozen: tuple[str, ...]
    teacher: str | None
    metric: str | None
    score: float | None
    seed: int
    processes: int
    versions: Mapping[str, str | None]
    timestamp: str

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read_trainings(file: Path) -> list[Mapping[str, Any]]:
    """The trainings of a dense model, the last one last, from its `TRAINING_FILE`.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        trainings = read_object(file)["trainings"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({described(error)}); remove it to train without its history"
        ) from error
    if not isinstance(trainings, list) or not all(isinstance(entry, dict) for entry in trainings):
        raise CheckpointError(f"{file} holds no list of trainings; remove it to train without its history")
    return trainings


def write_trainings(file: Path, trainings: Sequence[Mapping[str, Any]]) -> None:
    """Write the file that `read_trainings` reads."""
    text = json.dumps({"trainings": list(trainings)}, indent=2, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")
