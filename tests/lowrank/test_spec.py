"""What a checkpoint's config may say of its factored modules."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from flashsvd.errors import CheckpointError
from flashsvd.lowrank.columns import Columns
from flashsvd.lowrank.spec import (
    FORMAT_VERSION,
    JoinedSpec,
    LayerSpec,
    ModuleSpec,
    factor_kind,
    read_modules,
    spec_from_json,
)

UNEQUAL = Columns((4, 1, 1))
PARTS = (("q", LayerSpec(8, 4)), ("k", None), ("v", LayerSpec(2)))
SPECS: list[ModuleSpec] = [
    LayerSpec(8),
    LayerSpec(8, heads=2),
    LayerSpec(8, factors="int8"),
    LayerSpec(8, 2, "int8"),
    JoinedSpec((("q", LayerSpec(8, factors="int8")), ("k", None))),
    JoinedSpec(PARTS),
    JoinedSpec(PARTS, UNEQUAL),
    JoinedSpec(PARTS, Columns((1, 1, 1), groups=4)),
]


def test_it_is_read_without_torch() -> None:
    code = (
        "import sys; from flashsvd.lowrank.spec import read_modules\n"
        "print(read_modules({'a': {'rank': 4}}, 1)['a'].rank, {'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "4 set()"


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_description_survives_json(spec: ModuleSpec) -> None:
    text = json.dumps(spec.to_json(), sort_keys=True)
    assert read_modules({"x": json.loads(text)}, FORMAT_VERSION) == {"x": spec}


def test_equal_parts_are_described_as_they_ever_were() -> None:
    spec = JoinedSpec(PARTS, Columns((7, 7, 7)))
    assert spec == JoinedSpec(PARTS)
    assert spec.to_json() == {
        "parts": [{"name": "q", "rank": 8, "heads": 4}, {"name": "k", "rank": None}, {"name": "v", "rank": 2}]
    }


@pytest.mark.parametrize("version", [0, 5, "1", True, None])
def test_another_format_is_refused_by_its_version(version: Any) -> None:
    with pytest.raises(CheckpointError, match=f"of format {version!r}, this flashsvd reads 1 to 4; upgrade"):
        read_modules({}, version)


def test_factors_in_floats_are_described_as_they_ever_were() -> None:
    assert LayerSpec(8, 2).to_json() == {"rank": 8, "heads": 2}
    assert LayerSpec(8, factors="int8").to_json() == {"rank": 8, "factors": "int8"}


def test_a_model_has_integers_where_any_layer_has() -> None:
    floats: dict[str, ModuleSpec] = {"a": LayerSpec(8), "b": JoinedSpec(PARTS)}
    assert factor_kind(floats) == "float"
    assert factor_kind(floats | {"c": JoinedSpec((("q", None), ("k", LayerSpec(2, factors="int8"))))}) == "int8"
    assert factor_kind({}) == "float"


@pytest.mark.parametrize("factors", ["int4", "", None, 8, ["int8"]])
def test_other_factors_are_refused_by_their_kind(factors: Any) -> None:
    with pytest.raises(CheckpointError, match=r"describes x with factors .*, and this flashsvd knows float and int8"):
        spec_from_json("x", {"rank": 4, "factors": factors})


def test_what_is_not_known_is_refused_by_its_name() -> None:
    with pytest.raises(CheckpointError, match=r"quantization_config in config\.json holds bits, group, which this"):
        read_modules({}, 1, ["group", "bits"])
    for data, names in (
        ({"rank": 4, "group": 1, "bits": 8}, "bits, group"),
        ({"parts": [{"name": "a", "rank": 4}, {"name": "b", "rank": 4}], "order": "x"}, "order"),
    ):
        with pytest.raises(CheckpointError, match=rf"config\.json describes a\.b as .* does not know {names}; upgrade"):
            spec_from_json("a.b", data)
    with pytest.raises(CheckpointError, match=r"config\.json describes x\.b as .* does not know bits; upgrade"):
        spec_from_json("x", {"parts": [{"name": "a", "rank": 4}, {"name": "b", "rank": 4, "bits": 8}]})


@pytest.mark.parametrize(
    "columns",
    [
        {"shares": [4, 1]},
        {"shares": [4, 1, 0]},
        {"shares": 3},
        {"groups": 0},
        {"groups": True},
        {"shares": [1, 1, "1"]},
    ],
    ids=str,
)
def test_columns_that_cannot_be_are_refused_by_name(columns: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json describes a\.b with shares .* of 3 parts"):
        spec_from_json("a.b", JoinedSpec(PARTS).to_json() | columns)
