"""What a profile found: a table for people and notebooks, and JSON."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from flashsvd.common.json_file import read_json
from flashsvd.common.tables import counted, html_table, text_table
from flashsvd.errors import CheckpointError, described
from flashsvd.profiling.config import ON_BLOCKS
from flashsvd.storage.layer_places import LayerPlace, read_places

Status = Literal["ok", "skipped", "failed"]
# By these a file is known as the JSON of a profile, of whatever version.
KEYS = ("task", "metric_name", "checkpoint", "rows", "_latency_definition")


@dataclass(frozen=True)
class Generation:
    """What generating cost.

    Attributes:
        prefill_ms: time to the first token, for the whole batch.
        ms_per_token: time of each token after it, for the whole batch.
        tokens_per_second: those tokens, of all prompts, over their time.
        cache_bytes: of keys and values in the end.
        prefill_memory_mib: most memory above the loaded model until the first token.
        decode_memory_mib: most memory above the loaded model from then on.
        step_bytes: of the checkpoint's weights that a step reads; `terabytes_per_second`: those over a token's time.
            None in files of versions that did not count them.
    """

    prefill_ms: float
    ms_per_token: float
    tokens_per_second: float
    cache_bytes: int
    prefill_memory_mib: float
    decode_memory_mib: float
    step_bytes: int | None = None
    terabytes_per_second: float | None = None


@dataclass(frozen=True)
class VariantRow:
    """What was measured of one variant.

    Attributes:
        status: `ok`, `skipped` where it cannot run here, `failed` where it broke.
        reason: why, where it is not `ok`; the figures are then None.
        metrics: the task's; None where one is not defined.
        latency_ms: median of the timed forwards; `latency_p90_ms`: nine of ten stay within.
        timed_forwards: how many those are, of full batches where there was one (`full_batches`).
        peak_memory_mib: most memory while loading and running, above what it was before.
        transient_memory_mib: most memory while running, above the loaded model.
        parameters: of the checkpoint.
        weight_bytes: of the weights as they are in memory.
        cuda_graphs: how many it had captured in the end.
        kv_cache: what it was asked to keep of keys and values; empty where it was not.
        speed_up: the dense variant's median latency over this one's.
        generation: None where it was not asked for, or where this variant cannot; `no_generation` then says why.
    """

    variant: str
    status: Status
    reason: str = ""
    metrics: Mapping[str, float | None] | None = None
    latency_ms: float | None = None
    latency_p90_ms: float | None = None
    samples_per_second: float | None = None
    tokens_per_second: float | None = None
    timed_forwards: int | None = None
    full_batches: bool | None = None
    peak_memory_mib: float | None = None
    transient_memory_mib: float | None = None
    parameters: int | None = None
    weight_bytes: int | None = None
    dtype: str | None = None
    cuda_graphs: int = 0
    kv_cache: str = ""
    speed_up: float | None = None
    generation: Generation | None = None
    no_generation: str = ""

    @property
    def label(self) -> str:
        """The variant, and how it differs from others of its name."""
        return self.variant if self.kv_cache in ("", "auto") else f"{self.variant}, {self.kv_cache} cache"


@dataclass(frozen=True, repr=False)
class ProfileResult:
    """The result of `run_profile`.

    Attributes:
        metric_name: the task's first metric, the one shown.
        checkpoint: what was profiled; `dense`: what it stands against, None where that was not asked for.
        method: of the compression; `dense` where the checkpoint is not compressed.
        backend: of the fused variant; `plain` where that was left out.
        graph: when that ran as CUDA graphs: `auto`, `always` or `never`.
        runs: timed passes over the data.
        rows: the variants, in the order they were measured.
        definitions: what latency, the two memories, the sizes and generation mean.
        new_tokens: generated after each prompt; None where that was not asked for.
        copy_terabytes_per_second: of a large copy on the device, read and written bytes together; None where nothing
            was generated, or where memory had no room for it.
        module_ranks, module_errors, module_places: of the checkpoint, as its metadata has them; empty for a dense one.
    """

    task: str
    metric_name: str
    checkpoint: str
    dense: str | None
    method: str
    ratio: float | None
    device: str
    batch_size: int
    seq_len: int
    padding: str
    micro_batches: int
    graph: str
    offload: bool
    runs: int
    num_eval_samples: int
    data: str
    timestamp: str
    git_commit: str | None
    versions: Mapping[str, str | None]
    rows: tuple[VariantRow, ...]
    definitions: Mapping[str, str]
    new_tokens: int | None = None
    copy_terabytes_per_second: float | None = None
    seed: int | None = None
    backend: str = "auto"
    module_ranks: Mapping[str, int | None] = field(default_factory=dict)
    module_errors: Mapping[str, float | None] = field(default_factory=dict)
    module_places: Mapping[str, LayerPlace] = field(default_factory=dict)

    def __getitem__(self, variant: str) -> VariantRow:
        """The row of a variant."""
        for row in self.rows:
            if row.variant == variant:
                return row
        raise KeyError(variant)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, with what the figures mean under `_latency_definition` and the like."""
        data = dataclasses.asdict(self)
        data |= {f"_{name}_definition": text for name, text in data.pop("definitions").items()}
        return data

    @classmethod
    def read(cls, file: Path) -> ProfileResult:
        """A result that `flashsvd profile --output` wrote.

        Raises:
            CheckpointError: there is no such file, or it is not such a result.
        """
        try:
            data: Any = read_json(file)
            definitions = {key[1:-11]: data.pop(key) for key in list(data) if key.endswith("_definition")}
            rows = tuple(_row(row) for row in data.pop("rows"))
            if isinstance(data["graph"], bool):
                # As files have it that were written when graphs were asked for or not.
                data["graph"] = "always" if data["graph"] else "never"
            data["module_places"] = read_places(data.get("module_places", {}))
            return _checked(cls(rows=rows, definitions=definitions, **data))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{file} is no profile that flashsvd wrote ({described(error)}); profile the checkpoint again"
            ) from error

    def header(self) -> list[str]:
        """The table's columns."""
        generation = [
            "prefill ms",
            "ms/token",
            "tokens/s",
            "TB/s",
            "% of copy",
            "cache MiB",
            "prefill MiB",
            "decode MiB",
        ]
        return [
            "variant", self.metric_name, "p50 ms", "p90 ms", "samples/s", "x dense",
            "peak MiB", "transient MiB", "parameters", "weights MB", *(generation if self.new_tokens else []),
        ]  # fmt: skip

    def cells(self, row: VariantRow) -> list[str]:
        """A row as text; a figure that is not there is a dash."""
        metric = (row.metrics or {}).get(self.metric_name)
        size = None if row.weight_bytes is None else row.weight_bytes / 1e6
        return [
            row.label,
            _text(metric, ".4f"),
            _text(row.latency_ms, ".2f"),
            _text(row.latency_p90_ms, ".2f"),
            _text(row.samples_per_second, ".1f"),
            _text(row.speed_up, ".2f"),
            _text(row.peak_memory_mib, ".1f"),
            _text(row.transient_memory_mib, ".1f"),
            _text(row.parameters, ",d"),
            _text(size, ".1f"),
            *(_generation_cells(row.generation, self.copy_terabytes_per_second) if self.new_tokens else []),
        ]

    def notes(self) -> list[str]:
        """A line for each variant without figures, then what was measured."""
        lines = [f"{row.label} was {row.status}: {row.reason}" for row in self.rows if row.status != "ok"]
        lines += [f"{row.label} did not generate: {row.no_generation}" for row in self.rows if row.no_generation]
        return [*lines, self.title(), *(f"{name}: {text}" for name, text in self.definitions.items())]

    def title(self) -> str:
        """What was measured on what, in one line."""
        against = f" against {self.dense}" if self.dense and self.dense != self.checkpoint else ""
        dtypes = ", ".join(dict.fromkeys(row.dtype for row in self.rows if row.dtype))
        drawn = "" if self.seed is None else f" drawn by seed {self.seed}"
        fused = [row for row in self.rows if row.variant in ON_BLOCKS and row.status == "ok"]
        options = "".join(f", {row.label} by {self.backend}{_graphs_of(row, self.graph)}" for row in fused)
        options += ", weights offloaded" * self.offload
        samples = f"{counted(self.num_eval_samples, 'sample')} of {self.data}{drawn}"
        return (
            f"{self.checkpoint} ({self.method}){against}: {self.task} on {samples}, batches of {self.batch_size} by at "
            f"most {self.seq_len} tokens, padding {self.padding}, timed passes {self.runs}, "
            f"{dtypes or 'dtype unknown'} on {self.device}{options}"
        )

    def __str__(self) -> str:
        return "\n".join([text_table(self.header(), self._table()), "", *self.notes()])

    def __repr__(self) -> str:
        rows = ", ".join(
            f"{row.label} {row.status if row.latency_ms is None else f'{row.latency_ms:.2f} ms'}" for row in self.rows
        )
        return f"ProfileResult({self.task} of {self.checkpoint} on {self.device}: {rows})"

    def _repr_html_(self) -> str:
        return html_table(f"profile of {self.checkpoint}", self.header(), self._table(), self.notes())

    def _table(self) -> list[list[str]]:
        return [self.cells(row) for row in self.rows]


def _generation_cells(found: Generation | None, copied: float | None) -> list[str]:
    if found is None:
        return ["-"] * 8
    read = found.terabytes_per_second
    return [
        f"{found.prefill_ms:.2f}",
        f"{found.ms_per_token:.2f}",
        f"{found.tokens_per_second:.1f}",
        _text(read, ".3g"),
        _text(100 * read / copied if read is not None and copied else None, ".0f"),
        f"{found.cache_bytes / (1 << 20):.2f}",
        f"{found.prefill_memory_mib:.1f}",
        f"{found.decode_memory_mib:.1f}",
    ]


def _graphs_of(row: VariantRow, asked: str) -> str:
    return f" in {counted(row.cuda_graphs, 'CUDA graph')} ({asked})" if row.cuda_graphs else ""


_Read = TypeVar("_Read", Generation, VariantRow, ProfileResult)


def _row(data: dict[str, Any]) -> VariantRow:
    generation = data.pop("generation")
    return _checked(VariantRow(**data, generation=None if generation is None else _checked(Generation(**generation))))


def _checked(read: _Read) -> _Read:
    """What was read, where each value is of its field's type, so that it can be shown."""
    for name, annotation in typing.get_type_hints(type(read)).items():
        if not _is(getattr(read, name), annotation):
            raise ValueError(f"{name} is {getattr(read, name)!r:.40}")
    return read


def _is(value: Any, annotation: Any) -> bool:
    kind, parts = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if isinstance(annotation, types.UnionType):
        return any(_is(value, part) for part in parts)
    if kind is Literal:
        return value in parts
    if isinstance(value, (int, float)) and not abs(value) <= sys.float_info.max:
        return False
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is Mapping:
        return isinstance(value, dict) and all(_is(item, parts[1]) for item in value.values())
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
