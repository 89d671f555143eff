"""Holding a checkpoint's tensors against the state of the model that is to be loaded from it.

transformers only warns about a missing or extra tensor, and not at all where the user asked it not to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from flashsvd.models.registry import base_prefix
from flashsvd.storage.verify import TensorShape, check_tensors


def check_state(model: Any, found: Mapping[str, TensorShape], where: str, *, all_of_it: bool = False) -> None:
    """Demand that a checkpoint holds the whole state of the model, and nothing else.

    Of tensors that the model ties together one is enough, since they are written once.

    Args:
        model: with its factored modules in place, on any device.
        found: the shapes of the checkpoint's tensors, by name.
        where: what the checkpoint is called in the error.
        all_of_it: whether it must hold what the class itself can do without, too.

    Raises:
        CheckpointError: naming a tensor that is missing, misshapen or has no place.
    """
    state = model.state_dict(keep_vars=True)
    written = {id(tensor) for name, tensor in state.items() if name in found}
    tied = {name for name, tensor in state.items() if id(tensor) in written}
    optional = tied if all_of_it else tied | _ignored(model, state, "missing")
    check_tensors(_shapes(model), found, where, optional)


def check_base_state(model: Any, found: Mapping[str, TensorShape], where: str) -> None:
    """Hold a checkpoint against a model as `check_state` does, but for the head: an encoder loads under any.

    Args:
        model: of the class that saved the checkpoint or of another, with its factored modules in place.
        found: the shapes of the checkpoint's tensors, by name.
        where: what the checkpoint is called in the error.

    Raises:
        CheckpointError: naming a tensor that is missing, misshapen or has no place.
    """
    expected = _shapes(model)
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
    check_tensors(expected, found, where, optional)


def _shapes(model: Any) -> dict[str, TensorShape]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _optional(model: Any, expected: Iterable[str], found: Mapping[str, TensorShape]) -> set[str]:
    """Names that may be missing, since another tensor is their twin, or that the class itself ignores."""
    # The twins are not tied yet.
    twins = dict(getattr(model, "all_tied_weights_keys", None) or {})
    twins |= {source: name for name, source in twins.items()}
    tied = {name for name, twin in twins.items() if twin in found or _respelled(model, twin) in found}
    names = {*expected, *found}
    return tied | _ignored(model, names, "missing") | _ignored(model, names, "unexpected")


def _ignored(model: Any, names: Iterable[str], what: str) -> set[str]:
    """The names that the class itself ignores where they are `missing` or `unexpected`."""
    patterns = getattr(model, f"_keys_to_ignore_on_load_{what}", None) or ()
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def _base_names(model: Any, found: Mapping[str, TensorShape]) -> dict[str, str]:
    """The checkpoint's tensors of the base model: their names in `model`, and as the file spells them."""
    prefix = f"{model.base_model_prefix}."
    in_file = prefix if any(name.startswith(prefix) for name in found) else ""
    return {base_prefix(model) + n.removeprefix(in_file): n for n in found if n.startswith(in_file)}


def _respelled(model: Any, name: str) -> str:
    prefix = f"{model.base_model_prefix}."
    return name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
