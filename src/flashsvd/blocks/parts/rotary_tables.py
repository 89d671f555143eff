"""Cosines and sines of rotary positions, from the model's own embedding, kept for as long as they hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashsvd.blocks.running.choice import bucket
from flashsvd.blocks.running.sequences import Tables


class RotaryTables:
    """The tables of one model; all its blocks share them. They stay where they are, since graphs read them there.

    Args:
        embedding: transformers' module: (x, positions [1, P], layer type) -> cos, sin [1, P, head_dim] in the dtype of
            x, whose two halves are the same. One that knows no types of layers is not told any.
    """

    def __init__(self, embedding: Any) -> None:
        self._embedding = embedding
        self._tables: dict[tuple[str | None, int, torch.dtype, torch.device], Tables] = {}

    def forget(self) -> None:
        """Drop all tables, whose frequencies are about to move."""
        self._tables.clear()

    def take(self, layer_type: str | None, span: int, x: Tensor) -> Tables:
        """The tables of a kind of layer, for positions below `span`, in the dtype of x and on its device."""
        rows = bucket(span)
        key = (layer_type, rows, x.dtype, x.device)
        if key not in self._tables:
            positions = torch.arange(rows, device=x.device)[None]
            kind = () if layer_type is None else (layer_type,)
            cos, sin = (half(table) for table in self._embedding(x, positions, *kind))
            if x.is_cuda:
                # What is made while someone captures a graph has no values before its replay.
                if torch.cuda.is_current_stream_capturing():
                    return cos, sin
                # Other streams do not wait for this one.
                torch.cuda.current_stream(x.device).synchronize()
            self._tables[key] = cos, sin
        return self._tables[key]

    def of(self, x: Tensor, positions: Tensor) -> Tables:
        """cos, sin [B, T, head_dim / 2] of these positions [B, T], in the dtype of x and on its device."""
        cos, sin = (table[..., : table.shape[-1] // 2] for table in self._embedding(x, positions))
        return cos, sin


def half(table: Tensor) -> Tensor:
    """[1, P, D] -> [P, D / 2]"""
    return table[0, :, : table.shape[2] // 2].contiguous()
