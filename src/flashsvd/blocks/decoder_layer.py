"""A decoder layer of transformers with a fused block in it, which runs with every cache and mask that it is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashsvd.blocks.decoder import DecoderBlock
from flashsvd.blocks.parts.called_heads import Call
from flashsvd.blocks.parts.row_cache import update
from flashsvd.blocks.running.packed import PackedModule
from flashsvd.blocks.running.refusals import refuse_decoder_call
from flashsvd.blocks.running.sequences import Tables
from flashsvd.blocks.running.stack import on_device


class FusedDecoderLayer(PackedModule):
    """Mixed into a layer class: the block in the place of the layer's own modules.

    Attributes:
        place: the layer's number, by which a cache knows it.
    """

    block: DecoderBlock
    place: int

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def run(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        cache: Any,
        position_embeddings: tuple[Tensor, Tensor] | None,
        options: dict[str, Any],
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [batch, length, hidden] -> the same after the layer, in new memory.

        Args:
            mask: of scores, [batch or 1, 1, length, columns], as transformers makes it for SDPA; None for a causal one.
            cache: of transformers; None for none.
            position_embeddings: cos, sin [batch or 1, length, head_dim] of each token.
            position_ids: [batch or 1, length], which keys that are rotated when they are read are kept with.

        Raises:
            BackendError: the call asks for more than the layer's output, or its cache holds another form of keys and
                values than the layer's.
        """
        refuse_decoder_call(hidden_states, mask, options)

        def keep(keys: Tensor, values: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
            return update(cache, keys, values, self.place, exact)

        batch, length, _ = hidden_states.shape
        with on_device(hidden_states):
            tables = _by_token(position_embeddings, hidden_states)
            places = torch.arange(batch * length, dtype=torch.int32, device=hidden_states.device)
            call = Call(batch, tables, places, position_ids, mask, None if cache is None else keep)
            result: Tensor = self.block(hidden_states, call)
        return result


def _by_token(embeddings: tuple[Tensor, Tensor] | None, x: Tensor) -> Tables | None:
    """[batch or 1, length, head_dim] -> [batch * length, head_dim / 2]"""
    if embeddings is None:
        return None
    batch, length, _ = x.shape
    cos, sin = (t[..., : t.shape[-1] // 2].expand(batch, length, -1).flatten(0, 1) for t in embeddings)
    return cos, sin
