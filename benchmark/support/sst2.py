"""Padding masks of SST-2's validation sentences."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

LENGTHS = Path(__file__).parents[1] / "data" / "sst2_validation_lengths.txt"


def sst2_masks(device: torch.device, batch: int, length: int, batches: int) -> list[Tensor]:
    """Masks [batch, length] of whole batches of sentences, in the split's order."""
    lengths = [int(line) for line in LENGTHS.read_text().split()]
    chosen = torch.tensor(lengths[: batch * batches], device=device).clamp(max=length)
    masks = torch.arange(length, device=device) < chosen[:, None]
    return list(masks.long().chunk(batches))
