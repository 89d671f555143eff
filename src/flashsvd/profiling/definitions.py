"""What the figures of a profile mean, for people."""

from __future__ import annotations

from collections.abc import Sequence

from flashsvd.evaluation.loop import FORWARDS_OF_EACH_SIZE, WARMUP_FORWARDS
from flashsvd.evaluation.measure import peak_resident_bytes
from flashsvd.evaluation.subject import Subject
from flashsvd.evaluation.workload import Workload
from flashsvd.profiling import generation
from flashsvd.profiling.config import ON_BLOCKS
from flashsvd.profiling.generation import Prompts
from flashsvd.profiling.memory import freed_at_once
from flashsvd.profiling.result import VariantRow
from flashsvd.profiling.variants import Setting


def definitions(
    workload: Workload,
    subject: Subject,
    rows: Sequence[VariantRow],
    setting: Setting,
    prompts: Prompts | None,
    copied: float | None = None,
) -> dict[str, str]:
    """What was measured, by the names of the figures.

    Args:
        prompts: what was generated after; None where nothing was.
        copied: TB/s of a copy on the device, where something was and that was measured.
    """
    cuda = setting.device.type == "cuda"
    compiled = any(row.variant == "compiled" and row.status == "ok" for row in rows)
    warmed = "after a pass over the data and " if cuda else "after "
    fused = any(row.variant in ON_BLOCKS and row.status == "ok" for row in rows)
    also = " (the compiled variant: a pass over the data)" if compiled and not cuda else ""
    if fused and cuda:
        also = f" (fused variants: {FORWARDS_OF_EACH_SIZE} passes, so that its CUDA graphs, if any, are captured)"
    none_full = "" if any(row.full_batches for row in rows) else " (none was full, so on those there were)"
    return {
        "latency": (
            f"milliseconds of a forward on {workload.job(subject).timed_forward}{none_full} {warmed}"
            f"{WARMUP_FORWARDS} warm-up forwards{also}; tokenizing, scoring and copies of inputs are not counted"
        ),
        **memory_definitions(setting),
        "size": "parameters of the checkpoint; bytes of the weights in memory, which fused blocks hold packed",
        **({"generation": generation.definition(prompts, setting.device, copied)} if prompts else {}),
    }


def memory_definitions(setting: Setting) -> dict[str, str]:
    """What peak and transient memory were."""
    cuda = setting.device.type == "cuda"
    memory = "CUDA memory allocated by torch" if cuda else "resident memory of the process"
    included = "of the weights, which stay on the host, those in use" if setting.offload else "all weights"
    exact = "" if cuda else f"; {_how_exact()}; that of the compiled variant has the compiler itself in it"
    return {
        "peak_memory": (
            f"most {memory} while loading and while running the largest batch, above what it was before, {included} "
            f"and captured graphs included; what compiling and measuring kernels took for a moment is not{exact}"
        ),
        "transient_memory": (
            "of that, what running took above the loaded model"
            + (", weights moved to the device for it included" if setting.offload else "")
        ),
    }


def _how_exact() -> str:
    """What to know of the resident memory of a process that has run other models before."""
    if not peak_resident_bytes():
        return "not measured: this system does not say how much memory a process has had"
    with freed_at_once() as exact:
        if exact:
            return "memory that is freed goes back to the system at once meanwhile"
    return "memory that an earlier variant freed may be used again uncounted: profile one variant at a time to compare"
