"""`flashsvd eval`: a checkpoint, dense or compressed, scored and timed on a task's validation split."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from flashsvd.common.device import BACKENDS, DEVICES, DTYPES, resolve_device, resolve_dtype
from flashsvd.common.options import (
    check_choices,
    check_count,
    check_not_empty,
    check_switches,
    option,
    take_plain_types,
)
from flashsvd.data.tasks import TASKS
from flashsvd.errors import CheckpointError
from flashsvd.evaluation.result import EvalResult
from flashsvd.evaluation.sizes import BATCH_SIZE_HELP, SEQ_LEN_HELP

if TYPE_CHECKING:
    from flashsvd.kernels.launch import Backend

log = logging.getLogger("flashsvd")


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate and on what.

    Raises:
        ConfigError: an option has a value that cannot be used.
    """

    checkpoint: str = option(
        help="compressed checkpoint, or a dense model's directory or hub name to compare with", path="model"
    )
    task: str = option(
        help="cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte; classification or regression of --data of your own; "
        "similarity for sentence encoders; perplexity (of --data) or wikitext2 for causal language models",
        suggestions=tuple(TASKS),
    )
    data: str | None = option(
        None,
        help="a TSV, CSV, parquet or JSON-lines file (a .txt file too for language models), or a directory with a "
        "validation file; the default is the task's own data on the hub",
        path="read",
    )
    batch_size: int | None = option(None, help=BATCH_SIZE_HELP)
    seq_len: int | None = option(None, help=SEQ_LEN_HELP)
    stride: int | None = option(
        None,
        help="tokens from one window of a language model to the next; the default is seq-len; fewer give each token "
        "more context, and each is still scored once",
    )
    padding: str = option("longest", help="pad to the longest of the batch, or to seq-len", choices=("longest", "max"))
    max_eval_samples: int | None = option(None, help="evaluate only this many examples or windows, the first ones")
    device: str | None = option(None, help="cuda or cpu; the default is cuda where there is one", suggestions=DEVICES)
    dtype: str | None = option(None, help="dtype to run in; the default is the checkpoint's own", choices=DTYPES)
    backend: str | None = option(
        None,
        help="run on fused blocks (BERT, RoBERTa and ModernBERT): auto takes for each operation what is faster, by "
        "measurement; torch and triton force one; the default is the plain model",
        choices=BACKENDS,
    )
    output: str | None = option(None, help="JSON file to write, such as results/x.json", path="write")

    def __post_init__(self) -> None:
        take_plain_types(self)
        check_choices(self)
        check_not_empty(self)
        check_switches(self)
        for name in ("batch_size", "seq_len", "stride", "max_eval_samples"):
            check_count(name, getattr(self, name), optional=True)


def run_eval(config: EvalConfig) -> EvalResult:
    """Evaluate a checkpoint, and write the JSON where the config names a file.

    Everything that can be refused is refused before the weights are loaded.

    Raises:
        FlashSVDError: the config, the checkpoint or the data cannot be used.
    """
    from flashsvd import runtime
    from flashsvd._version import __version__
    from flashsvd.common.device import describe_device
    from flashsvd.common.provenance import git_commit, timestamp
    from flashsvd.data.tasks import get_task
    from flashsvd.evaluation.job import WARMUP_FORWARDS, run_job
    from flashsvd.evaluation.measure import PeakMemory
    from flashsvd.evaluation.subject import Subject
    from flashsvd.evaluation.warm_up import compiles, warm_up
    from flashsvd.evaluation.workload import Workload, batch_shape, load_data
    from flashsvd.storage.atomic import check_file_target, write_text

    task = get_task(config.task)
    backend = cast("Backend | None", config.backend)
    device, dtype = resolve_device(config.device), resolve_dtype(config.dtype)
    if config.output:
        check_file_target(Path(config.output).expanduser())
    subject = Subject.find(config.checkpoint, task)
    task, data = load_data(task, config.data, config.max_eval_samples, subject)
    if backend is not None:
        runtime.check(subject.config, backend, device)
    shape = batch_shape(task, subject, config.batch_size, config.seq_len, config.padding, config.stride)
    workload = Workload.prepare(task, data, subject, shape, config.max_eval_samples)
    if backend is not None:
        workload.check_fused(subject)
    job = workload.job(subject)

    log.info("loading %s", config.checkpoint)
    memory = PeakMemory(device)
    model = subject.load(dtype).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    if backend is not None:
        model = runtime.optimize(model, backend)
    warmed = ""
    if backend is not None and compiles(device):
        warmed = "one forward for each size of batch and "
        with memory.paused():
            warm_up(job, model, device)
    timings = run_job(job, model, device)
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
        peak_memory_mib=round(memory.mib(), 2),
        latency_ms=timings.percentile(50),
        latency_percentiles_ms={f"p{q}": timings.percentile(q) for q in (50, 90, 99)},
        samples_per_second=timings.per_second(timings.samples),
        tokens_per_second=timings.per_second(timings.tokens),
        batch_size=shape.batch_size,
        seq_len=shape.seq_len,
        stride=shape.stride,
        padding=shape.padding,
        num_eval_samples=timings.samples,
        parameters=parameters,
        backend=backend or "plain",
        device=describe_device(device),
        dtype=str(model.dtype).removeprefix("torch."),
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
    if config.output:
        text = json.dumps(result.to_json(), indent=2, allow_nan=False)
        try:
            write_text(Path(config.output).expanduser(), text + "\n")
        except CheckpointError:
            log.warning("this result could not be written: %s", text)
            raise
    return result
