"""Launches worked out once: for operands like ones seen before, nothing is checked, chosen or looked up again.

On the host, Triton's own way to a launch takes longer than many of the kernels run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashsvd.kernels.launch import Backend, descriptor, precision

# Batches without padding differ in their numbers of tokens, each of which has a plan.
MOST_PLANS = 1024

Operands = tuple[Tensor | None, ...]
# Operands of one kind -> the result.
Plan = Callable[..., Tensor]


class Address(NamedTuple):
    """An argument that is the operand of this number."""

    operand: int


class Tile(NamedTuple):
    """An argument that describes the memory of the operand of this number."""

    operand: int
    descriptor: Any


def tile(operand: int, x: Tensor, block: list[int]) -> Tile | None:
    """Tiles of this shape of an operand that lies as x does; None for an empty one."""
    described = descriptor(x, block)
    if described is None:
        return None
    # A plan outlives the operands that it was made for.
    described.base = None
    return Tile(operand, described)


class Launch:
    """A kernel with its grid, and with all its arguments but the operands.

    Args:
        arguments: in order; an `Address` or a `Tile` where an operand comes in.
        constants: the constants by their names, and Triton's options.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], **constants: Any) -> None:
        self._kernel, self._grid = kernel, (*grid, 1, 1)[:3]
        self._constants = constants
        self._addresses = [(i, a.operand) for i, a in enumerate(arguments) if isinstance(a, Address)]
        self._tiles = [(i, *a) for i, a in enumerate(arguments) if isinstance(a, Tile)]
        self._arguments = list(arguments)
        self._compiled: Any = None
        self._trailing: list[Any] = []

    @property
    def name(self) -> str:
        """The kernel's."""
        return str(self._kernel.__name__)

    def __call__(self, *operands: Tensor | None) -> None:
        arguments = self._arguments.copy()
        for i, operand in self._addresses:
            arguments[i] = operands[operand]
        for i, operand, described in self._tiles:
            arguments[i] = _moved(described, operands[operand])
        if self._compiled is not None:
            self._compiled(*arguments, *self._trailing)
            return
        compiled = self._kernel[self._grid](*arguments, **self._constants)
        # The interpreter compiles nothing.
        if compiled is not None:
            names = self._kernel.arg_names[len(arguments) :]
            self._trailing = [self._constants[name] for name in names]
            self._compiled = compiled[self._grid]


class Plans:
    """The plans of one kernel."""

    def __init__(self) -> None:
        self._plans: dict[Hashable, Plan] = {}

    def __len__(self) -> int:
        return len(self._plans)

    def find(self, operands: Operands, backend: Backend, *options: Hashable) -> Plan | None:
        """The plan for such operands and options, as far as there is one yet."""
        if torch.compiler.is_compiling() or not at_hand(operands[0], backend):
            return None
        assert operands[0] is not None
        return self._plans.get(_key(operands, precision(operands[0]), (backend, *options)))

    def keep(self, plan: Plan, operands: Operands, exact: str, backend: Backend, *options: Hashable) -> None:
        """Use this plan for such operands and options from now on.

        Args:
            exact: the precision that it was made for, since torch may be set to another one while a kernel compiles.
        """
        if not at_hand(operands[0], backend):
            return
        if len(self._plans) >= MOST_PLANS:
            self._plans.clear()
        self._plans[_key(operands, exact, (backend, *options))] = plan


def in_place(operands: Operands, prepared: Operands) -> bool:
    """Whether the operands are used where they lie, none of them copied for its layout's sake."""
    pairs = zip(operands, prepared, strict=True)
    return all(a is b or (a is not None and b is not None and a.data_ptr() == b.data_ptr()) for a, b in pairs)


def _key(operands: Operands, exact: str, options: tuple[Hashable, ...]) -> Hashable:
    # What decides how a kernel reads a tensor; Triton compiles anew for addresses that are no multiples of 16.
    kinds = [None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16) for x in operands]
    return (exact, options, *kinds)


def at_hand(x: Tensor | None, backend: Backend) -> bool:
    """Whether there may be a plan: a kernel is launched, and on the current GPU, which is where a launch goes."""
    if x is None or backend == "torch":
        return False
    # `auto` launches on GPUs only; elsewhere a tensor, such as one of torch's function transforms, may have no address.
    return x.device.index == torch.cuda.current_device() if x.is_cuda else backend == "triton"


def _moved(described: Any, x: Tensor | None) -> Any:
    """The descriptor, of another tensor's memory, without the checks that it has passed."""
    copy = object.__new__(type(described))
    copy.__dict__.update(described.__dict__)
    copy.base = x
    return copy
