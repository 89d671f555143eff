"""`flashsvd finetune`: a model and a config in, a trained model of the same form out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashsvd.training.config import FinetuneConfig

if TYPE_CHECKING:
    from flashsvd.training.result import FinetuneResult

__all__ = ["FinetuneConfig", "run_finetune"]


def run_finetune(config: FinetuneConfig) -> FinetuneResult:
    """Train a model, dense or compressed, and save it in the form it had.

    Everything that can be refused is refused before the weights are loaded. Where torchrun or accelerate starts several
    processes, each calls this, the first one writes, and all get the result. One thread of a process trains at a time.

    Raises:
        FlashSVDError: the config, the model, the data or the output cannot be used, or the training failed; nothing
            has been written but checkpoints to resume from.
    """
    from flashsvd.common.caller_state import ordinary_tensors, own_random_numbers
    from flashsvd.training.run import TrainingJob

    with ordinary_tensors(), own_random_numbers():
        return TrainingJob.prepare(config).run()
