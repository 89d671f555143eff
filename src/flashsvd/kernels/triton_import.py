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
        constexpr = "constexpr"

        @staticmethod
        def jit(function: Any) -> Any:
            return function

    triton, tl, TensorDescriptor = _Absent(), _Absent(), None

__all__ = ["MISSING", "TensorDescriptor", "tl", "triton"]
