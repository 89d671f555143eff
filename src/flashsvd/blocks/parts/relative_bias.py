"""The bias of attention scores by distance that all layers of a model share."""

from __future__ import annotations

from torch import Tensor

from flashsvd.blocks.parts.buffers import Packed


class RelativeBias(Packed):
    """bias [heads, 2 R + 1], as `flash_attention` takes it; one module in every block."""

    bias: Tensor

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.keep("bias", bias, bias.dtype)
