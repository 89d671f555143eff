"""`compression_info.json`: what was asked, what was done, and with which software."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashsvd.common.json_file import read_json
from flashsvd.errors import CheckpointError, described
from flashsvd.storage.layer_places import LayerPlace, read_places

INFO_FILE = "compression_info.json"
FORMAT_VERSION = 1

# The fields that nobody can tell from a model and its config.
ABOUT = (
    "method", "method_options", "ranks", "ratio", "ranks_json", "rank_steps", "rank_search", "base_model", "task",
    "calibration", "calib_inputs", "refine_steps", "untrained", "versions", "git_commit", "timestamp", "trainings",
    "dense_bytes",
)  # fmt: skip
# What files written before lack, and then have.
_LATER: dict[str, Any] = {
    "trainings": [], "module_errors": {}, "module_places": {}, "digests": {}, "rank_steps": None, "rank_search": None,
    "factors": "float", "calib_inputs": "dense", "refine_steps": 0,
}  # fmt: skip
# Characters of a name, a path or the like.
_LONGEST_TEXT = 10_000


@dataclass(frozen=True)
class CompressionInfo:
    """The contents of `compression_info.json`.

    Attributes:
        method_options: the method's own options as they were used.
        ranks: the rank asked for each role, None for all where a ratio was asked.
        ratio: the fraction of the factored layers' parameters to keep, None where ranks were asked.
        rank_steps: `fast` or `fine`, the steps of ranks that were looked for; None where all were given. Files written
            before lack it, and then it is None.
        rank_search: how those were divided: `uniform`, by the `loss`, `learned`, or by `sensitivity`, as with
            `--asvd-search`. It is None where `rank_steps` is, and in files written before it was there.
        ranks_json: the file that gave the rank of each matrix, None where none did.
        factors: how the factors are kept, `float` in the dtype of the model or `int8` as integers with a scale for each
            row, which `parameters` does not count. Files written before lack it, and then it is `float`.
        module_ranks: the rank each target really has, by module path; None where it stayed dense.
        module_errors: the relative error of each target's weights as they were compressed, ||W - U V||_F / ||W||_F, by
            module path; None where it stayed dense. Files written before lack it, and then it is empty.
        module_places: the layer of each target and its name there, by module path. Files written before lack it, and
            then it is empty.
        calibration: what was calibrated on, and under `rank_search` or `refinement` what ranks were chosen or layers
            refined on where that was something else; None where nothing was.
        calib_inputs: `dense` or `compressed`, whether each layer was calibrated on what the layers before it give in
            the dense model or once they are compressed. Files written before lack it, and then it is `dense`.
        refine_steps: for how many steps the factors of each layer were trained to give what the dense layer gave. Files
            written before lack it, and then it is 0.
        parameters: counts: `dense` and `compressed` of the whole model, `target_dense` and `target_compressed` of
            the targets alone (biases not counted).
        dense_bytes: size of the dense model's weight files.
        untrained: parameters the base model had no weights for, so that they are random (a new head, as a rule).
        digests: SHA-256 of each weight and tokenizer file, by its path inside the directory. Files written before lack
            it, and then it is empty.
        trainings: what the factors were trained on since, the last one last, as `TrainingRecord` has it. Files written
            before there was any training lack it.
    """

    method: str
    method_options: Mapping[str, Any]
    ranks: Mapping[str, int | None]
    ratio: float | None
    ranks_json: str | None
    module_ranks: Mapping[str, int | None]
    qkv: str
    base_model: str
    task: str | None
    calibration: Mapping[str, Any] | None
    model_type: str
    architecture: str
    dtype: str
    parameters: Mapping[str, int]
    dense_bytes: int
    untrained: tuple[str, ...]
    versions: Mapping[str, str | None]
    git_commit: str | None
    timestamp: str
    trainings: tuple[Mapping[str, Any], ...] = ()
    module_errors: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    module_places: Mapping[str, LayerPlace] = dataclasses.field(default_factory=dict)
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rank_steps: str | None = None
    rank_search: str | None = None
    factors: str = "float"
    calib_inputs: str = "dense"
    refine_steps: int = 0
    format_version: int = FORMAT_VERSION

    def about(self) -> dict[str, Any]:
        """What of it is not in the model and its config, for the config to carry: JSON."""
        return {name: plain(getattr(self, name)) for name in ABOUT}

    def write(self, directory: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False)
        (directory / INFO_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> CompressionInfo:
        """Read what `write` wrote; raises as `read_file` does."""
        return cls.read_file(directory / INFO_FILE)

    @classmethod
    def read_file(cls, path: Path) -> CompressionInfo:
        """Raises CheckpointError where the file is not JSON, of another format, incomplete, or nonsense."""
        try:
            data: Any = read_json(path)
            version = data["format_version"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path} cannot be read ({described(error)}); compress the model again") from error
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{path} has format {version!r}, this flashsvd reads {FORMAT_VERSION}; upgrade it")
        data = _LATER | data
        names = {field.name for field in dataclasses.fields(cls)}
        if missing := sorted(names - set(data)):
            raise CheckpointError(f"{path} lacks {', '.join(missing)}; compress the model again")
        check_fields(data, str(path))
        known = {name: data[name] for name in names}
        known |= {name: tuple(data[name]) for name in ("untrained", "trainings")}
        return cls(**(known | {"module_places": read_places(data["module_places"])}))


def check_fields(data: Mapping[str, Any], where: str) -> None:
    """Demand that what is there of the fields of a `CompressionInfo` can be.

    Raises:
        CheckpointError: naming the first field that cannot be.
    """
    for name, fits in _CHECKS.items():
        if name in data and not fits(data[name]):
            raise CheckpointError(f"{where} has {name} {data[name]!r:.60}, which cannot be; compress again")


Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_TEXT


def _count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**63


def _ratio(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1


def _error(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _place(value: Any) -> bool:
    try:
        LayerPlace.from_json(value)
    except TypeError:
        return False
    return True


def _or_null(fits: Check) -> Check:
    return lambda value: value is None or fits(value)


def _map_of(fits: Check, *required: str) -> Check:
    return lambda data: isinstance(data, dict) and all(map(fits, data.values())) and set(required) <= set(data)


_CHECKS: dict[str, Check] = {
    **dict.fromkeys(
        ("method", "qkv", "factors", "base_model", "model_type", "architecture", "dtype", "timestamp", "calib_inputs"),
        _text,
    ),
    **dict.fromkeys(("task", "git_commit", "ranks_json", "rank_steps", "rank_search"), _or_null(_text)),
    "method_options": _map_of(lambda value: True),
    "ranks": _map_of(_or_null(_count)),
    "ratio": _or_null(_ratio),
    "module_ranks": _map_of(_or_null(_count)),
    "module_errors": _map_of(_or_null(_error)),
    "module_places": _map_of(_place),
    "calibration": _or_null(_map_of(lambda value: True)),
    "parameters": _map_of(_count, "dense", "compressed", "target_dense", "target_compressed"),
    "dense_bytes": _count,
    "refine_steps": lambda value: type(value) is int and 0 <= value < 2**63,
    "untrained": lambda value: isinstance(value, list) and all(map(_text, value)),
    "versions": _map_of(_or_null(_text)),
    "digests": _map_of(_text),
    "trainings": lambda value: isinstance(value, list) and all(isinstance(entry, dict) for entry in value),
}


def plain(value: Any) -> Any:
    """A value, or a dataclass, without paths and tuples, which JSON does not have."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
