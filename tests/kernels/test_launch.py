"""What launchers share: ranks in tiles, aligned memory, the choice of backend and of tiles."""

from __future__ import annotations

import subprocess
import sys
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashsvd.errors import BackendError
from flashsvd.kernels import launch, partial_sums
from flashsvd.kernels.launch import ALIGNMENT, LARGEST_RANK, SMALLEST_TILE, aligned, rank_tiles, use_triton
from flashsvd.kernels.partial_sums import divided, splits_that_fill
from flashsvd.kernels.tiles import Table, Tiles, choose

CPU = torch.device("cpu")


@given(st.integers(1, LARGEST_RANK))
def test_rank_tiles_hold_the_rank_with_little_waste(rank: int) -> None:
    first, second = rank_tiles(rank)
    widths = [first, second] if second else [first]
    assert all(width >= SMALLEST_TILE and width.bit_count() == 1 for width in widths)
    assert first >= second
    assert first + second >= rank
    assert first + second <= max(SMALLEST_TILE, 1 << (rank - 1).bit_length())
    # From ranks on that the smallest tiles do not overshoot, less than half is wasted.
    if rank > 2 * SMALLEST_TILE:
        assert first + second <= 1.5 * rank
    elif rank > SMALLEST_TILE:
        assert (first, second) == (2 * SMALLEST_TILE, 0)


@pytest.mark.parametrize(("rank", "expected"), [(1, (16, 0)), (24, (32, 0)), (160, (128, 32)), (240, (256, 0))])
def test_rank_tiles_of_some_ranks(rank: int, expected: tuple[int, int]) -> None:
    assert rank_tiles(rank) == expected


def test_a_rank_above_the_largest_is_refused() -> None:
    with pytest.raises(ValueError, match=f"rank {LARGEST_RANK + 1} is above {LARGEST_RANK}"):
        rank_tiles(LARGEST_RANK + 1)


@given(
    st.integers(1, 5), st.integers(1, 20), st.integers(0, 3), st.booleans(), st.sampled_from([torch.half, torch.float])
)
def test_aligned_keeps_the_numbers(rows: int, columns: int, offset: int, transposed: bool, dtype: torch.dtype) -> None:
    x = torch.randn(rows, columns + offset).to(dtype)[:, offset:]
    x = x.T if transposed else x
    result = aligned(x)
    assert torch.equal(result, x)
    assert result.stride(-1) == 1
    assert result.data_ptr() % ALIGNMENT == result.stride(0) * result.element_size() % ALIGNMENT == 0


def test_aligned_copies_nothing_that_is_aligned() -> None:
    x = torch.zeros(6, 32)[1:, 8:20]
    assert aligned(x) is x


@pytest.mark.parametrize(
    ("dtype", "why"),
    [(torch.float64, "not float64"), (torch.int8, "not int8"), (torch.float32, "on a GPU, not on cpu")],
)
def test_triton_is_refused_where_it_cannot_run(dtype: torch.dtype, why: str) -> None:
    with patch.object(launch, "interpreting", return_value=False), pytest.raises(BackendError, match=why):
        use_triton("triton", torch.zeros(1, dtype=dtype))


def test_bf16_is_refused_in_the_interpreter_which_multiplies_it_wrongly() -> None:
    class OnGpu:
        dtype, is_cuda, device = torch.bfloat16, True, torch.device("cuda:0")

    on_gpu: Any = OnGpu()
    with patch.object(launch, "interpreting", return_value=True):
        for x in (torch.zeros(1, dtype=torch.bfloat16), on_gpu):
            with pytest.raises(BackendError, match="multiplies bf16 wrongly; use backend auto or torch"):
                use_triton("triton", x)
        assert not use_triton("auto", on_gpu)
        assert use_triton("triton", torch.zeros(1))


def test_triton_is_refused_where_it_is_not_installed() -> None:
    with (
        patch.object(launch, "MISSING", "no module"),
        pytest.raises(BackendError, match=r"not installed \(no module\)"),
    ):
        use_triton("triton", torch.zeros(1))


def test_triton_is_refused_on_an_old_gpu() -> None:
    class OnOldGpu:
        dtype, is_cuda, device = torch.float16, True, torch.device("cuda:0")

    x: Any = OnOldGpu()
    with patch.object(launch, "capability", return_value=(7, 5)):
        with pytest.raises(BackendError, match=r"capability 8.0, this GPU has 7.5"):
            use_triton("triton", x)
        assert not use_triton("auto", x)
    with patch.object(launch, "capability", return_value=(8, 0)):
        assert use_triton("auto", x)


def test_auto_takes_torch_on_the_cpu_and_an_unknown_backend_is_refused() -> None:
    assert not use_triton("auto", torch.zeros(1))
    assert not use_triton("torch", torch.zeros(1))
    unknown: Any = "cuda"
    with pytest.raises(ValueError, match="auto, torch or triton, not 'cuda'"):
        use_triton(unknown, torch.zeros(1))


@pytest.mark.parametrize(("rows", "columns"), [(8, 16), (16, 24), (0, 16)])
def test_tiles_that_tensor_cores_cannot_take_are_refused(rows: int, columns: int) -> None:
    with pytest.raises(ValueError, match=r"power of two from 16 on, not (8|24|0)"):
        Tiles(rows, columns)


def choose_on_cpu(option: Any) -> Tiles:
    table = Table[tuple[torch.Tensor]](lambda c: Tiles(64, 32), [Tiles(16, 16)], lambda c: c[0].shape)
    return choose(option, table, (torch.zeros(1),), "name", lambda t: None)


def test_the_callers_tiles_come_before_the_tables() -> None:
    assert choose_on_cpu(Tiles(32, 16)) == Tiles(32, 16)
    assert choose_on_cpu(None) == Tiles(64, 32)


def test_tiles_are_not_timed_without_a_gpu_nor_named_otherwise() -> None:
    with pytest.raises(ValueError, match="needs a GPU"):
        choose_on_cpu("autotune")
    with pytest.raises(ValueError, match="not 'fast'"):
        choose_on_cpu("fast")


@given(st.integers(1, 2000), st.integers(1, 4096))
def test_splits_fill_the_gpu_and_leave_each_two_steps(tokens: int, walked: int) -> None:
    choice = Tiles(64, 32)
    with patch.object(partial_sums, "multiprocessors", return_value=132):
        splits = splits_that_fill(CPU, tokens, walked, choice)
    programs = -(-tokens // choice.rows)
    assert splits == 1 or (splits * programs <= 132 and walked >= splits * 2 * choice.columns)
    assert splits >= 1
    # One more would be too many for the GPU or too few steps for each.
    assert (splits + 1) * programs > 132 or walked < (splits + 1) * 2 * choice.columns


@given(st.integers(1, 4096), st.integers(1, 200), st.sampled_from([16, 32, 64]))
def test_a_divided_walk_is_walked_once_in_whole_steps(walked: int, splits: int, columns: int) -> None:
    programs, each = divided(walked, splits, columns)
    assert each % columns == 0
    assert programs <= splits
    # Every program has a step to take.
    assert (programs - 1) * each < walked <= programs * each


def test_fp32_products_follow_either_of_torchs_settings() -> None:
    script = """
import torch
from flashsvd.kernels.launch import precision
x = torch.zeros(1)
print(precision(x), precision(x.half()))
torch.backends.cuda.matmul.allow_tf32 = True
print(precision(x), precision(x.half()))
torch.backends.cuda.matmul.allow_tf32 = False
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
else:
    torch.backends.cuda.matmul.allow_tf32 = True
print(precision(x))
"""
    # In a process of its own, since torch does not let go of having seen both.
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["ieee", "ieee", "tf32", "ieee", "tf32"], done.stderr
