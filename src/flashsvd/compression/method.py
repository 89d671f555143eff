"""The former place of `flashsvd.methods.method`, kept for one release."""

from __future__ import annotations

import warnings

from flashsvd.methods.method import Factors, Method, Need, RankProblem, Statistics

__all__ = ["Factors", "Method", "Need", "RankProblem", "Statistics"]

warnings.warn(
    "flashsvd.compression.method has moved to flashsvd.methods.method; import from there",
    DeprecationWarning,
    stacklevel=2,
)
