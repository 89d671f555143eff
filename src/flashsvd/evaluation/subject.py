"""The checkpoint that is evaluated, dense or compressed, as far as it is known before its weights are loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from flashsvd.data.tasks import PERPLEXITY, TASKS, Task, check_label_count, get_task
from flashsvd.errors import ConfigError, ModelError
from flashsvd.io import load_factored
from flashsvd.models.found import Found, find_model
from flashsvd.models.heads import fitting_tasks, head_class, head_of
from flashsvd.models.loading import load_model, sequence_length
from flashsvd.models.registry import base_prefix
from flashsvd.storage.model_files import HubUnreachableError, companion_file
from flashsvd.storage.training_file import TRAINING_FILE, read_trainings

log = logging.getLogger("flashsvd")


def task_of(asked: str | None, found: Found) -> Task:
    """The task asked for, or the last one that the checkpoint was compressed or trained for, or a language model's own.

    Raises:
        ConfigError: neither names one.
        CheckpointError: the checkpoint's metadata cannot be used.
    """
    if asked is not None:
        return get_task(asked)
    known = _own_task(found)
    if known not in TASKS and head_of(found.config, found.own_class) == "lm":
        log.info("%s is a causal language model that names no task: its perplexity is measured", found.name)
        known = PERPLEXITY
    if known not in TASKS:
        raise ConfigError(
            f"{found.name} does not say which task it is for; name one that it fits with --task: "
            f"{fitting_tasks(found.config)}"
        )
    return get_task(known)


def _own_task(found: Found) -> str:
    if found.compressed:
        return (found.info.task if found.info else None) or ""
    try:
        file = companion_file(found.source, TRAINING_FILE)
    except HubUnreachableError:
        return ""
    trainings = read_trainings(file) if file else []
    return str(trainings[-1].get("task")) if trainings else ""


@dataclass(frozen=True)
class Subject(Found):
    """A checkpoint that fits a task.

    Attributes:
        wanted_class: the class that the task needs: its own, or the base class below its head.
    """

    wanted_class: Any

    @classmethod
    def find(cls, checkpoint: str, task: Task) -> Subject:
        """Find a checkpoint and hold it against a task.

        Raises:
            ModelError, CheckpointError: it cannot be had, is not supported, or lacks the head that the task needs.
            DataError: its head has another number of classes than the task.
        """
        return cls.of(find_model(checkpoint), task)

    @classmethod
    def of(cls, found: Found, task: Task) -> Subject:
        """Hold a checkpoint that was found against a task.

        Raises:
            ModelError, CheckpointError: it lacks the head that the task needs, or its metadata cannot be used.
            DataError: its head has another number of classes than the task.
        """
        subject = cls(found.name, found.source, found.config, head_class(found.config, task.head))
        own = subject.own_class
        if task.head != "encoder" and own is not subject.wanted_class:
            lacks = "classification head" if task.head == "classifier" else "causal language model head"
            raise ModelError(
                f"{found.name} is a {own.__name__} without a {lacks}; {task.name} needs one, and the model fits "
                f"--task {fitting_tasks(found.config)}"
            )
        if task.head == "classifier":
            check_label_count(task, found.config, found.name)
        if subject.info and subject.info.untrained:
            random = ", ".join(subject.info.untrained)
            log.warning("the weights of %s were random when the model was compressed", random)
        return subject

    def seq_len(self, asked: int | None, default: int) -> int:
        """The sequence length to use: the one asked for, or the default as far as the model can read it.

        Raises:
            ConfigError: the model cannot read as many tokens as asked.
        """
        return sequence_length(self.config, self.source, asked, default)

    @property
    def method(self) -> str:
        """The compression method, which may be `unknown`, or `dense`."""
        return self.info.method if self.info else "dense"

    def load(self, dtype: torch.dtype | None) -> Any:
        """The model on the CPU, in eval mode; its own dtype for None."""
        if self.compressed:
            model = load_factored(self.source, self.config, dtype)
            return model if self.own_class is self.wanted_class else model.base_model
        loaded = load_model(self.source, self.config, self.wanted_class, dtype)
        if self.own_class is self.wanted_class and loaded.untrained and base_prefix(loaded.model):
            log.warning(
                "%s has no trained weights for %s: they are random, and so are its scores",
                self.source,
                ", ".join(loaded.untrained),
            )
        return loaded.model
