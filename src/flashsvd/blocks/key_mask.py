"""How a packed model gets its attention mask as [batch, length], not spread out to [batch, 1, length, length].

transformers asks the function registered under the config's attention implementation for the mask; ours hands back the
padding mask as it is. The name must not contain "flash", which transformers takes for a FlashAttention to load.
"""

from __future__ import annotations

import copy
from typing import Any, NoReturn

from torch import Tensor, nn

from flashsvd.errors import BackendError

IMPLEMENTATION = "packed_tokens"


def hand_over_key_mask(model: nn.Module) -> None:
    """Give the model a config of its own that asks for the padding mask alone; no saved config says so."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionMaskInterface.register(IMPLEMENTATION, _key_mask)
    AttentionInterface.register(IMPLEMENTATION, _no_attention)
    shared: Any = model.config
    own = copy.deepcopy(shared)
    own._attn_implementation_internal = IMPLEMENTATION
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def _key_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    return attention_mask


def _no_attention(*_: Any, **__: Any) -> NoReturn:
    raise BackendError(
        f"attention implementation {IMPLEMENTATION!r} is that of optimised models; set_attn_implementation('sdpa')"
    )
