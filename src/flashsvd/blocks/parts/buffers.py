"""Packed weights as a module's own: they move and convert with it, and no checkpoint ever holds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashsvd.blocks.running.quick import QuickModule, count_move


class Packed(QuickModule):
    """A module whose tensors are non-persistent buffers, and attributes as quickly read as any other."""

    def keep(self, name: str, tensor: Tensor | None, dtype: torch.dtype) -> None:
        """Own a tensor, in memory of its own and in this dtype."""
        if tensor is not None:
            tensor = tensor.to(dtype, memory_format=torch.contiguous_format, copy=True)
        self.register_buffer(name, tensor, persistent=False)
        self.__dict__[name] = tensor

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._buffers:
            self.__dict__[name] = value

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        count_move()
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.__dict__.update(self._buffers)
        return self
