"""Launches worked out once: for operands like ones seen before, nothing is checked, chosen or looked up again.

On the host, Triton's own way to a launch takes longer than many of the kernels run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from flashsvd.kernels.launch import descriptor
from flashsvd.kernels.tiles import Tiles

Operands = tuple[Tensor | None, ...]
# Operands of one kind -> the result.
Plan = Callable[..., Tensor]

_bare: Any = object.__new__


class Address(NamedTuple):
    """An argument that is the operand of this name."""

    operand: str


class Tile(NamedTuple):
    """An argument that describes the memory of the operand of this name."""

    operand: str
    descriptor: Any


def addresses(*operands: str) -> list[Address]:
    """Arguments that are the operands of these names."""
    return [Address(operand) for operand in operands]


def tile(operand: str, x: Tensor, block: list[int]) -> Tile | None:
    """Tiles of this shape of an operand that lies as x does; None for an empty one."""
    described = descriptor(x, block)
    if described is None:
        return None
    # A plan outlives the operands that it was made for.
    described.base = None
    return Tile(operand, described)


def row_tiles(operand: str, x: Tensor, rows: int, widths: tuple[int, int]) -> list[Tile | None]:
    """Tiles of so many rows and of each of the two widths, the second of which may be 0."""
    return [tile(operand, x, [rows, width]) for width in widths]


class Launch:
    """A kernel with its grid, and with all its arguments but the operands.

    Args:
        operands: the names of what the launch is called with, in order.
        arguments: in the kernel's order; an `Address` or a `Tile` where an operand comes in.
        tiles: the kernel's constants ROWS and COLUMNS, its warps and stages; None where it takes none.
        constants: the other constants by their names, and Triton's options.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        operands: Sequence[str],
        arguments: Sequence[Any],
        tiles: Tiles | None = None,
        **constants: Any,
    ) -> None:
        place = {name: i for i, name in enumerate(operands)}
        if tiles is not None:
            constants |= {"ROWS": tiles.rows, "COLUMNS": tiles.columns}
            constants |= {"num_warps": tiles.warps, "num_stages": tiles.stages}
        self._kernel, self._grid = kernel, (*grid, 1, 1)[:3]
        self._constants = constants
        self._addresses = [(i, place[a.operand]) for i, a in enumerate(arguments) if isinstance(a, Address)]
        tiles_at = [(i, a) for i, a in enumerate(arguments) if isinstance(a, Tile)]
        self._tiles = [(i, place[a.operand], type(a.descriptor), vars(a.descriptor)) for i, a in tiles_at]
        self._arguments = list(arguments)
        self._compiled: Any = None
        self._trailing: list[Any] = []

    @property
    def name(self) -> str:
        """The name of the kernel."""
        return str(self._kernel.__name__)

    def __call__(self, *operands: Tensor | None) -> None:
        arguments = self._arguments.copy()
        for i, operand in self._addresses:
            arguments[i] = operands[operand]
        for i, operand, kind, fields in self._tiles:
            # The descriptor, of another tensor's memory, without the checks that it has passed.
            arguments[i] = moved = _bare(kind)
            moved.__dict__.update(fields)
            moved.base = operands[operand]
        if self._compiled is not None:
            self._compiled(*arguments, *self._trailing)
            return
        compiled = self._kernel[self._grid](*arguments, **self._constants)
        # The interpreter compiles nothing.
        if compiled is not None:
            names = self._kernel.arg_names[len(arguments) :]
            self._trailing = [self._constants[name] for name in names]
            self._compiled = compiled[self._grid]


def into_last(launch: Launch, shape: tuple[int, ...]) -> Plan:
    """A plan that writes into its last operand, or where that is None into new memory of this shape."""

    def run(x: Tensor, *others: Tensor | None) -> Tensor:
        out = others[-1]
        if out is None:
            # Torch reads sizes faster as several arguments than as one.
            out = x.new_empty(*shape)
            others = (*others[:-1], out)
        launch(x, *others)
        return out

    return run


def in_place(operands: Operands, prepared: Operands) -> bool:
    """Whether the operands are used where they lie, none of them copied for its layout's sake."""
    pairs = zip(operands, prepared, strict=True)
    return all(a is b or (a is not None and b is not None and a.data_ptr() == b.data_ptr()) for a, b in pairs)
