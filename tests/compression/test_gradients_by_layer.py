"""Statistics by gradients of one layer after the other are those of the whole model in memory."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import DECODERS, ENCODERS, EVERY_DECODER, EVERY_ENCODER, build, build_model, build_tokenizer
from flashsvd import CompressConfig, run_compress
from flashsvd.calibration.activations import ACTIVATIONS
from flashsvd.calibration.collect import collect_statistics
from flashsvd.calibration.losses import Loss, head_loss, similarity_loss
from flashsvd.calibration.probes import embedding_probe, state_probe
from flashsvd.calibration.store import on_disk
from flashsvd.compression.walks import states
from flashsvd.compression.walks.gradients import collect_by_layer
from flashsvd.compression.walks.states import StateFolder
from flashsvd.data.tokenize import Batch
from flashsvd.errors import ModelError
from flashsvd.methods.method import GRADIENTS, Need
from flashsvd.models.put_away import PutAway
from flashsvd.models.registry import find_targets
from flashsvd.models.sentence import SentenceEncoder
from padded import padded_inputs
from training_data import write_text

CPU = torch.device("cpu")
EVERY_NEED: frozenset[Need] = ACTIVATIONS | GRADIENTS
EVERY_MODEL = [*EVERY_ENCODER, *EVERY_DECODER]


def headed(name: str) -> Any:
    """A decoder with its own head, or an encoder that classifies."""
    return build(name, "classifier" if name in ENCODERS else None)


def batches_for(name: str) -> list[Batch]:
    """Batches of unequal length: of texts with a class each, or of windows that predict their next tokens."""
    if name in DECODERS:
        windows = [inputs["input_ids"] for inputs in padded_inputs()]
        return [Batch(({"input_ids": ids, "attention_mask": torch.ones_like(ids)},), ids) for ids in windows]
    return [Batch((inputs,), torch.tensor([0, 1, 1, 0])) for inputs in padded_inputs()]


def pairs() -> list[Batch]:
    """Batches of two texts, in a forward each, with the score of each pair."""
    inputs = padded_inputs(4)
    return [Batch((inputs[i], inputs[i + 1]), torch.tensor([0.0, 1.0, 2.5, 5.0])) for i in (0, 2)]


def at_once(model: Any, batches: list[Batch], loss: Loss, needs: frozenset[Need] = EVERY_NEED) -> dict[str, Tensor]:
    (found,) = collect_statistics(copy.deepcopy(model), find_targets(model), batches, needs, loss, CPU)
    return found


def by_layer(
    model: Any,
    batches: list[Batch],
    loss: Loss,
    directory: Path,
    needs: frozenset[Need] = EVERY_NEED,
    weights: PutAway | None = None,
) -> list[dict[str, Tensor]]:
    targets, losses = find_targets(model), {loss: GRADIENTS & needs}
    return list(
        collect_by_layer(
            model, weights or PutAway(model, None), targets, batches, ACTIVATIONS & needs, losses, CPU,
            StateFolder(directory),
        )
    )  # fmt: skip


def merged(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: values for part in parts for name, values in part.items()}


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name].dtype == torch.float64, name
        assert values.abs().max() > 0, name
        assert torch.equal(ours[name], values), name


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_the_sums_are_those_of_a_pass_over_the_whole_model(tmp_path: Path, name: str) -> None:
    model, batches = headed(name), batches_for(name)
    expected = at_once(model, batches, head_loss)
    assert_same_bits(merged(by_layer(model, batches, head_loss, tmp_path)), expected)


@pytest.mark.parametrize("need", sorted(GRADIENTS))
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_each_kind_of_gradient_is_had_by_itself(tmp_path: Path, name: str, need: Need) -> None:
    model, batches, needs = headed(name), batches_for(name), frozenset[Need]({need})
    expected = at_once(model, batches, head_loss, needs)
    assert_same_bits(merged(by_layer(model, batches, head_loss, tmp_path, needs)), expected)


@pytest.mark.parametrize("name", ["bert", "mpnet", "modernbert", "distilbert"])
@pytest.mark.parametrize(
    "loss",
    [similarity_loss(SentenceEncoder()), embedding_probe(SentenceEncoder(), 3), state_probe(3)],
    ids=["gold", "embeddings", "states"],
)
def test_a_loss_may_come_after_several_forwards(tmp_path: Path, name: str, loss: Loss) -> None:
    model, batches = build_model(name, "base"), pairs()
    expected = at_once(model, batches, loss)
    assert_same_bits(merged(by_layer(model, batches, loss, tmp_path)), expected)


def test_gradients_of_two_losses_are_those_of_each(tmp_path: Path) -> None:
    model, batches = build_model("bert", "base"), pairs()
    gold, probe = similarity_loss(SentenceEncoder()), embedding_probe(SentenceEncoder(), 3)
    expected = at_once(model, batches, gold, frozenset[Need]({"row_gradients"}))
    expected |= at_once(model, batches, probe, frozenset[Need]({"output_gradients"}))
    losses: dict[Loss, set[Need]] = {gold: {"row_gradients"}, probe: {"output_gradients"}}
    parts = collect_by_layer(
        model, PutAway(model, None), find_targets(model), batches, (), losses, CPU, StateFolder(tmp_path)
    )
    assert_same_bits(merged(list(parts)), expected)


@pytest.mark.parametrize("name", ["bert", "llama tied"])
def test_of_16_bit_weights_they_are_taken_in_32_bits(tmp_path: Path, name: str) -> None:
    model, batches = headed(name).bfloat16(), batches_for(name)
    expected = at_once(model, batches, head_loss)
    assert_same_bits(merged(by_layer(model, batches, head_loss, tmp_path)), expected)


def test_states_in_files_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = headed("gpt2"), batches_for("gpt2")
    expected = at_once(model, batches, head_loss)
    monkeypatch.setattr(states, "IN_MEMORY", 0)
    assert_same_bits(merged(by_layer(model, batches, head_loss, tmp_path)), expected)


def test_a_part_holds_the_sums_of_one_layer_and_no_states_are_left(tmp_path: Path) -> None:
    model, batches = build_model(num_hidden_layers=3), batches_for("bert")
    parts = by_layer(model, batches, head_loss, tmp_path)
    layers = [{name.partition(".layer.")[2].partition(".")[0] for name in part} for part in parts]
    assert layers == [{"0"}, {"1"}, {"2"}, {"2"}, {"1"}, {"0"}]
    assert [{name.partition("/")[0] for name in part} for part in parts] == [set(ACTIVATIONS)] * 3 + [
        set(GRADIENTS)
    ] * 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["bert", "llama tied"])
def test_no_more_than_one_layer_is_in_memory_and_the_model_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model, batches = headed(name), batches_for(name)
    before = {path: (p.dtype, p.requires_grad) for path, p in model.named_parameters()}
    layers: list[set[str]] = []
    weights = PutAway(model, None)
    copies = weights.copy_of

    def copied(path: str) -> nn.Module:
        layers.append({other for other, p in model.named_parameters() if not p.is_meta})
        return copies(path)

    monkeypatch.setattr(weights, "copy_of", copied)
    by_layer(model, batches, head_loss, tmp_path, weights=weights)
    inside = {target.module.rpartition(f".{target.layer}.")[0] for target in find_targets(model)}
    assert len(inside) == 1
    (path,) = inside
    # The first layer is looked at once more, to see what layers return.
    assert len(layers) == 1 + 2 * 2
    assert not any(held.startswith(path) for found in layers for held in found)
    assert {path: (p.dtype, p.requires_grad) for path, p in model.named_parameters()} == before
    assert all(p.is_meta and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("bert.encoder.layer.1.output.dense.weight", "layer.1.output.dense.weight holds NaN or infinite values"),
        ("classifier.weight", "classifier.weight holds NaN or infinite values"),
    ],
)
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, path: str, says: str) -> None:
    model = headed("bert")
    with torch.no_grad():
        model.get_parameter(path).view(-1)[0] = float("nan")
    with pytest.raises(ModelError, match=says):
        by_layer(model, batches_for("bert"), head_loss, tmp_path)


def test_a_loss_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    def broken(model: Any, batch: Batch) -> Tensor:
        return head_loss(model, batch) / 0

    with pytest.raises(ModelError, match="the loss is NaN or infinite on the calibration data"):
        by_layer(headed("bert"), batches_for("bert"), broken, tmp_path)


def test_one_part_at_a_time_is_in_memory_as_they_are_written(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def parts() -> Any:
        for number in range(3):
            assert not any(other() is not None for other in alive)
            found = torch.ones(2, dtype=torch.float64)
            alive.append(weakref.ref(found))
            part = {f"covariance/{number}": found}
            del found
            yield part
            del part

    assert len(on_disk(parts(), {}, "", tmp_path / "statistics").tensors) == 3


@pytest.mark.parametrize("qkv", ["joint", "per-head"])
@pytest.mark.parametrize("options", [{"method": "fwsvd"}, {"method": "drone", "rank_search": "loss"}], ids=str)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama tied"])
def test_a_run_by_layer_is_one_with_statistics_that_were_kept(
    tmp_path: Path, name: str, options: dict[str, Any], qkv: str
) -> None:
    """To keep them takes a pass over the whole model."""
    source, text = tmp_path / "dense", write_text(tmp_path / "text") / "train.txt"
    model = build(name, "masked-lm" if name in ENCODERS else None)
    model.save_pretrained(source)
    build_tokenizer().save_pretrained(source)
    given = options | {"model": str(source), "ratio": 0.5, "qkv": qkv, "device": "cpu", "calib_data": str(text)}
    given |= {"calib_samples": 12, "calib_batch_size": 4, "calib_seq_len": 16}
    found = [
        run_compress(CompressConfig(output=str(tmp_path / str(number)), **given, **more))
        for number, more in enumerate(({}, {"save_stats": str(tmp_path / "statistics")}))
    ]
    assert found[0].info.module_ranks == found[1].info.module_ranks
    ours, theirs = ((tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(2))
    assert ours == theirs
