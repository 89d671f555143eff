"""The steps of a compression: prepare what can be refused, then load, calibrate, choose ranks, factor, save."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsvd.calibration.activations import ACTIVATIONS
from flashsvd.calibration.batches import digest_of
from flashsvd.calibration.collect import collect_statistics
from flashsvd.calibration.processes import Processes
from flashsvd.calibration.source import Calibration, CalibrationRequest, prepare_calibration
from flashsvd.calibration.store import (
    INDEX_FILE,
    ModelStatistics,
    fingerprint,
    load_statistics,
    on_disk,
)
from flashsvd.common.device import resolve_device, resolve_dtype
from flashsvd.common.paths import expand
from flashsvd.common.provenance import git_commit, library_versions, timestamp
from flashsvd.compression.asked import (
    asks_for_losses,
    check_inputs,
    check_options,
    looks_for_ranks,
    reads_data_otherwise,
    searches_ranks,
)
from flashsvd.compression.config import CompressConfig
from flashsvd.compression.factoring import Factoring, QKVLayout
from flashsvd.compression.factorize import FactoredMatrix, factor_model, matrix_shapes
from flashsvd.compression.loss_search import search_by_loss
from flashsvd.compression.rank_search import search_ranks
from flashsvd.compression.result import CompressReport, GroupLog
from flashsvd.compression.walks.gradients import collect_by_layer
from flashsvd.compression.walks.layers import has_list_of_layers, list_of_layers
from flashsvd.compression.walks.pieces import Pieces
from flashsvd.compression.walks.states import StateFolder
from flashsvd.compression.walks.walk import Refinement, Walk
from flashsvd.data.sampling import Draw
from flashsvd.data.tasks import Task, get_task
from flashsvd.errors import ConfigError
from flashsvd.io import save_compressed, save_pieces
from flashsvd.lowrank.ranks import (
    RankRequest,
    kept_parameters,
    parameter_budget,
    plan_found_ranks,
    plan_given_ranks,
    plan_ranks,
)
from flashsvd.lowrank.shapes import ROLES, MatrixShape
from flashsvd.methods.method import GRADIENTS, Method, Need
from flashsvd.methods.rank_search import with_rank_search
from flashsvd.methods.registry import get_method
from flashsvd.models.architecture import Target
from flashsvd.models.found import find_model
from flashsvd.models.heads import class_for_task, fitting_tasks
from flashsvd.models.loading import Pretrained, load_model, seeded, shortened, skeleton
from flashsvd.models.precision import cast
from flashsvd.models.put_away import PutAway
from flashsvd.models.registry import architecture_of, find_targets
from flashsvd.storage.atomic import check_target, write_text
from flashsvd.storage.companions import Companions, find_companions
from flashsvd.storage.metadata import CompressionInfo, plain
from flashsvd.storage.rank_file import RANKS_FILE, ranks_text, read_ranks
from flashsvd.storage.stored_weights import StoredWeights
from flashsvd.storage.unfinished import Terms, Unfinished
from flashsvd.storage.verify import weight_files
from flashsvd.storage.weight_headers import find_weights

log = logging.getLogger("flashsvd")

STATISTICS_FOLDER = "statistics"
# What changes no bit of the weights.
_FREE = ("resume", "overwrite", "output", "state_dict", "recipe")


@dataclass(frozen=True)
class CompressionJob:
    """A compression before its weights are loaded: nothing that could be refused is left open.

    Attributes:
        layered: whether the model is read, factored and written layer by layer. One whose layers are not the items of
            one list is in memory whole, and done in one pass.
        unfinished: where what is done lies until the checkpoint is written.
        processes: that do it together; the first one writes.
    """

    config: CompressConfig
    factoring: Factoring
    shapes: Sequence[MatrixShape]
    output: Path
    source: str
    model_config: Any
    model_class: Any
    head_options: Mapping[str, Any]
    calibration: Calibration | None
    companions: Companions
    layered: bool
    unfinished: Unfinished
    processes: Processes

    @classmethod
    def prepare(cls, config: CompressConfig) -> CompressionJob:
        """Resolve a config into everything that the act needs but the weights.

        Raises:
            FlashSVDError: the config, the model, the calibration data or the output cannot be used.
        """
        plain = get_method(
            config.method, alpha=config.alpha, asvd_search=config.asvd_search, adasvd_base=config.adasvd_base
        )
        method = with_rank_search(plain, config.rank_search)
        task = get_task(config.task) if config.task is not None else None
        processes = Processes.joined()
        device, dtype = processes.own_device(resolve_device(config.device)), resolve_dtype(config.dtype)
        if config.refine and processes.count > 1:
            raise ConfigError("--refine is for one process; start it without torchrun, or pass --refine 0")
        output = config.output_directory(method.name)
        check_target(output, config.overwrite)
        check_options(config, method, output)
        check_inputs(config, plain)
        if config.save_stats and not config.resume:
            check_target(_path(config.save_stats), config.overwrite, marker=INDEX_FILE)

        found = find_model(config.model)
        found.refuse_compressed()
        source, model_config = found.source, found.config
        model_class, head_options = class_for_task(config.model, task, model_config)
        for name, value in head_options.items():
            setattr(model_config, name, value)
        empty = skeleton(source, model_class, model_config)
        targets = find_targets(empty)
        layered = has_list_of_layers(empty, targets)
        if config.walks:
            list_of_layers(empty, targets)
        if architecture_of(model_config).generates and not plain.needs:
            log.warning(
                "%s knows nothing of what a decoder reads, and costs it far more than others do; take --method drone "
                "or --recipe best",
                plain.name,
            )
        shapes = matrix_shapes(empty, targets, _layout(config))
        if config.ranks_json:
            plan = plan_given_ranks(shapes, read_ranks(_path(config.ranks_json), config.qkv))
        else:
            plan = plan_ranks(shapes, division(config.rank_request(), model_config))
        calibration = _calibration(config, method, task, model_class, model_config, source)
        companions = find_companions(source, sentence_encoder=task is not None and task.head == "encoder")
        factoring = Factoring(targets, plan, method, _layout(config), device, dtype, config.factor_kind)
        unfinished = Unfinished.find(
            output,
            _terms(config, device, calibration, model_config, processes),
            resume=config.resume,
            overwrite=config.overwrite,
        )
        return cls(
            config, factoring, shapes, output, source, model_config, model_class, head_options, calibration, companions,
            layered, unfinished, processes,
        )  # fmt: skip

    def run(self) -> CompressReport:
        """Do it and save the checkpoint, all of it or nothing; what an interruption leaves can be resumed from."""
        loaded = self._load()
        model = loaded.model
        dense_parameters = sum(p.numel() for p in model.parameters())
        files = find_weights(self.source, getattr(self.model_config, "transformers_weights", None))
        dense_bytes = sum(file.stat().st_size for file in files)
        start = time.perf_counter()
        key = self._fingerprint(model)
        with self._at_work(key) as directory:
            weights = PutAway(model, self.source) if self.layered and not self.holds_model else None
            statistics = self._statistics(model, weights, directory, key)
            needs = self.factoring.method.needs
            ranked = self._with_final_ranks(model, weights, self._with_statistics(statistics, needs), directory)
            # Gradients by outputs say what ranks are worth, and no factors are made of them.
            factoring = replace(self._with_statistics(statistics, needs - {"output_gradients"}), plan=ranked.plan)
            pieces = None
            if self.layered:
                weights = weights or PutAway(model, self.source)
                pieces = Pieces(directory, model, weights, factoring.dtype, self.processes)
            matrices, refinements = self._factor(model, factoring, pieces)
            seconds = time.perf_counter() - start
            parameters = {
                "dense": dense_parameters,
                "compressed": sum(p.numel() for p in model.parameters()),
                "target_dense": sum(shape.dense_parameters for shape in self.shapes),
                "target_compressed": kept_parameters(self.shapes, factoring.plan),
            }
            info = self._describe(model, matrices, parameters, dense_bytes, loaded.untrained, statistics)
            log.info("saving to %s", self.output)
            if self.processes.is_first:
                info = self._save(model, info, pieces)
            self.processes.wait()
        size = sum(file.stat().st_size for file in weight_files(self.output))
        return CompressReport(self.output, info, tuple(matrices), size, seconds, tuple(refinements))

    @contextlib.contextmanager
    def _at_work(self, key: str) -> Iterator[Path]:
        """The working directory, which the first process opens for all.

        Args:
            key: the fingerprint of the model's weights.
        """
        # Every process has looked at the output by now.
        self.processes.wait()
        with self.unfinished.opened(key) if self.processes.is_first else contextlib.nullcontext():
            self.processes.wait()
            yield self.unfinished.directory

    @property
    def _searches(self) -> bool:
        return searches_ranks(self.config, self.factoring.method)

    def _load(self) -> Pretrained:
        log.info("loading %s", self.config.model)
        with seeded(self.config.seed):
            loaded = load_model(self.source, self.model_config, self.model_class, **self.head_options)
        if loaded.untrained:
            log.warning(
                "%s has no trained weights for %s: they are random, train them before use",
                self.config.model,
                shortened(loaded.untrained),
            )
        return loaded

    def _fingerprint(self, model: Any) -> str:
        """That of the model's weights, each read from its file where that can be, so that none stays in memory."""
        stored = StoredWeights(self.source, model)

        def read(name: str) -> Tensor:
            values = stored.read(name)
            return model.get_parameter(name).detach() if values is None else values

        return fingerprint(model, read)

    @property
    def _measures(self) -> bool:
        """Whether the walk collects the statistics, layer by layer, as it factors.

        It cannot where they are gradients, of which the last layer's are the first that there are; where a search for
        ranks, which comes before the factors of the first layer, reads those of all layers; and where they are to be
        kept, since that takes gradients along.
        """
        needs, config = self.factoring.method.needs, self.config
        before = config.stats or config.save_stats or self._searches or not GRADIENTS.isdisjoint(needs)
        return bool(needs) and self.layered and not before and config.calib_inputs == "dense"

    @property
    def holds_model(self) -> bool:
        """Whether the model is in memory whole before it is factored: for statistics to keep, and to learn ranks on."""
        return bool(self.config.save_stats) or asks_for_losses(self.config, self.factoring.method)

    def _statistics(self, model: Any, weights: PutAway | None, directory: Path, key: str) -> ModelStatistics | None:
        """What the method needs to know of the whole dense model before the first layer is factored; None for nothing.

        Args:
            weights: those of the model where they are put away.
            directory: keeps it for a run that resumes this one.
            key: the fingerprint of the weights.
        """
        config, targets, needs = self.config, self.factoring.targets, self.factoring.method.needs
        if not needs or self._measures or (config.calib_inputs == "compressed" and not self._searches):
            return None
        if config.stats:
            where = _path(config.stats)
            statistics = load_statistics(where, key)
            statistics.require(targets, needs, config.task, str(where))
            return statistics
        device = self.factoring.device
        assert device is not None, "prepared with one"
        assert self.calibration is not None, "prepared for every method that needs it"
        about = self.calibration.about
        where = _path(config.save_stats) if config.save_stats else directory / STATISTICS_FOLDER
        if not self.processes.is_first:
            self.processes.wait()
            return load_statistics(where, key)
        if self.unfinished.resumes and (where / INDEX_FILE).is_file():
            self.processes.wait()
            return load_statistics(where, key)
        # Whatever any method may need later, so that they all can use what is saved.
        kept: set[Need] = {"covariance", "mean_abs"} if config.save_stats else set()
        if config.save_stats and self.calibration.loss is not None:
            kept.add("row_gradients")
        if weights is None:
            parts = _collected(model, targets, self.calibration, {*needs, *kept}, device)
        else:
            batches, losses = self.calibration.batches, self.calibration.losses(needs)
            parts = collect_by_layer(model, weights, targets, batches, needs, losses, device, StateFolder(directory))
        statistics = on_disk(parts, about, key, where, config.overwrite)
        self.processes.wait()
        return statistics

    def _with_statistics(self, statistics: ModelStatistics | None, needs: Collection[Need]) -> Factoring:
        if statistics is None:
            return self.factoring
        return replace(self.factoring, statistics_of=lambda target, blocks: statistics.of(target, needs, blocks))

    @property
    def _request(self) -> RankRequest:
        return division(self.config.rank_request(), self.model_config)

    def _with_final_ranks(
        self, model: Any, weights: PutAway | None, factoring: Factoring, directory: Path
    ) -> Factoring:
        """With the ranks asked for, or those that a search comes to.

        Args:
            weights: those of the model where they are put away.
            directory: keeps these for a run that resumes this one.
        """
        if not self._searches:
            return factoring
        file = directory / RANKS_FILE
        if not self.processes.is_first:
            self.processes.wait()
        if not self.processes.is_first or (self.unfinished.resumes and file.is_file()):
            found = read_ranks(file, self.config.qkv)
            ranks = {name: rank for name, rank in found.items() if rank is not None}
        else:
            ranks = self._found_ranks(model, weights, factoring)
            write_text(file, ranks_text(self.config.qkv, ranks))
        if self.processes.is_first:
            self.processes.wait()
        return replace(factoring, plan=plan_found_ranks(self.shapes, ranks))

    def _found_ranks(self, model: Any, weights: PutAway | None, factoring: Factoring) -> dict[str, int]:
        """The ranks that a search comes to; full rank where a matrix should stay dense."""
        request = self._request
        budget = parameter_budget(self.shapes, request)
        if factoring.method.search == "loss":
            read = StoredWeights(self.source, model).read if weights is None else weights.read
            return search_by_loss(model, replace(factoring, read_weight=read), budget, request.steps)
        assert self.calibration is not None, "prepared for every search that asks for losses"
        batches, loss = self.calibration.batches, self.calibration.loss
        # From the even division a search comes to better ranks than from the fast one.
        even = replace(factoring, plan=plan_ranks(self.shapes, replace(request, steps="fine")))
        return search_ranks(model, even, budget, request.steps, batches, loss, self.config.seed)

    def _factor(
        self, model: Any, factoring: Factoring, pieces: Pieces | None
    ) -> tuple[list[FactoredMatrix], list[Refinement]]:
        count, method = len(factoring.targets), factoring.method.name
        log.info("factoring %d matrices with %s on %s", count, method, factoring.device)
        with GroupLog(count) as progress:
            if pieces is not None:
                return pieces.walk(factoring, self._walk(), progress)
            matrices = factor_model(
                model, replace(factoring, read_weight=StoredWeights(self.source, model).read), progress
            )
        if factoring.dtype is not None:
            cast(model, factoring.dtype)
        return matrices, []

    def _save(self, model: Any, info: CompressionInfo, pieces: Pieces | None) -> CompressionInfo:
        options: dict[str, Any] = {
            "companions": self.companions,
            "overwrite": self.config.overwrite,
            "state_dict": self.config.state_dict,
            "ranks": info.module_ranks if self._searches else None,
        }
        if pieces is not None:
            return save_pieces(model, pieces.complete, self.output, info, **options)
        return save_compressed(model, self.output, info, **options)

    def _walk(self) -> Walk:
        if not self.config.walks and not self._measures:
            return Walk()
        assert self.calibration is not None, "prepared for every walk on data"
        inputs = [part for batch in self.calibration.batches for part in batch.inputs]
        compressed = self.config.calib_inputs == "compressed"
        return Walk(inputs, compressed, self.config.refine, self.config.seed, self._measures, self.processes)

    def _describe(
        self,
        model: Any,
        matrices: Sequence[FactoredMatrix],
        parameters: Mapping[str, int],
        dense_bytes: int,
        untrained: tuple[str, ...],
        statistics: ModelStatistics | None,
    ) -> CompressionInfo:
        config, request, method = self.config, self._request, self.factoring.method
        calibration = statistics.about if statistics else self.calibration.about if self.calibration else None
        if calibration and self.calibration and config.stats:
            read_for = "rank_search" if asks_for_losses(config, method) else "refinement"
            calibration = {**calibration, read_for: self.calibration.about}
        return CompressionInfo(
            method=method.name,
            method_options=dict(method.options),
            ranks={role: request.of(role) for role in ROLES},
            ratio=request.ratio,
            module_ranks={m.name: m.rank for m in matrices},
            module_errors={m.name: None if m.rank is None else m.error for m in matrices},
            module_places={target.name: target.place for target in self.factoring.targets},
            qkv=config.qkv,
            factors=config.factors,
            base_model=config.model,
            task=config.task,
            calibration=calibration,
            calib_inputs=config.calib_inputs,
            refine_steps=config.refine,
            ranks_json=config.ranks_json,
            rank_steps=request.steps if looks_for_ranks(config, method) else None,
            rank_search=method.search if looks_for_ranks(config, method) else None,
            model_type=str(model.config.model_type),
            architecture=type(model).__name__,
            dtype=str(model.dtype).removeprefix("torch."),
            parameters=parameters,
            dense_bytes=dense_bytes,
            untrained=untrained,
            versions=library_versions(),
            git_commit=git_commit(),
            timestamp=timestamp(),
        )


def _collected(
    model: Any, targets: Sequence[Target], calibration: Calibration, needs: Collection[Need], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """All sums, by a pass for each loss that is differentiated, or by one without any."""
    activations, losses = ACTIVATIONS & set(needs), calibration.losses(needs)
    if not losses:
        yield from collect_statistics(model, targets, calibration.batches, activations, None, device)
    for loss, gradients in losses.items():
        yield from collect_statistics(model, targets, calibration.batches, activations | gradients, loss, device)
        activations = frozenset()


def _terms(
    config: CompressConfig, device: torch.device, calibration: Calibration | None, model_config: Any,
    processes: Processes,
) -> Terms:  # fmt: skip
    """What the bits of the checkpoint depend on, but for the model."""
    options = {name: value for name, value in plain(config).items() if name not in _FREE} | {"device": device.type}
    versions = {name: version for name, version in library_versions().items() if name != "triton"}
    read = {"model's config": model_config.to_json_string()}
    if config.ranks_json:
        read["rank file"] = _path(config.ranks_json).read_text(encoding="utf-8")
    if config.stats:
        read["statistics' index"] = (_path(config.stats) / INDEX_FILE).read_text(encoding="utf-8")
    data = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in read.items()}
    if calibration:
        data["calibration data"] = digest_of(calibration.batches)
    return Terms(options, versions, data, processes.count)


def _calibration(
    config: CompressConfig, method: Method, task: Task | None, model_class: Any, model_config: Any, source: str
) -> Calibration | None:
    """The calibration data, where the method or the search for ranks reads any."""
    measures = bool(method.needs) and not config.stats
    if not measures and not reads_data_otherwise(config, method):
        return None
    draw = Draw(config.calib_samples, config.seed, first=config.calib_order == "first")
    request = CalibrationRequest(config.calib_data, draw, config.calib_seq_len, config.calib_batch_size)
    longest = architecture_of(model_config).max_length(model_config)
    calibration = prepare_calibration(request, task, model_class, model_config, source, longest)
    if measures and "row_gradients" in method.needs and calibration.loss is None:
        raise ConfigError(
            f"{method.name} differentiates a loss, and {config.model} has none by itself; "
            f"choose drone or asvd, or a task that the model fits with --task: {fitting_tasks(model_config)}"
        )
    return calibration


def division(request: RankRequest, model_config: Any) -> RankRequest:
    """How a budget is divided: of what a decoder reads for a token, no division makes less, so that its is even."""
    return replace(request, steps="fine") if architecture_of(model_config).generates else request


def _layout(config: CompressConfig) -> QKVLayout:
    return "per-head" if config.qkv == "per-head" else "joint"


def _path(name: str) -> Path:
    return expand(name)
