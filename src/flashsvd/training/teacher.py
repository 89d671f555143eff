"""Which model is imitated, found and held against the student before either is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashsvd.data.tasks import Task
from flashsvd.errors import ConfigError, FlashSVDError, ModelError
from flashsvd.finetune_config import DISTILL_WEIGHT, TEMPERATURE, FinetuneConfig
from flashsvd.models.loading import load_tokenizer
from flashsvd.models.registry import architecture_of
from flashsvd.training.distill import Distillation, Teacher
from flashsvd.training.headed_model import HeadedModel, Mode, resize_output
from flashsvd.training.material import make_objective


@dataclass(frozen=True)
class TeacherPlan:
    """A teacher that fits a student."""

    source: HeadedModel
    distillation: Distillation

    @classmethod
    def find(
        cls, config: FinetuneConfig, mode: Mode, task: Task | None, student: HeadedModel, tokenizer: Any, seq_len: int
    ) -> TeacherPlan | None:
        """The teacher that a config names; None where it names none.

        Args:
            tokenizer: the student's, whose tokens both models read.
            seq_len: most tokens of an example.

        Raises:
            FlashSVDError: it cannot be had, was not trained for the mode and task, knows other tokens or fewer of them
                at a time, or has other hidden states.
        """
        if config.teacher is None:
            return None
        weight = DISTILL_WEIGHT if config.distill_weight is None else config.distill_weight
        how = Distillation(weight, config.temperature or TEMPERATURE, config.hidden_weight or 0.0)
        try:
            teacher = HeadedModel.find(config.teacher, mode, task, trains=False)
        except FlashSVDError as error:
            raise type(error)(f"--teacher cannot be used: {error}") from error
        _check(teacher, student, mode, tokenizer, how)
        longest = architecture_of(teacher.config).max_length(teacher.config)
        if seq_len > longest:
            raise ConfigError(f"--teacher {teacher.name} reads {longest} tokens at most; pass --seq-len {longest}")
        return cls(teacher, how)

    def load(self, task: Task | None, tokenizer: Any, scale: float) -> Teacher:
        """The teacher, whose scores are multiples of `scale` as the student's labels are."""
        objective = make_objective(task, self.source, tokenizer)
        model = self.source.load(seed=0).model
        resize_output(model, 1 / scale)
        return Teacher(model, objective, self.distillation)


def _check(teacher: HeadedModel, student: HeadedModel, mode: Mode, tokenizer: Any, distillation: Distillation) -> None:
    """Refuse a teacher whose answers would mean something else than the student's."""
    who = f"--teacher {teacher.name}"
    if mode != "similarity" and not teacher.has_head:
        raise ModelError(f"{who} has no trained {teacher.model_class.__name__} to imitate; train it first")
    if teacher.foreign_classes:
        raise ModelError(f"{who} has the classes {', '.join(teacher.foreign_classes)}, which are not the task's")
    if load_tokenizer(teacher.source).get_vocab() != tokenizer.get_vocab():
        raise ModelError(f"{who} has other tokens than {student.name}; take a model of the same family")
    if mode == "mlm" and teacher.config.vocab_size != student.config.vocab_size:
        raise ModelError(
            f"{who} predicts {teacher.config.vocab_size} tokens, {student.name} {student.config.vocab_size}; take a "
            "model with as many"
        )
    if not distillation.hidden_weight:
        return
    for name in ("num_hidden_layers", "hidden_size"):
        theirs, ours = (getattr(model.config, name) for model in (teacher, student))
        if theirs != ours:
            raise ModelError(f"{who} has {name} {theirs}, {student.name} {ours}; leave out --hidden-weight")
