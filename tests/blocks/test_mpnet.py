"""MPNet on fused blocks: the bias of its scores goes by columns, and its layers and encoder return what they did."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import build_model, factor
from flashsvd import optimize
from flashsvd.blocks.mpnet import REACH, bias_by_distance
from flashsvd.errors import BackendError
from model_accuracy import assert_as_exact


def compressed(qkv: str = "joint", **options: Any) -> Any:
    model = build_model("mpnet", "base", **options)
    if qkv != "dense":
        factor(model, qkv, ratio=0.6)
    return model


def padded(side: str, length: int = 9) -> dict[str, Tensor]:
    """Rows of which one has a single token, padded on one side or on both and in between."""
    mask = torch.ones(3, length, dtype=torch.long)
    match side:
        case "right":
            mask[1, length // 2 :] = mask[2, 1:] = 0
        case "left":
            mask[1, : length // 2] = mask[2, :-1] = 0
        case "holes":
            mask[1, [0, 2, 3, length - 2]] = mask[2, 1:-1] = 0
    ids = torch.randint(5, 20, mask.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask}


@torch.inference_mode()
def run(model: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    return model(**batch, **options)


def test_the_bias_by_distance_is_that_of_every_pair_of_columns() -> None:
    encoder, columns = compressed().encoder, torch.arange(2 * REACH)
    distance = (columns - columns[:, None]).clamp(-REACH, REACH)
    assert torch.equal(bias_by_distance(encoder)[:, distance + REACH], encoder.compute_position_bias(columns[None])[0])


@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_tokens_that_stand_further_apart_than_the_bias_reaches(side: str) -> None:
    plain, batch = compressed(max_position_embeddings=320).double(), padded(side, 300)
    real = batch["attention_mask"].bool()
    expected, found = (run(model, batch)[0][real] for model in (plain, optimize(copy.deepcopy(plain))))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("qkv", "side"), [("dense", "left"), ("joint", "right"), ("per-head", "holes")])
def test_on_triton_the_answers_are_the_same(qkv: str, side: str, launched: list[str]) -> None:
    plain, batch = compressed(qkv), padded(side)
    model = optimize(copy.deepcopy(plain), backend="triton")
    assert_as_exact(run(model, batch).last_hidden_state, plain, batch)
    assert launched.count("_attention") == len(plain.encoder.layer)


def test_the_layers_share_one_bias_which_moves_with_the_model() -> None:
    model = optimize(compressed())
    (shared,) = {layer.block.bias for layer in model.encoder.layer}
    model.double()
    assert shared.bias.dtype == torch.float64
    assert run(model, padded("left")).last_hidden_state.dtype == torch.float64


def test_a_layer_and_the_encoder_return_tuples_as_in_transformers() -> None:
    plain, batch = compressed().double(), padded("holes")
    model, real = optimize(copy.deepcopy(plain)), batch["attention_mask"].bool()
    seen: dict[str, list[Any]] = {"plain": [], "fused": []}
    for name, watched in (("plain", plain), ("fused", model)):
        watched.encoder.layer[0].register_forward_hook(lambda _, __, out, name=name: seen[name].append(out))
    expected, found = (run(one, batch, return_dict=False, output_hidden_states=True) for one in (plain, model))
    assert [type(part) for part in found] == [type(part) for part in expected] == [Tensor, Tensor, tuple]
    for a, b in zip([found[0], *found[2]], [expected[0], *expected[2]], strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-10, atol=1e-10)
    for (a,), (b,) in zip(seen["fused"], seen["plain"], strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-10, atol=1e-10)


def watch_bias(model: Any) -> None:
    model.encoder.relative_attention_bias.register_forward_hook(lambda *_: None)


def replace_bias(model: Any) -> None:
    class Other(nn.Embedding):
        """An embedding that could do more."""

    model.encoder.relative_attention_bias = Other(32, 4)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (watch_bias, r"encoder\.relative_attention_bias has a hook"),
        (replace_bias, r"encoder\.relative_attention_bias is a Other, not a Embedding"),
    ],
)
def test_a_bias_that_someone_changed_is_refused(change: Callable[[Any], None], why: str) -> None:
    model = compressed()
    change(model)
    with pytest.raises(BackendError, match=why):
        optimize(model)


@pytest.mark.parametrize("shape", [(3, 1, 9, 9), (3, 1, 1, 9)])
@pytest.mark.parametrize("name", ["mpnet", "distilbert"])
def test_a_mask_of_four_dimensions_that_a_caller_made_is_refused(name: str, shape: tuple[int, ...]) -> None:
    model = optimize(build_model(name, "base"))
    with pytest.raises(BackendError, match=r"takes an attention mask \[batch, length\]"):
        run(model, padded("right") | {"attention_mask": torch.ones(shape, dtype=torch.bool)})
