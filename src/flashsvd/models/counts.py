"""The counts of a config held against the weights that it describes, before anything is built that has so many parts."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashsvd.errors import FlashSVDError, ModelError
from flashsvd.storage.verify import TensorShape, all_shapes, weight_files

_LAYERS = "num_hidden_layers"
# Each is a dimension of some tensor.
_WIDTHS = (
    "hidden_size", "intermediate_size", "vocab_size", "type_vocab_size", "num_labels",
    "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip
_EMBEDDINGS = ("word_embeddings.weight", "tok_embeddings.weight", "embed_tokens.weight", "wte.weight")
_POSITIONS = ("position_embeddings.weight", "wpe.weight")

# Where no headers tell: more than any model has, and little enough to build.
_MOST_LAYERS, _MOST = 1_000, 2**24


def check_counts(config: Mapping[str, Any], source: str) -> None:
    """Refuse a config of more layers, labels, words or channels than there can be.

    Args:
        config: what config.json holds.
        source: the model's directory or hub name. In a directory with safetensors files, their headers have the last
            word.

    Raises:
        ModelError: naming the first count that cannot be.
    """
    counts = _counts(config)
    shapes = _shapes(Path(source))
    tensors = len(shapes) or _MOST_LAYERS
    widest = max((size for shape in shapes.values() for size in shape), default=_MOST)
    # A layer has more than one tensor.
    _refuse_above(counts, (_LAYERS,), tensors, source, bool(shapes))
    _refuse_above(counts, _WIDTHS, widest, source, bool(shapes))
    if any(name.endswith(_POSITIONS) for name in shapes):
        _refuse_above(counts, ("max_position_embeddings",), widest, source, True)
    if {"num_attention_heads", "head_dim"} <= set(counts) and counts["num_attention_heads"] * counts[
        "head_dim"
    ] > _MOST:
        raise ModelError(f"config.json of {source} asks for attention wider than any; fetch the model again")
    _check_embedding(counts, shapes, source)


def _counts(config: Mapping[str, Any]) -> dict[str, int]:
    """The whole numbers of a config, under the names that all families share."""
    from transformers import CONFIG_MAPPING

    own = config.get("model_type")
    aliases = getattr(CONFIG_MAPPING[own], "attribute_map", {}) if own in CONFIG_MAPPING else {}
    shared = {name: common for common, name in aliases.items()}
    return {shared.get(name, name): value for name, value in config.items() if type(value) is int}


def _shapes(directory: Path) -> dict[str, TensorShape]:
    """Those of a directory's tensors; empty where they cannot be had, which whoever loads them says."""
    with contextlib.suppress(FlashSVDError):
        return all_shapes(weight_files(directory)) if directory.is_dir() else {}
    return {}


def _refuse_above(counts: Mapping[str, int], names: tuple[str, ...], most: int, source: str, known: bool) -> None:
    for name in names:
        if counts.get(name, 0) > most:
            why = f"more than its weights have room for ({most:,})" if known else f"of which at most {most:,} are built"
            raise ModelError(f"config.json of {source} has {name} {counts[name]:,}, {why}; fetch the model again")


def _check_embedding(counts: Mapping[str, int], shapes: Mapping[str, TensorShape], source: str) -> None:
    for name, shape in shapes.items():
        if name.endswith(_EMBEDDINGS) and len(shape) == 2:
            for count, size in zip(("vocab_size", "hidden_size"), shape, strict=True):
                if counts.get(count, size) > size:
                    raise ModelError(
                        f"config.json of {source} has {count} {counts[count]:,}, but the tensor {name} is {list(shape)}; "
                        "fetch the model again"
                    )
