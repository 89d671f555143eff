"""Calibration: the sums that hooks collect are those of a plain loop over the real tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import ENCODERS, EVERY_ENCODER, build, build_decoder, build_model, build_tokenizer
from flashsvd.calibration.activations import key
from flashsvd.calibration.batches import masked_batches, text_batches, window_batches
from flashsvd.calibration.collect import collect_statistics
from flashsvd.calibration.losses import head_loss, similarity_loss
from flashsvd.data.sampling import Draw
from flashsvd.data.tokenize import Batch, Tokenize
from flashsvd.errors import DataError, ModelError
from flashsvd.lowrank.layers import weight_matrix
from flashsvd.models.architecture import Target
from flashsvd.models.registry import find_targets
from flashsvd.models.sentence import SentenceEncoder

CPU = torch.device("cpu")


def padded_batches(count: int = 3, side: str = "right") -> list[Batch]:
    """Rows of one to seven real tokens."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        ids = torch.randint(5, 20, (4, 7), generator=generator)
        lengths = torch.randint(1, 8, (4, 1), generator=generator)
        positions = torch.arange(7)
        mask = (positions < lengths if side == "right" else positions >= 7 - lengths).long()
        labels = torch.randint(0, 2, (4,), generator=generator)
        batches.append(Batch(({"input_ids": ids, "attention_mask": mask},), labels))
    return batches


def inputs_of(model: Any, path: str, batches: list[Batch]) -> Tensor:
    """The rows x [tokens, in] that a module really gets, padding left out."""
    rows: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, x: rows.append(x[0]))
    with torch.no_grad():
        for batch in batches:
            for part in batch.inputs:
                model(**part)
    handle.remove()
    masks = [part["attention_mask"].bool() for batch in batches for part in batch.inputs]
    return torch.cat([x[mask] for x, mask in zip(rows, masks, strict=True)]).double()


def collect(model: Any, batches: list[Batch], *needs: Any, **options: Any) -> dict[str, Tensor]:
    loss = options.pop("loss", None)
    parts = collect_statistics(model, find_targets(model), batches, needs, loss, CPU, **options)
    return {name: value for part in parts for name, value in part.items()}


@pytest.mark.parametrize("name", EVERY_ENCODER)
@pytest.mark.parametrize("side", ["left", "right"])
def test_activation_statistics_are_those_of_the_real_tokens(side: str, name: str) -> None:
    model, batches = build_model(name), padded_batches(side=side)
    found = collect(model, batches, "covariance", "mean_abs")
    for target in find_targets(model):
        x = inputs_of(model, target.module, batches)
        torch.testing.assert_close(found[key("covariance", target)], x.T @ x / len(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[key("mean_abs", target)], x.abs().mean(0), rtol=1e-6, atol=1e-9)
        assert found[key("covariance", target)].dtype == torch.float64


@pytest.mark.parametrize("name", ["llama", "modernbert"])
def test_layers_that_read_the_same_activations_share_their_statistics(name: str) -> None:
    found = collect(build(name), padded_batches(), "covariance")
    # Of each layer: one for q, k, v, one for their output, one for the gated pair, one for what comes after it.
    assert len(found) == 2 * 4


def test_wide_inputs_are_summed_in_blocks() -> None:
    model = build_model(intermediate_size=1100, num_hidden_layers=1)
    batches = padded_batches()
    target = find_targets(model)[-1]
    x = inputs_of(model, target.module, batches)
    torch.testing.assert_close(
        collect(model, batches, "covariance")[key("covariance", target)], x.T @ x / len(x), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "qwen2"])
def test_row_gradients_sum_the_squared_gradients_of_each_batch_by_row_and_head(name: str) -> None:
    if name in ENCODERS:
        model, batches = build_model(name), padded_batches()
    else:
        model = build_decoder(name)
        ids = [torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        batches = [Batch(({"input_ids": x, "attention_mask": torch.ones_like(x)},), x) for x in ids]
    found = collect(model, batches, "row_gradients", loss=head_loss)
    expected: dict[str, Tensor] = {}
    for batch in batches:
        model.zero_grad()
        head_loss(model, batch).backward()
        for target in find_targets(model):
            module = model.get_submodule(target.module)
            gradient = weight_matrix(module, module.weight.grad)
            if target.part is not None:
                width = gradient.shape[1] // len(target.part.names)
                start = target.part.names.index(target.part.name) * width
                gradient = gradient[:, start : start + width]
            by_head = gradient.double().square().reshape(len(gradient), target.heads, -1).sum(2).T
            expected[target.name] = expected.get(target.name, 0) + by_head
    for target in find_targets(model):
        assert found[key("row_gradients", target)].shape == (target.heads, expected[target.name].shape[1])
        torch.testing.assert_close(found[key("row_gradients", target)], expected[target.name], rtol=1e-4, atol=1e-12)


def test_similarity_is_the_squared_error_of_the_cosine_against_gold_over_five() -> None:
    model = build_model(head="base")
    (first,), (second,) = (batch.inputs for batch in padded_batches(2))
    gold = torch.tensor([0.0, 1.0, 2.5, 5.0])
    loss = similarity_loss(SentenceEncoder())(model, Batch((first, second), gold))
    embeddings = []
    for part in (first, second):
        states, mask = model(**part).last_hidden_state, part["attention_mask"].bool()
        embeddings.append(torch.stack([row[real].mean(0) for row, real in zip(states, mask, strict=True)]))
    expected = (torch.cosine_similarity(*embeddings) - gold / 5).square().mean()
    torch.testing.assert_close(loss, expected)


def test_the_sums_do_not_depend_on_how_many_passes_they_take() -> None:
    model, batches = build_model(), padded_batches()
    needs = ("covariance", "mean_abs", "row_gradients")
    at_once = collect(model, batches, *needs, loss=head_loss)
    parts = list(collect_statistics(model, find_targets(model), batches, needs, head_loss, CPU, pass_bytes=1))
    assert len(parts) == 8
    one_by_one = {name: value for part in parts for name, value in part.items()}
    assert set(one_by_one) == set(at_once)
    for name, value in at_once.items():
        torch.testing.assert_close(one_by_one[name], value)


def test_the_model_comes_back_as_it_was() -> None:
    model = build_model(hidden_dropout_prob=0.5).half()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asking = {name: p.requires_grad for name, p in model.named_parameters()}
    runs = [collect(model, padded_batches(), "covariance", "row_gradients", loss=head_loss) for _ in range(2)]
    # No dropout, so both runs see the same activations.
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    after = model.state_dict()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asking
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_frequencies_of_rotary_embeddings_keep_their_digits() -> None:
    model = build_decoder("llama").bfloat16()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.model.rotary_emb.inv_freq = before["model.rotary_emb.inv_freq"] = torch.rand(4)
    ids = torch.randint(5, 60, (2, 6))
    collect(model, [Batch(({"input_ids": ids, "attention_mask": torch.ones_like(ids)},))], "mean_abs")
    after = dict(model.named_buffers())
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    assert model.dtype == torch.bfloat16
    assert model.config.use_cache


def test_fewer_tokens_than_channels_leave_a_covariance_of_exactly_their_rank() -> None:
    model = build_model(intermediate_size=200)
    found = collect(model, padded_batches(1), "covariance")
    tokens = padded_batches(1)[0].tokens
    (wide,) = (c for c in (found[key("covariance", t)] for t in find_targets(model)[5:6]))
    values = torch.linalg.eigvalsh(wide)
    assert tokens < 32
    assert (values > 1e-12 * values.max()).sum() == tokens


def test_an_activation_that_is_not_finite_is_refused_by_layer() -> None:
    model = build_model()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.LayerNorm.weight[3] = float("nan")
    with pytest.raises(ModelError, match=r"inputs of bert\.encoder\.layer\.1\.attention\.self\.query are NaN"):
        collect(model, padded_batches(), "mean_abs")


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = build_model()
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(ModelError, match="the loss is NaN"):
        collect(model, padded_batches(), "row_gradients", loss=head_loss)


def test_a_draw_is_fixed_by_its_seed_or_takes_the_first() -> None:
    assert Draw(3, 0).indices(10) == Draw(3, 0).indices(10) != Draw(3, 1).indices(10)
    assert sorted(Draw(99, 0).indices(10)) == list(range(10))
    assert Draw(3, 5, first=True).indices(10) == [0, 1, 2]


def test_windows_are_disjoint_and_whole() -> None:
    batches = window_batches(list(range(23)), 5, Draw(3, 0), 2)
    assert [len(batch.inputs[0]["input_ids"]) for batch in batches] == [2, 1]
    for batch in batches:
        ids = batch.inputs[0]["input_ids"]
        assert all(row[0] % 5 == 0 and torch.equal(row, torch.arange(row[0], row[0] + 5)) for row in ids)
        assert batch.labels is ids
    with pytest.raises(DataError, match="has 4 tokens, less than one window of 5"):
        window_batches([1, 2, 3, 4], 5, Draw(3, 0), 2)


def test_masked_tokens_are_predicted_and_special_ones_never_masked() -> None:
    class Tokenizer:
        all_special_ids = (0, 2, 3)
        mask_token_id = 4

    ids = torch.randint(5, 20, (8, 50))
    ids[:, 0], ids[:, -1] = 2, 3
    plain = Batch(({"input_ids": ids, "attention_mask": torch.ones_like(ids)},))
    (masked,) = masked_batches([plain], Tokenizer(), seed=0)
    chosen = masked.inputs[0]["input_ids"] == 4
    assert 0.08 < chosen.double().mean() < 0.22
    assert not chosen[:, 0].any()
    assert not chosen[:, -1].any()
    assert masked.labels is not None
    assert torch.equal(masked.labels[chosen], ids[chosen])
    assert (masked.labels[~chosen] == -100).all()


def test_a_batch_always_has_something_to_predict() -> None:
    class Tokenizer:
        all_special_ids = (2, 3)
        mask_token_id = 4

    ids = torch.tensor([[2, 7, 3]])
    plain = Batch(({"input_ids": ids, "attention_mask": torch.ones_like(ids)},))
    for seed in range(20):
        (masked,) = masked_batches([plain], Tokenizer(), seed)
        assert masked.labels is not None
        assert masked.labels.tolist() == [[-100, 7, -100]]


def test_empty_lines_are_no_samples() -> None:
    tokenize = Tokenize(build_tokenizer(), 8)
    (batch,) = text_batches("dog\n\n  \nman\n", tokenize, Draw(9, 0, first=True), 4)
    assert tokenize.tokenizer.batch_decode(batch.inputs[0]["input_ids"], skip_special_tokens=True) == ["dog", "man"]
    with pytest.raises(DataError, match="calibration text is empty"):
        text_batches("\n \n", tokenize, Draw(9, 0), 4)


def test_targets_name_their_streams() -> None:
    model = build_model()
    query, key_, value, output = (target.inputs for target in find_targets(model)[:4])
    assert query == key_ == value != output
    assert key("row_gradients", Target("a", "attn", 0)) != key("row_gradients", Target("b", "attn", 0))
