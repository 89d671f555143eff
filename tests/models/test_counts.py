"""A config that asks for more than its weights have is refused before anything of that size is built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from transformers import AutoModel

from conftest import EVERY_DECODER, MakeModel, build_decoder
from flashsvd import CompressConfig, FlashSVDError, run_compress
from flashsvd.errors import ModelError
from flashsvd.models.found import load_config

COUNTS = (
    "num_hidden_layers", "num_labels", "vocab_size", "hidden_size", "intermediate_size", "type_vocab_size",
    "max_position_embeddings", "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip


def change(directory: Path, **values: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("number", [100_000, 10**9, 10**30])
def test_a_count_beyond_the_weights_is_refused_by_name(make_model: MakeModel, name: str, number: int) -> None:
    source = make_model()
    change(source, **{name: number})
    with pytest.raises(ModelError, match=rf"{name} {number:,}, but .* fetch the model again"):
        load_config(str(source))


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("gpt2", {"n_layer": 10**9}), ("gpt2", {"n_embd": 10**9}), ("gpt2", {"n_positions": 10**9}),
        ("gpt2", {"n_head": 10**9}), ("modernbert", {"num_hidden_layers": 10**9}),
        ("gpt2", {"n_inner": 10**9}), ("distilbert", {"n_layers": 10**9}), ("distilbert", {"hidden_dim": 10**9}),
        ("mpnet", {"relative_attention_num_buckets": 10**9}), ("modernbert", {"num_labels": 10**9}),
        ("roberta", {"max_position_embeddings": 10**9}),
    ],
)  # fmt: skip
def test_a_count_is_known_by_the_name_that_its_family_gives_it(
    make_model: MakeModel, family: str, values: Mapping[str, int]
) -> None:
    source = make_model(family, "base")
    change(source, **values)
    with pytest.raises(ModelError, match="1,000,000,000, but"):
        load_config(str(source))


def test_heads_are_no_wider_together_than_any_tensor(make_model: MakeModel) -> None:
    source = make_model()
    change(source, num_attention_heads=60, head_dim=60)
    with pytest.raises(ModelError, match="num_attention_heads times head_dim 3,600"):
        load_config(str(source))


@pytest.mark.parametrize(("name", "most"), [("num_hidden_layers", "1,000"), ("num_labels", "16,777,216")])
def test_counts_have_a_bound_where_no_header_tells(make_model: MakeModel, name: str, most: str) -> None:
    source = make_model()
    (source / "model.safetensors").unlink()
    change(source, **{name: 10**9})
    with pytest.raises(ModelError, match=f"the most that is built is {most}"):
        load_config(str(source))


@pytest.mark.parametrize("name", EVERY_DECODER)
def test_positions_without_a_table_may_be_any_number(tmp_path: Path, name: str) -> None:
    model = build_decoder(name)
    model.save_pretrained(tmp_path)
    load_config(str(tmp_path))
    if "gpt2" not in name:
        change(tmp_path, max_position_embeddings=131_072)
        load_config(str(tmp_path))


@pytest.mark.parametrize("name", ["num_hidden_layers", "vocab_size", "intermediate_size"])
def test_plain_from_pretrained_builds_none_of_it_either(make_model: MakeModel, tmp_path: Path, name: str) -> None:
    run_compress(CompressConfig(model=str(make_model()), ratio=0.5, output=str(tmp_path / "out")))
    change(tmp_path / "out", **{name: 100_000})
    # Of a width a tensor says it, whose layer without storage costs nothing.
    with pytest.raises(FlashSVDError, match=rf"{name} 100,000|\[100000, \d+\] was expected"):
        AutoModel.from_pretrained(tmp_path / "out")
