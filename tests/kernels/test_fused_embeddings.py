"""LayerNorm(words[ids] + places[positions] + kinds[types]) on Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashsvd.kernels.fused_embeddings import fused_embeddings
from kernel_accuracy import DEVICE, DTYPES, Operands, assert_accurate, on_triton

VOCABULARY, ROWS, KINDS = 50, 30, 2


def indices(count: int, below: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randint(below, (count,), generator=generator, device=DEVICE)


def operands(tokens: int, size: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> list[Any]:
    make = Operands(dtype)
    return [make(VOCABULARY, size), indices(tokens, VOCABULARY), make(size), make(size) if bias else None]


def tables(tokens: int, size: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    make = Operands(dtype, seed=1)
    return {
        "places": make(ROWS, size),
        "positions": indices(tokens, ROWS, 1),
        "kinds": make(KINDS, size),
        "types": indices(tokens, KINDS, 2),
    }


def assert_embeds_accurately(words: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> None:
    def in_torch(as_dtype: torch.dtype) -> Tensor:
        def cast(x: Any) -> Any:
            return x.to(as_dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        others = {name: cast(x) for name, x in options.items()}
        return fused_embeddings(cast(words), ids, cast(weight), cast(bias), eps=1e-5, backend="torch", **others)

    with on_triton():
        result = fused_embeddings(words, ids, weight, bias, eps=1e-5, backend="triton", **options)
    assert_accurate(result, in_torch(words.dtype), in_torch(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size"), [(1, 24), (7, 100), (65, 32)])
def test_any_sizes(tokens: int, size: int, dtype: torch.dtype) -> None:
    assert_embeds_accurately(*operands(tokens, size, dtype), **tables(tokens, size, dtype))


@pytest.mark.parametrize("left_out", [("places", "positions"), ("kinds", "types"), ("types",)], ids=" ".join)
def test_tables_that_are_not_there(left_out: tuple[str, ...]) -> None:
    given = {name: x for name, x in tables(6, 32).items() if name not in left_out}
    assert_embeds_accurately(*operands(6, 32, bias=False), **given)


def test_the_positions_of_one_sequence_serve_all() -> None:
    given = tables(12, 32) | {"positions": indices(4, ROWS)}
    assert_embeds_accurately(*operands(12, 32), **given)


@pytest.mark.parametrize("wrong", [VOCABULARY, -1])
def test_an_id_outside_of_the_table_gives_nan_and_not_other_memory(wrong: int) -> None:
    words, ids, weight, bias = operands(3, 32)
    ids[1] = wrong
    result = fused_embeddings(words, ids, weight, bias, eps=1e-5, backend="triton")
    assert result[1].isnan().all()
    assert result[::2].isfinite().all()


def test_operands_that_do_not_fit_are_refused() -> None:
    words, ids, weight, bias = operands(6, 32)
    given = tables(6, 32)
    with pytest.raises(ValueError, match="do not fit"):
        fused_embeddings(words, ids, weight[:-1], bias, eps=1e-5)
    with pytest.raises(ValueError, match="do not fit"):
        fused_embeddings(words, ids, weight, bias, eps=1e-5, places=given["places"], positions=indices(4, ROWS))
    with pytest.raises(ValueError, match="do not fit"):
        fused_embeddings(words, ids, weight, bias, eps=1e-5, types=given["types"])
    with pytest.raises(ValueError, match="ids are int32 or int64"):
        fused_embeddings(words, ids.float(), weight, bias, eps=1e-5)
