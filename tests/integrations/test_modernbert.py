"""What only ModernBERT has: two kinds of attention, parts in one linear, a head that passes from task to task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM

from conftest import MakeModel, build_model, factor
from flashsvd import CompressConfig, load_compressed, read_info, run_compress

LAYOUTS = ["joint", "per-head"]
TOKENS = torch.arange(5, 17)[None]


def compress(source: Path, output: Path, **options: object) -> Path:
    run_compress(CompressConfig(model=str(source), output=str(output), **({"ratio": 0.5, "device": "cpu"} | options)))
    return output


def attended(model: Any, layer: str, changed: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The output [tokens, hidden] of a layer's attention, with what another module of the layer puts out changed."""
    modules, seen = model.get_submodule(layer), []
    handles = [
        modules.get_submodule(changed).register_forward_hook(lambda *arguments: change(arguments[2])),
        modules.attn.register_forward_hook(lambda *arguments: seen.append(arguments[2][0][0])),
    ]
    with torch.inference_mode():
        model(TOKENS)
    for handle in handles:
        handle.remove()
    return seen[0]


def unchanged(y: Tensor) -> Tensor:
    return y


def without_token_five(y: Tensor) -> Tensor:
    return y.index_fill(1, torch.tensor(5), 0.0)


def differing_rows(a: Tensor, b: Tensor) -> list[int]:
    return [row for row in range(len(a)) if (a[row] - b[row]).abs().max() > 1e-5]


@pytest.mark.parametrize("qkv", LAYOUTS)
def test_the_parts_of_the_attention_are_queries_keys_and_values(qkv: str) -> None:
    model = build_model("modernbert", "base")
    factor(model, qkv)
    everywhere = list(range(TOKENS.shape[1]))

    def changing(part: str, change: Callable[[Tensor], Tensor]) -> Tensor:
        return attended(model, "layers.0", f"attn.Wqkv.{part}", change)

    plain = changing("q", unchanged)
    moved = {part: differing_rows(changing(part, without_token_five), plain) for part in ("q", "k", "v")}
    assert moved == {"q": [5], "k": everywhere, "v": everywhere}
    # The output is linear in the values alone.
    torch.testing.assert_close(changing("v", torch.neg), -plain)
    assert differing_rows(changing("k", torch.neg), -plain) == everywhere


def test_the_parts_of_the_mlp_are_the_activations_input_and_its_gate() -> None:
    model = build_model("modernbert", "base")
    factor(model)
    mlp, x = model.layers[0].mlp, torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        plain = mlp(x)
        mlp.Wi.gate.v.weight *= -1
        torch.testing.assert_close(mlp(x), -plain)
        mlp.Wi.input.v.weight *= -1
        assert differing_rows(mlp(x), plain) == list(range(5))


@pytest.mark.parametrize("qkv", LAYOUTS)
def test_a_token_is_seen_by_all_in_a_global_layer_and_by_its_neighbours_in_a_local_one(
    make_model: MakeModel, tmp_path: Path, qkv: str
) -> None:
    model = load_compressed(compress(make_model("modernbert", "base"), tmp_path / "out", qkv=qkv))
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    for layer, reached in (("layers.0", range(12)), ("layers.1", range(2, 9))):
        plain, moved = (attended(model, layer, "attn_norm", change) for change in (unchanged, without_token_five))
        assert differing_rows(moved, plain) == list(reached)


def test_a_config_of_the_first_release_is_understood(make_model: MakeModel, tmp_path: Path) -> None:
    """It gives the period of the global layers and two rotary bases, where newer ones list them layer by layer."""
    options: dict[str, Any] = {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 90.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    }
    source = make_model("modernbert", "masked-lm", **options)
    config = json.loads((source / "config.json").read_text())
    for name in ("layer_types", "rope_parameters"):
        del config[name]
    config |= {"global_attn_every_n_layers": 2, "global_rope_theta": 90.0, "local_rope_theta": 500.0}
    (source / "config.json").write_text(json.dumps(config | {"reference_compile": True}))
    output = compress(source, tmp_path / "out")
    expected = build_model("modernbert", "masked-lm", **options)
    factor(expected, ratio=0.5)
    for model in (load_compressed(output), AutoModelForMaskedLM.from_pretrained(output)):
        with torch.inference_mode():
            assert torch.equal(model(TOKENS)[0], expected(TOKENS)[0])


def test_a_new_classifier_stands_on_the_head_that_the_language_model_was_trained_with(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model("modernbert", "masked-lm", hidden_size=64)
    output = compress(source, tmp_path / "out", task="sst2")
    model, trained = load_compressed(output), build_model("modernbert", "masked-lm", hidden_size=64).head.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in model.head.state_dict().items())
    assert read_info(output).compression.untrained == ("classifier.bias", "classifier.weight")
    # Transformers draws this layer at a scale of its own, 1 / sqrt(hidden), cut at two of them.
    assert 0.7 < float(model.classifier.weight.detach().std()) * 64**0.5 < 1.0


def test_info_shows_the_parts(make_model: MakeModel, tmp_path: Path) -> None:
    output = compress(make_model("modernbert", "masked-lm"), tmp_path / "out", ratio=None, rank=4)
    text = str(read_info(output))
    assert "ModernBertForMaskedLM (modernbert)" in text
    # The attention's output would not be smaller at rank 16.
    assert (
        "attn.Wqkv.q 4, attn.Wqkv.k 4, attn.Wqkv.v 4, attn.Wo dense, mlp.Wi.input 16, mlp.Wi.gate 16, mlp.Wo 16" in text
    )
