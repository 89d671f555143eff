"""The counts of a config held against the weights that it describes, before anything is built of so many parts."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashsvd.errors import FlashSVDError, ModelError
from flashsvd.storage.verify import TensorShape, all_shapes, weight_files

_LAYERS, _POSITIONS = "num_hidden_layers", "max_position_embeddings"
_HEADS, _HEAD_DIM, _ATTENTION = "num_attention_heads", "head_dim", "num_attention_heads times head_dim"
# Each is a dimension of some tensor, or smaller than one.
_WIDTHS = (
    "hidden_size", "intermediate_size", "vocab_size", "type_vocab_size", "num_labels", _HEADS, "num_key_value_heads",
    _HEAD_DIM, _ATTENTION, "n_inner", "hidden_dim", "relative_attention_num_buckets",
)  # fmt: skip
_WORD_TABLES = ("word_embeddings.weight", "tok_embeddings.weight", "embed_tokens.weight", "wte.weight")
_POSITION_TABLES = ("position_embeddings.weight", "wpe.weight")

# Where no headers tell: more than any model has, and little enough to build.
_MOST_LAYERS, _WIDEST = 1_000, 2**24


def check_counts(config: Mapping[str, Any], source: str) -> None:
    """Refuse a config of more layers, labels, words or channels than there can be.

    Args:
        config: what config.json holds.
        source: the model's directory or hub name; empty where it is not known. In a directory with safetensors files,
            their headers have the last word.

    Raises:
        ModelError: naming the first count that cannot be.
    """
    shapes = _shapes(Path(source)) if source else {}
    counts = _counts(config)
    # A layer has more than one tensor.
    limits = {_LAYERS: len(shapes) or _MOST_LAYERS}
    limits |= dict.fromkeys(_WIDTHS, max((size for shape in shapes.values() for size in shape), default=_WIDEST))
    for name, shape in shapes.items():
        if name.endswith(_WORD_TABLES) and len(shape) == 2:
            limits["vocab_size"], limits["hidden_size"] = shape
        elif name.endswith(_POSITION_TABLES) and len(shape) == 2:
            limits[_POSITIONS] = shape[0]
    for name, most in limits.items():
        if counts.get(name, 0) > most:
            why = "its weights have room for" if shapes else "the most that is built is"
            raise ModelError(
                f"config.json of {source or 'the model'} has {name} {counts[name]:,}, but {why} {most:,}; "
                "fetch the model again"
            )


def _counts(config: Mapping[str, Any]) -> dict[str, int]:
    """The whole numbers of a config, under the names that all families share."""
    from transformers import CONFIG_MAPPING

    family = config.get("model_type")
    aliases = getattr(CONFIG_MAPPING[family], "attribute_map", {}) if family in CONFIG_MAPPING else {}
    shared = {own: name for name, own in aliases.items()}
    counts = {shared.get(name, name): value for name, value in config.items() if type(value) is int}
    counts[_ATTENTION] = counts.get(_HEADS, 0) * counts.get(_HEAD_DIM, 0)
    return counts


def _shapes(directory: Path) -> dict[str, TensorShape]:
    """Those of a directory's tensors; empty where they cannot be had, which whoever loads them says."""
    with contextlib.suppress(FlashSVDError):
        return all_shapes(weight_files(directory)) if directory.is_dir() else {}
    return {}
