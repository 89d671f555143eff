"""`flashsvd eval`: a checkpoint, dense or compressed, scored and timed on a task's validation split."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashsvd.device import DTYPES, resolve_device, resolve_dtype
from flashsvd.errors import ConfigError, ModelError
from flashsvd.options import check_choices, check_count, option

if TYPE_CHECKING:
    import torch

    from flashsvd.data import Examples
    from flashsvd.metadata import CompressionInfo
    from flashsvd.predict import Predictor
    from flashsvd.tasks import Task

log = logging.getLogger("flashsvd")

WARMUP_FORWARDS = 2


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate and on what.

    Raises:
        ConfigError: an option has a value that cannot be used.
    """

    checkpoint: str = option(help="compressed checkpoint, or a dense model's directory or hub name to compare with")
    task: str = option(help="cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, or similarity for sentence encoders")
    data: str | None = option(
        None, help="a TSV, CSV, parquet or JSON-lines file, or a directory with a validation file; the default is GLUE"
    )
    batch_size: int = option(32, help="examples in a batch")
    seq_len: int = option(128, help="tokens an example is cut to")
    padding: str = option("longest", help="pad to the longest of the batch, or to seq-len", choices=("longest", "max"))
    max_eval_samples: int | None = option(None, help="evaluate only this many examples, the first ones")
    device: str | None = option(None, help="cuda or cpu; the default is cuda where there is one")
    dtype: str | None = option(None, help="dtype to run in; the default is the checkpoint's own", choices=DTYPES)
    output: str | None = option(None, help="JSON file to write, such as results/x.json")

    def __post_init__(self) -> None:
        check_choices(self)
        check_count("batch_size", self.batch_size)
        check_count("seq_len", self.seq_len)
        check_count("max_eval_samples", self.max_eval_samples, optional=True)
        if not isinstance(self.checkpoint, str) or not self.checkpoint:
            raise ConfigError(f"--checkpoint must be a directory or a hub name, got {self.checkpoint!r}")


@dataclass(frozen=True)
class EvalResult:
    """The result of `run_eval`; `to_json` gives the keys users know.

    Attributes:
        metric_value: the task's first metric; None where it is not defined.
        latency_ms: median milliseconds of the model's forward on a full batch.
        peak_memory_mib: what the model and its forwards took; `memory_definition` says of which memory.
    """

    task: str
    metric_name: str
    metric_value: float | None
    metrics: Mapping[str, float | None]
    base_model: str
    method: str
    ranks: Mapping[str, int | None] | None
    ratio: float | None
    peak_memory_mib: float
    latency_ms: float
    latency_percentiles_ms: Mapping[str, float]
    samples_per_second: float
    batch_size: int
    seq_len: int
    padding: str
    num_eval_samples: int
    parameters: int
    device: str
    dtype: str
    checkpoint_dir: str
    data: str
    timestamp: str
    git_commit: str | None
    flashsvd_version: str
    latency_definition: str
    memory_definition: str

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, with the two definitions under `_latency_definition` and `_memory_definition`."""
        data = dataclasses.asdict(self)
        for name in ("latency_definition", "memory_definition"):
            data[f"_{name}"] = data.pop(name)
        return data

    def __str__(self) -> str:
        scores = ", ".join(
            f"{name} {'undefined' if value is None else format(value, '.4f')}" for name, value in self.metrics.items()
        )
        return (
            f"{self.task}: {scores} on {self.num_eval_samples} examples\n"
            f"{self.method} model of {self.parameters:,} parameters, {self.dtype} on {self.device}: "
            f"{self.latency_ms:.1f} ms a batch of {self.batch_size} (median, padded to {self.padding}, "
            f"at most {self.seq_len} tokens), {self.samples_per_second:.0f} examples/s, "
            f"peak memory {self.peak_memory_mib:.0f} MiB"
        )


def run_eval(config: EvalConfig) -> EvalResult:
    """Evaluate a checkpoint, and write the JSON where the config names a file.

    Raises:
        FlashSVDError: the config, the checkpoint or the data cannot be used.
    """
    from flashsvd._version import __version__
    from flashsvd.atomic import write_text
    from flashsvd.data import load_examples
    from flashsvd.device import describe_device
    from flashsvd.measure import PeakMemory
    from flashsvd.metrics import compute_metrics
    from flashsvd.predict import Classifier, SentenceSimilarity
    from flashsvd.pretrained import load_tokenizer
    from flashsvd.provenance import git_commit, timestamp
    from flashsvd.tasks import get_task

    task = get_task(config.task)
    device = resolve_device(config.device)
    examples = load_examples(task, "validation", config.data, config.max_eval_samples)
    subject = _Subject.find(config, task)
    tokenizer = load_tokenizer(subject.source)
    if tokenizer.pad_token is None:
        raise ModelError(f"the tokenizer of {config.checkpoint} has no padding token; set one and save it again")
    predictor: Predictor = (
        Classifier(task, subject.config) if task.head == "classifier" else SentenceSimilarity(subject.source)
    )

    log.info("loading %s", config.checkpoint)
    memory = PeakMemory(device)
    model = subject.load(resolve_dtype(config.dtype)).to(device)
    predictions, latencies = _run(config, model, tokenizer, predictor, examples, device)
    full = [ms for size, ms in latencies if size == config.batch_size] or [ms for _, ms in latencies]
    metrics = {
        name: value if math.isfinite(value) else None
        for name, value in compute_metrics(task.metrics, predictions, examples.labels).items()
    }
    for name in (name for name, value in metrics.items() if value is None):
        log.warning("%s is not defined here: predictions or labels are constant", name)
    info = subject.info
    result = EvalResult(
        task=task.name,
        metric_name=task.metrics[0],
        metric_value=metrics[task.metrics[0]],
        metrics=metrics,
        base_model=info.base_model if info else config.checkpoint,
        method=info.method if info else "dense",
        ranks=info.ranks if info else None,
        ratio=info.ratio if info else None,
        peak_memory_mib=round(memory.mib(), 2),
        latency_ms=_percentile(full, 50),
        latency_percentiles_ms={f"p{q}": _percentile(full, q) for q in (50, 90, 99)},
        samples_per_second=round(len(examples) / sum(ms for _, ms in latencies) * 1000, 2),
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        padding=config.padding,
        num_eval_samples=len(examples),
        parameters=sum(p.numel() for p in model.parameters()),
        device=describe_device(device),
        dtype=str(model.dtype).removeprefix("torch."),
        checkpoint_dir=config.checkpoint,
        data=config.data or f"hub:{task.hub_config}",
        timestamp=timestamp(),
        git_commit=git_commit(),
        flashsvd_version=__version__,
        latency_definition=_latency_definition(task),
        memory_definition=memory.definition,
    )
    if config.output:
        write_text(Path(config.output).expanduser(), json.dumps(result.to_json(), indent=2, allow_nan=False) + "\n")
    return result


@dataclass(frozen=True)
class _Subject:
    """What is to be evaluated, before its weights are loaded."""

    source: str
    config: Any
    own_class: Any
    wanted_class: Any
    info: CompressionInfo | None

    @classmethod
    def find(cls, config: EvalConfig, task: Task) -> _Subject:
        from flashsvd.io import is_compressed
        from flashsvd.metadata import CompressionInfo
        from flashsvd.models import architecture_of
        from flashsvd.pretrained import base_class, classifier_class, load_config, locate, own_class
        from flashsvd.tasks import check_label_count

        source = locate(config.checkpoint)
        model_config = load_config(source)
        longest = architecture_of(model_config).max_length(model_config)
        if config.seq_len > longest:
            raise ConfigError(
                f"--seq-len {config.seq_len} is above {longest}, the longest {config.checkpoint} can read"
            )
        own = own_class(model_config)
        wanted = classifier_class(model_config) if task.head == "classifier" else base_class(model_config)
        if task.head == "classifier":
            if own is not wanted:
                raise ModelError(
                    f"{config.checkpoint} is a {own.__name__} without a classification head; {task.name} needs one"
                )
            check_label_count(task, model_config, config.checkpoint)
        info = CompressionInfo.read(Path(source)) if is_compressed(source) else None
        if info and info.untrained:
            log.warning("the weights of %s were random when the model was compressed", ", ".join(info.untrained))
        return cls(source, model_config, own, wanted, info)

    def load(self, dtype: torch.dtype | None) -> Any:
        from flashsvd.io import load_compressed
        from flashsvd.pretrained import load_model

        if self.info is None:
            return load_model(self.source, self.config, self.wanted_class, dtype).model
        model = load_compressed(self.source, dtype=dtype)
        return model if self.own_class is self.wanted_class else model.base_model


def _run(
    config: EvalConfig, model: Any, tokenizer: Any, predictor: Predictor, examples: Examples, device: torch.device
) -> tuple[list[float], list[tuple[int, float]]]:
    """Predictions for all examples, and (size, milliseconds) of each batch."""
    import torch
    from tqdm.auto import tqdm

    from flashsvd.measure import timed

    predictions: list[float] = []
    latencies: list[tuple[int, float]] = []
    options = {
        "padding": "max_length" if config.padding == "max" else True,
        "truncation": True,
        "max_length": config.seq_len,
        "return_tensors": "pt",
    }
    with torch.inference_mode():
        for start in tqdm(range(0, len(examples), config.batch_size), desc="evaluating", unit="batch"):
            texts = examples.texts[start : start + config.batch_size]
            inputs = [tokenizer(*call, **options).to(device) for call in predictor.tokenizer_calls(texts)]
            forward = functools.partial(_forward, model, inputs)
            for _ in range(WARMUP_FORWARDS if start == 0 else 0):
                forward()
            outputs, milliseconds = timed(forward, device)
            predictions += predictor.predict(outputs, [part["attention_mask"] for part in inputs])
            latencies.append((len(texts), milliseconds))
    return predictions, latencies


def _forward(model: Any, inputs: list[Any]) -> list[Any]:
    return [model(**part) for part in inputs]


def _percentile(values: list[float], q: int) -> float:
    import numpy as np

    return round(float(np.percentile(values, q)), 3)


def _latency_definition(task: Task) -> str:
    unit = "both texts of every pair" if task.head == "encoder" else "one batch"
    return (
        f"median milliseconds of the model's forward on {unit} of a full batch, after {WARMUP_FORWARDS} warm-up "
        "forwards; tokenizing, data loading and copies to the device are not counted"
    )
