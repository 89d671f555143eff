"""Inputs of a model with padding in them."""

from __future__ import annotations

import torch

from flashsvd.data.tokenize import Inputs


def padded_inputs(count: int = 3, side: str = "right", rows: int = 4, length: int = 9) -> list[Inputs]:
    """Inputs of that many forwards, whose rows have two real tokens or more."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for i in range(count):
        ids = torch.randint(5, 20, (rows, length + i), generator=generator)
        lengths = torch.randint(2, length + i + 1, (rows, 1), generator=generator)
        positions = torch.arange(length + i)
        mask = (positions < lengths if side == "right" else positions >= length + i - lengths).long()
        inputs.append({"input_ids": ids, "attention_mask": mask})
    return inputs
