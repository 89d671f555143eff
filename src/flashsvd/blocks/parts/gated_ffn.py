"""The packed gated feed-forward sublayer, pre-LN: x + (act(n W_a + b_a) * (n W_g + b_g)) W2 + b2, n = LayerNorm(x).

Any of the matrices may be low-rank or dense.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashsvd.blocks.parts.buffers import Packed
from flashsvd.blocks.parts.chunks import equal_parts, materialised_parts, pre_ln_chunk_tokens
from flashsvd.blocks.parts.ffn import can_walk
from flashsvd.blocks.parts.norm import PackedNorm
from flashsvd.blocks.parts.output import PackedResidual
from flashsvd.blocks.parts.products import linear, product
from flashsvd.blocks.parts.projections import PackedProjections, Projection
from flashsvd.blocks.parts.read import Activation, Dense, Joint, present
from flashsvd.blocks.parts.widths import gated_width, widen
from flashsvd.blocks.running.choice import Choices, Implementation, Operation
from flashsvd.kernels.activations import IN_PLACE
from flashsvd.kernels.flashsvdgeglu import flashsvd_geglu
from flashsvd.kernels.gated_linear import gated_linear

CORE = Operation("gated ffn core", "{} and {} to {} to {}")


class PackedGatedFFN(Packed):
    """x [T, hidden] -> [T, hidden], written over x.

    All matrices low-rank, and an activation that kernels know: P_a and P_g in one product, then the core
    (act(P_a V_a) * (P_g V_g)) U2, then V2 onto the residual. Otherwise plain products, dense ones where the layer is.
    """

    u: Tensor
    v_a: Tensor
    v_g: Tensor
    b_a: Tensor | None
    b_g: Tensor | None
    u2: Tensor | None

    def __init__(
        self,
        norm: PackedNorm,
        activated: Dense | Joint,
        gate: Dense | Joint,
        second: Dense | Joint,
        activation: Activation,
        dtype: torch.dtype,
        choices: Choices,
    ) -> None:
        super().__init__()
        self.norm, self.activation, self.choices = norm, activation, choices
        # Whether both halves have factors, and whether the walk's kernel can take these.
        self.lifted = self.walked = False
        if isinstance(activated, Joint) and isinstance(gate, Joint):
            self.lifted = isinstance(activation, str)
            if isinstance(second, Joint):
                self.walked = can_walk(activation, activated.rank, gate.rank, second.rank)
        if self.lifted:
            assert isinstance(activated, Joint)
            assert isinstance(gate, Joint)
            self.keep("u", torch.cat([widen(part.u, 1, gated_width) for part in (activated, gate)], 1), dtype)
            # As `nn.Linear` stores them, which is how the core takes them.
            self.keep("v_a", widen(activated.v, 0, gated_width).T, dtype)
            self.keep("v_g", widen(gate.v, 0, gated_width).T, dtype)
            self.keep("b_a", present(activated.bias), dtype)
            self.keep("b_g", present(gate.bias), dtype)
        else:
            parts = [Projection.of(part, present(part.bias)) for part in (activated, gate)]
            self.first = PackedProjections(parts, dtype)
        self.keep("u2", widen(second.u, 1, gated_width) if isinstance(second, Joint) else None, dtype)
        matrix = widen(second.v, 0, gated_width) if isinstance(second, Joint) else second.matrix
        self.output = PackedResidual(None, matrix, second.bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not self.lifted:
            for rows in materialised_parts(x, "torch"):
                self.output(self._plain(self.norm(rows)), rows)
            return x
        # Meanwhile a token takes its norm, its two ranks, and the second layer's.
        width = x.shape[1] + self.u.shape[1] + (0 if self.u2 is None else self.u2.shape[1])
        for rows in equal_parts(x, pre_ln_chunk_tokens(x, width)):
            p = product(self.norm(rows), self.u)
            picked = self._pick(p)
            for part, target in zip(materialised_parts(p, picked), materialised_parts(rows, picked), strict=True):
                self.output(self._core(part, picked), target)
        return x

    def _pick(self, p: Tensor) -> Implementation:
        inner, r_a, r_g = self.v_a.shape[0], self.v_a.shape[1], self.v_g.shape[1]
        return self.choices.pick(
            CORE,
            (r_a, r_g, inner, inner if self.u2 is None else self.u2.shape[1]),
            p,
            lambda name: [self._core(part, name) for part in materialised_parts(p, name)],
            ("torch", "triton", "products") if self.walked else ("torch", "products"),
        )

    def _core(self, p: Tensor, implementation: Implementation) -> Tensor:
        """(act(P_a V_a + b_a) * (P_g V_g + b_g)) U2, without U2 where the second matrix is dense."""
        assert isinstance(self.activation, str)
        p_a, p_g = p.split_with_sizes((self.v_a.shape[1], self.v_g.shape[1]), 1)
        lifts = (p_a, p_g, self.v_a, self.v_g)
        if implementation == "torch":
            h = IN_PLACE[self.activation](linear(p_a, self.v_a, self.b_a))
            h.mul_(linear(p_g, self.v_g, self.b_g))
        elif implementation == "products":
            h = gated_linear(*lifts, self.b_a, self.b_g, activation=self.activation, backend="triton")
        else:
            assert self.u2 is not None
            return self._walk(*lifts, self.u2, self.activation)
        return h if self.u2 is None else product(h, self.u2)

    def _walk(self, p_a: Tensor, p_g: Tensor, v_a: Tensor, v_g: Tensor, u2: Tensor, activation: str) -> Tensor:
        return flashsvd_geglu(p_a, p_g, v_a, v_g, u2, self.b_a, self.b_g, activation=activation, backend="triton")

    def _plain(self, n: Tensor) -> Tensor:
        act = IN_PLACE[self.activation] if isinstance(self.activation, str) else self.activation
        activated, gate = self.first.project(n).chunk(2, dim=1)
        h = act(activated).mul_(gate)
        return h if self.u2 is None else product(h, self.u2)
