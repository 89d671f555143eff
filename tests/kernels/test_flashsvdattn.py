"""Rank-space attention: the algebra that folds the lifts away, and the same on Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_accuracy import SURPLUS, assert_attends_accurately, attend, packed, sequences
from flashsvd.errors import BackendError
from flashsvd.kernels.flashsvdattn import flashsvd_attention, flashsvd_attention_reference, fold_query
from flashsvd.kernels.tiles import Tiles
from kernel_accuracy import DEVICE, DTYPES, Operands, on_triton

# Rows beyond a sequence have no sum to divide by; the interpreter says so, and they are not stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

HEADS, HEAD_DIM = 3, 8
SCALE = HEAD_DIM**-0.5
LENGTHS = [(1,), (3, 5), (63, 65), (1, 0, 20)]


def lift(p: Tensor, v: Tensor, b: Tensor | None) -> Tensor:
    """P V + b of every head, [T, H, r] or [T, 1, r] -> [T, H, D]."""
    lifted = torch.stack([p[:, head % p.shape[1]] @ v[head] for head in range(v.shape[0])], dim=1)
    return lifted if b is None else lifted + b


def factors(make: Operands, lengths: tuple[int, ...], rank: int, joint: bool, bias: bool) -> Any:
    """A projection's P, V and b, without tokens of no sequence."""
    p = packed(make, lengths, 1 if joint else HEADS, rank)[:-SURPLUS]
    return p, make.weight(HEADS, rank, HEAD_DIM, walked=1), make(HEADS, HEAD_DIM) if bias else None


@pytest.mark.parametrize("joint", [False, True], ids=["per head", "joint"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
def test_rank_space_attention_is_attention_on_lifted_heads(
    causal: bool, lengths: tuple[int, ...], bias: bool, joint: bool
) -> None:
    make = Operands(torch.float64)
    q, k, v = (factors(make, lengths, rank, joint, bias) for rank in (5, 4, 6))
    expected = attend(lift(*q), lift(*k), lift(*v), lengths, SCALE, causal=causal)
    (p_q, v_q, b_q), (p_k, v_k, _), (p_v, v_v, b_v) = q, k, v
    matrix, offset = fold_query(v_q, b_q, v_k)
    assert matrix.shape == (HEADS, 5, 4)
    attended = flashsvd_attention_reference(
        lift(p_q, matrix, offset), p_k, p_v, *sequences(lengths), softmax_scale=SCALE, causal=causal
    )
    torch.testing.assert_close(lift(attended, v_v, b_v), expected)


@pytest.mark.parametrize("joint", [False, True], ids=["per head", "joint"])
def test_folding_changes_fp32_by_rounding_alone(joint: bool) -> None:
    lengths = (20, 33)
    q, k, v = (factors(Operands(), lengths, rank, joint, True) for rank in (24, 8, 40))
    exact = [[None if x is None else x.double() for x in one] for one in (q, k, v)]
    expected = attend(*(lift(*one) for one in exact), lengths, SCALE)
    matrix, offset = fold_query(q[1], q[2], k[1])
    with on_triton():
        attended = flashsvd_attention(
            lift(q[0], matrix, offset), k[0], v[0], *sequences(lengths), softmax_scale=SCALE, backend="triton"
        )
    torch.testing.assert_close(lift(attended, *v[1:]).double(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True], ids=["per head", "joint"])
@pytest.mark.parametrize(("r_k", "r_v"), [(8, 24), (24, 160), (40, 8), (160, 40), (192, 192)])
def test_any_two_ranks(r_k: int, r_v: int, shared: bool, dtype: torch.dtype) -> None:
    lengths, make = (20, 1, 0, 33), Operands(dtype)
    kv_heads = 1 if shared else 2
    q, p_k, p_v = (packed(make, lengths, h, r) for h, r in ((2, r_k), (kv_heads, r_k), (kv_heads, r_v)))
    assert_attends_accurately(flashsvd_attention, q, p_k, p_v, lengths=lengths, softmax_scale=0.2)


@pytest.mark.parametrize("lengths", [(1,), (3, 1), (63,), (65,), (100,)])
def test_sequences_of_any_length(lengths: tuple[int, ...]) -> None:
    make = Operands()
    q, p_k, p_v = (packed(make, lengths, 2, rank) for rank in (24, 24, 40))
    tuning = {"tiles": Tiles(32, 32)}
    assert_attends_accurately(flashsvd_attention, q, p_k, p_v, lengths=lengths, softmax_scale=0.2, tuning=tuning)


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, p_k, p_v = (torch.zeros(9, 2, rank, device=DEVICE) for rank in (4, 5, 4))
    with pytest.raises(ValueError, match=r"queries \(9, 2, 4\), keys \(9, 2, 5\), values \(9, 2, 4\) do not fit"):
        flashsvd_attention(q, p_k, p_v, *sequences((9,)), softmax_scale=SCALE)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU to time on")
def test_tiles_are_not_timed_without_a_gpu() -> None:
    x = torch.zeros(9, 2, 8)
    with pytest.raises(ValueError, match="needs a GPU"):
        flashsvd_attention(x, x, x, *sequences((9,)), softmax_scale=SCALE, backend="triton", tiles="autotune")


def test_fp64_is_left_to_torch() -> None:
    x = torch.zeros(9, 2, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(BackendError, match="not float64"):
        flashsvd_attention(x, x, x, *sequences((9,)), softmax_scale=SCALE, backend="triton")
