"""What a packed model refuses: its factors are gone, folded into the weights of its blocks."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

from torch import nn

from flashsvd.errors import BackendError


class PackedModule(nn.Module):
    """Mixed into every class that stands in a packed model for one of transformers'."""

    def train(self, mode: bool = True) -> Any:
        if mode:
            self._refuse("trained")
        return super().train(False)

    def state_dict(self, *_: Any, **__: Any) -> Any:
        self._refuse("saved")

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        self._refuse("given other weights")

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
        self._refuse("given other weights")

    def __reduce_ex__(self, _: Any) -> NoReturn:
        self._refuse("pickled")

    # Copies are made by reduction too, unless it is said how.

    def __copy__(self) -> Any:
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _refuse(self, what: str) -> NoReturn:
        raise BackendError(
            f"an optimised model cannot be {what}; load the checkpoint again, without optimize, for that"
        )


class PackedModel(PackedModule):
    """Refuses, for a model as a whole, what its packed blocks cannot do."""

    def save_pretrained(self, *_: Any, **__: Any) -> Any:
        self._refuse("saved")

    def dequantize(self, *_: Any, **__: Any) -> Any:
        self._refuse("made dense")


class HalfPacked(PackedModel):
    """Mixed into what holds fused layers where others were never made: it neither runs nor can be made whole."""

    def forward(self, *_: Any, **__: Any) -> Any:
        self._refuse("run")

    def _refuse(self, what: str) -> NoReturn:
        raise BackendError(
            f"optimize was interrupted, so that the model cannot be {what}: some layers' weights are gone; "
            "load the checkpoint again"
        )


def refuse_packed(model: nn.Module, what: str = "saved") -> None:
    """Raises BackendError where a model was packed, wholly or in part.

    Args:
        what: cannot be done with it, as a participle.
    """
    for module in model.modules():
        if isinstance(module, PackedModule):
            module._refuse(what)


def refuse_half_packed(model: nn.Module) -> None:
    """Raises BackendError where a model was packed in part."""
    for module in model.modules():
        if isinstance(module, HalfPacked):
            module._refuse("optimised")


def is_packed(model: nn.Module) -> bool:
    """Whether a model holds packed blocks."""
    return any(isinstance(module, PackedModule) for module in model.modules())


def mark_packed(model: nn.Module) -> None:
    """Make a transformers model refuse what its blocks cannot do, before anything else happens to it."""
    mix_in(model, PackedModel)


def mark_half_packed(model: nn.Module) -> None:
    """Make a model whose layers were fused in part refuse everything; one of which none was is left as it was."""
    for module in [module for module in model.modules() if is_packed(module)]:
        mix_in(module, HalfPacked)


def mix_in(model: nn.Module, mixin: type) -> None:
    """Give a module of transformers the methods of another class before its own.

    transformers finds what it knows of a class, such as which outputs can be recorded, by the class's full name; so the
    subclass goes by the same one.
    """
    base = type(model)
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    model.__class__ = type(base.__name__, (mixin, base), names)
