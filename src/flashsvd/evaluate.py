"""`flashsvd eval`: a checkpoint, dense or compressed, scored and timed on a task's validation split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashsvd.evaluation.config import EvalConfig

if TYPE_CHECKING:
    from flashsvd.evaluation.result import EvalResult

__all__ = ["EvalConfig", "run_eval"]


def run_eval(config: EvalConfig) -> EvalResult:
    """Evaluate a checkpoint, and write the JSON where the config names a file.

    Everything that can be refused is refused before the weights are loaded.

    Raises:
        FlashSVDError: the config, the checkpoint or the data cannot be used.
    """
    from flashsvd.common.caller_state import ordinary_tensors
    from flashsvd.evaluation.run import evaluate

    with ordinary_tensors():
        return evaluate(config)
