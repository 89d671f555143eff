"""The loss of an optimised model, which says of its gradients that there are none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashsvd.blocks.running.packed import mix_in
from flashsvd.blocks.running.refusals import NO_GRADIENTS
from flashsvd.errors import BackendError


def refuse_backward(model: Any) -> None:
    """Let `backward` of a loss that a model returns raise `BackendError`, unless somebody trains the model's head."""
    own: Callable[..., Any] = type(model).forward

    # Its signature is read by pipelines and trainers.
    @functools.wraps(own)
    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        output = own(self, *arguments, **options)
        loss = getattr(output, "loss", None)
        if isinstance(loss, Tensor) and torch.is_grad_enabled() and not loss.requires_grad:
            output["loss"] = _refusing(loss)
        return output

    mix_in(model, type("RefusingBackward", (), {"forward": forward}))


def _refusing(loss: Tensor) -> Tensor:
    # torch asks for gradients only where an input does.
    anchor = torch.empty(0, device=loss.device, requires_grad=True)
    return _Refusing.apply(loss, anchor)  # type: ignore[no-untyped-call,no-any-return]  # torch leaves it untyped


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, loss: Tensor, __: Tensor) -> Tensor:
        return loss.view_as(loss)

    @staticmethod
    def backward(_: Any, *__: Any) -> Any:
        """Raises BackendError: the factors are gone."""
        raise BackendError(NO_GRADIENTS)
