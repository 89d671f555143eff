"""Sizes of batches where none are asked for, and the help of the options that do; no torch is needed to know them."""

from __future__ import annotations

# Of a language model the logits, not the layers, are what fills memory.
BATCH_SIZE, LM_BATCH_SIZE = 32, 8
SEQ_LEN, LM_SEQ_LEN = 128, 1024

BATCH_SIZE_HELP = f"examples or windows in a batch; the default is {BATCH_SIZE}, {LM_BATCH_SIZE} for language models"
SEQ_LEN_HELP = (
    "tokens an example is cut to, or tokens of a language model's window; the default is "
    f"{SEQ_LEN}, {LM_SEQ_LEN} for language models, or less where the model reads no more"
)
