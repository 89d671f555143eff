"""`ranks.json`: the rank of each matrix, as a method chose it, for another run to use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashsvd.common.json_file import read_json
from flashsvd.errors import ConfigError, described

RANKS_FILE = "ranks.json"


def write_ranks(directory: Path, qkv: str, ranks: Mapping[str, int | None]) -> None:
    """Write `ranks.json` into a directory; None is a matrix that stays dense."""
    (directory / RANKS_FILE).write_text(ranks_text(qkv, ranks), encoding="utf-8")


def ranks_text(qkv: str, ranks: Mapping[str, int | None]) -> str:
    """What `ranks.json` holds; None is a matrix that stays dense."""
    return json.dumps({"qkv": qkv, "ranks": dict(ranks)}, indent=2) + "\n"


def read_ranks(file: Path, qkv: str) -> dict[str, int | None]:
    """The ranks in a file; `ranks.plan_given_ranks` holds them against a model.

    Raises:
        ConfigError: there is no such file, it is not one of ours, or it is for the other Q/K/V layout.
    """
    if file.is_dir():
        file = file / RANKS_FILE
    if not file.is_file():
        raise ConfigError(f"there is no file {file}; give a {RANKS_FILE} with --ranks-json")
    try:
        data: Any = read_json(file)
        layout, ranks = data["qkv"], dict(data["ranks"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{file} is no {RANKS_FILE} ({described(error)}); give one that flashsvd compress wrote"
        ) from error
    if layout != qkv:
        raise ConfigError(f"{file} holds ranks for --qkv {layout}; pass that, or another file")
    return ranks
