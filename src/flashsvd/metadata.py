"""`compression_info.json`: what was asked, what was done, and with which software."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashsvd.errors import CheckpointError

INFO_FILE = "compression_info.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class CompressionInfo:
    """The contents of `compression_info.json`.

    Attributes:
        ranks: the rank asked for each role, None for all where a ratio was asked.
        ratio: the fraction of the factored layers' parameters to keep, None where ranks were asked.
        module_ranks: the rank each target really has, by module path; None where it stayed dense.
        parameters: counts: `dense` and `compressed` of the whole model, `target_dense` and `target_compressed` of
            the targets alone (biases not counted).
        dense_bytes: size of the dense model's weights in the checkpoint's dtype.
        untrained: parameters the base model had no weights for, so that they are random (a new head, as a rule).
    """

    method: str
    ranks: Mapping[str, int | None]
    ratio: float | None
    module_ranks: Mapping[str, int | None]
    qkv: str
    base_model: str
    task: str | None
    model_type: str
    architecture: str
    dtype: str
    parameters: Mapping[str, int]
    dense_bytes: int
    untrained: tuple[str, ...]
    versions: Mapping[str, str | None]
    git_commit: str | None
    timestamp: str
    format_version: int = FORMAT_VERSION

    def write(self, directory: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False)
        (directory / INFO_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> CompressionInfo:
        """Raises CheckpointError where the file is missing, no JSON, of a newer format, or incomplete."""
        path = directory / INFO_FILE
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is not a directory; give one that `flashsvd compress` wrote")
        if not path.is_file():
            raise CheckpointError(f"{directory} has no {INFO_FILE}; give a directory that `flashsvd compress` wrote")
        try:
            data: Any = json.loads(path.read_text(encoding="utf-8"))
            version = data["format_version"]
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path} cannot be read ({error!r}); compress the model again") from error
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{path} has format {version!r}, this flashsvd reads {FORMAT_VERSION}; upgrade it")
        names = {field.name for field in dataclasses.fields(cls)}
        if missing := sorted(names - set(data)):
            raise CheckpointError(f"{path} lacks {', '.join(missing)}; compress the model again")
        known = {name: data[name] for name in names}
        return cls(**(known | {"untrained": tuple(data["untrained"])}))
