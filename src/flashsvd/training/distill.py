"""Learning from a teacher's outputs and hidden states beside the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flashsvd.training.objective import Objective, Question


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
