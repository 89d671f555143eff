"""What the caller of a whole model knows of its batch, for the stack of layers inside.

The stack would otherwise wait for the device once more, and could not do so while a CUDA graph is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from flashsvd.blocks.running.tokens import Tokens


@dataclass(frozen=True, eq=False)
class Known:
    """A batch whose padding was found out before the model was called.

    Attributes:
        mask: as the model is given it.
        shape: (batch, length).
        tokens: the batch's tokens, of hidden states [batch, length, hidden].
        owned: whether nobody else has the hidden states that come out of the embeddings.
    """

    mask: Tensor | None
    shape: tuple[int, int]
    tokens: Callable[[Tensor], Tokens]
    owned: bool = False


_known: ContextVar[Known | None] = ContextVar("flashsvd_known_batch", default=None)


@contextmanager
def knowing(batch: Known) -> Iterator[None]:
    """Tell the stack that is called meanwhile, in this thread, what is known."""
    token = _known.set(batch)
    try:
        yield
    finally:
        _known.reset(token)


def known_batch(hidden_states: Tensor, mask: Tensor | None) -> Known | None:
    """What is known of hidden states [batch, length, hidden] under a mask; None where it is of another batch."""
    found = _known.get()
    return found if found and found.mask is mask and hidden_states.shape[:2] == found.shape else None
