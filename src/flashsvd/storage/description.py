"""What a compressed checkpoint is, in rows of a name and a text, for `flashsvd info` and for its model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashsvd.storage.layer_places import LayerPlace, place_of
from flashsvd.storage.metadata import CompressionInfo


def describe(c: CompressionInfo, weight_bytes: int) -> list[tuple[str, str]]:
    """The rows, of which some are there only where there is something to say.

    Args:
        weight_bytes: the size of its weight files.
    """
    p = c.parameters
    rows = [
        ("base model", c.base_model or "unknown"),
        ("architecture", f"{c.architecture} ({c.model_type})"),
        ("task", c.task or "none given"),
        ("method", ", ".join([c.method, *_options(c.method_options), f"Q/K/V {c.qkv}"])),
        ("asked", _asked(c)),
        ("ranks", _rank_summary(c.module_ranks, c.module_places)),
        ("factored layers", _reduction(p["target_dense"], p["target_compressed"], "parameters")),
        ("whole model", _reduction(p["dense"], p["compressed"], "parameters")),
        ("weights", f"{_reduction(c.dense_bytes, weight_bytes, 'bytes')}, {_dtypes(c)}"),
        ("made", _made(c)),
    ]
    if c.calibration:
        rows.append(("calibrated on", _calibration(c.calibration) + _inputs(c)))
    if c.refine_steps:
        rows.append(("refined", f"{c.refine_steps} steps a layer, towards what the dense layer gave"))
    rows += [("trained", _training(training)) for training in c.trainings]
    if c.untrained:
        rows.append(("random weights", ", ".join(c.untrained)))
    return rows


def _asked(c: CompressionInfo) -> str:
    steps = f", ranks in {c.rank_steps} steps" if c.rank_steps else ""
    search = f", rank search {c.rank_search}" if c.rank_search else ""
    return _asked_size(c) + steps + search


def _asked_size(c: CompressionInfo) -> str:
    if c.ratio is not None:
        return f"keep {c.ratio:g} of the factored layers' parameters"
    if c.ranks_json is not None:
        return f"the ranks of {c.ranks_json}"
    if not c.ranks:
        return "unknown"
    return ", ".join(f"{role} {rank}" for role, rank in c.ranks.items())


def _made(c: CompressionInfo) -> str:
    if not c.versions:
        return "unknown: another program saved it, and its config does not say"
    return f"{c.timestamp} by flashsvd {c.versions.get('flashsvd')}, commit {c.git_commit or 'unknown'}"


def _dtypes(c: CompressionInfo) -> str:
    return c.dtype if c.factors == "float" else f"{c.dtype} with factors in {c.factors}"


def _options(options: Mapping[str, Any]) -> list[str]:
    return [f"{name.replace('_', ' ')} {value}" for name, value in options.items() if value is not False]


def _calibration(about: Mapping[str, Any]) -> str:
    return (
        f"{about.get('samples')} samples, {about.get('tokens')} tokens of {about.get('data')}, seed {about.get('seed')}"
    )


def _inputs(c: CompressionInfo) -> str:
    return ", each layer's inputs from compressed layers" if c.calib_inputs == "compressed" else ""


def _training(about: Mapping[str, Any]) -> str:
    """`sst2, 3 epochs, learning rate 5e-05, seed 0: accuracy 0.8761`."""
    frozen = about.get("frozen") if isinstance(about.get("frozen"), list) else []
    parts = [
        str(about.get("task") or about.get("mode")),
        f"{about.get('epochs')} epochs of {about.get('data')}",
        f"learning rate {about.get('learning_rate')}",
        *([f"teacher {about['teacher']}"] if about.get("teacher") else []),
        *([f"frozen {', '.join(map(str, frozen))}"] if frozen else []),
        f"seed {about.get('seed')}",
    ]
    score = about.get("score")
    result = f": {about.get('metric')} {score:.4f}" if isinstance(score, (int, float)) else ""
    return ", ".join(parts) + result


def _rank_summary(module_ranks: Mapping[str, int | None], places: Mapping[str, LayerPlace]) -> str:
    """Ranks by what the matrices are called within a layer: `attention.self.query 96, output.dense 152`."""
    by_name: dict[str, list[int | None]] = {}
    for path, rank in module_ranks.items():
        by_name.setdefault(place_of(path, places).kind, []).append(rank)
    return ", ".join(f"{name} {_range(ranks)}" for name, ranks in by_name.items())


def _range(ranks: list[int | None]) -> str:
    numbers = sorted({rank for rank in ranks if rank is not None})
    if not numbers:
        return "dense"
    text = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
    dense = sum(rank is None for rank in ranks)
    return f"{text} ({dense} dense)" if dense else text


def _reduction(before: int, after: int, unit: str) -> str:
    share = f" ({after / before:.1%})" if before else ""
    return f"{before:,} -> {after:,} {unit}{share}"
