"""transformers' Trainer with a mode's loss, and a teacher's where there is one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.utils import logging

from flashsvd.data.tokenize import Inputs
from flashsvd.errors import ConfigError
from flashsvd.training.config import FinetuneConfig
from flashsvd.training.distill import Answer, Teacher
from flashsvd.training.objectives import Objective


class ObjectiveTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Trains on an `Objective`."""

    def __init__(self, *, objective: Objective, teacher: Teacher | None, **options: Any) -> None:
        super().__init__(**options, compute_metrics=self._metrics_of)
        self._objective = objective
        self._teacher = teacher.to(self.args.device) if teacher else None
        # A batch's loss is a mean here: the Trainer must divide it by the batches of a step.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: Any = None
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


_SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
# Points of the loss curve.
POINTS = 200


def training_arguments(
    config: FinetuneConfig, directory: Path, on_cpu: bool, metric: str | None, greater_is_better: bool
) -> Any:
    """Arguments that train as the config says; making them starts torch's process group, where there are several.

    Args:
        directory: for checkpoints.
        metric: the one that the best weights are chosen by; None where nothing is evaluated.

    Raises:
        ConfigError: this machine cannot train so.
    """
    from transformers import TrainingArguments

    evaluation = "no" if metric is None else "steps" if config.eval_steps else "epoch"
    options: dict[str, Any] = {
        "output_dir": str(directory),
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": _SCHEDULERS[config.scheduler],
        "warmup_steps": config.warmup,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.clip,
        "bf16": config.bf16,
        "eval_strategy": evaluation,
        "eval_steps": config.eval_steps,
        # The Trainer keeps the best weights only where it saves them as often as it evaluates.
        "save_strategy": "steps" if evaluation == "steps" else "epoch",
        "save_steps": config.eval_steps or config.save_steps,
        "save_total_limit": 2,
        "load_best_model_at_end": metric is not None,
        "metric_for_best_model": metric,
        "greater_is_better": greater_is_better,
        "logging_strategy": "steps",
        "logging_steps": 1 / POINTS,
        # Losses that are not finite must show.
        "logging_nan_inf_filter": False,
        # A sentence encoder's own pooling leaves the model's pooler aside; every other mode uses all there is.
        "ddp_find_unused_parameters": config.mode == "similarity",
        "label_names": ["labels"],
        "remove_unused_columns": False,
        "dataloader_pin_memory": not on_cpu,
        "use_cpu": on_cpu,
        "seed": config.seed,
        "report_to": "none",
        "disable_tqdm": False,
        "log_level_replica": "error",
    }
    for launcher in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{launcher}", "false").lower() in ("1", "true"):
            raise ConfigError(f"{launcher} shards a model, which is not supported; start plain processes with torchrun")
    try:
        arguments = TrainingArguments(**options)
        arguments.device  # noqa: B018 - sets up the devices
    except (ImportError, ValueError, RuntimeError) as error:
        raise ConfigError(f"cannot train so here: {' '.join(str(error).split())}") from error
    # One process trains on one GPU: several belong to several processes, not to nn.DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
