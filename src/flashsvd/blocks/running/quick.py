"""The inside of fused blocks: modules that are called quickly, and how often their weights were moved."""

from __future__ import annotations

import itertools
from typing import Any

from torch import nn


class QuickModule(nn.Module):
    """A module of a block, called as cheaply as a function: torch's own way would take as long as a launch."""

    def __call__(self, *arguments: Any) -> Any:
        if self._forward_hooks or self._forward_pre_hooks:
            return super().__call__(*arguments)
        return self.forward(*arguments)


_counter = itertools.count(1)
_moves = 0


def count_move() -> None:
    """Note that packed weights of some model are about to be moved or converted."""
    global _moves
    _moves = next(_counter)


def moves() -> int:
    """Another number whenever packed weights were moved, in any model of this process."""
    return _moves
