"""Triton, or where it is missing a stand-in under which the kernel files still import and their torch paths run."""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    MISSING = ""
except ImportError as error:
    MISSING = str(error)

    class _Absent:
        @staticmethod
        def constexpr(value: Any = None) -> Any:
            return value

        @staticmethod
        def jit(function: Any = None, **_: Any) -> Any:
            return function or _Absent.jit

    triton, tl, TensorDescriptor = _Absent(), _Absent(), None


def kernel(*varying: str) -> Any:
    """`triton.jit` of a kernel whose arguments of these names change from batch to batch.

    It is compiled once for all their values, where Triton would by itself compile it anew for those that are 1, or a
    multiple of 16, and for the rest.
    """
    return triton.jit(do_not_specialize=list(varying))


__all__ = ["MISSING", "TensorDescriptor", "kernel", "tl", "triton"]
