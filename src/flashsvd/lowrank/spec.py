"""What a checkpoint's config says of its factored modules: data, which other programs can read without torch.

The `quantization_config` of a checkpoint is

    {"quant_method": "flashsvd", "format_version": 1, "modules": {path: description, ...}}

with one of these descriptions for each factored module, by its path in the model. W [in, out] is what the module
multiplies its input by:

    {"rank": r}               W ~ U V. `path.u.weight` [r, in] is U transposed, `path.v.weight` [out, r] V transposed,
                              and `path.v.bias` [out] the bias, where the layer has one.
    {"rank": r, "heads": h}   Each of h equal blocks of columns has factors of its own: `path.u.weight` [h * r, in],
                              `path.v.weight` [h, out / h, r], `path.v.bias` [out].
    {"parts": [...]}          The columns of W are those of several projections, which are the modules `path.name`:
                              {"name": name, ...} with one of the above, or with "rank": null for a dense
                              `path.name.weight`. Without more, the parts are equal shares of the columns in this order.

Format 2 adds to a module of parts the `shares` and `groups` of columns that are divided otherwise (`columns.Columns`).
Format 3 adds an empty `path.weight` [0] beside the tensors of each factored module and part, by which a program that
does not know the format fails to load the dense layer it takes the module for. It also has, under `about`, what is
known of the compression beyond the modules. Format 4 has factors as integers: with `"factors": "int8"` in a description

    `path.u.weight` and `path.v.weight` are int8, and beside them lie `path.u.scale` and `path.v.scale`, fp32, of the
    weight's shape without its last dimension: a scale for each row. What is multiplied with is scale * weight.

Every checkpoint is written in the last format.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from flashsvd.errors import CheckpointError
from flashsvd.lowrank.columns import Columns

QUANT_METHOD = "flashsvd"
FORMAT_VERSION = 4

# How the numbers of factors are kept: in the model's dtype, or as integers with a scale for each row.
FactorKind = Literal["float", "int8"]
FACTOR_KINDS: tuple[FactorKind, ...] = get_args(FactorKind)


@dataclass(frozen=True)
class LayerSpec:
    """What the checkpoint says of one factored layer; the rest follows from the dense layer it replaces."""

    rank: int
    heads: int | None = None
    factors: FactorKind = "float"

    def to_json(self) -> dict[str, Any]:
        heads = {} if self.heads is None else {"heads": self.heads}
        return {"rank": self.rank} | heads | ({} if self.factors == "float" else {"factors": self.factors})

    @classmethod
    def from_json(cls, name: str, data: Any) -> LayerSpec:
        """Read what `to_json` writes.

        Args:
            name: the path of the layer, for the errors.

        Raises:
            CheckpointError: `data` is something else, or says more than this flashsvd knows.
        """
        if isinstance(data, Mapping):
            _refuse_unknown(name, data, ("rank", "heads", "factors"))
        counts = {key: value for key, value in data.items() if key != "factors"} if isinstance(data, Mapping) else {}
        if "rank" not in counts or not all(map(_is_count, counts.values())):
            raise CheckpointError(f"config.json describes {name} as {data!r}, which is no factored layer")
        factors = data.get("factors", "float")
        if factors not in FACTOR_KINDS:
            raise CheckpointError(
                f"config.json describes {name} with factors {factors!r}, and this flashsvd knows "
                f"{' and '.join(FACTOR_KINDS)}; upgrade flashsvd"
            )
        return cls(**counts, factors=factors)


@dataclass(frozen=True)
class JoinedSpec:
    """What the checkpoint says of a module with parts.

    Attributes:
        parts: the name of each and its factors' sizes, None for a part that stayed dense.
        columns: which columns of the module each part has; None gives them equal shares, in their order.
    """

    parts: tuple[tuple[str, LayerSpec | None], ...]
    columns: Columns | None = None

    def __post_init__(self) -> None:
        if self.columns == Columns.equal(len(self.parts)):
            object.__setattr__(self, "columns", None)

    def to_json(self) -> dict[str, Any]:
        # A list, since transformers sorts the keys of its config and the order of the parts is that of the columns.
        parts = [{"name": name} | (spec.to_json() if spec else {"rank": None}) for name, spec in self.parts]
        return {"parts": parts} | (self.columns.to_json() if self.columns else {})

    @classmethod
    def from_json(cls, name: str, data: Any) -> JoinedSpec:
        """Read what `to_json` writes.

        Args:
            name: the path of the module, for the errors.

        Raises:
            CheckpointError: `data` is something else, or says more than this flashsvd knows.
        """
        if isinstance(data, Mapping):
            _refuse_unknown(name, data, ("parts", "shares", "groups"))
        parts = data.get("parts") if isinstance(data, Mapping) else None
        if not isinstance(parts, list) or len(parts) < 2 or not all(isinstance(part, Mapping) for part in parts):
            raise CheckpointError(f"config.json describes {name} as {data!r}, which is no module of several parts")
        names = [part.get("name") for part in parts]
        if not all(isinstance(n, str) and n.isidentifier() for n in names) or len(set(names)) < len(names):
            raise CheckpointError(f"config.json describes {name} with parts named {names!r}; compress the model again")
        specs = tuple((part["name"], _part_from_json(f"{name}.{part['name']}", part)) for part in parts)
        return cls(specs, _columns_from_json(name, data, len(parts)))


ModuleSpec: TypeAlias = LayerSpec | JoinedSpec


def spec_from_json(name: str, data: Any) -> ModuleSpec:
    """What `data` says of the factored module at the path `name`.

    Raises:
        CheckpointError: it describes no factored module, or says more than this flashsvd knows.
    """
    if isinstance(data, Mapping) and "parts" in data:
        return JoinedSpec.from_json(name, data)
    return LayerSpec.from_json(name, data)


def read_modules(modules: Any, version: Any, others: Collection[str] = ()) -> dict[str, ModuleSpec]:
    """The factored modules that a `quantization_config` describes, by path.

    Args:
        modules: its `modules`.
        version: its `format_version`.
        others: the names of what else it holds.

    Raises:
        CheckpointError: the format is not known, it holds what this flashsvd does not know, or a description is wrong.
    """
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"config.json is of format {version!r}, this flashsvd reads 1 to {FORMAT_VERSION}; upgrade flashsvd"
        )
    if others:
        raise CheckpointError(
            f"quantization_config in config.json holds {', '.join(sorted(others))}, which this flashsvd does not know; "
            "upgrade flashsvd"
        )
    if not isinstance(modules, Mapping):
        raise CheckpointError("config.json has no `modules` map in quantization_config; compress the model again")
    return {path: spec_from_json(path, spec) for path, spec in modules.items()}


def layer_specs(specs: Mapping[str, ModuleSpec]) -> dict[str, LayerSpec]:
    """The factored layers by path, those of joined modules among them."""
    layers: dict[str, LayerSpec] = {}
    for path, spec in specs.items():
        if isinstance(spec, JoinedSpec):
            layers |= {f"{path}.{name}": part for name, part in spec.parts if part is not None}
        else:
            layers[path] = spec
    return layers


def factor_kind(specs: Mapping[str, ModuleSpec]) -> FactorKind:
    """How the factors of a model are kept: as integers where those of any layer are."""
    return "int8" if any(layer.factors == "int8" for layer in layer_specs(specs).values()) else "float"


def _refuse_unknown(name: str, data: Mapping[Any, Any], known: Collection[str]) -> None:
    if unknown := sorted(str(key) for key in data if key not in known):
        raise CheckpointError(
            f"config.json describes {name} as {data!r}, and this flashsvd does not know {', '.join(unknown)}; "
            "upgrade flashsvd"
        )


def _part_from_json(name: str, data: Mapping[str, Any]) -> LayerSpec | None:
    rest = {key: value for key, value in data.items() if key != "name"}
    return None if rest == {"rank": None} else LayerSpec.from_json(name, rest)


def _columns_from_json(name: str, data: Mapping[str, Any], count: int) -> Columns | None:
    if "shares" not in data and "groups" not in data:
        return None
    shares, groups = data.get("shares", [1] * count), data.get("groups", 1)
    fits = isinstance(shares, list) and len(shares) == count and all(map(_is_count, [*shares, groups]))
    if not fits:
        raise CheckpointError(
            f"config.json describes {name} with shares {shares!r} and groups {groups!r} of {count} parts, which must "
            "be counts, a share for each part; compress the model again"
        )
    return Columns(tuple(shares), groups)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0
