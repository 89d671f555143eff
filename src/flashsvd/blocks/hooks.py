"""Who watches a layer: transformers' own recording of hidden states, or hooks that someone else has put there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

RECORDER = "transformers.utils.output_capturing"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def foreign_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The module's hooks other than transformers' recorders, which stay in place for good once they were needed."""
    # A forward of its own is what some libraries put in the place of hooks.
    found: list[Callable[..., Any]] = [module.forward] if "forward" in vars(module) else []
    # Asked of every layer at every call, and most have none.
    for name in HOOKS:
        if hooks := module.__dict__[name]:
            found += [hook for hook in hooks.values() if getattr(hook, "__module__", None) != RECORDER]
    return found


def any_foreign_hooks(modules: Iterable[nn.Module]) -> bool:
    return any(foreign_hooks(module) for module in modules)
