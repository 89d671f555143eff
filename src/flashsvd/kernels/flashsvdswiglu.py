"""The core of a low-rank SwiGLU network, of any ranks, for the many tokens of a prompt.

    Y = (silu(P_g V_g + b_g) * (P_u V_u + b_u)) U_2

    P_g [T, r_g], V_g [r_g, I], b_g [I]; P_u [T, r_u], V_u [r_u, I], b_u [I]; U_2 [I, r_2], Y [T, r_2]

Gate and up projection are lifted, multiplied, and projected into the rank space of the down projection. V_g and V_u are
taken transposed, [I, r_g] and [I, r_u]. Two forms:

- The walk of `flashsvd_geglu`, where all three ranks fit on chip: no [T, I] tensor exists.
- Otherwise, and on plain torch, H = silu(P_g V_g + b_g) * (P_u V_u + b_u) by `gated_linear`, then H U_2. H exists of so
  many tokens at a time that what is held beside Y stays within a bound.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from torch import Tensor

from flashsvd.kernels.activations import kernel_name
from flashsvd.kernels.flashsvdgeglu import GatedFFN, check_geglu, flashsvd_geglu, flashsvd_geglu_reference
from flashsvd.kernels.gated_linear import CANDIDATES, GatedLinear, default_tiles, gated_linear
from flashsvd.kernels.launch import LARGEST_RANK, Backend, aligned, use_triton
from flashsvd.kernels.op import Op
from flashsvd.kernels.plans import Plan
from flashsvd.kernels.tiles import Table, Tiles, TilesOption

__all__ = ["flashsvd_swiglu", "flashsvd_swiglu_reference"]

# Of LLaMA-7B's network in half precision, some five thousand tokens.
MOST_BYTES = 128 * 2**20
# Tokens of a chunk come in multiples of this, the longest tile, where there is room for as many.
CHUNK_STEP = 128
# In plain torch the two lifts and their product exist at once.
HELD_IN_TORCH = 3


class SwiGLU(NamedTuple):
    """Operands and options of a call."""

    p_g: Tensor
    p_u: Tensor
    v_g: Tensor
    v_u: Tensor
    u2: Tensor
    b_g: Tensor | None
    b_u: Tensor | None
    activation: str
    most_bytes: int


def flashsvd_swiglu_reference(
    p_g: Tensor, p_u: Tensor, v_g: Tensor, v_u: Tensor, u2: Tensor, b_g: Tensor | None, b_u: Tensor | None,
    activation: str,
) -> Tensor:  # fmt: skip
    """`flashsvd_swiglu` in plain torch, with all the [T, I] tensors in memory."""
    return flashsvd_geglu_reference(p_g, p_u, v_g, v_u, u2, b_g, b_u, activation)


def bytes_of_a_token(c: SwiGLU, lifted: int) -> int:
    """What a chunk holds for each of its tokens: `lifted` rows of the intermediate dimension, and its result."""
    inner, rank = c.u2.shape
    return (lifted * inner + rank) * c.u2.element_size()


def chunk_tokens(c: SwiGLU, lifted: int) -> int:
    """The tokens of a chunk: as few chunks as the bound allows, of about equal length."""
    tokens, most = c.p_g.shape[0], c.most_bytes // bytes_of_a_token(c, lifted)
    if tokens <= most:
        return tokens
    step = CHUNK_STEP if most >= CHUNK_STEP else 1
    most -= most % step
    equal = -(-tokens // -(-tokens // most))
    return -(-equal // step) * step


def in_chunks(c: SwiGLU, lifted: int, backend: Backend, tiles: Tiles | None = None) -> Tensor:
    """The result by way of H, of a chunk of tokens after the other."""
    tokens, step = c.p_g.shape[0], chunk_tokens(c, lifted)

    def core(rows: slice) -> Tensor:
        p_g, p_u = c.p_g[rows], c.p_u[rows]
        weights = (c.v_g, c.v_u, c.b_g, c.b_u)
        return gated_linear(p_g, p_u, *weights, activation=c.activation, backend=backend, tiles=tiles) @ c.u2

    if step == tokens:
        return core(slice(None))
    out = c.p_g.new_empty(tokens, c.u2.shape[1])
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        out[rows] = core(rows)
    return out


def fits_on_chip(*factors: Tensor) -> bool:
    """Whether a program of the walk can hold what has the ranks of these factors."""
    return all(rank <= LARGEST_RANK for factor in factors for rank in factor.shape[-1:])


def check_swiglu(c: SwiGLU) -> None:
    """Raises ValueError where the operands do not fit together, or the bound has no room for a token."""
    check_geglu(GatedFFN(c.p_g, c.p_u, c.v_g, c.v_u, c.u2, c.b_g, c.b_u, c.activation, None), "g", "u")
    least = bytes_of_a_token(c, HELD_IN_TORCH)
    if c.most_bytes < least:
        raise ValueError(f"most_bytes is at least what one token takes, {least}, not {c.most_bytes}")


def _lifts(c: SwiGLU) -> GatedLinear:
    """The gated product of a chunk, by which tiles are chosen."""
    rows = slice(chunk_tokens(c, 1))
    return GatedLinear(c.p_g[rows], c.p_u[rows], c.v_g, c.v_u, c.b_g, c.b_u, c.activation)


def _sizes(c: SwiGLU) -> Hashable:
    return chunk_tokens(c, 1).bit_length(), c.v_g.shape, c.v_u.shape, c.u2.shape, kernel_name(c.activation)


def _prepare(c: SwiGLU, exact: str) -> SwiGLU:
    # The rows of P are laid out a chunk at a time, if at all.
    b_g, b_u = (None if b is None else b.contiguous() for b in (c.b_g, c.b_u))
    return c._replace(v_g=aligned(c.v_g), v_u=aligned(c.v_u), b_g=b_g, b_u=b_u)


def _plan(c: SwiGLU, exact: str, t: Tiles) -> Plan:
    # A plan outlives the operands that it was made for.
    options = (c.activation, c.most_bytes)
    return lambda *operands: in_chunks(SwiGLU._make((*operands, *options)), 1, "triton", t)


_op = Op(
    "swiglu", SwiGLU, check=check_swiglu, shape=lambda c: (c.p_g.shape[0], c.u2.shape[1]),
    reference=lambda c: in_chunks(c, HELD_IN_TORCH, "torch"), prepare=_prepare, plan=_plan,
    table=Table(lambda c: default_tiles(_lifts(c)), CANDIDATES, _sizes),
)  # fmt: skip


def flashsvd_swiglu(
    p_g: Tensor, p_u: Tensor, v_g: Tensor, v_u: Tensor, u2: Tensor,
    b_g: Tensor | None = None, b_u: Tensor | None = None, *,
    activation: str = "silu", backend: Backend = "auto", tiles: TilesOption = None, most_bytes: int = MOST_BYTES,
) -> Tensor:  # fmt: skip
    """(silu(P_g V_g + b_g) * (P_u V_u + b_u)) U_2.

    Args:
        p_g: rank-space activation of the gate, which is what is activated, [T, r_g]; its rows may be strided.
        p_u: rank-space activation of the up projection, [T, r_u]; its rows may be strided. Where it is `p_g`, pass that
            itself.
        v_g: lift of the gate, transposed as `nn.Linear` stores it, [I, r_g].
        v_u: lift of the up projection, transposed likewise, [I, r_u].
        u2: projection of the down projection, [I, r_2].
        b_g: bias of the gate, [I].
        b_u: bias of the up projection, [I].
        activation: what a model's config calls it, "silu" or "swish"; or another that `flashsvd_geglu` takes.
        backend: `triton` for the kernels, `torch` for plain torch, `auto` for the kernels on a GPU that can run them.
        tiles: `rows` tokens and `columns` of the intermediate dimension; None takes the table's.
        most_bytes: what H, and a chunk of the result, may take beside the operands and the result. The walk holds
            neither.

    Returns:
        [T, r_2].

    Raises:
        ValueError: the shapes or dtypes do not fit together, the activation is unknown, or `most_bytes` has no room
            for a token.
        BackendError: `backend="triton"` cannot run here.
    """
    c = SwiGLU(p_g, p_u, v_g, v_u, u2, b_g, b_u, activation, most_bytes)
    if fits_on_chip(v_g, v_u, u2) and use_triton(backend, p_g):
        # Not left to the walk, which has other names for the operands.
        check_swiglu(c)
        return flashsvd_geglu(*c[:7], activation=activation, backend=backend, tiles=tiles)
    return _op(c[:7], c[7:], backend, tiles)
