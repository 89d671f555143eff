"""What a compression did, for people."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashsvd.common.tables import html_table
from flashsvd.compression.factorize import FactoredMatrix
from flashsvd.compression.walks.walk import Refinement
from flashsvd.lowrank.ranks import ALIGNED, ASKED_DENSE, FAST_DENSE, SEARCHED_DENSE
from flashsvd.models.loading import shortened
from flashsvd.shown import on_one_line
from flashsvd.storage.metadata import CompressionInfo, plain

log = logging.getLogger("flashsvd")

# A share of the parameters that was asked for and not kept, from which on it is said why.
NOTABLE = 0.005
_WHY_LESS: dict[str | None, str] = {
    "fine": f"ranks go in steps of {ALIGNED} from {8 * ALIGNED} on, and with the next step matrices would hold more "
    "than that, or no fewer parameters than dense ones",
    "fast": "no ranks that kernels run as fast come closer, or matrices would hold no fewer parameters than dense "
    f"ones; --rank-steps fine divides in steps of {ALIGNED} from {8 * ALIGNED} on",
}


@dataclass(frozen=True, repr=False)
class CompressReport:
    """The result of `run_compress`.

    Attributes:
        output: the checkpoint's directory.
        info: what its `compression_info.json` says.
        matrices: what became of each target.
        bytes_on_disk: size of its weight files.
        seconds: wall time of the factorisation.
        refinements: what training did to each layer, empty where none was asked for.
    """

    output: Path
    info: CompressionInfo
    matrices: tuple[FactoredMatrix, ...]
    bytes_on_disk: int
    seconds: float
    refinements: tuple[Refinement, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Every field as a value that JSON has."""
        as_json: dict[str, Any] = plain(self)
        return as_json

    def __str__(self) -> str:
        groups = (group_line(group) for group in group_matrices(self.matrices))
        return "\n".join([*groups, *map(str, self.refinements), *self.summary()])

    def __repr__(self) -> str:
        p = self.info.parameters
        return f"CompressReport({self.info.method}: {p['dense']:,} -> {p['compressed']:,} parameters, in {self.output})"

    def _repr_html_(self) -> str:
        caption = f"{self.info.base_model}, {self.info.method}, Q/K/V {self.info.qkv}"
        header = ["layer", "role", "rank", "parameters", "kept", "relative error", "remarks"]
        rows = [_Line.of(group) for group in group_matrices(self.matrices)]
        cells = [
            [f"{r.stack} {r.layer}".strip(), r.role, r.ranks, f"{r.before:,}", f"{r.after:,}", r.errors, r.remarks]
            for r in rows
        ]
        return html_table(caption, header, cells, [*map(str, self.refinements), *self.summary()])

    def summary(self) -> list[str]:
        """The closing lines: totals, what stayed dense, where the checkpoint is."""
        p = self.info.parameters
        lines = [
            f"factored layers: {p['target_dense']:,} -> {p['target_compressed']:,} parameters "
            f"({p['target_compressed'] / p['target_dense']:.1%} kept)",
            f"whole model:     {p['dense']:,} -> {p['compressed']:,} parameters "
            f"({p['compressed'] / p['dense']:.1%} kept), weights "
            f"{self.info.dense_bytes / 1e6:.1f} -> {self.bytes_on_disk / 1e6:.1f} MB"
            + (f", factors in {self.info.factors}" if self.info.factors != "float" else ""),
        ]
        if self.info.rank_steps is not None:
            search = "" if self.info.rank_search == "uniform" else f", rank search {self.info.rank_search}"
            lines.append(f"ranks:           in {self.info.rank_steps} steps{search}")
        ratio, kept = self.info.ratio, p["target_compressed"] / p["target_dense"]
        if ratio is not None and kept < ratio - NOTABLE:
            lines.append(f"asked was {ratio:.1%}: {_WHY_LESS[self.info.rank_steps]}")
        for reason, count in Counter(_why_dense(m) for m in self.matrices if m.rank is None).items():
            lines.append(f"{count} of {len(self.matrices)} matrices stayed dense: {reason}")
        if noted := [m for m in self.matrices if m.note]:
            lines.append(f"{len(noted)} of {len(self.matrices)} matrices had degenerate statistics, see above")
        if unchanged := [r for r in self.refinements if r.after >= r.before]:
            lines.append(f"{len(unchanged)} of {len(self.refinements)} layers were not refined: training did not help")
        if self.info.untrained:
            lines.append(
                f"{shortened(self.info.untrained)} had no trained weights: they are random, train them before use"
            )
        lines.append(f"factored in {self.seconds:.1f} s, saved to {on_one_line(str(self.output))}")
        return lines


def _why_dense(matrix: FactoredMatrix) -> str:
    """The reason without the numbers of this matrix."""
    chosen = (ASKED_DENSE, FAST_DENSE, SEARCHED_DENSE)
    return matrix.reason if matrix.reason in chosen else "factors would not be smaller"


class GroupLog:
    """A progress bar over the matrices, and a log line for each layer group as it is complete."""

    def __init__(self, total: int) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(total=total, desc="factoring", unit="matrix")
        self._group: list[FactoredMatrix] = []

    def __enter__(self) -> GroupLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._bar.close()

    def __call__(self, matrix: FactoredMatrix) -> None:
        if self._group and _group_of(self._group[0]) != _group_of(matrix):
            self._flush()
        self._group.append(matrix)
        self._bar.update()

    def _flush(self) -> None:
        if self._group:
            log.info("%s", group_line(self._group))
        self._group = []


def group_matrices(matrices: Sequence[FactoredMatrix]) -> list[list[FactoredMatrix]]:
    """Matrices of the same layer and role together, in order."""
    groups: dict[tuple[str, int, str], list[FactoredMatrix]] = {}
    for matrix in matrices:
        groups.setdefault(_group_of(matrix), []).append(matrix)
    return list(groups.values())


def _group_of(matrix: FactoredMatrix) -> tuple[str, int, str]:
    return matrix.stack, matrix.layer, matrix.role


def group_line(group: Sequence[FactoredMatrix]) -> str:
    """One line on a layer group: ranks, parameters, relative errors, what stayed dense and why."""
    one = _Line.of(group)
    line = (
        f"{one.stack} layer".lstrip()
        + f" {one.layer:>2} {one.role:<4} rank {one.ranks:<12} {one.before:>11,} -> {one.after:>11,}"
    )
    line += f"  error {one.errors}" if one.errors else ""
    return f"{line}  {one.remarks}" if one.remarks else line


@dataclass(frozen=True)
class _Line:
    """What is said of a layer group.

    Attributes:
        before, after: parameters of the dense and of the kept matrices.
        errors: relative ones, empty where all stayed dense.
    """

    stack: str
    layer: int
    role: str
    ranks: str
    before: int
    after: int
    errors: str
    remarks: str

    @classmethod
    def of(cls, group: Sequence[FactoredMatrix]) -> _Line:
        ranks = [("dense" if m.rank is None else f"{m.rank}x{m.heads}" if m.heads else str(m.rank)) for m in group]
        errors = [f"{m.error:.3f}" for m in group if m.rank is not None]
        reasons = sorted({m.reason for m in group if m.rank is None})
        notes = sorted({m.note for m in group if m.note})
        return cls(
            group[0].stack,
            group[0].layer,
            group[0].role,
            _compact(ranks),
            sum(m.dense_parameters for m in group),
            sum(m.kept_parameters for m in group),
            _compact(errors) if errors else "",
            "  ".join([*(f"dense: {reason}" for reason in reasons), *(f"note: {note}" for note in notes)]),
        )


def _compact(values: Sequence[str]) -> str:
    return values[0] if len(set(values)) == 1 else ", ".join(values)
