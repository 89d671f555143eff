"""Prints the bytes of shared memory that each kernel takes on a Hopper GPU with the table's tiles, without having one.

Of `spills` it prints the bytes of registers that a program stores because they are too many.

Runs in a process of its own, since Triton's interpreter, once chosen, replaces the compiler.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashsvd.kernels import (
    activated_linear,
    decode_attention,
    decode_table,
    flash_attn_rotary,
    flash_attn_triton,
    flashsvddecode,
    flashsvdffnv1,
    flashsvdffnv2,
    flashsvdgeglu,
    flashsvdropeattn,
    fused_ln,
    gated_linear,
    latent_attention,
    rms_norm,
)
from flashsvd.kernels.flashsvdropeattn import largest_rank
from flashsvd.kernels.launch import precision
from flashsvd.kernels.triton_import import TensorDescriptor

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int8: "i8"}


class Compiler:
    """Stands in for a kernel: compiles what would be launched, and remembers what that takes."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.shared = self.spilled = 0

    def __getitem__(self, grid: object) -> Compiler:
        return self

    def __call__(
        self, *arguments: Any, num_warps: int, num_stages: int = 1, launch_pdl: bool = False, **constants: Any
    ) -> None:
        named = dict(zip(self.kernel.arg_names, arguments, strict=False)) | constants
        signature = {name: "constexpr" if name in constants else kind(value) for name, value in named.items()}
        fixed = {name: named[name] for name, type_name in signature.items() if type_name == "constexpr"}
        options = {"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": launch_pdl}
        self.done(self.compiled(named, signature, fixed, options))

    def compiled(
        self, named: dict[str, Any], signature: dict[str, str], fixed: dict[str, Any], options: dict[str, Any]
    ) -> Any:
        source = ASTSource(self.kernel, signature, fixed)
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

    def done(self, compiled: Any) -> None:
        self.shared = compiled.metadata.shared


class Registers(Compiler):
    """As a launch compiles it, which knows the sizes that are multiples of 16, with the bytes that are spilled."""

    def compiled(
        self, named: dict[str, Any], signature: dict[str, str], fixed: dict[str, Any], options: dict[str, Any]
    ) -> Any:
        ones = {name: 1 for name, value in named.items() if type(value) is int and value == 1 and name not in fixed}
        signature, fixed = signature | dict.fromkeys(ones, "constexpr"), fixed | ones
        known = [isinstance(x, Tensor) or (type(x) is int and x % 16 == 0) for x in named.values()]
        aligned = [i for i, name in enumerate(named) if known[i] and name not in fixed]
        source = ASTSource(self.kernel, signature, fixed, {(i,): [["tt.divisibility", 16]] for i in aligned})
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

    def done(self, compiled: Any) -> None:
        super().done(compiled)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        (self.spilled,) = map(int, re.findall(r"STACK:(\d+)", said))


def kind(argument: Any) -> str:
    """What Triton calls the type of an argument."""
    if isinstance(argument, TensorDescriptor):
        return f"tensordesc<{TYPES[argument.base.dtype]}{argument.block_shape}>".replace(" ", "")
    if isinstance(argument, Tensor):
        return f"*{TYPES[argument.dtype]}"
    if isinstance(argument, float):
        return "fp32"
    return "constexpr" if argument is None else "i32"


def shared_memory(module: Any, kernel: str, *call: Any) -> int:
    return launched(Compiler(getattr(module, kernel)), module, kernel, *call).shared


def launched(compiler: Compiler, module: Any, kernel: str, *call: Any) -> Compiler:
    op = module._op
    hopper = patch.object(module, "generation", return_value="hopper", create=True)
    with patch.object(module, kernel, compiler), hopper:
        op.launch(op.call(*call), precision(call[0]))
    return compiler


def main(dtype: torch.dtype, rank: int) -> dict[str, int]:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    p, q, lift, down, bias = zeros(1, rank), zeros(1, rank), zeros(64, rank), zeros(64, rank), zeros(64)
    x, narrow, wide = zeros(1000, 64), zeros(rank, 64), zeros(64, rank)
    ffn, options = [lift, bias, down], ["gelu", 1]
    gated = [lift, lift, down, bias, bias]
    sequences = torch.zeros(2, dtype=torch.int32)
    return ffn_v1(dtype, rank) | {
        "geglu": shared_memory(flashsvdgeglu, "_geglu", p, q, *gated, *options),
        "geglu of one factor": shared_memory(flashsvdgeglu, "_geglu", p, None, *gated, *options),
        "v2": shared_memory(flashsvdffnv2, "_ffn_v2", x, narrow, *ffn, wide, bias, "gelu"),
        **attention(zeros, rank, sequences),
        "rotary attention": rotary(zeros, rank, 128, sequences),
        "rotary attention, causal": rotary(zeros, rank, 128, sequences, causal=True),
        "rotary attention of wide heads": rotary(zeros, rank, 256, sequences),
        "attention that turns": turned(zeros, rank, sequences),
        "attention that turns, in a window": turned(zeros, rank, sequences, window=64),
        "attention that turns, causal": turned(zeros, rank, sequences, causal=True),
    }


def attention(zeros: Callable[..., Tensor], rank: int, sequences: Tensor) -> dict[str, int]:
    q, cache, ends = zeros(1, 1, rank), zeros(1, 1, 1000, rank), torch.zeros(1, dtype=torch.int32)

    def of(
        kv: Tensor, *lengths: Tensor | None, bias: Tensor | None = None, causal: bool = False, queries: int = 1000
    ) -> int:
        operands = (q, kv, kv, bias, sequences, *lengths, None, None)
        return shared_memory(flash_attn_triton, "_attention", *operands, queries, 1000, 1.0, -1, causal)

    alike, other, cached = (None, None, None), (sequences.clone(), None, None), (None, ends, ends.clone())
    return {
        "attention": of(q, *alike),
        "attention with a bias": of(q, *alike, bias=zeros(1, 257)),
        "attention to other keys": of(q, *other),
        "causal attention": of(q, *alike, causal=True),
        "causal attention to a cache": of(cache, *cached, causal=True),
        "causal attention of few queries to a cache": of(cache, None, ends, None, causal=True, queries=5),
    }


def ffn_v1(dtype: torch.dtype, rank: int) -> dict[str, int]:
    """For numbers of tokens that its table tells apart."""
    lift, bias = torch.zeros(64, rank, dtype=dtype), torch.zeros(64, dtype=dtype)

    def of(tokens: int) -> int:
        p = torch.zeros(tokens, rank, dtype=dtype)
        return shared_memory(flashsvdffnv1, "_ffn_v1", p, lift, bias, lift, "gelu", 1)

    return {"v1": of(1), "v1 of more tokens": of(1000), "v1 of some tokens": of(5000), "v1 of many tokens": of(20_000)}


def geglu(dtype: torch.dtype, rank: int) -> dict[str, int]:
    """For numbers of tokens that its table tells apart."""
    lift, bias = torch.zeros(64, rank, dtype=dtype), torch.zeros(64, dtype=dtype)

    def of(tokens: int) -> int:
        p, q = (torch.zeros(tokens, rank, dtype=dtype) for _ in range(2))
        return shared_memory(flashsvdgeglu, "_geglu", p, q, lift, lift, lift, bias, bias, "gelu", 1)

    return {"geglu": of(1), "geglu of some tokens": of(10_000), "geglu of many tokens": of(20_000)}


def lifts(dtype: torch.dtype, rank: int) -> dict[str, int]:
    """Lifts with an activation or a gate in their epilogue, for numbers of tokens that their tables tell apart."""
    lift, bias = torch.zeros(64, rank, dtype=dtype), torch.zeros(64, dtype=dtype)

    def of(tokens: int) -> dict[str, int]:
        p = torch.zeros(tokens, rank, dtype=dtype)
        gated = shared_memory(gated_linear, "_gated_linear", p, p, lift, lift, bias, bias, "gelu")
        plain = shared_memory(activated_linear, "_activated_linear", p, lift, bias, "gelu")
        return {f"activated lift of {tokens}": plain, f"gated lift of {tokens}": gated}

    return of(1) | of(1000) | of(5000)


def norms(dtype: torch.dtype, size: int) -> dict[str, int]:
    """With all that can be added to the rows and stored."""
    rows, vector = [torch.zeros(1, size, dtype=dtype) for _ in range(4)], torch.zeros(size, dtype=dtype)
    x, residual, *written = rows
    return {
        "LayerNorm": shared_memory(fused_ln, "_fused_ln", x, residual, *[vector] * 3, *written, 1e-5),
        "RMSNorm": shared_memory(rms_norm, "_rms_norm", x, residual, vector, *written, 1e-5),
    }


def decode(dtype: torch.dtype, width: int) -> dict[str, int]:
    """The products of a decoding step and its attention, of heads of at most 256, as a Hopper starts them early."""

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    m, scale = zeros(width, width), zeros(2 * width, dtype=torch.float32)
    norm, integers = zeros(width), zeros(width, width, dtype=torch.int8)

    def linear(*call: Any) -> int:
        early = patch.object(flashsvddecode, "early_start", return_value=EARLY)
        with early, patch.object(decode_table, "generation", return_value="hopper"):
            return shared_memory(flashsvddecode, "_decode_linear", *call)

    def of(n: int) -> dict[str, int]:
        x = zeros(n, width)
        normed = [x, norm, norm, m, m, m, None, None, None, None, None, "layer", 1e-5, "none", False, 1]
        shared = [x, None, None, m, None, None, None, None, None, None, None, "none", 0.0, "none", False, 4]
        pair = [zeros(n, 2 * width), None, None, integers, integers, None]
        gated = [*pair, scale, None, None, None, None, "none", 0.0, "silu", True, None]
        return {
            f"{n} rows, normed": linear(*normed),
            f"{n} rows, columns shared": linear(*shared),
            f"{n} rows, gated int8": linear(*gated),
            f"{n} rows, attention": decoded(n, zeros, min(width, decode_attention.LARGEST_HEAD)),
        }

    return of(1) | of(4) | of(16)


def decoded(n: int, zeros: Callable[..., Tensor], width: int) -> int:
    q, k, cache = zeros(n, 2, width), zeros(n, 1, width), zeros(n, 1, 512, width)
    table, place = zeros(n, width // 2), torch.zeros(1, dtype=torch.int32)
    weight, rest = zeros(width), [place, None, None, None, 1.0, 1e-5, -1, 2]
    operands = [q, weight, k, weight, k, table, table, cache, cache.clone(), *rest]
    with patch.object(decode_attention, "early_start", return_value=EARLY):
        return shared_memory(decode_attention, "_decode_attention", *operands)


def spills(dtype: torch.dtype, width: int) -> dict[str, int]:
    """Of attention of a decoding step, of heads with keys of their own and of four that share them."""

    def of(group: int, splits: int) -> int:
        q, k, cache = (
            torch.zeros(1, *shape, dtype=dtype) for shape in ((8 * group, width), (8, width), (8, 512, width))
        )
        table, place = torch.zeros(1, width // 2, dtype=dtype), torch.zeros(1, dtype=torch.int32)
        operands = [q, None, k, None, k, table, table, cache, cache, place, None, None, None, 1.0, 1e-5, -1, splits]
        compiler = Registers(decode_attention._decode_attention)
        with patch.object(decode_attention, "early_start", return_value=EARLY):
            return launched(compiler, decode_attention, "_decode_attention", *operands).spilled

    return {f"{group} heads, {splits} splits": of(group, splits) for group in (1, 4) for splits in (1, 8, 32)}


def latent(dtype: torch.dtype, rank: int) -> dict[str, int]:
    """Attention of a decoding step over rank space, of heads of 128: shared memory, and bytes that are spilled."""

    def of(keys: int, lifted: bool, turned: bool) -> dict[str, int]:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype)

        width = 128 if lifted or turned else rank
        k, v = zeros(1, keys, rank if lifted or not turned else width), zeros(1, 1, rank)
        lift, table = zeros(8, width, rank) if lifted else None, zeros(512, width // 2) if turned else None
        caches = [zeros(1, x.shape[1], 512, x.shape[2]) for x in (k, v)]
        rest = [torch.zeros(1, dtype=torch.int32), None, None, None, 1.0, 1e-5, -1, 2]
        operands = [zeros(1, 32, width), None, k, None, v, table, table, lift, None, *caches, *rest]
        scores, values = (Registers(getattr(latent_attention, name)) for name in LATENT)
        both = dict(zip(LATENT, (scores, values), strict=True))
        with (
            patch.object(latent_attention, "early_start", return_value=EARLY),
            patch.multiple(latent_attention, **both),
        ):
            latent_attention._op.launch(latent_attention._op.call(*operands), precision(operands[0]))
        return {"scores": scores, "values": values}

    forms = {"turned": (8, False, True), "walked": (1, False, False), "lifted": (1, True, True), "own": (8, True, True)}
    taken = {f"{form} {part}": x for form, how in forms.items() for part, x in of(*how).items()}
    return {f"{name}, shared": x.shared for name, x in taken.items()} | {
        f"{name}, spilled": x.spilled for name, x in taken.items()
    }


LATENT = ("latent_scores", "_attend_by_scores")
EARLY = {"PDL": True, "launch_pdl": True}
# What `KIND:RANK` compiles, for a rank that only some kernels have a row for.
KINDS = {
    "v1": ffn_v1,
    "geglu": geglu,
    "lifts": lifts,
    "decode": decode,
    "norms": norms,
    "spills": spills,
    "latent": latent,
}


def rotary(zeros: Callable[..., Tensor], rank: int, head_dim: int, sequences: Tensor, causal: bool = False) -> int:
    """At the widest rank of values, queries and keys stay at the widest that the kernel takes of them."""
    lifted = min(rank, largest_rank(head_dim, zeros(0).dtype))
    p, v, table = zeros(1, 1, lifted), zeros(1, lifted, head_dim), torch.zeros(1000, head_dim // 2)
    operands = [p, v, p, v, zeros(1, 1, rank), table, table, None, None, sequences, None, None]
    return shared_memory(flashsvdropeattn, "_rope_attention", *operands, 1000, 1.0, -1, causal)


def turned(zeros: Callable[..., Tensor], width: int, sequences: Tensor, window: int = -1, causal: bool = False) -> int:
    """At the widest head that it turns values stay at the width."""
    head_dim = min(width, flash_attn_rotary.LARGEST_TURNED_HEAD)
    q, table = zeros(1, 1, head_dim), zeros(1000, head_dim // 2)
    operands = [q, q, zeros(1, 1, width), table, table, sequences, None, None]
    return shared_memory(flash_attn_rotary, "_attention_rotary", *operands, 1000, 1.0, window, causal)


if __name__ == "__main__":
    dtype_name, *ranks = sys.argv[1:]
    dtype = getattr(torch, dtype_name)
    found = {}
    for rank in ranks:
        which, _, number = rank.rpartition(":")
        found[rank] = (KINDS[which] if which else main)(dtype, int(number))
    print(json.dumps(found))
