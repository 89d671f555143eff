"""Trains as the command line does, and writes down what each process ends with: run by torchrun, in a test."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from flashsvd.cli import main
from flashsvd.training import run
from flashsvd.training.trainer import ObjectiveTrainer


def record(directory: Path) -> None:
    """Each process's weights after the training, and who saved the model."""
    rank = os.environ.get("RANK", "0")
    train, save = ObjectiveTrainer.train, run.save_trained

    def recorded_train(self: ObjectiveTrainer, **options: Any) -> Any:
        output = train(self, **options)
        torch.save(self.model.state_dict(), directory / f"weights-{rank}.pt")
        (directory / f"losses-{rank}.json").write_text(
            json.dumps([entry["loss"] for entry in self.state.log_history if "loss" in entry])
        )
        return output

    def recorded_save(*arguments: Any, **options: Any) -> None:
        (directory / f"saved-{rank}").touch()
        save(*arguments, **options)

    ObjectiveTrainer.train = recorded_train
    run.save_trained = recorded_save


if __name__ == "__main__":
    record(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
