"""A result as the page shows it: text, JSON, pictures, and the file that describes a checkpoint."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any

from flashsvd.storage.metadata import INFO_FILE
from flashsvd.storage.training_file import CURVE_PNG, TRAINING_FILE
from flashsvd.ui.news import Picture, Shown


def present(results: tuple[Any, ...]) -> Shown:
    """One result, or several of the same kind."""
    data = [result.to_json() for result in results]
    return Shown(
        text="\n\n".join(map(_text, results)),
        data=data[0] if len(data) == 1 else data,
        info=_info_file(results[0]),
        pictures=tuple(_pictures(results)),
        table=_table(results),
    )


def _text(result: Any) -> str:
    """What the command prints in the end; where it has a line for each layer, the log has those."""
    return "\n".join(result.summary()) if hasattr(result, "summary") else str(result)


def _table(results: tuple[Any, ...]) -> str | None:
    from flashsvd.profiling.result import ProfileResult

    return "".join(r._repr_html_() for r in results) if isinstance(results[0], ProfileResult) else None


def _info_file(result: Any) -> tuple[str, bytes] | None:
    """The description of the checkpoint that a job wrote; None where it wrote none."""
    output = getattr(result, "output", None)
    if output is None:
        return None
    for name in (INFO_FILE, TRAINING_FILE):
        if (output / name).is_file():
            return name, (output / name).read_bytes()
    return None


def _pictures(results: tuple[Any, ...]) -> Iterable[Picture]:
    from flashsvd.compression.result import CompressReport
    from flashsvd.profiling.figures import layer_figures, profile_figures
    from flashsvd.profiling.result import ProfileResult
    from flashsvd.training.result import FinetuneResult

    match results[0]:
        case CompressReport() as report:
            info = report.info
            yield from svgs(layer_figures(info.module_ranks, info.module_errors, info.module_places))
        case FinetuneResult() as result:
            if (result.output / CURVE_PNG).is_file():
                yield Picture("Loss and score over the steps", "image/png", (result.output / CURVE_PNG).read_bytes())
        case ProfileResult():
            yield from svgs(profile_figures(results))


def svgs(figures: Mapping[str, Any]) -> Iterable[Picture]:
    """Figures as pictures, by their titles."""
    for title, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg")
        yield Picture(title, "image/svg+xml", buffer.getvalue())
