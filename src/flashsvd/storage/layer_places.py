"""Where a matrix stands in a model, as far as people are shown it: in which layer, and what it is called there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerPlace:
    """Where a matrix stands in a model.

    Attributes:
        layer: index of its layer; -1 where it is in none.
        name: what it is called within the layer, such as `attention.self.query`.
        stack: the stack of layers, such as `encoder` or `decoder`; empty where the model has one only.
    """

    layer: int
    name: str
    stack: str = ""

    @property
    def kind(self) -> str:
        """What it has in common with its like in other layers: its name, with the stack before it."""
        return f"{self.stack} {self.name}" if self.stack else self.name

    @classmethod
    def from_json(cls, data: Any) -> LayerPlace:
        """What `dataclasses.asdict` made of a place.

        Raises:
            TypeError: `data` is something else.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"{data!r} is not a place")
        place = cls(**data)
        if type(place.layer) is not int or not all(isinstance(text, str) for text in (place.name, place.stack)):
            raise TypeError(f"{data!r} is not a place")
        return place


def read_places(data: Mapping[str, Any]) -> dict[str, LayerPlace]:
    """Places by path, of which `dataclasses.asdict` made `data`.

    Raises:
        TypeError: one of them is something else.
    """
    return {path: LayerPlace.from_json(place) for path, place in data.items()}


def place_of(path: str, places: Mapping[str, LayerPlace]) -> LayerPlace:
    """The place of the matrix at a path.

    Args:
        places: those that are known, by path. Checkpoints written before have none, and what stands in for one is read
            from the path: its last number is the layer, and what follows it the name.
    """
    if path in places:
        return places[path]
    parts = path.split(".")
    number = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return LayerPlace(int(parts[number]) if number >= 0 else -1, ".".join(parts[number + 1 :]))
