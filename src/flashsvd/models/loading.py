"""Loading the weights and the tokenizers of models, with errors of one line."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashsvd.common.making import making_modules
from flashsvd.common.process import ordinary_tensors
from flashsvd.errors import ConfigError, ModelError, library_errors
from flashsvd.models.heads import head_of, own_class
from flashsvd.models.registry import architecture_of, base_prefix
from flashsvd.storage.tokenizer_files import check_tokenizer_files, tell_of_others
from flashsvd.storage.trust import check_tokenizer_config, check_weights
from flashsvd.storage.verify import INDEX, WEIGHTS, all_shapes, weight_files


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
        dtype: None keeps the checkpoint's own.
        new_head: give a sequence classifier a fresh head even where it has one.
        options: set on the config, such as `num_labels`.

    Raises:
        ModelError: the weights cannot be had or read, lie outside of the model, or lack a part of the base model.
    """
    check_weights(source, config)
    if any((Path(source) / name).is_file() for name in (WEIGHTS, INDEX)):
        all_shapes(weight_files(Path(source)))
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


def check_vocabulary(largest: int, vocabulary: int, source: str) -> None:
    """Refuse token ids that a model has no embedding for.

    Raises:
        ModelError: the tokenizer is not the model's.
    """
    if largest >= vocabulary:
        raise ModelError(
            f"the tokenizer of {source} gives token {largest}, but the model knows {vocabulary}; "
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
