"""How exact an optimised model must be where its dtype rounds.

The plain model and the optimised one add in different orders, and how far apart that brings them depends on the machine
and on the number of threads. So the measure of both is the plain model in fp64, as it is for a kernel.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from kernel_accuracy import assert_accurate


@torch.inference_mode()
def assert_as_exact(found: Tensor, plain: Any, batch: dict[str, Tensor], output: str = "last_hidden_state") -> None:
    """What an optimised model found has, on real tokens, at most twice the error of its plain model."""
    exact = copy.deepcopy(plain).double()
    answers = [found, *(getattr(model(**batch), output) for model in (plain, exact))]
    if found.ndim == 3 and "attention_mask" in batch:
        answers = [answer[batch["attention_mask"].bool()] for answer in answers]
    assert_accurate(*answers)
