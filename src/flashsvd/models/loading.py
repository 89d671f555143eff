"""Loading the weights and the tokenizers of models, with errors of one line."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashsvd.common.caller_state import ordinary_tensors
from flashsvd.common.lfs import POINTER
from flashsvd.common.making_modules import making_modules
from flashsvd.errors import CheckpointError, ConfigError, ModelError, library_errors
from flashsvd.lowrank.spec import QUANT_METHOD
from flashsvd.models.found import quantization_method
from flashsvd.models.heads import head_of, own_class
from flashsvd.models.registry import architecture_of, base_prefix
from flashsvd.storage.companions import find_pointer
from flashsvd.storage.tokenizer_check import check_tokenizer_files, tell_of_others
from flashsvd.storage.trust import check_tokenizer_config, check_weights
from flashsvd.storage.verify import INDEX, WEIGHTS, all_shapes, weight_files
from flashsvd.storage.weight_headers import find_weights, stored_dtype

log = logging.getLogger("flashsvd")

# Buffers that old checkpoints hold, which a model makes by itself.
_CONSTANTS = re.compile(r"(^|\.)(position_ids|masked_bias|inv_freq)$")


@dataclass(frozen=True)
class Pretrained:
    """A loaded model.

    Attributes:
        model: on the CPU, in eval mode.
        source: the local directory or hub name it came from.
        untrained: parameters its source had no weights for, so that they are random.
    """

    model: Any
    source: str
    untrained: tuple[str, ...] = ()


def load_model(
    source: str,
    config: Any,
    model_class: Any,
    dtype: torch.dtype | None = None,
    *,
    new_head: bool = False,
    **options: Any,
) -> Pretrained:
    """Load weights into `model_class`; those of another kind of head do not count, even under the same names.

    Args:
        dtype: None keeps the one that the weights are stored in, whatever the config says.
        new_head: give a sequence classifier a fresh head even where it has one.
        options: set on the config, such as `num_labels`.

    Raises:
        ModelError: the weights cannot be had or read, lie outside of the model, lack a part of the base model, or hold
            one that the model has no place for.
    """
    check_weights(source, config)
    if any((Path(source) / name).is_file() for name in (WEIGHTS, INDEX)):
        try:
            all_shapes(weight_files(Path(source)))
        except CheckpointError as error:
            raise ModelError(error.message) from error
    stored = own_dtype(source, config)
    dtype = stored if dtype is None else dtype
    for name, value in options.items():
        setattr(config, name, value)
    with library_errors(source), making_modules(), ordinary_tensors():
        model, loading = model_class.from_pretrained(
            source,
            config=config,
            dtype=dtype or "auto",
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        renewed = _renew_head(model) if new_head or _has_another_head(config, model_class) else []
    mismatched = sorted(str(entry[0]) for entry in loading["mismatched_keys"])
    if mismatched := [name for name in mismatched if name not in renewed]:
        raise ModelError(f"{source}: the tensor {mismatched[0]} does not have the shape that its config.json implies")
    untrained = tuple(sorted({*loading["missing_keys"], *renewed}))
    prefix = base_prefix(model)
    for name in untrained:
        # A head or a pooler may be new; the encoder below it may not.
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith("pooler."):
            raise ModelError(f"{source} lacks the weights of {name}, a part of the base model; fetch it again")
    _account_for(loading, model, source)
    return Pretrained(model.eval(), source, untrained)


def seeded(seed: int) -> AbstractContextManager[None]:
    """Weights that a model comes without depend on the seed alone, also where other threads load models."""
    return making_modules(torch.Generator().manual_seed(seed))


def skeleton(source: str, model_class: Any, config: Any) -> Any:
    """A model without storage.

    Raises:
        ModelError: its config makes none.
    """
    with library_errors(source), making_modules(), torch.device("meta"):
        return model_class(config)


def own_dtype(source: str, config: Any) -> torch.dtype | None:
    """The dtype that a model's weights are stored in, whatever its config says; None where they are not plain numbers.

    Raises:
        ModelError: naming a file that is truncated, damaged or a git-lfs pointer.
    """
    stored = stored_dtype(find_weights(source, getattr(config, "transformers_weights", None)))
    return stored if quantization_method(config) in (None, QUANT_METHOD) else None


def _account_for(loading: Any, model: Any, source: str) -> None:
    """Say what of a file did not come into the model.

    Raises:
        ModelError: it is a part of the base model, such as a layer, or transformers reports an error.
    """
    for message in loading.get("error_msgs") or ():
        raise ModelError(f"{source} cannot be loaded as {type(model).__name__}: {' '.join(str(message).split())}")
    lost = sorted(name for name in loading["unexpected_keys"] if not _CONSTANTS.search(name))
    if quantization_method(model.config) == QUANT_METHOD:
        # Those of the base model were held against the config when the factored layers were built.
        lost = [name for name in lost if not _in_base(model, name)]
    for name in lost:
        if _in_base(model, name):
            more = f" and {len(lost) - 1} more tensors" if len(lost) > 1 else ""
            raise ModelError(
                f"{source} holds {name}{more}, which a {type(model).__name__} of its config.json has no place for; "
                "correct the config (num_hidden_layers, as a rule), or fetch the model again"
            )
    if lost:
        _warn_of_lost(source, type(model).__name__, tuple(lost))


@functools.cache
def _warn_of_lost(source: str, model_class: str, names: tuple[str, ...]) -> None:
    """Once for each model and class, however often it is loaded."""
    log.warning("%s holds %s, which a %s has no place for: left out", source, shortened(names), model_class)


def _in_base(model: Any, name: str) -> bool:
    """Whether a file's tensor is one of the base model's own, under whatever head the file spells it; a pooler may go
    with a head."""
    prefix = f"{model.base_model_prefix}."
    bare = name.removeprefix(prefix)
    part = bare.partition(".")[0]
    base = model.get_submodule(base_prefix(model).removesuffix("."))
    known = name.startswith(prefix) or part in dict(base.named_children())
    return known and part != "pooler"


def shortened(names: Collection[str]) -> str:
    """The first four of some names, and how many others there are."""
    shown = ", ".join(list(names)[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _has_another_head(config: Any, model_class: Any) -> bool:
    """Whether a sequence classifier is loaded from another class's checkpoint, whose head may have the same names."""
    if head_of(config, model_class) != "classifier":
        return False
    return bool(getattr(config, "architectures", None)) and own_class(config) is not model_class


def _renew_head(model: Any) -> list[str]:
    """Give the head fresh weights, as transformers would have; returns their names."""
    prefix = base_prefix(model)
    kept = (prefix, *(f"{path}." for path in architecture_of(model.config).shared_head))
    renewed = {name: p for name, p in model.named_parameters() if not name.startswith(kept)}
    for parameter in renewed.values():
        # Memory of its own: that of a file may not be written to.
        parameter.data = torch.empty_like(parameter)
        parameter._is_hf_initialized = False
    # Children first, since a module may give its children's weights another scale than they have by themselves.
    for path, module in reversed(list(model.named_modules())):
        if not f"{path}.".startswith(kept):
            model._init_weights(module)
    return list(renewed)


def sequence_length(config: Any, source: str, asked: int | None, default: int) -> int:
    """The sequence length to use: the one asked for, or the default as far as the model can read it.

    Raises:
        ConfigError: the model cannot read as many tokens as asked.
    """
    longest = architecture_of(config).max_length(config)
    if asked is not None and asked > longest:
        raise ConfigError(f"--seq-len {asked} is above {longest}, the longest {source} can read")
    return min(default, longest) if asked is None else asked


def check_tokens(largest: Mapping[str, int], config: Any, source: str) -> None:
    """Refuse token ids, or types of tokens, that a model has no embedding for.

    Args:
        largest: of each of the model's inputs, by argument name.

    Raises:
        ModelError: the tokenizer is not the model's.
    """
    for name, what, count in (
        ("input_ids", "token", config.vocab_size),
        ("token_type_ids", "token type", getattr(config, "type_vocab_size", None)),
    ):
        if count is not None and largest.get(name, 0) >= count:
            raise ModelError(
                f"the tokenizer of {source} gives {what} {largest[name]}, but the model knows {count}; "
                "save the model's own tokenizer"
            )


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model.

    Raises:
        ModelError: the model has no tokenizer, has lost a part of it, or it would be read from elsewhere.
    """
    from transformers import AutoTokenizer

    if Path(source).is_dir():
        check_tokenizer_files(source)
    check_tokenizer_config(source)
    if Path(source).is_dir() and (pointer := find_pointer(Path(source))):
        raise ModelError(f"{pointer} {POINTER}")
    with library_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if not words:
        raise ModelError(f"the tokenizer of {source} has no words; save the base model's tokenizer into it")
    if Path(source).is_dir():
        tell_of_others(source)
    return tokenizer


def check_tokenizer(tokenizer: Any, source: str, *, masks: bool = False) -> None:
    """Refuse a tokenizer that cannot pad, or where `masks` has no token to mask with.

    Raises:
        ModelError: naming what it lacks.
    """
    if tokenizer.pad_token is None:
        raise ModelError(f"the tokenizer of {source} has no padding token; set one and save it again")
    if masks and tokenizer.mask_token_id is None:
        raise ModelError(f"the tokenizer of {source} has no mask token; set one and save it again")
