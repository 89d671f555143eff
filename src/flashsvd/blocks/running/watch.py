"""What would make a captured graph wrong: other modules or weights in the model, and hooks that it would not run.

Asked at every call, so what is looked at is written down once, as the dictionaries that torch's modules keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from flashsvd.blocks.running.quick import QuickModule, moves
from flashsvd.blocks.running.refusals import HOOKS, any_foreign_hooks

_EVERYWHERE = [hooks for name, hooks in vars(torch_module).items() if name.startswith("_global_") and "hook" in name]
# What classes of these do in their forward is known: they compute.
KNOWN_CODE = ("torch", "transformers", "flashsvd", "huggingface_hub", "builtins", "abc", "typing", "collections")


class Watch:
    """A model as it is now.

    Attributes:
        weight: one of its weights, which says where it is and in which dtype.
        foreign: whether it, or a module inside of it, is of somebody's own class, whose code may do anything: count
            calls, or keep a tensor that it hands out.
    """

    def __init__(self, model: Any) -> None:
        modules = list(outside(model))
        # The model's own hooks and wrappers run around its forward, whatever they do.
        self._inside = [module for module in modules if module is not model]
        self.foreign = any(map(_is_foreign, modules))
        self._attributes = [vars(module) for module in self._inside]
        self._hooks = [attributes[name] for attributes in self._attributes for name in HOOKS]
        kept = [vars(module)[name] for module in modules for name in ("_modules", "_parameters", "_buffers")]
        self._empty = [each for each in kept if not each]
        self._kept = [(each, tuple(each.values())) for each in (*kept, vars(model.config)) if each]
        self._dropouts = [vars(module) for module in modules if isinstance(module, nn.Dropout)]
        self._tensors = [x for _, values in self._kept for x in values if isinstance(x, Tensor)]
        self._places = [x.data_ptr() for x in self._tensors]
        self._moves = moves()
        self.weight = next(model.parameters())

    def holds(self) -> bool:
        """Whether the model's modules and its config are the same, and its weights lie where they did."""
        if any(self._empty):
            return False
        for each, values in self._kept:
            if len(each) != len(values) or not all(map(is_, each.values(), values)):
                return False
        return self._moves == moves() and [x.data_ptr() for x in self._tensors] == self._places

    def is_tampered(self) -> bool:
        """Whether somebody has hooks on a module inside of the model, wrapped one, or lets its dropout draw."""
        if any(attributes["training"] and attributes["p"] > 0 for attributes in self._dropouts):
            return True
        if any(_EVERYWHERE) or any("forward" in attributes for attributes in self._attributes):
            return True
        # Recorders of transformers' own stay in place for good, and do nothing unless they are asked.
        return any(self._hooks) and any_foreign_hooks(self._inside)


def _is_foreign(module: nn.Module) -> bool:
    return any(base.__module__.partition(".")[0] not in KNOWN_CODE for base in type(module).__mro__)


def outside(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that others may change: all but the insides of fused blocks."""
    todo = [model]
    while todo:
        module = todo.pop()
        yield module
        todo += [m for m in module.children() if not isinstance(m, QuickModule)]
