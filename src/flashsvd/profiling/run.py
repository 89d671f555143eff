"""The steps of a profile: find what can be refused, then measure each variant by itself, and say what was measured."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from flashsvd import runtime
from flashsvd.common.device import PLAIN, describe_device, resolve_device, resolve_dtype
from flashsvd.common.options import read_paths
from flashsvd.common.paths import expand
from flashsvd.common.provenance import git_commit, library_versions, timestamp
from flashsvd.data.sampling import Draw
from flashsvd.data.tasks import Task
from flashsvd.errors import BackendError, CheckpointError, ConfigError, FlashSVDError, ModelError
from flashsvd.evaluation.subject import Subject, task_of
from flashsvd.evaluation.workload import Workload, batch_shape, load_data
from flashsvd.models.found import find_model
from flashsvd.models.loading import own_dtype
from flashsvd.profiling.bandwidth import copy_bandwidth
from flashsvd.profiling.config import GRAPHS, ON_BLOCKS, VARIANTS, ProfileConfig
from flashsvd.profiling.definitions import definitions
from flashsvd.profiling.figures import is_plot, png
from flashsvd.profiling.generation import Prompts
from flashsvd.profiling.measure import measure, rehearse
from flashsvd.profiling.result import KEYS, ProfileResult, VariantRow
from flashsvd.profiling.variants import DENSE, Setting, check_offload, why_not
from flashsvd.storage.result_file import ResultFile, holds_json

if TYPE_CHECKING:
    from flashsvd.blocks.parts.kept import KVCache
    from flashsvd.kernels.launch import Backend

log = logging.getLogger("flashsvd")

JSON_FILE, PLOT_FILE = "profile.json", "profile.png"


def profile(config: ProfileConfig) -> ProfileResult:
    """Measure each variant by itself, one after the other, and write the files where the config names a directory.

    A variant that cannot run, or fails, is a row that says why.

    Raises:
        FlashSVDError: the config, the checkpoints or the data cannot be used, or no variant could be measured.
    """
    device, dtype = resolve_device(config.device), resolve_dtype(config.dtype)
    if config.offload:
        check_offload(device)
    check_output(config)
    found = find_model(config.checkpoint)
    task = task_of(config.task, found)
    subject = Subject.of(found, task)
    names = config.variant_names()
    dense = _dense(config, task, subject) if set(names) & set(DENSE) else None
    draw = None if config.max_eval_samples is None else Draw(config.max_eval_samples, config.seed)
    task, data = load_data(task, config.data, draw, subject)
    backend = cast("Backend", "auto" if config.backend in (None, PLAIN) else config.backend)
    graph, kv_caches = GRAPHS[config.graph], cast("tuple[KVCache, ...]", config.kv_caches())
    for kept in kv_caches:
        if graph is True or kept != "auto":
            runtime.check(subject.config, backend, device, graph, kept)
    shape = batch_shape(task, subject, config.batch_size, config.seq_len, config.padding)
    workload = Workload.prepare(task, data, subject, shape, draw)
    setting = Setting(
        device,
        dtype or own_dtype(subject.source, subject.config),
        config.micro_batches,
        backend,
        config.backend is not None and not config.may_skip,
        graph,
        config.offload,
        kv_caches[0],
    )
    reasons = {name: why_not(name, subject, workload, setting) for name in names}
    _refuse_what_was_asked_for(config, reasons)
    subjects = {name: dense if name in DENSE and dense is not None else subject for name in names}
    for one in subjects.values():
        workload.job(one)
    prompts = Prompts.cut(workload, subject, config.new_tokens) if config.new_tokens else None

    rehearse(subject, setting)
    rows = []
    for name, reason in sorted({**reasons, **config.left_out()}.items(), key=lambda item: VARIANTS.index(item[0])):
        if reason is not None:
            log.info("%s is skipped: %s", name, reason)
            rows.append(VariantRow(name, "skipped", reason))
        else:
            for kept in kv_caches if name in ON_BLOCKS else kv_caches[:1]:
                asked = dataclasses.replace(setting, kv_cache=kept)
                rows.append(measure(name, subjects[name], workload, asked, config.runs, prompts))
    _refuse_nothing(rows)
    # After the variants, since what a process has freed may be used again uncounted.
    copied = copy_bandwidth(device) if prompts else None
    info = subject.info
    result = ProfileResult(
        task=task.name,
        metric_name=task.metrics[0],
        checkpoint=config.checkpoint,
        dense=dense.source if dense else None,
        method=subject.method,
        ratio=info.ratio if info else None,
        device=describe_device(device),
        batch_size=shape.batch_size,
        seq_len=workload.longest,
        padding=shape.padding,
        micro_batches=config.micro_batches,
        backend=config.backend or backend,
        graph=config.graph,
        offload=config.offload,
        runs=config.runs,
        num_eval_samples=_samples(workload, subject),
        seed=draw.seed if draw else None,
        data=config.data or f"hub:{task.hub_config}",
        timestamp=timestamp(),
        git_commit=git_commit(),
        versions=library_versions(),
        rows=_with_speed_up(rows),
        definitions=definitions(workload, subject, rows, setting, prompts, copied),
        new_tokens=config.new_tokens,
        copy_terabytes_per_second=copied,
        module_ranks=info.module_ranks if info else {},
        module_errors=info.module_errors if info else {},
        module_places=info.module_places if info else {},
    )
    if files := _result_files(config):
        files[JSON_FILE].write_json(result.to_json())
        files[PLOT_FILE].write(png(result))
    return result


def check_output(config: ProfileConfig) -> None:
    """Refuse an output that must not or cannot be written.

    Raises:
        CheckpointError: naming the file.
    """
    for file in _result_files(config).values():
        file.check(read_paths(config))


def _result_files(config: ProfileConfig) -> dict[str, ResultFile]:
    """The files to write, by their names; none where no directory is named."""
    if config.output is None:
        return {}
    known = {JSON_FILE: lambda file: holds_json(file, KEYS), PLOT_FILE: is_plot}
    directory = expand(config.output)
    return {name: ResultFile(directory / name, "profile", known[name], config.overwrite) for name in known}


def _dense(config: ProfileConfig, task: Task, subject: Subject) -> Subject:
    """The dense model to compare with.

    Raises:
        ConfigError: it is not known, cannot be had, or is another model than the one that was compressed.
    """
    if not subject.compressed:
        if config.dense is not None:
            raise ConfigError(f"{config.checkpoint} is dense itself; leave out --dense")
        return subject
    if config.dense is not None:
        dense = Subject.find(config.dense, task)
    elif subject.info is None or not subject.info.base_model:
        raise ConfigError(f"{config.checkpoint} does not say what it was compressed from; name it with --dense")
    else:
        try:
            dense = Subject.find(subject.info.base_model, task)
        except (ModelError, CheckpointError) as error:
            raise ConfigError(
                f"the dense model that {config.checkpoint} was compressed from cannot be used ({error.message}); "
                "name it with --dense"
            ) from error
    if dense.compressed:
        raise ConfigError(f"{dense.source} is compressed itself; name the dense model with --dense")
    for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        here, there = getattr(subject.config, name, None), getattr(dense.config, name, None)
        if here != there:
            raise ConfigError(
                f"{dense.source} has {name} {there}, {config.checkpoint} has {here}, so it was not compressed from it; "
                "name the dense model with --dense"
            )
    return dense


def _refuse_what_was_asked_for(config: ProfileConfig, reasons: dict[str, str | None]) -> None:
    """A variant that was named must apply, unless it may be skipped; of all of them by default, some may not.

    Whoever names a backend names the variant that it is for.

    Raises:
        BackendError: one that was named does not.
    """
    for name, reason in reasons.items():
        named = config.variants is not None or (name == "fused" and config.backend is not None)
        if named and reason is not None and not config.may_skip:
            raise BackendError(f"the variant {name} does not apply: {reason}")


def _refuse_nothing(rows: Sequence[VariantRow]) -> None:
    if not any(row.status == "ok" for row in rows):
        row = next((row for row in rows if row.status == "failed"), rows[0])
        raise FlashSVDError(f"nothing could be measured; {row.variant} was {row.status}: {row.reason}")


def _with_speed_up(rows: Sequence[VariantRow]) -> tuple[VariantRow, ...]:
    dense = next((row.latency_ms for row in rows if row.variant == "dense"), None)
    return tuple(
        dataclasses.replace(row, speed_up=round(dense / row.latency_ms, 3)) if dense and row.latency_ms else row
        for row in rows
    )


def _samples(workload: Workload, subject: Subject) -> int:
    return sum(batch.samples for batch in workload.job(subject))
