"""The steps of an evaluation: find what can be refused, then load, run the batches, and say what was measured."""

from __future__ import annotations

import logging
import math

from flashsvd._version import __version__
from flashsvd.common.device import PLAIN, describe_device, resolve_device, resolve_dtype
from flashsvd.common.options import read_paths
from flashsvd.common.paths import expand
from flashsvd.common.provenance import git_commit, timestamp
from flashsvd.data.sampling import Draw
from flashsvd.data.tasks import get_task
from flashsvd.evaluation.blocks import Blocks
from flashsvd.evaluation.config import EvalConfig
from flashsvd.evaluation.loop import FORWARDS_OF_EACH_SIZE, WARMUP_FORWARDS, compiles, run_eval_job, warm_up
from flashsvd.evaluation.measure import PeakMemory
from flashsvd.evaluation.result import KEYS, EvalResult
from flashsvd.evaluation.subject import Subject, task_of
from flashsvd.evaluation.workload import Workload, batch_shape, load_data
from flashsvd.lowrank.int8 import dtype_text
from flashsvd.models.found import find_model
from flashsvd.storage.result_file import ResultFile, holds_json

log = logging.getLogger("flashsvd")


def evaluate(config: EvalConfig) -> EvalResult:
    """Evaluate a checkpoint, and write the JSON where the config names a file.

    Raises:
        FlashSVDError: the config, the checkpoint or the data cannot be used.
    """
    if config.task is not None:
        get_task(config.task)
    device, dtype = resolve_device(config.device), resolve_dtype(config.dtype)
    file = _result_file(config)
    if file is not None:
        file.check(read_paths(config))
    found = find_model(config.checkpoint)
    task = task_of(config.task, found)
    subject = Subject.of(found, task)
    draw = None if config.max_eval_samples is None else Draw(config.max_eval_samples, config.seed)
    task, data = load_data(task, config.data, draw, subject)
    shape = batch_shape(task, subject, config.batch_size, config.seq_len, config.padding, config.stride)
    workload = Workload.prepare(task, data, subject, shape, draw)
    blocks = Blocks.choose(config.backend, subject, workload, device)
    job = workload.job(subject)

    log.info("loading %s", config.checkpoint)
    memory = PeakMemory(device)
    model = subject.load(dtype).to(device)
    parameters, dtype_said = sum(p.numel() for p in model.parameters()), dtype_text(model)
    blocks = blocks.fuse(model)
    warmed = ""
    if blocks.backend is not None and compiles(device):
        warmed = f"{FORWARDS_OF_EACH_SIZE} forwards for each size of batch and "
        with memory.paused():
            warm_up(job, model, device)
    timings = run_eval_job(job, model, device)
    metrics = {name: value if math.isfinite(value) else None for name, value in job.metrics().items()}
    for name in (name for name, value in metrics.items() if value is None):
        log.warning("%s is not defined here: predictions or labels are constant, or the loss overflows", name)
    info = subject.info
    none_full = "" if timings.any_full else " (none was full, so on those there were)"
    result = EvalResult(
        task=task.name,
        metric_name=task.metrics[0],
        metric_value=metrics[task.metrics[0]],
        metrics=metrics,
        base_model=info.base_model if info else config.checkpoint,
        method=subject.method,
        ranks=info.ranks if info else None,
        ratio=info.ratio if info else None,
        module_ranks=info.module_ranks if info else None,
        rank_steps=info.rank_steps if info else None,
        rank_search=info.rank_search if info else None,
        peak_memory_mib=round(memory.mib(), 2),
        latency_ms=timings.percentile(50),
        latency_percentiles_ms={f"p{q}": timings.percentile(q) for q in (50, 90, 99)},
        samples_per_second=timings.per_second(timings.samples),
        tokens_per_second=timings.per_second(timings.tokens),
        batch_size=shape.batch_size,
        seq_len=workload.longest,
        stride=shape.stride,
        padding=shape.padding,
        num_eval_samples=timings.samples,
        seed=draw.seed if draw else None,
        parameters=parameters,
        backend=blocks.backend or PLAIN,
        why_plain=blocks.why_plain,
        device=describe_device(device),
        dtype=dtype_said,
        checkpoint_dir=config.checkpoint,
        data=config.data or f"hub:{task.hub_config}",
        timestamp=timestamp(),
        git_commit=git_commit(),
        flashsvd_version=__version__,
        latency_definition=(
            f"median milliseconds of the model's forward on {job.timed_forward}{none_full} after "
            f"{warmed}{WARMUP_FORWARDS} warm-up forwards; tokenizing, data loading, scoring and copies to the device "
            "are not counted"
        ),
        memory_definition=memory.definition,
    )
    if file is not None:
        file.write_json(result.to_json())
    return result


def _result_file(config: EvalConfig) -> ResultFile | None:
    if config.output is None:
        return None
    path = expand(config.output)
    return ResultFile(path, "evaluation", lambda file: holds_json(file, KEYS), config.overwrite)
