"""A model under the head that a mode trains, dense or compressed, as far as it is known before its weights are."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from flashsvd.data.tasks import Task, check_classifier, foreign_classes, names_classes_of
from flashsvd.errors import DataError, ModelError
from flashsvd.io import load_factored
from flashsvd.models.found import Found
from flashsvd.models.heads import class_for_task, head_class
from flashsvd.models.loading import Pretrained, load_model, seeded
from flashsvd.models.precision import check_finite
from flashsvd.models.registry import base_prefix, find_targets

log = logging.getLogger("flashsvd")

Mode = Literal["cls", "mlm", "similarity"]


@dataclass(frozen=True)
class LoadedModel:
    """A model with parameters in float32, on the CPU.

    Attributes:
        dtype: that of its checkpoint.
        untrained: parameters its checkpoint had no weights for.
    """

    model: Any
    dtype: torch.dtype
    untrained: tuple[str, ...]


@dataclass(frozen=True)
class HeadedModel(Found):
    """A model that fits a mode; its config has the classes of the task in it.

    Attributes:
        model_class: the transformers class that the mode trains.
        has_head: whether its checkpoint has the head, and is to keep it.
        foreign_classes: what the head's classes were called, where that was something else than the task's labels.
    """

    model_class: Any
    has_head: bool
    foreign_classes: tuple[str, ...]

    @classmethod
    def of(
        cls, found: Found, mode: Mode, task: Task | None, new_head: bool = False, *, trains: bool = True
    ) -> HeadedModel:
        """Hold a model that was found against a mode.

        Args:
            new_head: a classifier gets a fresh head for the task, whatever head it has.
            trains: whether it is to be trained, and not a teacher.

        Raises:
            ModelError, CheckpointError: it cannot be trained, or given the head that the mode needs.
            DataError: its head has another number of classes than the task.
        """
        name, config, compressed = found.name, found.config, found.compressed
        if found.quantized:
            raise ModelError(f"{name} is quantized, and rounded weights cannot be trained; give the unquantized model")
        if trains and found.factors == "int8":
            raise ModelError(
                f"{name} has int8 factors, and rounded weights cannot be trained; compress with --factors float, train "
                "that, and round it with flashsvd.round_factors"
            )
        if mode == "mlm":
            model_class = head_class(config, "masked-lm")
        else:
            try:
                model_class, options = class_for_task(name, task, config, new_head)
            except DataError as error:
                if compressed or not trains:
                    raise
                raise DataError(f"{error.message}, or train a fresh head with --new-head") from error
            for option, value in options.items():
                setattr(config, option, value)
        has_own_head = found.own_class is model_class
        if compressed and new_head and has_own_head:
            # Some versions of transformers put the old head into a compressed model whatever the new one's size is.
            raise ModelError(f"{name} is compressed, head and all; give its dense model a new head and compress that")
        has_head = has_own_head and not new_head
        foreign: list[str] = []
        if mode == "cls":
            assert task is not None, "a classifier is trained on a task"
            if not has_head:
                config.problem_type = None
            foreign = foreign_classes(task, config) if task.labels else []
            _set_classes(task, config)
            check_classifier(config, name)
        return cls(name, found.source, config, model_class, has_head, tuple(foreign))

    def load(self, seed: int) -> LoadedModel:
        """Load it; weights of a head that it lacks are random, by the seed."""
        with seeded(seed):
            if self.compressed and self.has_head:
                loaded = Pretrained(load_factored(self.source, self.config), self.source)
            else:
                new_head = self.own_class is self.model_class and not self.has_head
                loaded = load_model(self.source, self.config, self.model_class, new_head=new_head)
        model = loaded.model
        if not self.compressed:
            # The weights of a compressed one are looked at as they are loaded.
            check_finite(model)
        dtype = model.dtype
        # The parameters alone: buffers such as rotary frequencies have a precision of their own.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
        return LoadedModel(model, dtype, loaded.untrained)


def start_at(model: Any, untrained: Collection[str], value: float) -> None:
    """Let a new regression head answer with about this value at first, so that no step goes into finding it.

    Args:
        untrained: names of the parameters that are random; a head without a bias stays as it is.
    """
    for name, parameter in model.named_parameters():
        if name in untrained and name.endswith("bias") and parameter.shape == (1,):
            parameter.data.fill_(value)


def resize_output(model: Any, factor: float) -> None:
    """Multiply what a regression's head answers, in its last layer."""
    if factor == 1:
        return
    base = set(model.base_model.modules())
    outputs = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1 and m not in base]
    (output,) = outputs
    for parameter in output.parameters():
        parameter.data.mul_(factor)


def _set_classes(task: Task, config: Any) -> None:
    """Name the task's classes in the config, unless they are there in an order of their own."""
    if task.labels and not names_classes_of(task, config):
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: i for i, label in enumerate(task.labels)}
    if config.problem_type is None:
        config.problem_type = "single_label_classification" if task.labels else "regression"


def freeze(model: Any, parts: Collection[str]) -> None:
    """Take the gradient from the parameters of some parts; biases go with their matrices, norms stay trainable.

    Args:
        parts: of `embeddings` (all of them, with their norm), `attention` (projections of Q, K, V and of the output)
            and `ffn` (the feed-forward matrices).
    """
    for target in find_targets(model):
        if ("ffn" if target.role == "ffn" else "attention") in parts:
            model.get_submodule(target.module).requires_grad_(False)
    if "embeddings" in parts:
        for child in model.get_submodule(base_prefix(model).removesuffix(".")).children():
            if any(isinstance(module, nn.Embedding) for module in child.modules()):
                child.requires_grad_(False)
