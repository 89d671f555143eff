"""Sizes of batches where none are asked for; no torch is needed to know them."""

from __future__ import annotations

# Of a language model the logits, not the layers, are what fills memory.
BATCH_SIZE, LM_BATCH_SIZE = 32, 8
SEQ_LEN, LM_SEQ_LEN = 128, 1024
