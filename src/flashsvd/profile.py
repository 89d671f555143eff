"""`flashsvd profile`: a checkpoint against its dense base on this machine, in accuracy, time, memory and size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashsvd.profiling.config import ProfileConfig

if TYPE_CHECKING:
    from flashsvd.profiling.result import ProfileResult

__all__ = ["ProfileConfig", "run_profile"]


def run_profile(config: ProfileConfig) -> ProfileResult:
    """Measure each variant by itself, one after the other, and write the files where the config names a directory.

    Everything that can be refused is refused before any weights are loaded. A variant that cannot run, or fails, is a
    row that says why.

    Raises:
        FlashSVDError: the config, the checkpoints or the data cannot be used, or no variant could be measured.
    """
    from flashsvd.common.caller_state import ordinary_tensors
    from flashsvd.profiling.run import profile

    with ordinary_tensors():
        return profile(config)
