"""`--recipe`: options that go together under one name, of which each that is given by itself holds instead.

`best` is what scored best of all that was measured (docs/measurements.md), `quick` what comes closest to it without
going through the model layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PLAIN: Mapping[str, Any] = {
    "method": "standard",
    "rank_steps": "fast",
    "rank_search": None,
    "calib_inputs": "dense",
    "refine": 0,
}
_SEARCHED: Mapping[str, Any] = {"method": "drone", "rank_steps": "fine", "rank_search": "loss"}
_BY_NAME: Mapping[str, Mapping[str, Any]] = {
    "best": {**_SEARCHED, "calib_inputs": "compressed", "refine": 360},
    "quick": {**_SEARCHED, "calib_inputs": "dense", "refine": 0},
}
RECIPES = tuple(_BY_NAME)


def recipe(name: object, *, finds_ranks: bool) -> Mapping[str, Any]:
    """The value of each option of a recipe by the option's name; as without one for a name that is not known.

    Args:
        finds_ranks: whether there are ranks to look for; options of a search are left as without a recipe otherwise.
    """
    options = _BY_NAME.get(name, _PLAIN) if isinstance(name, str) else _PLAIN
    if finds_ranks:
        return options
    return {**options, "rank_steps": _PLAIN["rank_steps"], "rank_search": _PLAIN["rank_search"]}
