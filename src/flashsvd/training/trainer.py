"""transformers' Trainer with a mode's loss, and a teacher's where there is one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.utils import logging

from flashsvd.training.distill import Answer, Teacher
from flashsvd.training.objective import Objective
from flashsvd.training.rows import Tensors


class ObjectiveTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Trains on an `Objective`."""

    def __init__(self, *, objective: Objective, teacher: Teacher | None, **options: Any) -> None:
        super().__init__(**options, compute_metrics=self._metrics_of)
        self._objective = objective
        self._teacher = teacher.to(self.args.device) if teacher else None
        # A batch's loss is a mean here: the Trainer shall divide it by the batches of a step.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: Tensors, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of a batch; while evaluating, of the labels alone, and what the metrics need."""
        teacher = self._teacher if model.training else None
        question = self._objective.ask(inputs, model.training)
        options = {"output_hidden_states": True} if teacher and teacher.wants_hidden_states else {}
        output = model(**question.inputs, **options)
        scores = self._objective.scores(output, question)
        loss = self._objective.loss(scores, question)
        if teacher:
            # The student's forward is wrapped in it; the teacher is a plain model.
            with self.accelerator.autocast():
                answer = teacher.answer(question)
            loss = teacher.blend(loss, Answer(scores, output.get("hidden_states")), answer, question)
        if not return_outputs:
            return loss
        return loss, {"loss": loss, "predictions": self._objective.predictions(scores, question)}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a checkpoint's weights under the names that the model has now.

        Those of the file it came from may be older ones (LayerNorm.gamma), which resuming would not find.
        """
        if self.args.should_save:
            with _no_bars():
                self.model.save_pretrained(output_dir, save_original_format=False)

    def _metrics_of(self, outcome: Any) -> Mapping[str, float]:
        predictions, labels = (torch.from_numpy(values) for values in (outcome.predictions, outcome.label_ids))
        return self._objective.evaluate(predictions, labels)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """transformers shows a bar for every file it writes, which would tear the one of the training."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
