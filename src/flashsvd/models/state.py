"""Holding a compressed checkpoint's tensors against the whole state of the model that is about to be loaded.

transformers only warns about a missing or extra tensor, and not at all where the user asked it not to. A head may
differ, since an encoder loads under any; the base model may not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flashsvd.models.registry import base_prefix
from flashsvd.storage.verify import Shape, check_no_extra, compare_tensors


def check_state(model: Any, found: Mapping[str, Shape], where: str) -> None:
    """Demand every tensor of the model, or of its base model where another class saved the checkpoint.

    Args:
        model: with its factored modules in place, on any device.
        found: the shapes of the checkpoint's tensors, by name.

    Raises:
        CheckpointError: naming a tensor that is missing, misshapen or has no place.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    optional = _optional(model, expected, found)
    if type(model).__name__ not in (model.config.architectures or ()):
        names = _base_names(model, found)
        found = {name: found[spelled] for name, spelled in names.items()}
        expected = {name: shape for name, shape in expected.items() if name.startswith(base_prefix(model))}
        # A class with a head may have no pooler where its base model has one, and the other way round.
        pooler = f"{base_prefix(model)}pooler."
        optional |= {name for name in (*expected, *found) if name.startswith(pooler)}
    # A head of another size is transformers' to refuse, or to replace where the user says so.
    found = {n: s if n.startswith(base_prefix(model)) else expected.get(n, s) for n, s in found.items()}
    compare_tensors({n: s for n, s in expected.items() if n in found or n not in optional}, found, where)
    check_no_extra({*expected, *optional}, found, where)


def _optional(model: Any, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> set[str]:
    """Names that may be missing, since another tensor is their twin, or that the class itself ignores."""
    twins = dict(getattr(model, "all_tied_weights_keys", None) or {})
    twins |= {source: name for name, source in twins.items()}
    ignored = [
        *(getattr(model, "_keys_to_ignore_on_load_missing", None) or ()),
        *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
    ]
    tied = {name for name, twin in twins.items() if twin in found or _respelled(model, twin) in found}
    return tied | {n for n in (*expected, *found) if any(re.search(pattern, n) for pattern in ignored)}


def _base_names(model: Any, found: Mapping[str, Shape]) -> dict[str, str]:
    """The checkpoint's tensors of the base model: their names in `model`, and as the file spells them."""
    prefix = f"{model.base_model_prefix}."
    in_file = prefix if any(name.startswith(prefix) for name in found) else ""
    return {base_prefix(model) + n.removeprefix(in_file): n for n in found if n.startswith(in_file)}


def _respelled(model: Any, name: str) -> str:
    prefix = f"{model.base_model_prefix}."
    return name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
