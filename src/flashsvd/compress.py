"""`flashsvd compress`: a model and a config in, a smaller checkpoint out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashsvd.compression.config import CompressConfig

if TYPE_CHECKING:
    from flashsvd.compression.plan import CompressPlan
    from flashsvd.compression.result import CompressReport

__all__ = ["CompressConfig", "plan_compress", "run_compress"]


def run_compress(config: CompressConfig) -> CompressReport:
    """Compress a model and save the checkpoint.

    Everything that can be refused is refused before the weights are loaded.

    Raises:
        FlashSVDError: the config, the model, the data or the output cannot be used; no checkpoint has been written.
    """
    from flashsvd.common.caller_state import ordinary_tensors
    from flashsvd.compression.run import CompressionJob

    with ordinary_tensors():
        return CompressionJob.prepare(config).run()


def plan_compress(config: CompressConfig) -> CompressPlan:
    """What `run_compress` would do, need and write; nothing is loaded, computed or written.

    What `run_compress` refuses before it loads the weights is refused here too.

    Raises:
        FlashSVDError: the config, the model, the data or the output cannot be used.
    """
    from flashsvd.common.caller_state import ordinary_tensors
    from flashsvd.compression.plan import plan_of
    from flashsvd.compression.run import CompressionJob

    with ordinary_tensors():
        return plan_of(CompressionJob.prepare(config))
