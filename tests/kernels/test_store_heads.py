"""Heads of a prompt put into a stored cache on Triton, rotated or as they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashsvd.kernels.rotary import rotate_heads_reference
from flashsvd.kernels.store_heads import store_heads
from kernel_accuracy import DEVICE, DTYPES, Operands, assert_accurate, on_triton

ROOM, POSITIONS = 11, 12


def tables(width: int, dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    angles = torch.arange(POSITIONS, device=DEVICE)[:, None] * torch.linspace(1, 0.1, width // 2, device=DEVICE)
    positions = (torch.arange(tokens, device=DEVICE) * 5 % POSITIONS).int()
    return angles.cos().to(dtype), angles.sin().to(dtype), positions


def cache(rows: int, heads: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.full((rows, heads, ROOM, width), torch.nan, dtype=dtype, device=DEVICE)


def untouched(place: Tensor, length: int) -> bool:
    return bool(place[:, :, length:].isnan().all()) and not bool(place[:, :, :length].isnan().any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "length", "heads", "width"), [(1, 7, 2, 32), (3, 4, 5, 12), (2, 1, 24, 64), (2, 11, 1, 4)]
)
def test_keys_are_rotated_into_their_columns(
    rows: int, length: int, heads: int, width: int, dtype: torch.dtype
) -> None:
    x, place = Operands(dtype)(rows * length, heads, width), cache(rows, heads, width, dtype)
    given, turning = x.clone(), tables(width, dtype, rows * length)
    out = place[:, :, :length]
    with on_triton():
        assert store_heads(x, out, *turning, backend="triton") is out
    exact, plain = (
        rotate_heads_reference(y, *(t.to(y.dtype) for t in turning[:2]), turning[2])
        .view(rows, length, heads, width).transpose(1, 2)
        for y in (x.double(), x)
    )  # fmt: skip
    assert_accurate(out, plain, exact)
    assert untouched(place, length)
    assert torch.equal(x, given)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("width", [4, 24, 5000])
def test_without_tables_they_are_put_there_as_they_are(backend: str, width: int) -> None:
    # As second factors make them, side by side with others.
    x = Operands(torch.float16)(6, 3 * width)[:, width:].unflatten(1, (2, width))
    place = cache(2, 2, width, torch.float16)
    store_heads(x, place[:, :, :3], backend=backend)
    assert torch.equal(place[:, :, :3], x.reshape(2, 3, 2, width).transpose(1, 2))
    assert untouched(place, 3)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_no_tokens(backend: str) -> None:
    place = cache(2, 2, 8, torch.float32)
    store_heads(Operands()(0, 2, 8), place[:, :, :0], backend=backend)
    assert bool(place.isnan().all())


def test_operands_that_do_not_fit_are_refused() -> None:
    x, place, turning = Operands()(6, 2, 8), cache(2, 2, 8, torch.float32)[:, :, :3], tables(8, torch.float32, 6)
    with pytest.raises(ValueError, match=r"x \(5, 2, 8\), out \(2, 2, 3, 8\) do not fit"):
        store_heads(x[:5], place)
    with pytest.raises(ValueError, match=r"x \(6, 2, 7\).* do not fit"):
        store_heads(x[..., :7], place[..., :7])
    with pytest.raises(ValueError, match="dtypes differ"):
        store_heads(x.half(), place)
    with pytest.raises(ValueError, match="all given or none"):
        store_heads(x, place, turning[0])
    with pytest.raises(ValueError, match="not contiguous"):
        store_heads(x, place.transpose(2, 3).contiguous().transpose(2, 3))
    with pytest.raises(ValueError, match="heads of 8 do not fit"):
        store_heads(x, place, turning[0][:, :2], turning[1][:, :2], turning[2])


def test_in_a_compiled_graph() -> None:
    x, place, turning = (
        Operands()(6, 2, 8).clone(),
        cache(2, 2, 8, torch.float32)[:, :, :3],
        tables(8, torch.float32, 6),
    )

    def call(x: Tensor, out: Tensor) -> Tensor:
        return store_heads(x, out, *turning, backend="triton") + 1

    shifted = torch.compile(call, backend="aot_eager", fullgraph=True)(x, place)
    torch.testing.assert_close(shifted - 1, place)
    torch.library.opcheck(torch.ops.flashsvd.store_heads.default, (x, *turning, torch.zeros(2, 2, 3, 8, device=DEVICE)))
