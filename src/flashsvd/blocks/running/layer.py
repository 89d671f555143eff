"""A layer of a packed model: a block in the place of the layer's own modules."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from flashsvd.blocks.running.packed import PackedModule
from flashsvd.blocks.running.refusals import refuse_call
from flashsvd.blocks.running.stack import on_device, run_packed
from flashsvd.blocks.running.tokens import Tokens
from flashsvd.errors import BackendError


class Block(Protocol):
    """What a layer computes."""

    def __call__(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """hidden [T, hidden], overwritten by the result."""


class FusedLayer(PackedModule):
    """Mixed into a layer class: the block in the place of the layer's own modules."""

    block: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *_: Any,
        tokens: Tokens | None = None,
        **options: Any,
    ) -> Tensor:
        """Packed tokens [T, hidden], overwritten by the result, or a padded batch [batch, length, hidden].

        Args:
            tokens: of the batch; needed where `hidden_states` is packed.

        Raises:
            BackendError: the hidden states are neither of these, or more is asked for than a layer's output.
        """
        block: Block = self.block
        if hidden_states.ndim == 2 and tokens is not None:
            return block(hidden_states, tokens)
        if hidden_states.ndim != 3:
            raise BackendError(
                f"a fused layer by itself takes a batch [batch, length, hidden], not {list(hidden_states.shape)}; "
                "call the model, or give it such a batch"
            )
        if tokens is None:
            refuse_call(hidden_states, None, options)
            tokens = Tokens.of(hidden_states, attention_mask)
        with on_device(hidden_states):
            return run_packed([self.block], hidden_states, tokens)
