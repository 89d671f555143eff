"""The checkpoint that is evaluated, dense or compressed, as far as it is known before its weights are loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from flashsvd.data.tasks import Task, check_label_count
from flashsvd.errors import ModelError
from flashsvd.io import find_info, is_compressed, load_factored
from flashsvd.models.heads import base_class, causal_lm_class, classifier_class, own_class
from flashsvd.models.loading import load_config, load_model, locate, sequence_length
from flashsvd.models.registry import base_prefix
from flashsvd.storage.metadata import INFO_FILE, CompressionInfo

log = logging.getLogger("flashsvd")


@dataclass(frozen=True)
class Subject:
    """A checkpoint that fits a task.

    Attributes:
        source: its directory or hub name.
        config: its transformers config.
        own_class: the transformers class that saved it.
        wanted_class: the class that the task needs: its own, or the base class below its head.
        compressed: whether its layers are factored.
        info: what is known of its compression; None for a dense model, and where its metadata was lost.
    """

    source: str
    config: Any
    own_class: Any
    wanted_class: Any
    compressed: bool
    info: CompressionInfo | None

    @classmethod
    def find(cls, checkpoint: str, task: Task) -> Subject:
        """Find a checkpoint and hold it against a task.

        Raises:
            ModelError, CheckpointError: it cannot be had, is not supported, or lacks the head that the task needs.
            DataError: its head has another number of classes than the task.
        """
        source = locate(checkpoint)
        config = load_config(source)
        own, wanted = own_class(config), _wanted_class(config, task)
        if task.head != "encoder" and own is not wanted:
            lacks = "classification head" if task.head == "classifier" else "causal language model head"
            raise ModelError(f"{checkpoint} is a {own.__name__} without a {lacks}; {task.name} needs one")
        if task.head == "classifier":
            check_label_count(task, config, checkpoint)
        compressed = is_compressed(config)
        info = find_info(source) if compressed else None
        if compressed and info is None:
            log.warning("%s is compressed but has no %s, so its method is unknown", checkpoint, INFO_FILE)
        if info and info.untrained:
            log.warning("the weights of %s were random when the model was compressed", ", ".join(info.untrained))
        return cls(source, config, own, wanted, compressed, info)

    def seq_len(self, asked: int | None, default: int) -> int:
        """The sequence length to use: the one asked for, or the default as far as the model can read it.

        Raises:
            ConfigError: the model cannot read as many tokens as asked.
        """
        return sequence_length(self.config, self.source, asked, default)

    @property
    def method(self) -> str:
        """The compression method, `dense`, or `unknown`."""
        if self.info is not None:
            return self.info.method
        return "unknown" if self.compressed else "dense"

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


def _wanted_class(config: Any, task: Task) -> Any:
    match task.head:
        case "classifier":
            return classifier_class(config)
        case "lm":
            return causal_lm_class(config)
        case "encoder":
            return base_class(config)
