"""Under torch.compile any size of an operand may vary from call to call, and the checks of operands still hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attention_accuracy import cumulative, packed, with_holes
from flashsvd.kernels.decode_attention import decode_attention
from flashsvd.kernels.flash_attn_rotary import flash_attention_rotary
from flashsvd.kernels.flash_attn_triton import flash_attention, flash_attention_with_kvcache
from flashsvd.kernels.flashsvdattn import flashsvd_attention
from flashsvd.kernels.flashsvddecode import decode_linear
from flashsvd.kernels.flashsvdffnv1 import flashsvd_ffn_v1
from flashsvd.kernels.flashsvdffnv2 import flashsvd_ffn_v2
from flashsvd.kernels.flashsvdgeglu import flashsvd_geglu
from flashsvd.kernels.flashsvdropeattn import flashsvd_rope_attention
from flashsvd.kernels.flashsvdswiglu import flashsvd_swiglu
from flashsvd.kernels.fused_ln import fused_ln
from flashsvd.kernels.latent_attention import latent_attention
from flashsvd.kernels.launch import LARGEST_RANK, Backend
from flashsvd.kernels.rms_norm import rms_norm
from flashsvd.kernels.rotary import rotate_heads
from kernel_accuracy import DEVICE, Operands

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

LENGTHS = (9, 4)
TOKENS = sum(LENGTHS)

Operation = tuple[Callable[..., Tensor], list[Tensor]]


def tokens(heads: int, width: int) -> Tensor:
    return packed(Operands(), LENGTHS, heads, width)[:TOKENS]


def tables() -> list[Tensor]:
    return [Operands(seed=seed)(40, 16) for seed in range(2)]


def dense(backend: Backend) -> Operation:
    def call(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, positions: Tensor) -> Tensor:
        return flash_attention(
            q, k, v, cu_seqlens, cu_seqlens, 9, 9,
            softmax_scale=0.2, window_size=(5, 5), positions=positions, backend=backend,
        )  # fmt: skip

    places = with_holes(LENGTHS)[:TOKENS]
    return call, [tokens(4, 24), tokens(2, 24), tokens(2, 40), cumulative(LENGTHS), places]


def rank_space(backend: Backend) -> Operation:
    def call(q: Tensor, p_k: Tensor, p_v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return flashsvd_attention(q, p_k, p_v, cu_seqlens, cu_seqlens, 9, 9, softmax_scale=0.2, backend=backend)

    return call, [tokens(4, 24), tokens(1, 24), tokens(1, 40), cumulative(LENGTHS)]


def causal(backend: Backend) -> Operation:
    def call(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return flash_attention(
            q, k, v, cu_seqlens, cu_seqlens, 9, 9,
            softmax_scale=0.2, causal=True, window_size=(5, 0), backend=backend,
        )  # fmt: skip

    return call, [tokens(4, 24), tokens(2, 24), tokens(2, 40), cumulative(LENGTHS)]


def from_a_cache(backend: Backend) -> Operation:
    def call(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, firsts: Tensor, cu_seqlens: Tensor) -> Tensor:
        return flash_attention_with_kvcache(
            q, k, v, ends, cu_seqlens, 9, cache_leftpad=firsts, softmax_scale=0.2, causal=True, backend=backend
        )

    ranges = [torch.tensor(numbers, dtype=torch.int32, device=DEVICE) for numbers in ((17, 20), (3, 0))]
    caches = [Operands()(2, 2, 24, width).contiguous() for width in (24, 40)]
    return call, [tokens(4, 24), *caches, *ranges, cumulative(LENGTHS)]


def rotary(backend: Backend) -> Operation:
    def call(*given: Tensor) -> Tensor:
        *operands, cu_seqlens, b_q, b_k = given
        lengths = (cu_seqlens, cu_seqlens, 9, 9)
        return flashsvd_rope_attention(*operands, *lengths, softmax_scale=0.2, b_q=b_q, b_k=b_k, backend=backend)

    make = Operands()
    lifts = [make.weight(heads, 24, 32, walked=1) for heads in (4, 2)]
    factors = [tokens(4, 24), lifts[0], tokens(2, 24), lifts[1], tokens(1, 40)]
    return call, [*factors, *tables(), cumulative(LENGTHS), make(4, 32), make(2, 32)]


def turned(backend: Backend) -> Operation:
    def call(*given: Tensor) -> Tensor:
        *operands, cu_seqlens, positions = given
        options = {"softmax_scale": 0.2, "window_size": (5, 5), "positions": positions, "backend": backend}
        return flash_attention_rotary(*operands, cu_seqlens, cu_seqlens, 9, 9, **options)

    heads = [tokens(4, 32), tokens(2, 32), tokens(2, 40)]
    return call, [*heads, *tables(), cumulative(LENGTHS), with_holes(LENGTHS)[:TOKENS]]


def ffn_v1(backend: Backend) -> Operation:
    make = Operands()
    given = [make(20, 24), make.weight(70, 24), make(70), make.weight(70, 40, walked=0)]
    return lambda *given: flashsvd_ffn_v1(*given, backend=backend), given


def geglu(backend: Backend) -> Operation:
    make = Operands()
    lifts = [make(20, 24), make(20, 30), make.weight(70, 24), make.weight(70, 30)]
    given = [*lifts, make.weight(70, 40, walked=0), make(70), make(70)]
    return lambda *given: flashsvd_geglu(*given, backend=backend), given


def wide_swiglu(backend: Backend) -> Operation:
    make, rank = Operands(), LARGEST_RANK + 8
    lifts = [make(20, 24), make(20, 30), make.weight(70, 24), make.weight(70, 30)]
    given = [*lifts, make.weight(70, rank, walked=0), make(70), make(70)]
    return lambda *given: flashsvd_swiglu(*given, backend=backend, most_bytes=30_000), given


def ffn_v2(backend: Backend) -> Operation:
    make = Operands()
    first = [make(20, 48), make.weight(24, 48), make.weight(70, 24), make(70)]
    given = [*first, make.weight(70, 40, walked=0), make.weight(48, 40), make(48)]
    return lambda *given: flashsvd_ffn_v2(*given, backend=backend), given


def layer_norm(backend: Backend) -> Operation:
    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
        return fused_ln(x, residual, weight, bias, eps=1e-5, shift=shift, backend=backend)

    make = Operands()
    return call, [make(20, 48), make(20, 48), make(48), make(48), make(48)]


def rms(backend: Backend) -> Operation:
    make = Operands()
    return lambda *given: rms_norm(*given, eps=1e-5, backend=backend), [make(20, 48), make(20, 48), make(48)]


def rotation(backend: Backend) -> Operation:
    def call(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        return rotate_heads(x.clone(), cos, sin, positions, backend=backend)

    return call, [tokens(4, 32), *tables(), torch.arange(TOKENS, device=DEVICE).int()]


def decoding(backend: Backend) -> Operation:
    def call(x: Tensor, q_v: Tensor, k_v: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return decode_linear(x, [q_v, k_v], bias, residual=residual, activation="silu", backend=backend)

    make = Operands()
    return call, [make(3, 40), make.weight(20, 24), make.weight(9, 16), make(29), make(3, 29)]


def decoding_attention(backend: Backend) -> Operation:
    def call(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *others: Tensor) -> Tensor:
        position, first, cos, sin = others
        caches = k_cache.clone(), v_cache.clone()
        options = {"softmax_scale": 0.2, "first": first, "cos": cos, "sin": sin, "splits": 2}
        return decode_attention(q, k, v, *caches, position, **options, backend=backend)

    make = Operands()
    new, caches = [make(3, 4, 32), make(3, 2, 32), make(3, 2, 20)], [make(3, 2, 40, 32), make(3, 2, 40, 20)]
    places = [torch.tensor([33], device=DEVICE), torch.tensor([0, 4, 20], device=DEVICE)]
    return call, [*new, *caches, *places, make(3, 16), make(3, 16)]


def rank_space_attention(backend: Backend) -> Operation:
    def call(
        q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lift: Tensor, *others: Tensor
    ) -> Tensor:
        position, first, cos, sin = others
        caches = k_cache.clone(), v_cache.clone()
        options = {"softmax_scale": 0.2, "first": first, "lift": lift, "cos": cos, "sin": sin, "splits": 2}
        return latent_attention(q, k, v, *caches, position, **options, backend=backend)

    make = Operands()
    new, caches = [make(3, 4, 32), make(3, 1, 24), make(3, 1, 20)], [make(3, 1, 40, 24), make(3, 1, 40, 20)]
    places = [torch.tensor([33], device=DEVICE), torch.tensor([0, 4, 20], device=DEVICE)]
    return call, [*new, *caches, make.weight(2, 32, 24), *places, make(40, 16), make(40, 16)]


OPERATIONS = pytest.mark.parametrize(
    "operation",
    [
        dense,
        rank_space,
        causal,
        from_a_cache,
        rotary,
        turned,
        ffn_v1,
        geglu,
        wide_swiglu,
        ffn_v2,
        layer_norm,
        rms,
        rotation,
        decoding,
        decoding_attention,
        rank_space_attention,
    ],
)


def compiled(call: Callable[..., Tensor], dynamic: bool | None) -> Callable[..., Tensor]:
    torch.compiler.reset()
    return torch.compile(call, backend="eager", fullgraph=True, dynamic=dynamic)


@OPERATIONS
def test_the_sizes_of_any_one_operand_may_vary(operation: Callable[[Backend], Operation]) -> None:
    call, given = operation("triton")
    expected = call(*given)
    for i, operand in enumerate(given):
        varying = [x.detach() for x in given]
        for dim in range(operand.ndim):
            torch._dynamo.maybe_mark_dynamic(varying[i], dim)
        torch.testing.assert_close(compiled(call, None)(*varying), expected)


@OPERATIONS
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_all_sizes_may_vary(operation: Callable[[Backend], Operation], backend: Backend) -> None:
    call, given = operation(backend)
    torch.testing.assert_close(compiled(call, True)(*given), call(*given))
