"""How many tokens at a time a sublayer takes, so that what it holds meanwhile stays small beside the hidden state."""

from __future__ import annotations

from torch import Tensor

from flashsvd.blocks.running.choice import Implementation

# Fewer tokens than this do not fill a GPU.
SMALLEST_CHUNK = 8192
# In hidden states. A pre-LN layer holds more of a token (its norm, lifted queries and keys), a dense one by far more.
ROOM = 2.0
PRE_LN_ROOM = 3.0
# Where the [tokens, intermediate] activation does exist, it exists of so many tokens at a time.
MATERIALISED_TOKENS = 8192


def chunk_tokens(hidden: Tensor, width: int) -> int:
    """How many tokens keep `width` numbers of each within ROOM times the hidden state's memory: few, long launches."""
    return max(SMALLEST_CHUNK, int(ROOM * hidden.numel()) // width)


def pre_ln_chunk_tokens(hidden: Tensor, width: int) -> int:
    """How many tokens a pre-LN layer takes at a time, which holds more of each."""
    return max(SMALLEST_CHUNK, int(PRE_LN_ROOM * hidden.numel()) // width)


def equal_parts(x: Tensor, most: int) -> list[Tensor]:
    """The rows of x, at most so many at a time."""
    step = -(-len(x) // max(1, -(-len(x) // most)))
    return [x[start : start + step] for start in range(0, len(x), step or 1)]


def materialised_parts(x: Tensor, implementation: Implementation) -> list[Tensor]:
    """The rows that a feed-forward core takes at a time: all, where it is the kernel, which holds no activation in
    memory.
    """
    if implementation == "triton":
        return [x]
    return [x[start : start + MATERIALISED_TOKENS] for start in range(0, x.shape[0], MATERIALISED_TOKENS)]
