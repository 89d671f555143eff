"""RMSNorm and LayerNorm of rows, by themselves and as options of the kernels that apply them as they read."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashsvd.blocks.parts.buffers import Packed
from flashsvd.blocks.parts.norm import NORM
from flashsvd.blocks.running.choice import Choices, Implementation
from flashsvd.kernels.decode_call import FEW_ROWS
from flashsvd.kernels.fused_ln import fused_ln
from flashsvd.kernels.rms_norm import rms_norm, rms_norm_reference


class RowNorm(Packed):
    """x [T, K] -> weight * x / |x|, or LayerNorm(x).

    Args:
        norm: a LayerNorm, or an RMSNorm of transformers' (`weight`, `variance_epsilon`).
        shared: whether the weights stay the norm's own; otherwise they are copied.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, norm: Any, dtype: torch.dtype, choices: Choices, shared: bool = False) -> None:
        super().__init__()
        self.kind: Literal["rms", "layer"] = "layer" if isinstance(norm, nn.LayerNorm) else "rms"
        self.eps = float(norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon)
        for name in ("weight", "bias"):
            own = getattr(norm, name, None)
            self.keep(name, None if own is None else own.detach(), dtype)
            if shared and own is not None:
                setattr(self, name, own.detach())
        self.choices = choices

    def before(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """What the kernels of a decoding step take: x as it is and the norm to apply, or x normed.

        Every program norms all rows by itself, which for more than a few takes longer than a launch.
        """
        if len(x) > FEW_ROWS:
            return self(x), {}
        return x, {"norm": self.kind, "norm_weight": self.weight, "norm_bias": self.bias, "eps": self.eps}

    def forward(self, x: Tensor) -> Tensor:
        """Of any number of rows, into new memory."""

        def run(implementation: Implementation) -> Tensor:
            by_kernel = implementation == "triton"
            if self.kind == "rms":
                if not by_kernel:
                    return rms_norm_reference(x, None, self.weight, self.eps)[0]
                return rms_norm(x, None, self.weight, eps=self.eps, backend="triton")
            if not by_kernel:
                return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
            return fused_ln(x, None, self.weight, self.bias, eps=self.eps, backend="triton")

        return run(self.choices.pick(NORM, (x.shape[1],), x, run))
