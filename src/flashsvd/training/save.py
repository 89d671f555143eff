"""A trained model's directory: an ordinary model of transformers, or an ordinary compressed checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsvd.io import save_compressed, save_dense
from flashsvd.models.registry import base_prefix
from flashsvd.storage.companions import Companions, find_companions, find_tokenizer
from flashsvd.storage.metadata import INFO_FILE, CompressionInfo
from flashsvd.storage.model_files import HubUnreachableError, companion_file
from flashsvd.storage.training_file import TRAINING_FILE, read_trainings, write_trainings
from flashsvd.training.model import HeadedModel, Mode


def output_marker(model: HeadedModel) -> str:
    """The file by which a directory of this kind is known as ours, and may be replaced."""
    return INFO_FILE if model.compressed else TRAINING_FILE


def companions_of(model: HeadedModel, mode: Mode) -> Companions:
    """What goes beside the weights: under a head, no model is a sentence encoder any more."""
    return (
        find_companions(model.source, sentence_encoder=True) if mode == "similarity" else find_tokenizer(model.source)
    )


def past_trainings(model: HeadedModel) -> Sequence[Mapping[str, Any]]:
    """The trainings that a model has behind it."""
    if model.info is not None:
        return model.info.trainings
    try:
        file = companion_file(model.source, TRAINING_FILE)
    except HubUnreachableError:
        return ()
    return read_trainings(file) if file else ()


@dataclass(frozen=True)
class RandomParameters:
    """Parameters that no checkpoint had weights for, with their values before the training."""

    values: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: Any, names: Collection[str]) -> RandomParameters:
        return cls({name: p.detach().clone() for name, p in model.named_parameters() if name in names})

    def left(self, model: Any) -> tuple[str, ...]:
        """The names of the parameters that are as they were, and so still random."""
        now = dict(model.named_parameters())
        return tuple(sorted(name for name, value in self.values.items() if torch.equal(now[name].cpu(), value)))


def save_trained(
    model: Any,
    headed: HeadedModel,
    output: Path,
    trainings: Sequence[Mapping[str, Any]],
    companions: Companions,
    untrained: tuple[str, ...],
    overwrite: bool,
    scratch: Path,
) -> None:
    """Write a trained model, all of it or nothing.

    Args:
        model: in the dtype to save, on the CPU.
        headed: what it was before.
        trainings: all it has behind it.
        companions: with the curve of the loss among them.
        untrained: parameters that are still random.
        scratch: a directory for files on their way.

    Raises:
        CheckpointError: the output cannot be written.
    """
    if headed.info is not None:
        info = trained_info(headed.info, model, trainings, untrained)
        save_compressed(model, output, info, companions=companions, overwrite=overwrite)
        return
    file = scratch / TRAINING_FILE
    write_trainings(file, trainings)
    companions = Companions({**companions.files, TRAINING_FILE: file})
    save_dense(model, output, companions, TRAINING_FILE, overwrite=overwrite)


def trained_info(
    info: CompressionInfo, model: Any, trainings: Sequence[Mapping[str, Any]], untrained: tuple[str, ...]
) -> CompressionInfo:
    """What is to say of a compressed model after a training, which may have given it another head."""
    prefix, own = f"{model.base_model_prefix}.", base_prefix(model)

    def renamed(of_modules: Mapping[str, Any]) -> dict[str, Any]:
        return {own + name.removeprefix(prefix): value for name, value in of_modules.items()}

    compressed = sum(p.numel() for p in model.parameters())
    dense = info.parameters["dense"] + compressed - info.parameters["compressed"]
    return dataclasses.replace(
        info,
        module_ranks=renamed(info.module_ranks),
        module_errors=renamed(info.module_errors),
        module_places=renamed(info.module_places),
        task=trainings[-1]["task"] or info.task,
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        parameters={**info.parameters, "dense": dense, "compressed": compressed},
        untrained=untrained,
        trainings=tuple(trainings),
    )
