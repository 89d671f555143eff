"""What the host pays to launch each operator on operands like ones that it has seen, in microseconds.

    python benchmark/benchmark_launch.py [--only attention,ffn]

Small batches of small models wait for it. On a GPU the launches are real, on operands so small that the GPU keeps up
with the host; a dry run leaves the kernels out, so that what is left is the cost of Python. The shortest of all runs
counts, since whatever else the machine does only adds to one.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flashsvd.kernels.flash_attn_rotary import flash_attention_rotary
from flashsvd.kernels.flash_attn_triton import flash_attention
from flashsvd.kernels.flashsvdffnv1 import flashsvd_ffn_v1
from flashsvd.kernels.flashsvdffnv2 import flashsvd_ffn_v2
from flashsvd.kernels.flashsvdgeglu import flashsvd_geglu
from flashsvd.kernels.flashsvdropeattn import flashsvd_rope_attention
from flashsvd.kernels.fused_ln import fused_ln
from flashsvd.kernels.rms_norm import rms_norm
from flashsvd.kernels.rotary import rotate_heads
from support.harness import DTYPES, Settings, parse
from support.results import Environment, Row, csv_file, merge, read_rows, write_rows

HEADS, HEAD_DIM, RANK, HIDDEN, INNER = 2, 32, 16, 64, 128
LENGTHS = (16, 16)
# Far fewer than a GPU's queue takes before the host has to wait for it.
LAUNCHES = 200
# Kernels that a dry run leaves out, by their modules.
KERNELS = {
    "flash_attn_triton": "_attention",
    "flash_attn_rotary": "_attention_rotary",
    "flashsvdropeattn": "_rope_attention",
    "flashsvdffnv1": "_ffn_v1",
    "flashsvdffnv2": "_ffn_v2",
    "flashsvdgeglu": "_geglu",
    "fused_ln": "_fused_ln",
    "rms_norm": "_rms_norm",
    "rotary": "_rotate_heads",
    "partial_sums": "_add_partials",
}

Call = Callable[[], Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse(__doc__, arguments)
    environment = Environment.of(settings.device, settings.commit)
    file = csv_file("benchmark_launch", environment.gpu, settings.out)
    dtype = next(name for name, known in DTYPES.items() if known == settings.dtype)
    rows = []
    with torch.no_grad(), ExitStack() as stack:
        if not settings.cuda:
            leave_out_kernels(stack)
        for name, call in chosen(settings):
            shortest = host_ms(call, settings)
            print(f"  {name:<44}{shortest * 1e3:9.2f} us", flush=True)
            rows.append(
                Row(name, f"T={sum(LENGTHS)}", "plan found", "ok", dtype, shortest, runs=settings.runs, timing="host")
            )
    rows = [replace(row, **vars(environment)) for row in rows]
    write_rows(merge(read_rows(file) if file.is_file() else [], rows), file)
    print(f"\n{file}: {len(rows)} rows of this run")


def chosen(settings: Settings) -> list[tuple[str, Call]]:
    """The operators whose names begin as `--only` asks.

    Raises:
        SystemExit: with 2, `--only` begins the name of none.
    """
    every = list(operators(settings))
    found = [(name, call) for name, call in every if not settings.only or name.startswith(settings.only)]
    if not found:
        print(
            f"--only begins the name of no operator; there are {'; '.join(name for name, _ in every)}", file=sys.stderr
        )
        raise SystemExit(2)
    return found


def operators(settings: Settings) -> Iterator[tuple[str, Call]]:
    """Every operator with operands that it takes as they lie."""

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=settings.device).to(settings.dtype)

    tokens, longest = sum(LENGTHS), max(LENGTHS)
    cu_seqlens = torch.tensor([0, *LENGTHS], device=settings.device).cumsum(0).int()
    packed = (cu_seqlens, cu_seqlens, longest, longest)
    q, k, v, out = (make(tokens, HEADS, HEAD_DIM) for _ in range(4))
    positions = torch.arange(longest, dtype=torch.int32, device=settings.device).repeat(len(LENGTHS))
    angles = torch.rand(longest, HEAD_DIM // 2, device=settings.device)
    cos, sin = angles.cos(), angles.sin()
    p_q, p_k = make(tokens, HEADS, RANK), make(tokens, HEADS, RANK)
    v_q, v_k = make(HEADS, RANK, HEAD_DIM), make(HEADS, RANK, HEAD_DIM)
    b_q, b_k = make(HEADS, HEAD_DIM), make(HEADS, HEAD_DIM)
    p, v1, b1, u2 = make(tokens, RANK), make(INNER, RANK), make(INNER), make(INNER, RANK)
    x, u1, v2, b2 = make(tokens, HIDDEN), make(RANK, HIDDEN), make(HIDDEN, RANK), make(HIDDEN)
    gate, written = make(tokens, RANK), make(tokens, HIDDEN)
    windowed: dict[str, Any] = {"softmax_scale": 0.2, "window_size": (4, 4), "positions": positions}
    rotary = (p_q, v_q, p_k, v_k, v, cos, sin, *packed)
    # Not `auto`, which leaves a dry run to plain torch.
    on_kernel: dict[str, Any] = {"backend": "triton"}
    yield "attention", lambda: flash_attention(q, k, v, *packed, softmax_scale=0.2, **on_kernel)
    yield "attention, window", lambda: flash_attention(q, k, v, *packed, out=out, **windowed, **on_kernel)
    yield "attention, rotating", lambda: flash_attention_rotary(q, k, v, cos, sin, *packed, **windowed, **on_kernel)
    yield "rotary attention", lambda: flashsvd_rope_attention(*rotary, b_q=b_q, b_k=b_k, **windowed, **on_kernel)
    yield "ffn v1", lambda: flashsvd_ffn_v1(p, v1, b1, u2, splits=1, **on_kernel)
    yield "ffn v1, split", lambda: flashsvd_ffn_v1(p, v1, b1, u2, splits=2, **on_kernel)
    yield "ffn v2", lambda: flashsvd_ffn_v2(x, u1, v1, b1, u2, v2, b2, **on_kernel)
    yield "gated ffn", lambda: flashsvd_geglu(p, gate, v1, v1, u2, b1, b1, splits=1, **on_kernel)
    yield "norm", lambda: fused_ln(x, x, b2, b2, eps=1e-5, out=written, **on_kernel)
    yield "rms norm", lambda: rms_norm(x, x, b2, eps=1e-5, out=written, **on_kernel)
    yield "rotation", lambda: rotate_heads(out, cos, sin, positions, **on_kernel)


def host_ms(call: Call, settings: Settings) -> float:
    """Milliseconds of the host's clock that a launch takes, the shortest of the runs; what the GPU does is not waited
    for in between.
    """
    for _ in range(settings.warmup + 1):
        call()
    return min(_run(call, settings) for _ in range(settings.runs))


def _run(call: Call, settings: Settings) -> float:
    if settings.cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(LAUNCHES):
        call()
    return (time.perf_counter() - start) * 1e3 / LAUNCHES


@dataclass(frozen=True)
class LeftOut:
    """Stands in for a kernel, and for what it is compiled to: takes a launch and does nothing."""

    kernel: Any

    @property
    def __name__(self) -> str:
        return str(self.kernel.__name__)

    @property
    def arg_names(self) -> list[str]:
        return list(inspect.signature(getattr(self.kernel, "fn", self.kernel)).parameters)

    def __getitem__(self, grid: tuple[int, ...]) -> LeftOut:
        return self

    def __call__(self, *arguments: Any, **constants: Any) -> LeftOut:
        return self


def leave_out_kernels(stack: ExitStack) -> None:
    """Replaces every kernel, what keeps kernels off the CPU, and the plans of both, while the stack is open."""
    stack.enter_context(patch("flashsvd.kernels.launch.why_not_triton", return_value=""))
    for name, kernel in KERNELS.items():
        module = importlib.import_module(f"flashsvd.kernels.{name}")
        stack.enter_context(patch.object(module, kernel, LeftOut(getattr(module, kernel))))
        if hasattr(module, "_op"):
            stack.enter_context(patch.object(module._op, "plans", {}))


if __name__ == "__main__":
    main()
