"""What would make a captured graph wrong: other modules or weights in the model, and hooks that it would not run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from flashsvd.blocks.running.quick import QuickModule, moves
from flashsvd.blocks.running.refusals import any_foreign_hooks


def outside(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that others may change: all but the insides of fused blocks."""
    todo = [model]
    while todo:
        module = todo.pop()
        yield module
        # Read as they lie: `children()` takes longer than a small batch can spare.
        todo += [m for m in module._modules.values() if m is not None and not isinstance(m, QuickModule)]


def is_watched(model: nn.Module) -> bool:
    """Whether somebody has hooks on a module, or wrapped one."""
    everywhere: bool = _has_any_global_hook()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    # The model's own run around its forward, whatever that does.
    return everywhere or any_foreign_hooks(module for module in outside(model) if module is not model)


def fingerprint(model: nn.Module) -> list[Any]:
    """The model's modules, and where their weights lie; equal as long as a graph that reads them is right."""
    found: list[Any] = [moves()]
    for module in outside(model):
        found += module._modules.values()
        found += [None if x is None else x.data_ptr() for x in module._parameters.values()]
        found += [None if x is None else x.data_ptr() for x in module._buffers.values()]
    return found
