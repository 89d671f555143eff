"""`flashsvd compress`: a model and a config in, a smaller checkpoint out."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashsvd.device import DTYPES, resolve_device, resolve_dtype
from flashsvd.errors import ConfigError, ModelError
from flashsvd.options import check_choices, option
from flashsvd.ranks import RankRequest, plan_ranks

if TYPE_CHECKING:
    import torch

    from flashsvd.factorize import FactoredMatrix
    from flashsvd.metadata import CompressionInfo
    from flashsvd.report import CompressReport

log = logging.getLogger("flashsvd")

OUTPUT_ROOT = "compressed_models"


@dataclass(frozen=True)
class CompressConfig:
    """What to compress and how.

    Raises:
        ConfigError: an option has a value that cannot be used.
    """

    model: str = option(help="hub name or local directory of the model to compress")
    method: str = option("standard", help="compression method: standard (truncated SVD)")
    task: str | None = option(None, help="task the model is for (a GLUE task, or similarity)")
    rank: int | None = option(None, help="rank r of all layers: attention r, feed-forward and attention output 4r")
    rank_attn: int | None = option(None, help="rank of the Q, K, V projections (per head with --qkv per-head)")
    rank_ffn: int | None = option(None, help="rank of the feed-forward matrices")
    rank_wo: int | None = option(None, help="rank of the attention output projection")
    ratio: float | None = option(None, help="fraction of the factored layers' parameters to keep; finds the ranks")
    qkv: str = option(
        "joint",
        help="factor each of Q, K, V as a whole, or every head by itself",
        choices=("joint", "per-head"),
    )
    device: str | None = option(None, help="where to factor: cuda or cpu; the default is cuda where there is one")
    dtype: str | None = option(None, help="dtype of the saved weights; the default is the model's own", choices=DTYPES)
    output: str | None = option(None, help=f"directory to write; the default is {OUTPUT_ROOT}/<model>_<method>_<ranks>")
    overwrite: bool = option(False, help="replace an existing compressed checkpoint")
    state_dict: bool = option(False, help="also write flashsvd_state_dict.pt, for tools that want one")
    seed: int = option(0, help="seed of a new head's random weights")

    def __post_init__(self) -> None:
        check_choices(self)
        self.rank_request()
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"--model must be a hub name or a directory, got {self.model!r}")

    def rank_request(self) -> RankRequest:
        """The ranks asked for."""
        return RankRequest.from_options(self.rank, self.rank_attn, self.rank_ffn, self.rank_wo, self.ratio)

    def output_directory(self, method: str) -> Path:
        """Where the checkpoint goes."""
        if self.output is not None:
            return Path(self.output).expanduser()
        name = Path(self.model).expanduser().resolve().name if Path(self.model).is_dir() else self.model.split("/")[-1]
        return Path(OUTPUT_ROOT) / f"{name}_{method}_{self.rank_request().label}"


def run_compress(config: CompressConfig) -> CompressReport:
    """Compress a model and save the checkpoint.

    Everything that can be refused is refused before the weights are loaded.

    Raises:
        FlashSVDError: the config, the model or the output cannot be used; nothing has been written then.
    """
    import torch

    from flashsvd.atomic import check_target
    from flashsvd.compression import get_method
    from flashsvd.factorize import factor_model, matrix_shapes
    from flashsvd.io import save_compressed
    from flashsvd.models import find_targets
    from flashsvd.pretrained import load_config, load_model, locate
    from flashsvd.ranks import kept_parameters
    from flashsvd.report import CompressReport
    from flashsvd.stored_weights import StoredWeights
    from flashsvd.verify import weight_files

    method = get_method(config.method)
    device, dtype = resolve_device(config.device), resolve_dtype(config.dtype)
    output = config.output_directory(method.name)
    check_target(output, config.overwrite)

    source = locate(config.model)
    model_config = load_config(source)
    _refuse_quantized(config.model, model_config)
    model_class, options = _head(config, model_config)
    with torch.device("meta"):
        skeleton = model_class(_with(model_config, options))
    targets = find_targets(skeleton)
    shapes = matrix_shapes(skeleton, targets, config.qkv)  # type: ignore[arg-type]  # checked in the config
    plan = plan_ranks(shapes, config.rank_request())

    log.info("loading %s", config.model)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        loaded = load_model(source, model_config, model_class, **options)
    model = loaded.model
    if loaded.untrained:
        log.warning(
            "%s has no trained weights for %s: they are random, train them before use",
            config.model,
            _shortened(loaded.untrained),
        )
    dense_parameters = sum(p.numel() for p in model.parameters())
    dense_bytes = sum(p.numel() * (dtype or p.dtype).itemsize for p in model.parameters())

    start = time.perf_counter()
    log.info("factoring %d matrices with %s on %s", len(targets), method.name, device)
    read = StoredWeights(source, model).read
    with _GroupLog(len(targets)) as progress:
        matrices = factor_model(model, targets, plan, method, config.qkv, device, progress, read)  # type: ignore[arg-type]  # as above
    seconds = time.perf_counter() - start

    if dtype is not None:
        model.to(dtype)
    parameters = {
        "dense": dense_parameters,
        "compressed": sum(p.numel() for p in model.parameters()),
        "target_dense": sum(shape.dense_parameters for shape in shapes),
        "target_compressed": kept_parameters(shapes, plan),
    }
    info = _describe(config, method.name, model, matrices, parameters, dense_bytes, loaded.untrained)
    log.info("saving to %s", output)
    save_compressed(model, output, info, companions=source, overwrite=config.overwrite, state_dict=config.state_dict)
    size = sum(file.stat().st_size for file in weight_files(output))
    return CompressReport(output, info, tuple(matrices), size, seconds)


class _GroupLog:
    """A progress bar over the matrices, and a log line for each layer group as it is complete."""

    def __init__(self, total: int) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(total=total, desc="factoring", unit="matrix")
        self._group: list[FactoredMatrix] = []

    def __enter__(self) -> _GroupLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._bar.close()

    def __call__(self, matrix: FactoredMatrix) -> None:
        if self._group and (self._group[0].layer, self._group[0].role) != (matrix.layer, matrix.role):
            self._flush()
        self._group.append(matrix)
        self._bar.update()

    def _flush(self) -> None:
        from flashsvd.report import group_line

        if self._group:
            log.info("%s", group_line(self._group))
        self._group = []


def _head(config: CompressConfig, model_config: Any) -> tuple[Any, dict[str, Any]]:
    """The class to load the model as, and what to set on its config: the task's head, or the model's own."""
    from flashsvd.pretrained import base_class, classifier_class, own_class
    from flashsvd.tasks import check_label_count, get_task

    if config.task is None:
        return own_class(model_config), {}
    task = get_task(config.task)
    if task.head == "encoder":
        return base_class(model_config), {}
    classifier = classifier_class(model_config)
    if own_class(model_config) is classifier:
        check_label_count(task, model_config, config.model)
        return classifier, {}
    options: dict[str, Any] = {"num_labels": task.num_labels}
    if task.labels:
        options["id2label"] = dict(enumerate(task.labels))
        options["label2id"] = {name: i for i, name in enumerate(task.labels)}
    return classifier, options


def _with(model_config: Any, options: dict[str, Any]) -> Any:
    for name, value in options.items():
        setattr(model_config, name, value)
    return model_config


def _refuse_quantized(name: str, model_config: Any) -> None:
    described = getattr(model_config, "quantization_config", None)
    if described is None:
        return
    method = described.get("quant_method") if isinstance(described, dict) else None
    if method == "flashsvd":
        raise ModelError(f"{name} is compressed already; compress the dense model it came from")
    raise ModelError(f"{name} is quantized ({method}); compress the unquantized model it came from")


def _describe(
    config: CompressConfig,
    method: str,
    model: torch.nn.Module,
    matrices: list[FactoredMatrix],
    parameters: dict[str, int],
    dense_bytes: int,
    untrained: tuple[str, ...],
) -> CompressionInfo:
    from flashsvd.metadata import CompressionInfo
    from flashsvd.provenance import git_commit, library_versions, timestamp
    from flashsvd.ranks import ROLES

    request = config.rank_request()
    return CompressionInfo(
        method=method,
        ranks={role: request.of(role) for role in ROLES},
        ratio=request.ratio,
        module_ranks={m.name: m.rank for m in matrices},
        qkv=config.qkv,
        base_model=config.model,
        task=config.task,
        model_type=str(model.config.model_type),  # type: ignore[union-attr]  # nn.Module hides attributes
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=parameters,
        dense_bytes=dense_bytes,
        untrained=untrained,
        versions=library_versions(),
        git_commit=git_commit(),
        timestamp=timestamp(),
    )


def _shortened(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
