"""The end of a greedy decoding step: the most probable token of each row is appended, and the step counted.

    id_b = argmax_v logits_{b, v},  or the padding where row b has ended;   ended_b |= id_b in ends
    position += 1;   tokens_{b, position} = id_b

    logits [n, V]     tokens [n, room]     ids, ended [n]     position, pad [1]

Several programs share a row. Each counts itself when its share is done, and the last one does the rest. Of equal logits
the first is taken, and a NaN is larger than all numbers, as in torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashsvd.kernels.checks import check_fit, has_dims
from flashsvd.kernels.launch import Backend
from flashsvd.kernels.op import Op, operand_names
from flashsvd.kernels.plans import Launch, Plan, addresses
from flashsvd.kernels.programmatic import await_inputs, early_start
from flashsvd.kernels.triton_import import kernel, tl, triton

__all__ = ["greedy_append"]

COLUMNS, MOST_SHARES = 4096, 16
# An order of 32 bits, and a column counted from the end, in one number: the largest is that of the first largest logit.
LAST = tl.constexpr(0x7FFFFFFF)
LEAST = tl.constexpr(-(1 << 63))


class GreedyAppend(NamedTuple):
    """Operands of a call."""

    logits: Tensor
    ends: Tensor
    pad: Tensor
    ids: Tensor
    tokens: Tensor
    position: Tensor
    ended: Tensor
    arrivals: Tensor


@triton.jit
def _ordered(x):
    # Whole numbers of 32 bits in the order of x.
    bits = (x.to(tl.float32) + 0.0).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ LAST, bits)
    return tl.where(x != x, LAST, order)


@kernel("n", "vocabulary", "room")
def _greedy_append(
    logits_ptr, ends_ptr, pad_ptr, ids_ptr, tokens_ptr, position_ptr, ended_ptr, arrivals_ptr, best_ptr,
    n, vocabulary, room, logits_row,
    COLUMNS: tl.constexpr, SHARES: tl.constexpr, N: tl.constexpr, ENDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    await_inputs(PDL)
    i_row = tl.program_id(0)
    i_share = tl.program_id(1)
    best = tl.full([COLUMNS], LEAST, tl.int64)
    for start in range(i_share * COLUMNS, vocabulary, SHARES * COLUMNS):
        o_column = start + tl.arange(0, COLUMNS)
        m_column = o_column < vocabulary
        x = tl.load(logits_ptr + i_row.to(tl.int64) * logits_row + o_column, mask=m_column, other=0.0)
        found = (_ordered(x).to(tl.int64) << 32) | (o_column ^ LAST).to(tl.int64)
        best = tl.maximum(best, tl.where(m_column, found, LEAST))
    tl.store(best_ptr + i_row * SHARES + i_share, tl.max(best, 0))
    # The one thread that counts publishes what all threads have stored before they met here.
    tl.debug_barrier()
    if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu") == n * SHARES - 1:
        tl.store(arrivals_ptr, 0)
        o_n = tl.arange(0, N)
        m_n = o_n < n
        o_best = o_n[:, None] * SHARES + tl.arange(0, SHARES)[None, :]
        best_of_row = tl.max(tl.load(best_ptr + o_best, mask=m_n[:, None], other=LEAST), 1)
        column = (best_of_row & LAST) ^ LAST
        ended = tl.load(ended_ptr + o_n, mask=m_n, other=0) != 0
        new = tl.where(ended, tl.load(pad_ptr), column)
        ends = tl.load(ends_ptr + tl.arange(0, ENDS))
        ended = ended | (tl.max((new[:, None] == ends[None, :]).to(tl.int32), 1) > 0)
        position = tl.load(position_ptr) + 1
        tl.store(ids_ptr + o_n, new, mask=m_n)
        tl.store(tokens_ptr + o_n.to(tl.int64) * room + position, new, mask=m_n)
        tl.store(ended_ptr + o_n, ended, mask=m_n)
        tl.debug_barrier()
        tl.store(position_ptr, position)


def check_greedy_append(c: GreedyAppend) -> None:
    """Raises ValueError where the operands do not fit together."""
    fits = has_dims(2, c.logits, c.tokens) and c.ends.ndim == 1
    fits = fits and len(c.tokens) == len(c.logits) and c.ids.shape == c.ended.shape == c.logits.shape[:1]
    fits = fits and c.position.shape == c.pad.shape == c.arrivals.shape == (1,)
    check_fit(fits, logits=c.logits)
    kinds = {
        "ends": torch.int64, "pad": torch.int64, "ids": torch.int64, "tokens": torch.int64, "position": torch.int32,
        "ended": torch.bool, "arrivals": torch.int32,
    }  # fmt: skip
    for name, dtype in kinds.items():
        x: Tensor = getattr(c, name)
        if x.dtype != dtype or not x.is_contiguous():
            raise ValueError(f"{name} is contiguous {dtype}, not {x.dtype} of strides {x.stride()}")
    if len(c.ends) & (len(c.ends) - 1) or len(c.ends) == 0:
        raise ValueError(f"ends has room for a power of two of ids, not {len(c.ends)}")


def _reference(c: GreedyAppend) -> Tensor:
    best = torch.where(c.ended, c.pad, c.logits.argmax(-1))
    c.ended.logical_or_((best[:, None] == c.ends).any(1))
    c.position.add_(1)
    c.tokens.index_copy_(1, c.position.long(), best[:, None])
    return best


def _prepare(c: GreedyAppend, exact: str) -> GreedyAppend:
    return c if c.logits.stride(1) == 1 else c._replace(logits=c.logits.contiguous())


def _plan(c: GreedyAppend, exact: str, tiles: None) -> Plan:
    n, vocabulary = c.logits.shape
    shares = min(MOST_SHARES, triton.next_power_of_2(-(-vocabulary // COLUMNS)))
    names = [*operand_names(GreedyAppend), "best"]
    arguments = [*addresses(*names), n, vocabulary, c.tokens.shape[1], c.logits.stride(0)]
    launch = Launch(
        _greedy_append, (n, shares), names, arguments, COLUMNS=COLUMNS, SHARES=shares,
        N=triton.next_power_of_2(n), ENDS=len(c.ends), num_warps=8, **early_start(c.logits),
    )  # fmt: skip

    def run(logits: Tensor, ends: Tensor, pad: Tensor, ids: Tensor, *others: Tensor) -> Tensor:
        launch(logits, ends, pad, ids, *others, logits.new_empty(n * shares, dtype=torch.int64))
        return ids

    return run


_op = Op(
    "greedy_append", GreedyAppend, check=check_greedy_append, shape=lambda c: tuple(c.ids.shape), reference=_reference,
    prepare=_prepare, plan=_plan, writes=("ids", "tokens", "position", "ended", "arrivals"),
)  # fmt: skip


def greedy_append(
    logits: Tensor, ends: Tensor, pad: Tensor, ids: Tensor, tokens: Tensor, position: Tensor, ended: Tensor,
    arrivals: Tensor, *, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Append the most probable token of each row, or padding in rows that have ended.

    Args:
        logits: of the next token, [n, V].
        ends: ids that end a row, int64 [a power of two]; -1 is none.
        pad: what follows in rows that have ended, int64 [1].
        ids: where the appended ids go, int64 [n].
        tokens: where they go as well, at `position` + 1, int64 [n, room].
        position: the column of the last token, int32 [1], which is then one more. There is room for another one.
        ended: which rows have ended, bool [n]; rows that now end are among them afterwards.
        arrivals: a zero, int32 [1], by which programs count themselves, and which is zero again in the end. No
            two calls use it at once.
        backend: `triton` for the kernel, `torch` for plain torch, `auto` for the kernel on a GPU that can run it.

    Returns:
        `ids`.

    Raises:
        ValueError: the shapes or dtypes do not fit together.
        BackendError: `backend="triton"` cannot run here.
    """
    return _op((logits, ends, pad, ids, tokens, position, ended, arrivals), (), backend)
