"""The low-rank layers under the import path existing users know."""

from flashsvd.lowrank.layers import LowRankLinear, PerHeadLowRankLinear

__all__ = ["LowRankLinear", "PerHeadLowRankLinear"]
