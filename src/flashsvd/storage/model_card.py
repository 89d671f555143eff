"""A checkpoint's `README.md`: what it is and how it is loaded, in the form that the hub reads."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashsvd.shown import shown
from flashsvd.storage.description import describe
from flashsvd.storage.metadata import CompressionInfo

CARD_FILE = "README.md"

_PIPELINES = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}


def model_card(info: CompressionInfo, name: str, weight_bytes: int, *, sentence_encoder: bool) -> str:
    """The card's text.

    Args:
        name: what the checkpoint is called.
        weight_bytes: the size of its weight files.
        sentence_encoder: whether sentence-transformers' files lie beside it.
    """
    info, name = _without_directories(info), shown(name)
    base = shown(info.base_model) or "an unknown model"
    return "\n".join(
        [
            "---",
            *_front_matter(info, sentence_encoder),
            "---",
            "",
            f"# {name}",
            "",
            f"This is {base}, compressed with [flashsvd](https://pypi.org/project/flashsvd/): a factored linear layer "
            "holds two thin matrices U and V in place of its weight W, with U V close to W.",
            "",
            "```python",
            "import flashsvd",
            "",
            f"model = flashsvd.load_compressed({name!r})",
            "```",
            "",
            "After `import flashsvd` transformers' own `from_pretrained` loads it too. Without it loading fails with a "
            "shape mismatch at `weight`, on purpose: a program that does not know the factors would leave the layers "
            "random. `flashsvd.export_dense` writes an ordinary dense model for such programs.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {what} | {_cell(value)} |" for what, value in describe(info, weight_bytes)),
            "",
        ]
    )


def _front_matter(info: CompressionInfo, sentence_encoder: bool) -> list[str]:
    """YAML, whose strings are written as JSON's, which YAML reads."""
    lines = ["library_name: flashsvd"]
    if _is_hub_name(info.base_model):
        lines += [f"base_model: {json.dumps(info.base_model)}", "base_model_relation: quantized"]
    pipelines = [kind for ending, kind in _PIPELINES.items() if info.architecture.endswith(ending)]
    pipeline = "sentence-similarity" if sentence_encoder else next(iter(pipelines), "feature-extraction")
    lines.append(f"pipeline_tag: {pipeline}")
    tags = ["flashsvd", "low-rank", "svd", info.method, info.model_type]
    tags += ["sentence-transformers"] if sentence_encoder else []
    return [*lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags)]


def _is_hub_name(name: str) -> bool:
    """Whether a model that was found under this name was found on the hub."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def _without_directories(info: CompressionInfo) -> CompressionInfo:
    """Models and data by their names alone: the directories above them say something of a machine, not of the model."""
    base = info.base_model if _is_hub_name(info.base_model) else Path(info.base_model).name
    ranks_json = Path(info.ranks_json).name if info.ranks_json else None
    calibration = _named(info.calibration) if info.calibration else None
    trainings = tuple(map(_named, info.trainings))
    return dataclasses.replace(
        info, base_model=base, ranks_json=ranks_json, calibration=calibration, trainings=trainings
    )


def _named(record: Mapping[str, Any]) -> dict[str, Any]:
    local = {key: Path(record[key]).name for key in ("data", "teacher") if isinstance(record.get(key), str)}
    return {**record, **{key: name for key, name in local.items() if not record[key].startswith("hub:")}}


def _cell(text: str) -> str:
    return shown(text).replace("|", "\\|")
