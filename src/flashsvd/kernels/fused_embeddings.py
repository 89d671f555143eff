"""The embeddings of an encoder in one pass: rows of up to three tables, their sum, and its normalisation.

    Y_t = LayerNorm(W[i_t] + P[p_t] + K[k_t])        W [vocabulary, H], P [positions, H], K [types, H], Y [T, H]

One program owns a few tokens: the rows are read once, summed on chip in fp32, and Y is written once. Each lookup, sum
and norm by itself would read and write [T, H] again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashsvd.kernels.checks import check_fit, has_dims
from flashsvd.kernels.launch import Backend
from flashsvd.kernels.norm_rows import default_rows, layer_normed, vector
from flashsvd.kernels.op import Op, operand_names
from flashsvd.kernels.plans import Launch, Plan, addresses, into_last
from flashsvd.kernels.triton_import import kernel, tl, triton

__all__ = ["fused_embeddings", "fused_embeddings_reference"]


class Embeddings(NamedTuple):
    """Operands and options of a call."""

    words: Tensor
    ids: Tensor
    places: Tensor | None
    positions: Tensor | None
    kinds: Tensor | None
    types: Tensor | None
    weight: Tensor
    bias: Tensor | None
    eps: float


def fused_embeddings_reference(
    words: Tensor, ids: Tensor, places: Tensor | None, positions: Tensor | None, kinds: Tensor | None,
    types: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """`fused_embeddings` in plain torch."""
    total = words[ids]
    if kinds is not None:
        total = total + (kinds[0] if types is None else kinds[types])
    if places is not None and positions is not None:
        total = total + places[positions].repeat(len(ids) // len(positions), 1)
    return torch.nn.functional.layer_norm(total, total.shape[-1:], weight, bias, eps)


@triton.jit
def _table_rows(table_ptr, index_ptr, o_index, table_rows, m_row, o_column, m_column, size):
    # [ROWS, BLOCK] of a table, by the indices at these places. What no row has an index for is NaN, not other memory.
    index = tl.load(index_ptr + o_index, mask=m_row, other=0)
    inside = (index >= 0) & (index < table_rows)
    place = table_ptr + tl.where(inside, index, 0).to(tl.int64)[:, None] * size + o_column[None, :]
    rows = tl.load(place, mask=m_row[:, None] & m_column[None, :], other=0.0).to(tl.float32)
    return tl.where(inside[:, None], rows, float("nan"))


@kernel("tokens", "period")
def _fused_embeddings(
    words_ptr, ids_ptr, places_ptr, positions_ptr, kinds_ptr, types_ptr, weight_ptr, bias_ptr, out_ptr,
    eps, tokens, period, size, word_rows, place_rows, kind_rows,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PLACES: tl.constexpr, KINDS: tl.constexpr, TYPES: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_column = tl.arange(0, BLOCK)
    m_row, m_column = o_row < tokens, o_column < size
    s = _table_rows(words_ptr, ids_ptr, o_row, word_rows, m_row, o_column, m_column, size)
    if PLACES:
        s += _table_rows(places_ptr, positions_ptr, o_row % period, place_rows, m_row, o_column, m_column, size)
    if KINDS:
        if TYPES:
            s += _table_rows(kinds_ptr, types_ptr, o_row, kind_rows, m_row, o_column, m_column, size)
        else:
            s += vector(kinds_ptr, o_column, m_column)
    y = layer_normed(s, weight_ptr, bias_ptr, o_column, m_column, size, eps, BIAS)
    place = out_ptr + o_row.to(tl.int64)[:, None] * size + o_column[None, :]
    tl.store(place, y.to(out_ptr.dtype.element_ty), mask=m_row[:, None] & m_column[None, :])


def check_embeddings(c: Embeddings) -> None:
    """Raises ValueError where the operands do not fit together."""
    tables = has_dims(2, c.words, c.places, c.kinds)
    tables = tables and all(x is None or x.shape[1] == c.words.shape[1] for x in (c.places, c.kinds))
    vectors = all(x is None or x.shape == c.words.shape[1:] for x in (c.weight, c.bias))
    check_fit(tables and vectors, words=c.words, places=c.places, kinds=c.kinds, weight=c.weight, bias=c.bias)
    tokens = c.ids.numel()
    indices = {"ids": c.ids, "positions": c.positions, "types": c.types}
    given = {name: x for name, x in indices.items() if x is not None}
    fits = has_dims(1, *given.values()) and (c.types is None or len(c.types) == tokens)
    fits = fits and (c.positions is None) == (c.places is None) and (c.types is None or c.kinds is not None)
    fits = fits and (c.positions is None or (len(c.positions) > 0 and tokens % len(c.positions) == 0))
    check_fit(fits, **given)
    if c.ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids are int32 or int64, not {c.ids.dtype}")


def _prepare(c: Embeddings, exact: str) -> Embeddings:
    tensors: dict[str, Any] = {name: x.contiguous() for name, x in c._asdict().items() if isinstance(x, Tensor)}
    return c._replace(**tensors)


def _plan(c: Embeddings, exact: str, tiles: None) -> Plan:
    tokens, (word_rows, size) = len(c.ids), c.words.shape
    block = triton.next_power_of_2(size)
    rows, warps = default_rows(tokens, block)
    arguments = [
        *addresses("words", "ids", "places", "positions", "kinds", "types", "weight", "bias", "out"),
        *(c.eps, tokens, tokens if c.positions is None else len(c.positions), size, word_rows),
        *(0 if x is None else len(x) for x in (c.places, c.kinds)),
    ]
    launch = Launch(
        _fused_embeddings, (-(-tokens // rows),), [*operand_names(Embeddings), "out"], arguments,
        ROWS=rows, BLOCK=block, PLACES=c.places is not None, KINDS=c.kinds is not None, TYPES=c.types is not None,
        BIAS=c.bias is not None, num_warps=warps,
    )  # fmt: skip
    run = into_last(launch, (tokens, size))
    return lambda *operands: run(*operands, None)


_op = Op(
    "fused_embeddings", Embeddings, check=check_embeddings, reference=lambda c: fused_embeddings_reference(*c),
    shape=lambda c: (len(c.ids), c.words.shape[1]), prepare=_prepare, plan=_plan, idle=lambda c: not len(c.ids),
)  # fmt: skip


def fused_embeddings(
    words: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    places: Tensor | None = None,
    positions: Tensor | None = None,
    kinds: Tensor | None = None,
    types: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """LayerNorm(words[ids] + places[positions] + kinds[types]) * weight + bias.

    The kernel gives NaN for a token with an index outside of its table; plain torch refuses it.

    Args:
        words: [vocabulary, H].
        ids: [T].
        weight: of the norm, [H].
        bias: of the norm, [H].
        eps: what is added to the variance.
        places: the table of positions, [positions, H].
        positions: [T], or as many as repeat: those of one sequence, for all sequences of a batch.
        kinds: the table of token types, [types, H].
        types: [T]; None takes the first type for every token.
        backend: `triton` for the kernel, `torch` for plain torch, `auto` for the kernel on a GPU that can run it.

    Returns:
        [T, H].

    Raises:
        ValueError: the shapes or dtypes do not fit together.
        BackendError: `backend="triton"` cannot run here.
    """
    return _op((words, ids, places, positions, kinds, types, weight, bias), (eps,), backend)
