"""Prints how many additions beside its products a thread of each kernel makes, compiled for a Hopper GPU.

Runs in a process of its own, since Triton's interpreter, once chosen, replaces the compiler.
"""

from __future__ import annotations

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashsvd.kernels.products import add_dot, dot_of_rows
from flashsvd.kernels.triton_import import tl

WARPS = 4


@triton.jit
def sums(x_ptr, y_ptr, out_ptr, side: tl.constexpr, k: tl.constexpr):
    o_side = tl.arange(0, side)
    o_k = tl.arange(0, k)
    acc = tl.load(out_ptr + o_side[:, None] * side + o_side[None, :]).to(tl.float32)
    x = tl.load(x_ptr + o_side[:, None] * k + o_k[None, :])
    y = tl.load(y_ptr + o_k[:, None] * side + o_side[None, :])
    acc = add_dot(acc, x, y, "ieee")
    tl.store(out_ptr + o_side[:, None] * side + o_side[None, :], acc)


@triton.jit
def scores(x_ptr, y_ptr, out_ptr, side: tl.constexpr, k: tl.constexpr):
    o_side = tl.arange(0, side)
    place = o_side[:, None] * k + tl.arange(0, k)[None, :]
    s = dot_of_rows(tl.load(x_ptr + place), tl.load(y_ptr + place), "ieee")
    tl.store(out_ptr + o_side[:, None] * side + o_side[None, :], s)


def additions(kernel: object, dtype: str, side: int, k: int) -> int:
    signature = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "out_ptr": "*fp32", "side": "constexpr", "k": "constexpr"}
    source = ASTSource(kernel, signature, {"side": side, "k": k})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
    return len(re.findall(r"\badd\S*\.f32\b", compiled.asm["ptx"]))


if __name__ == "__main__":
    side = 16
    found = {f"sums {dtype}": additions(sums, dtype, side, 64) for dtype in ("fp32", "bf16")}
    found |= {f"scores {k}": additions(scores, "fp32", side, k) for k in (64, 128, 256)}
    print(json.dumps(found))
