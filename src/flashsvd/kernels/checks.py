"""The errors of operands that do not fit together, in one form for all kernels."""

from __future__ import annotations

from torch import Tensor


def check_fit(fits: bool, **operands: Tensor | None) -> None:
    """Raises ValueError with the operands' shapes where they do not fit, and with their dtypes where these differ."""
    given = {name: x for name, x in operands.items() if x is not None}
    if not fits:
        raise ValueError(", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items()) + " do not fit")
    if len({x.dtype for x in given.values()}) > 1:
        raise ValueError("dtypes differ: " + ", ".join(f"{name} {x.dtype}" for name, x in given.items()))


def has_dims(dims: int, *operands: Tensor | None) -> bool:
    """Whether all the operands that are there have so many dimensions."""
    return all(x is None or x.ndim == dims for x in operands)
