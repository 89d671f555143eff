"""Learning from a teacher's outputs and hidden states beside the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flashsvd.data.tasks import Task
from flashsvd.errors import ConfigError, FlashSVDError, ModelError
from flashsvd.models.found import find_model
from flashsvd.models.loading import load_tokenizer
from flashsvd.models.registry import architecture_of
from flashsvd.models.sentence import read_sentence_encoder
from flashsvd.training.config import DISTILL_WEIGHT, TEMPERATURE, FinetuneConfig
from flashsvd.training.data import make_objective
from flashsvd.training.model import HeadedModel, Mode, resize_output
from flashsvd.training.objectives import Objective, Question


@dataclass(frozen=True)
class Distillation:
    """How much a teacher counts: (1 - weight) loss + weight soft loss + hidden_weight hidden loss."""

    weight: float
    temperature: float
    hidden_weight: float


@dataclass(frozen=True)
class Answer:
    """One model's answer to a question.

    Attributes:
        scores: of its objective.
        hidden_states: [B, S, D] of the embeddings and of each layer; None where they were not asked for.
    """

    scores: Tensor
    hidden_states: Sequence[Tensor] | None


class Teacher:
    """A model in eval mode that answers the student's questions.

    Args:
        objective: the mode's, for the teacher: its classes may be in another order than the student's.
    """

    def __init__(self, model: Any, objective: Objective, distillation: Distillation) -> None:
        self._model = model.eval().requires_grad_(False)
        self._objective = objective
        self._distillation = distillation

    def to(self, device: torch.device) -> Teacher:
        self._model.to(device)
        return self

    @property
    def wants_hidden_states(self) -> bool:
        return self._distillation.hidden_weight > 0

    def answer(self, question: Question) -> Answer:
        """What the teacher says to the student's inputs."""
        with torch.no_grad():
            output = self._model(**question.inputs, output_hidden_states=self.wants_hidden_states)
            return Answer(self._objective.scores(output, question), output.get("hidden_states"))

    def blend(self, loss: Tensor, student: Answer, teacher: Answer, question: Question) -> Tensor:
        """The student's loss with the teacher in it.

        Args:
            loss: of the labels.
        """
        how = self._distillation
        soft = soft_loss(student.scores, teacher.scores, how.temperature)
        blended = (1 - how.weight) * loss + how.weight * soft
        if student.hidden_states is None or teacher.hidden_states is None:
            return blended
        mask = question.inputs["attention_mask"]
        return blended + how.hidden_weight * hidden_loss(student.hidden_states, teacher.hidden_states, mask)


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of logits [M, classes]; squared error of values [M(, 1)].

    The factor keeps gradients at the size that the labels' own have (Hinton, Vinyals and Dean, Distilling the
    Knowledge in a Neural Network, 2015).
    """
    if student.dim() == 1 or student.shape[1] == 1:
        return F.mse_loss(student, teacher)
    log_p, log_q = (F.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean") * temperature**2


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean squared difference of hidden states over layers, real tokens and channels; layer by layer.

    The embeddings' output is the first, as in TinyBERT (Jiao et al., 2020); both models have as many layers and
    channels, so that no projection lies between them.

    Args:
        student, teacher: for each layer, [B, S, D].
        mask: 1 at real tokens, [B, S].
    """
    real = mask.bool()
    return torch.stack(
        [F.mse_loss(s[real].float(), t[real].float()) for s, t in zip(student, teacher, strict=True)]
    ).mean()


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
            teacher = HeadedModel.of(find_model(config.teacher), mode, task, trains=False)
        except FlashSVDError as error:
            raise type(error)(f"--teacher cannot be used: {error.message}") from error
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
    if mode == "similarity":
        theirs, ours = (read_sentence_encoder(model.source, model.config) for model in (teacher, student))
        if (theirs.prompt, theirs.lowercase) != (ours.prompt, ours.lowercase):
            raise ModelError(f"{who} has another prompt or case than {student.name}; take one with the same")
    if mode == "mlm" and teacher.config.vocab_size != student.config.vocab_size:
        raise ModelError(
            f"{who} predicts {teacher.config.vocab_size} tokens, {student.name} {student.config.vocab_size}; take a "
            "model with as many"
        )
    if not distillation.hidden_weight:
        return
    for name in ("num_hidden_layers", "hidden_size"):
        one, other = (getattr(model.config, name) for model in (teacher, student))
        if one != other:
            raise ModelError(f"{who} has {name} {one}, {student.name} {other}; leave out --hidden-weight")
