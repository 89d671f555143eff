"""Which files of a directory flashsvd wrote, so that replacing it destroys nothing of anybody else's."""

from __future__ import annotations

import re
from pathlib import Path

from flashsvd.errors import FlashSVDError, ModelError
from flashsvd.storage.companions import MODULES_FILE, CompanionPlaces, own_names
from flashsvd.storage.digests import digests_of
from flashsvd.storage.metadata import INFO_FILE, CompressionInfo
from flashsvd.storage.model_card import CARD_FILE
from flashsvd.storage.rank_file import RANKS_FILE
from flashsvd.storage.training_file import CURVE_CSV, CURVE_PNG, TRAINING_FILE
from flashsvd.storage.verify import INDEX

STATE_DICT_FILE = "flashsvd_state_dict.pt"
EXPORT_MARKER = "flashsvd_dense_export.json"
STATISTICS_FILE = "statistics.json"
# By the file that tells a directory of each kind from all others: one takes the place of another of its kind only.
KINDS = {
    INFO_FILE: "a compressed checkpoint",
    TRAINING_FILE: "a dense model that flashsvd trained",
    EXPORT_MARKER: "a dense export",
    STATISTICS_FILE: "calibration statistics",
}
_NAMES = (
    INFO_FILE, RANKS_FILE, STATE_DICT_FILE, EXPORT_MARKER, STATISTICS_FILE, INDEX, "config.json",
    "generation_config.json", TRAINING_FILE, CURVE_CSV, CURVE_PNG, CARD_FILE,
)  # fmt: skip
# Weights, whole or in shards, as transformers names them, and calibration statistics.
_SHARD = re.compile(r"(model(-\d{5}-of-\d{5})?|statistics-\d{5})\.safetensors")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx")


def kind_of(directory: Path) -> str | None:
    """What flashsvd wrote a directory as, of `KINDS`; None where it wrote none."""
    return next((kind for marker, kind in KINDS.items() if (directory / marker).is_file()), None)


def is_model_file(path: Path) -> bool:
    """Whether a path in a model's directory has a name that its weights, its config or its tokenizer may have."""
    if not (path.parent / "config.json").is_file():
        return False
    return path.name in _NAMES or path.suffix in _WEIGHTS or path.name in own_names(path.parent)


def _is_card_as_written(directory: Path) -> bool:
    """Whether nobody has edited the model card since it was written."""
    try:
        written = CompressionInfo.read(directory).digests
    except FlashSVDError:
        return False
    return digests_of(directory, [CARD_FILE])[CARD_FILE] == written.get(CARD_FILE)


def foreign_file(directory: Path) -> str | None:
    """A file, link or folder in one of our directories that is not of a kind flashsvd writes; None where all are."""
    try:
        companions = CompanionPlaces.of(directory)
    except ModelError:
        return MODULES_FILE
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        if path.is_dir() and not path.is_symlink():
            known = str(relative) in companions.folders
        else:
            known = companions.has(relative) or (
                len(relative.parts) == 1 and (relative.name in _NAMES or _SHARD.fullmatch(relative.name) is not None)
            )
        if relative == Path(CARD_FILE):
            known = _is_card_as_written(directory)
        if not known:
            return str(relative)
    return None
