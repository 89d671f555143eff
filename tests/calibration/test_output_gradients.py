"""The covariance of the loss's gradients by what each target computes is that of plain differentiation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import EVERY_DECODER, EVERY_ENCODER, build_decoder, build_model
from flashsvd.calibration.activations import key
from flashsvd.calibration.collect import collect_statistics
from flashsvd.calibration.losses import Loss, head_loss, label_count, similarity_loss
from flashsvd.calibration.store import ModelStatistics
from flashsvd.data.sampling import IGNORED
from flashsvd.data.tokenize import Batch
from flashsvd.errors import ModelError
from flashsvd.models.architecture import Target
from flashsvd.models.registry import find_targets
from flashsvd.models.sentence import SentenceEncoder

CPU = torch.device("cpu")


def inputs(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Texts of one to seven tokens, padded on the right."""
    ids = torch.randint(5, 20, (rows, 7), generator=generator)
    lengths = torch.randint(1, 8, (rows, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(7) < lengths).long()}


def classified() -> list[Batch]:
    """Batches of unequal size."""
    generator = torch.Generator().manual_seed(0)
    return [Batch((inputs(rows, generator),), torch.randint(0, 2, (rows,), generator=generator)) for rows in (4, 4, 1)]


def windows() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 60, (rows, 6), generator=generator) for rows in (2, 2, 1)]
    return [Batch(({"input_ids": x, "attention_mask": torch.ones_like(x)},), x) for x in ids]


def collect(model: Any, batches: list[Batch], loss: Loss = head_loss, **options: Any) -> dict[str, Tensor]:
    needs = ("covariance", "output_gradients")
    parts = collect_statistics(model, find_targets(model), batches, needs, loss, CPU, **options)
    return {name: value for part in parts for name, value in part.items()}


def own_columns(target: Target, rows: Tensor) -> Tensor:
    """A target's columns where the parts of its module are of equal width."""
    if target.part is None:
        return rows
    return rows.chunk(len(target.part.names), dim=-1)[target.part.names.index(target.part.name)]


def gradient_rows(model: Any, target: Target, batches: list[Batch], loss: Loss = head_loss) -> Tensor:
    """The gradients [tokens, out] of the loss by what a target computes, of the real tokens: those by zeros that are
    added to its output."""
    rows = []
    for batch in batches:
        added: list[Tensor] = []

        def add(_: Any, __: Any, output: Tensor, added: list[Tensor] = added) -> Tensor:
            added.append(torch.zeros_like(output, requires_grad=True))
            return output + added[-1]

        handle = model.get_submodule(target.module).register_forward_hook(add)
        value = loss(model, batch) * label_count(batch)
        handle.remove()
        masks = [part["attention_mask"].bool() for part in batch.inputs]
        gradients = torch.autograd.grad(value, added)
        rows += [own_columns(target, g[mask]) for g, mask in zip(gradients, masks, strict=True)]
    return torch.cat(rows).double()


def expect_plain_differentiation(
    model: Any, found: dict[str, Tensor], batches: list[Batch], loss: Loss = head_loss
) -> None:
    for target in find_targets(model):
        g = gradient_rows(model, target, batches, loss)
        assert g.abs().max() > 0
        ours = found[key("output_gradients", target)]
        assert ours.dtype == torch.float64
        expected = g.T @ g / len(g)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", EVERY_ENCODER)
def test_of_a_classifier_padding_is_left_out(name: str) -> None:
    model, batches = build_model(name), classified()
    expect_plain_differentiation(model, collect(model, batches), batches)


@pytest.mark.parametrize("name", EVERY_DECODER)
def test_of_a_decoder_parts_of_a_joined_module_have_their_own(name: str) -> None:
    model, batches = build_decoder(name), windows()
    expect_plain_differentiation(model, collect(model, batches), batches)


def test_of_two_texts_in_one_loss_each_has_its_own_padding() -> None:
    model, generator = build_model(head="base"), torch.Generator().manual_seed(0)
    batch = Batch((inputs(3, generator), inputs(3, generator)), torch.tensor([0.0, 2.5, 5.0]))
    loss = similarity_loss(SentenceEncoder())
    expect_plain_differentiation(model, collect(model, [batch], loss), [batch], loss)


def test_they_are_the_same_whichever_weights_ask_for_gradients() -> None:
    """Alone they need no gradient of a weight; beside the sums over rows of a weight's they have those too."""
    model, batches = build_model(), classified()
    alone = collect(model, batches)
    needs = ("output_gradients", "row_gradients")
    (beside,) = collect_statistics(model, find_targets(model), batches, needs, head_loss, CPU)
    for target in find_targets(model):
        name = key("output_gradients", target)
        torch.testing.assert_close(beside[name], alone[name])
        assert beside[key("row_gradients", target)].abs().sum() > 0


def test_a_pass_counts_their_bytes_too() -> None:
    model, batches = build_model(), classified()
    targets = find_targets(model)
    at_once = collect(model, batches)
    # Each of two layers has three streams of 32 channels and one of 48, five outputs of 32 and one of 48.
    size = 2 * 8 * (3 * 32**2 + 48**2 + 5 * 32**2 + 48**2)
    needs = ("covariance", "output_gradients")
    for allowed, passes in ((size, 1), (size - 1, 2)):
        assert len(list(collect_statistics(model, targets, batches, needs, head_loss, CPU, allowed))) == passes
    one_by_one = collect(model, batches, pass_bytes=1)
    assert set(one_by_one) == set(at_once)
    for name, value in at_once.items():
        torch.testing.assert_close(one_by_one[name], value)


def test_the_model_comes_back_as_it_was() -> None:
    model = build_model().half()
    asking = {name: p.requires_grad for name, p in model.named_parameters()}
    collect(model, classified())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asking
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_in_heads_each_has_its_block_of_the_diagonal() -> None:
    model, batches = build_model(), classified()
    statistics = ModelStatistics(collect(model, batches), {})
    query = find_targets(model)[0]
    whole = statistics.of(query, ["output_gradients"]).output_gradients
    by_head = statistics.of(query, ["output_gradients"], blocks=4).output_gradients
    assert whole is not None
    assert by_head is not None
    assert whole.shape == (32, 32)
    assert by_head.shape == (4, 8, 8)
    g = gradient_rows(model, query, batches).reshape(-1, 4, 8)
    torch.testing.assert_close(by_head, torch.einsum("nhi,nhj->hij", g, g) / len(g), rtol=1e-4, atol=1e-8)


def test_a_gradient_that_is_not_finite_is_refused_by_target() -> None:
    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * float("inf")

    model = build_model(num_hidden_layers=1)
    dense = model.bert.encoder.layer[0].output.dense
    handle = dense.register_forward_hook(lambda _, __, output: Infinite.apply(output))
    with pytest.raises(ModelError, match=r"gradient of bert\.encoder\.layer\.0\..* is NaN or infinite on the calib"):
        collect(model, classified())
    handle.remove()


def test_labels_that_are_ignored_do_not_count() -> None:
    batch = Batch((), torch.tensor([[IGNORED, 7, IGNORED], [3, IGNORED, 5]]))
    assert label_count(batch) == 3
