"""`generate()` on a compressed decoder: the same tokens as the dense model it stands for, however it is asked."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, set_seed

from conftest import build_decoder
from flashsvd import CompressConfig, export_dense, run_compress
from pairs import pairwise

FAMILIES = ["gpt2", "llama", "llama with llama3 rope", "mistral", "qwen2", "qwen3"]
LENGTH = 24
PADDING = 0

Pair = tuple[Any, Any]
MakePair = Callable[[str, str], Pair]


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}
LAYOUTS = ("joint", "per-head")
every_model = pytest.mark.parametrize(("name", "qkv"), [(name, qkv) for name in FAMILIES for qkv in LAYOUTS])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> MakePair:
    """Loads a compressed model and its dense export, in double precision, so that no near tie decides a token."""

    @cache
    def make(name: str, qkv: str) -> Pair:
        directory = tmp_path_factory.mktemp("generate")
        build_decoder(name).double().save_pretrained(directory / "dense")
        config = CompressConfig(directory / "dense", ratio=0.6, qkv=qkv, device="cpu", output=directory / "out")
        run_compress(config)
        export_dense(directory / "out", directory / "exported")
        compressed, exported = (AutoModelForCausalLM.from_pretrained(directory / name) for name in ("out", "exported"))
        return compressed, exported

    return make


def batch() -> dict[str, torch.Tensor]:
    """Three prompts of 9, 4 and 1 tokens, padded on the left."""
    tokens = torch.randint(2, 64, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 5, 8)):
        tokens[row, :padding] = PADDING
        mask[row, :padding] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def write(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """The tokens a model adds to each row, [rows, LENGTH]."""
    set_seed(3)
    options = {"do_sample": False, "max_new_tokens": LENGTH, "pad_token_id": PADDING} | options
    with torch.inference_mode():
        return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "qkv", "how"), pairwise(FAMILIES, LAYOUTS, list(OPTIONS)))
def test_the_compressed_model_writes_what_its_dense_export_writes(
    pair: MakePair, name: str, qkv: str, how: str
) -> None:
    compressed, exported = pair(name, qkv)
    tokens = write(compressed, batch(), **OPTIONS[how])
    assert tokens.shape == (3, LENGTH)
    assert torch.equal(tokens, write(exported, batch(), **OPTIONS[how]))


@every_model
def test_every_cache_gives_the_same_tokens(pair: MakePair, name: str, qkv: str) -> None:
    compressed, _ = pair(name, qkv)
    tokens = write(compressed, batch())
    for options in ({"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(write(compressed, batch(), **options), tokens)


@every_model
def test_a_padded_row_gives_the_same_tokens_as_alone(pair: MakePair, name: str, qkv: str) -> None:
    compressed, _ = pair(name, qkv)
    inputs = batch()
    together = write(compressed, inputs)
    for row, mask in enumerate(inputs["attention_mask"]):
        alone = inputs["input_ids"][row : row + 1, mask.bool()]
        assert torch.equal(
            write(compressed, {"input_ids": alone, "attention_mask": torch.ones_like(alone)})[0], together[row]
        )
