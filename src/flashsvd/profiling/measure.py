"""One variant, loaded by itself, run over the data, and measured."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from flashsvd.data.tokenize import Batch
from flashsvd.errors import BackendError, described
from flashsvd.evaluation.loop import FORWARDS_OF_EACH_SIZE, EvalJob, Timings, run_eval_job
from flashsvd.evaluation.measure import PeakMemory
from flashsvd.evaluation.subject import Subject
from flashsvd.evaluation.workload import Workload
from flashsvd.profiling.config import ON_BLOCKS
from flashsvd.profiling.generation import Prompts, measure_generation, memory_of_generation
from flashsvd.profiling.memory import freed_at_once, in_own_arena, settle
from flashsvd.profiling.result import VariantRow
from flashsvd.profiling.variants import Ready, Setting, prepare
from flashsvd.profiling.writers import Writer, why_no_generation, writer_of

log = logging.getLogger("flashsvd")


def measure(
    name: str, subject: Subject, workload: Workload, setting: Setting, runs: int, prompts: Prompts | None = None
) -> VariantRow:
    """Measure a variant; whatever goes wrong becomes its row's status, and the next one has a clean start.

    Args:
        runs: timed passes over the data.
        prompts: what to generate after, where the variant can.

    Raises:
        BackendError: the backend that was asked for cannot run the model.
    """
    log.info("measuring %s", name)
    settle()
    try:
        return _measure(name, subject, workload, setting, runs, prompts)
    except Exception as error:  # any library's: a variant that cannot run must not take the others with it
        if isinstance(error, BackendError) and setting.must_fuse:
            raise
        log.debug("%s failed", name, exc_info=True)
        row = _unmeasured(name, error)
        log.warning("%s was %s: %s", name, row.status, row.reason)
        return row
    finally:
        settle()


def rehearse(subject: Subject, setting: Setting) -> None:
    """Load a model for nothing on a CPU, where what the libraries import meanwhile would count as the first one's."""
    if setting.device.type == "cpu":
        # What cannot be loaded says so in the row of its variant.
        with contextlib.suppress(Exception):
            subject.load(setting.dtype)


def _measure(
    name: str, subject: Subject, workload: Workload, setting: Setting, runs: int, prompts: Prompts | None
) -> VariantRow:
    device = setting.device
    no_generation = why_no_generation(name, device) if prompts else ""
    after = None if no_generation else prompts

    def load() -> _Loaded:
        with _no_silent_fallback(name):
            return _load(name, subject, workload, setting, after)

    with freed_at_once():
        loaded = load() if device.type == "cuda" else in_own_arena(load)
    call, generation = loaded.ready.call, None
    with _no_silent_fallback(name):
        if after and loaded.writer:
            step_bytes = loaded.ready.step_bytes
            generation = measure_generation(loaded.writer, after, device, runs, loaded.generation_mib, step_bytes)
        jobs = [workload.job(subject) for _ in range(runs)]
        timings = _joined([run_eval_job(job, call, device) for job in jobs])
        found = jobs[0].metrics()
    return VariantRow(
        variant=name,
        status="ok",
        metrics={key: value if math.isfinite(value) else None for key, value in found.items()},
        latency_ms=timings.percentile(50),
        latency_p90_ms=timings.percentile(90),
        samples_per_second=timings.per_second(timings.samples),
        tokens_per_second=timings.per_second(timings.tokens),
        timed_forwards=len(timings.full),
        full_batches=timings.any_full,
        peak_memory_mib=round(loaded.peak_mib, 2),
        transient_memory_mib=round(loaded.transient_mib, 2),
        parameters=loaded.ready.parameters,
        weight_bytes=loaded.ready.weight_bytes,
        dtype=loaded.ready.dtype,
        cuda_graphs=graphs_kept(loaded.ready.model),
        kv_cache=setting.kv_cache if name in ON_BLOCKS else "",
        generation=generation,
        no_generation=no_generation,
    )


@dataclass(frozen=True)
class _Loaded:
    """A variant that has run, and the memory that it took; of generation, the prompts' and that of what followed.

    Attributes:
        writer: what generates; None where nothing is to.
    """

    ready: Ready
    peak_mib: float
    transient_mib: float
    generation_mib: tuple[float, float]
    writer: Writer | None


def _load(name: str, subject: Subject, workload: Workload, setting: Setting, prompts: Prompts | None) -> _Loaded:
    device = setting.device
    peak = PeakMemory(device)
    ready = prepare(name, subject, setting)
    with peak.paused():
        transient = PeakMemory(device)
        if passes := untimed_passes(name, device):
            with transient.paused():
                for _ in range(passes):
                    _run_untimed(workload.job(subject), ready, device)
    _run_untimed(workload.job(subject), ready, device, _largest(workload.job(subject)))
    peak_mib, transient_mib = peak.mib(), transient.mib()
    writer = writer_of(name, ready.call, ready.model) if prompts else None
    generation_mib = memory_of_generation(writer, prompts, device) if prompts and writer else (0.0, 0.0)
    return _Loaded(ready, peak_mib, transient_mib, generation_mib, writer)


def untimed_passes(name: str, device: torch.device) -> int:
    """How often a variant has to see the size of a batch until it has its kernels and, fused, its CUDA graph."""
    if device.type != "cuda":
        return int(name == "compiled")
    return FORWARDS_OF_EACH_SIZE if name in ON_BLOCKS else 1


def _run_untimed(job: EvalJob, ready: Ready, device: torch.device, batches: Iterable[Batch] | None = None) -> None:
    with torch.inference_mode():
        for batch in job if batches is None else batches:
            for inputs in batch.to(device).inputs:
                ready.call(**inputs, **job.forward_options)


def _largest(job: EvalJob) -> list[Batch]:
    """The batch with most places and the one with most tokens, which are what memory follows, padded or not."""
    widest = fullest = None
    for batch in job:
        widest = batch if widest is None or _places(batch) > _places(widest) else widest
        fullest = batch if fullest is None or batch.tokens > fullest.tokens else fullest
    return [batch for batch in (widest, fullest) if batch is not None]


def graphs_kept(model: Any) -> int:
    """CUDA graphs that an optimised model keeps, of whole forwards or of steps of generating."""
    decoders = getattr(model, "decoders", None)
    return len(getattr(model, "graphs", ())) if decoders is None else int(decoders.graphs)


def _places(batch: Batch) -> int:
    return sum(inputs["input_ids"].numel() for inputs in batch.inputs)


@contextlib.contextmanager
def _no_silent_fallback(name: str) -> Iterator[None]:
    """torch.compile runs on uncompiled, with a line in the log, where it had to compile too often: here that fails."""
    if name != "compiled":
        yield
        return
    import torch._dynamo

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def _joined(passes: list[Timings]) -> Timings:
    return Timings(
        [ms for timings in passes for ms in timings.milliseconds],
        [ms for timings in passes for ms in timings.full],
        sum(timings.samples for timings in passes),
        sum(timings.tokens for timings in passes),
        passes[0].any_full,
    )


def _unmeasured(name: str, error: Exception) -> VariantRow:
    if name == "compiled" and ("C++ compiler" in str(error) or "C compiler" in str(error)):
        return VariantRow(name, "skipped", "torch.compile needs a C++ compiler and finds none here; install g++")
    if isinstance(error, torch.OutOfMemoryError):
        return VariantRow(name, "failed", "out of memory; take a smaller --batch-size")
    return VariantRow(name, "failed", described(error))
