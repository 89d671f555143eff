"""What happens while the Trainer runs: when checkpoints are written, what is shown, and when it is hopeless."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from flashsvd.errors import DataError

log = logging.getLogger("flashsvd")


class Checkpoints(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Checkpoints between evaluations, every so many steps."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # One after an epoch or the last step waits for the evaluation, whose result it then holds.
        at_end = state.epoch == round(state.epoch) or state.global_step >= state.max_steps
        written_anyway = args.save_strategy == "epoch" and at_end
        if state.global_step % self._steps == 0 and not written_anyway:
            control.should_save = True


class LastEvaluation(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """An evaluation after the last step, whatever the interval, so that the last weights can be the best."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.eval_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True


class EarlyStopping(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Ends a training after so many evaluations without a better one.

    It counts them in the Trainer's history, which a resumed run has too; a count of its own would start anew.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Each evaluation is followed by a checkpoint, before which the Trainer has noted the best.
        if evaluations_since_best(state) >= self._patience:
            control.should_training_stop = True


def evaluations_since_best(state: Any) -> int:
    """How many evaluations a training's state holds after its best one."""
    best = state.best_global_step or 0
    return sum("eval_loss" in entry and entry["step"] > best for entry in state.log_history)


class StopWhenLost(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Ends a training whose loss is not finite any more, before a checkpoint is written of it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        """Look at what the Trainer logs.

        Raises:
            DataError: the loss is NaN or infinite.
        """
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise DataError(f"the loss is {loss} at step {state.global_step}; lower --learning-rate or --clip")


class Progress(ProgressCallback):  # type: ignore[misc]  # transformers is untyped
    """The Trainer's bars, with the loss beside them and a line for each evaluation."""

    def __init__(self, metrics: Sequence[str]) -> None:
        super().__init__()
        self._metrics = metrics

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "loss" in logs and self.training_bar is not None:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}", epoch=f"{state.epoch:.2f}")
        scores = [f"{name} {logs[f'eval_{name}']:.4f}" for name in ("loss", *self._metrics) if f"eval_{name}" in logs]
        if scores:
            log.info("epoch %.2f, step %d: evaluation %s", state.epoch, state.global_step, ", ".join(scores))
