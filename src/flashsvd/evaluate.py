"""`flashsvd eval`: a checkpoint, dense or compressed, scored and timed on a task's validation split."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flashsvd.device import BACKENDS, DTYPES, resolve_device, resolve_dtype
from flashsvd.errors import BackendError, CheckpointError, ConfigError
from flashsvd.evaluation.result import EvalResult
from flashsvd.options import check_choices, check_count, check_not_empty, option, take_plain_types

if TYPE_CHECKING:
    from flashsvd.data import Examples
    from flashsvd.evaluation.job import BatchShape, Job
    from flashsvd.evaluation.subject import Subject
    from flashsvd.kernels.launch import Backend
    from flashsvd.tasks import Task

log = logging.getLogger("flashsvd")

# Where a language model's batch is not given: its logits, not its layers, are what fills memory.
BATCH_SIZE, LM_BATCH_SIZE = 32, 8
SEQ_LEN, LM_SEQ_LEN = 128, 1024


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate and on what.

    Raises:
        ConfigError: an option has a value that cannot be used.
    """

    checkpoint: str = option(help="compressed checkpoint, or a dense model's directory or hub name to compare with")
    task: str = option(
        help="cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte; similarity for sentence encoders; perplexity (of --data) "
        "or wikitext2 for causal language models"
    )
    data: str | None = option(
        None,
        help="a TSV, CSV, parquet or JSON-lines file (a .txt file too for language models), or a directory with a "
        "validation file; the default is the task's own data on the hub",
    )
    batch_size: int | None = option(
        None, help=f"examples or windows in a batch; the default is {BATCH_SIZE}, {LM_BATCH_SIZE} for language models"
    )
    seq_len: int | None = option(
        None,
        help="tokens an example is cut to, or tokens of a language model's window; the default is "
        f"{SEQ_LEN}, {LM_SEQ_LEN} for language models, or less where the model reads no more",
    )
    stride: int | None = option(
        None,
        help="tokens from one window of a language model to the next; the default is seq-len; fewer give each token "
        "more context, and each is still scored once",
    )
    padding: str = option("longest", help="pad to the longest of the batch, or to seq-len", choices=("longest", "max"))
    max_eval_samples: int | None = option(None, help="evaluate only this many examples or windows, the first ones")
    device: str | None = option(None, help="cuda or cpu; the default is cuda where there is one")
    dtype: str | None = option(None, help="dtype to run in; the default is the checkpoint's own", choices=DTYPES)
    backend: str | None = option(
        None,
        help="run on fused blocks (BERT, RoBERTa and ModernBERT): auto takes for each operation what is faster, by "
        "measurement; torch and triton force one; the default is the plain model",
        choices=BACKENDS,
    )
    output: str | None = option(None, help="JSON file to write, such as results/x.json")

    def __post_init__(self) -> None:
        take_plain_types(self)
        check_choices(self)
        check_not_empty(self)
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
    from flashsvd.device import describe_device
    from flashsvd.evaluation.job import WARMUP_FORWARDS, run_job
    from flashsvd.evaluation.measure import PeakMemory
    from flashsvd.evaluation.subject import Subject
    from flashsvd.evaluation.warm_up import compiles, warm_up
    from flashsvd.provenance import git_commit, timestamp
    from flashsvd.storage.atomic import check_file_target, write_text
    from flashsvd.tasks import get_task

    task = get_task(config.task)
    backend = cast("Backend | None", config.backend)
    device, dtype = resolve_device(config.device), resolve_dtype(config.dtype)
    if config.output:
        check_file_target(Path(config.output).expanduser())
    data = _load_data(config, task)
    subject = Subject.find(config.checkpoint, task)
    if backend is not None:
        runtime.check(subject.config, backend, device)
    shape = _batch_shape(config, task, subject)
    job = _make_job(config, task, data, subject, shape)

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


def _load_data(config: EvalConfig, task: Task) -> Examples | str:
    from flashsvd.corpus import load_text
    from flashsvd.data import load_examples

    if task.head == "lm":
        return load_text(task, "validation", config.data)
    return load_examples(task, "validation", config.data, config.max_eval_samples)


def _batch_shape(config: EvalConfig, task: Task, subject: Subject) -> BatchShape:
    """The sizes asked for, the rest filled in.

    Raises:
        ConfigError: they do not fit the task, the model or one another.
    """
    from flashsvd.evaluation.job import BatchShape

    if task.head != "lm":
        if config.stride is not None:
            raise ConfigError(f"--stride is for running text, {task.name} has single examples; leave it out")
        seq_len = subject.seq_len(config.seq_len, SEQ_LEN)
        return BatchShape(config.batch_size or BATCH_SIZE, seq_len, config.padding)
    seq_len = subject.seq_len(config.seq_len, LM_SEQ_LEN)
    stride = config.stride or seq_len
    if seq_len < 2:
        raise ConfigError(f"--seq-len must be at least 2 for {task.name}: a token is predicted from those before it")
    if stride > seq_len:
        raise ConfigError(f"--stride {stride} is above --seq-len {seq_len}, so that tokens would be left out; lower it")
    if config.padding == "max":
        raise ConfigError(f"--padding max is for single examples, {task.name} has none to pad; leave it out")
    return BatchShape(config.batch_size or LM_BATCH_SIZE, seq_len, "none", stride)


def _make_job(config: EvalConfig, task: Task, data: Examples | str, subject: Subject, shape: BatchShape) -> Job:
    from flashsvd.evaluation.labelled import LabelledTexts
    from flashsvd.evaluation.perplexity import Perplexity, read_tokens
    from flashsvd.evaluation.predict import Classifier, Predictor, SentenceSimilarity
    from flashsvd.pretrained import load_tokenizer

    tokenizer = load_tokenizer(subject.source)
    if isinstance(data, str):
        tokens = read_tokens(tokenizer, data, subject.config.vocab_size, config.checkpoint)
        return Perplexity(tokens, shape, config.max_eval_samples)
    if config.backend is not None and task.head == "classifier":
        _refuse_left_padding(tokenizer, subject.config, config.checkpoint)
    predictor: Predictor = (
        Classifier(task, subject.config) if task.head == "classifier" else SentenceSimilarity(subject.source)
    )
    vocabulary = subject.config.vocab_size
    return LabelledTexts(task, data, predictor, tokenizer, shape, vocabulary, config.checkpoint)


def _refuse_left_padding(tokenizer: Any, model_config: Any, checkpoint: str) -> None:
    """Refuse a tokenizer that puts padding, where an optimised model has zeros, into the column that a head reads.

    Raises:
        BackendError: saying what to change.
    """
    # ModernBERT's head may read the mean of all real tokens instead.
    if tokenizer.padding_side == "left" and getattr(model_config, "classifier_pooling", "cls") == "cls":
        raise BackendError(
            f"the head of {checkpoint} reads the first column, and its tokenizer pads on the left; "
            "set padding_side to right in tokenizer_config.json, or leave out --backend"
        )
