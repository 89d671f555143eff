"""Programmatic dependent launch: a kernel begins while the one before it on the stream still runs.

What no kernel makes, such as weights, it fetches at once; then it waits until the kernel before has ended and all that
was written can be seen. Hopper can do so, and what came after it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flashsvd.kernels.launch import capability, interpreting
from flashsvd.kernels.triton_import import tl, triton

# Of a line of the cache.
LINE_BYTES = tl.constexpr(128)


def early_start(x: Tensor) -> dict[str, Any]:
    """A kernel's constant PDL on the tensor's device, and Triton's option to launch it so."""
    if x.is_cuda and not interpreting() and capability(x.device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@triton.jit
def await_inputs(PDL: tl.constexpr):
    # Of what another kernel may have written no result depends before this, and nothing is written. Every program comes
    # through here: the end of this kernel then is the end of all those before it.
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def fetch_ahead(p):
    # The lines of memory at these addresses begin to come into the cache; nobody waits for them.
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [p.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )
