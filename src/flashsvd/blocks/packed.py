"""What a packed model refuses: its factors are gone, folded into the weights of its blocks."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from flashsvd.errors import BackendError


class PackedModule(nn.Module):
    """Mixed into every class that stands in a packed model for one of transformers'."""

    def train(self, mode: bool = True) -> Any:
        if mode:
            _refuse("trained")
        return super().train(False)

    def state_dict(self, *_: Any, **__: Any) -> Any:
        _refuse("saved")

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        _refuse("given other weights")

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
        _refuse("given other weights")


class PackedModel(PackedModule):
    """The same for a model as a whole."""

    def save_pretrained(self, *_: Any, **__: Any) -> Any:
        _refuse("saved")


def refuse_packed(model: nn.Module) -> None:
    """Raises BackendError where a model was packed."""
    if is_packed(model):
        _refuse("saved")


def is_packed(model: nn.Module) -> bool:
    """Whether a model holds packed blocks."""
    return any(isinstance(module, PackedModule) for module in model.modules())


def mark_packed(model: nn.Module) -> None:
    """Make a transformers model refuse what its blocks cannot do, before anything else happens to it."""
    mix_in(model, PackedModel)


def mix_in(model: nn.Module, mixin: type) -> None:
    """Give a transformers model the methods of another class before its own.

    transformers finds what it knows of a class, such as which outputs can be recorded, by the class's full name; so the
    subclass goes by the same one.
    """
    base = type(model)
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    model.__class__ = type(base.__name__, (mixin, base), names)


def _refuse(what: str) -> NoReturn:
    raise BackendError(f"an optimised model cannot be {what}; load the checkpoint again, without optimize, for that")
