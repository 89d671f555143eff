"""`optimize` of ModernBERT: rotary positions, windows by column, a pre-LN stream, gates; what all share is tested on
BERT.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.modernbert import modeling_modernbert

from conftest import MakeModel, build_model, factor
from flashsvd import CompressConfig, EvalConfig, load_compressed, optimize, run_compress, run_eval, runtime
from flashsvd.blocks.modernbert import FusedModernBertLayer
from flashsvd.blocks.parts.rotary_attention import RotaryAttention, StreamedRotary
from flashsvd.compression.factoring import Factoring
from flashsvd.compression.factorize import factor_model
from flashsvd.errors import BackendError
from flashsvd.kernels import flash_attn_rotary, flashsvdropeattn
from flashsvd.kernels.rotary import rotate
from flashsvd.lowrank.ranks import RankChoice
from flashsvd.methods.registry import get_method
from flashsvd.models.registry import find_targets
from model_accuracy import assert_as_exact
from pairs import pairwise

# Two heads of 32, and one global layer between two local ones, where a token sees three to each side of it.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
LENGTH = 12


@pytest.fixture(autouse=True)
def exact_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers rounds queries and keys to fp32 to turn them; here a model in fp64 turns them in fp64."""
    own = modeling_modernbert.apply_rotary_pos_emb

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
        if q.dtype != torch.float64:
            return own(q, k, cos, sin, **options)
        assert len(cos) == 1
        cos, sin = (table[0, :, : table.shape[2] // 2] for table in (cos, sin))
        q, k = (torch.stack([rotate(row.transpose(0, 1), cos, sin).transpose(0, 1) for row in x]) for x in (q, k))
        return q, k

    monkeypatch.setattr(modeling_modernbert, "apply_rotary_pos_emb", apply)


def inputs(padding: str | None = "right") -> dict[str, Tensor]:
    """Four rows of twelve tokens; where there is padding, the last has a single real one."""
    ids = torch.randint(5, 20, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    if padding is None:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    match padding:
        case "right":
            mask[1, 5:] = mask[2, 11:] = mask[3, 1:] = 0
        case "left":
            mask[1, :7] = mask[2, :1] = mask[3, :11] = 0
        case "holes":
            # Of which some are wider than the window.
            mask[1, [0, 2, 3, 7, 10]] = mask[2, 3:9] = 0
            mask[3, torch.arange(LENGTH) != 5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def real_tokens(batch: dict[str, Tensor]) -> Tensor:
    return batch.get("attention_mask", torch.ones(batch["input_ids"].shape)).bool()


def compressed(name: str = "modernbert", head: str = "base", qkv: str = "joint", **options: Any) -> Any:
    model = build_model(name, head, **(SIZES | options))
    if qkv != "dense":
        factor(model, qkv, ratio=0.6)
    return model


def optimised(plain: Any, backend: Any = "torch") -> Any:
    return optimize(copy.deepcopy(plain), backend=backend)


@torch.inference_mode()
def run(model: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    return model(**batch, **options)


def assert_same_states(plain: Any, model: Any, batch: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """In fp64 they are the same within the tolerance, in fp32 as exact."""
    expected, found = (run(each, batch).last_hidden_state for each in (plain, model))
    real = real_tokens(batch)
    if plain.dtype == torch.float64:
        torch.testing.assert_close(found[real], expected[real], rtol=tolerance, atol=tolerance)
    else:
        assert_as_exact(found, plain, batch)
    assert not found[~real].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("padding", [None, "right", "left", "holes"])
@pytest.mark.parametrize("qkv", ["dense", "joint", "per-head"])
@pytest.mark.parametrize("name", ["modernbert", "modernbert with biases"])
def test_real_tokens_get_the_plain_models_states_and_padding_gets_zeros(
    name: str, qkv: str, padding: str | None, dtype: torch.dtype
) -> None:
    plain = compressed(name, qkv=qkv).to(dtype)
    assert_same_states(plain, optimised(plain), inputs(padding))


@pytest.mark.parametrize("qkv", ["joint", "per-head"])
@pytest.mark.parametrize(
    ("head", "options"),
    [
        ("classifier", {"classifier_pooling": "cls"}),
        ("classifier", {"classifier_pooling": "mean"}),
        ("masked-lm", {}),
        ("token-classifier", {}),
    ],
)
def test_models_with_a_head_answer_the_same(head: str, options: dict[str, Any], qkv: str) -> None:
    plain, batch = compressed(head=head, qkv=qkv, **options).double(), inputs()
    expected, found = (run(model, batch).logits for model in (plain, optimised(plain)))
    if head != "classifier":
        expected, found = (logits[real_tokens(batch)] for logits in (expected, found))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_loss_of_sparse_predictions_is_the_same() -> None:
    plain, batch = compressed(head="masked-lm", sparse_prediction=True).double(), inputs()
    labels = torch.where(torch.rand(4, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.4, 7, -100)
    batch["labels"] = labels.masked_fill(~real_tokens(batch), -100)
    expected, found = (run(model, batch) for model in (plain, optimised(plain)))
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("qkv", ["dense", "per-head"])
@pytest.mark.parametrize("local_attention", [1, 2, 7, 22, 128])
def test_windows_of_any_width(local_attention: int, qkv: str) -> None:
    plain = compressed(qkv=qkv, local_attention=local_attention).double()
    model = optimised(plain)
    for padding in (None, "right", "holes"):
        assert_same_states(plain, model, inputs(padding))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("qkv", ["joint", "per-head"])
def test_a_token_is_seen_by_all_in_a_global_layer_and_by_its_neighbours_in_a_local_one(qkv: str, backend: str) -> None:
    model = optimised(compressed(qkv=qkv), backend)
    x = torch.randn(1, LENGTH, 64, generator=torch.Generator().manual_seed(1))
    for layer, reached in ((1, range(LENGTH)), (2, range(2, 9))):
        with torch.inference_mode():
            plain, moved = (model.layers[layer](states) for states in (x, x.index_fill(1, torch.tensor(5), 0.5)))
        differing = (plain - moved)[0].abs().amax(1) > 1e-5
        assert differing.nonzero().flatten().tolist() == list(reached)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 20},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_positions_of_other_kinds(rope: dict[str, Any]) -> None:
    parameters = {
        "full_attention": {"rope_theta": 90.0, **rope},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    }
    for qkv in ("joint", "per-head"):
        plain = compressed(qkv=qkv, rope_parameters=parameters).double()
        assert_same_states(plain, optimised(plain), inputs())


@pytest.mark.parametrize("hidden_activation", ["gelu", "gelu_new", "relu", "silu", "quick_gelu"])
def test_any_activation_will_do(hidden_activation: str) -> None:
    plain = compressed(hidden_activation=hidden_activation).double()
    assert_same_states(plain, optimised(plain), inputs(), 1e-6)


DENSE = {
    "no part": set(),
    "keys": {"0.attn.Wqkv.k", "2.attn.Wqkv.k"},
    "values": {"0.attn.Wqkv.v", "1.attn.Wqkv.v"},
    "outputs": {"0.attn.Wo", "1.mlp.Wo"},
    "gates": {"0.mlp.Wi.gate", "1.mlp.Wi.input"},
    "a layer": {f"1.{name}" for name in ("attn.Wqkv.q", "attn.Wqkv.k", "attn.Wqkv.v", "mlp.Wi.input", "mlp.Wi.gate")},
}
RANKS = {"q": 3, "k": 9, "v": 12, "Wo": 20, "input": 20, "gate": 13}


@pytest.mark.parametrize("qkv", ["joint", "per-head"])
@pytest.mark.parametrize("name", ["modernbert", "modernbert with biases"])
@pytest.mark.parametrize("dense", DENSE)
def test_unequal_ranks_and_parts_that_stayed_dense_will_do(dense: str, name: str, qkv: Any) -> None:
    plain = build_model(name, "base", **SIZES).double()
    targets = find_targets(plain)
    plan = {}
    for target in targets:
        path = target.name.removeprefix("layers.")
        plan[target.name] = RankChoice(None if path in DENSE[dense] else RANKS[path.rpartition(".")[2]])
    factor_model(plain, Factoring(targets, plan, get_method("standard"), qkv))
    for padding in (None, "right"):
        assert_same_states(plain, optimised(plain), inputs(padding))


def test_per_head_factors_can_attend_in_their_rank_space() -> None:
    def attentions(qkv: str) -> list[Any]:
        return [layer.block.attention for layer in optimised(compressed(qkv=qkv)).layers]

    assert all(isinstance(attention, RotaryAttention) for attention in attentions("joint"))
    for attention in attentions("per-head"):
        assert isinstance(attention, StreamedRotary)
        assert all(width < SIZES["hidden_size"] for width in attention.qkv.widths)


def test_a_row_without_any_token_is_zeros_and_leaves_the_others_alone() -> None:
    model, batch = optimised(compressed()), inputs()
    batch["attention_mask"][2] = 0
    others = torch.tensor([0, 1, 3])
    found = run(model, batch).last_hidden_state
    assert not found[2].any()
    without = {name: tensor[others] for name, tensor in batch.items()}
    torch.testing.assert_close(found[others], run(model, without).last_hidden_state)
    batch["attention_mask"][:] = 0
    assert not run(model, batch).last_hidden_state.any()


@pytest.mark.parametrize("by", ["argument", "config"])
@pytest.mark.parametrize("padding", [None, "holes"])
@pytest.mark.parametrize("head", ["base", "classifier"])
def test_hidden_states_are_those_of_the_plain_model(head: str, padding: str | None, by: str) -> None:
    plain, batch = compressed("modernbert with biases", head).double(), inputs(padding)
    model = optimised(plain)
    without = run(model, batch)[0]
    expected = run(plain, batch, output_hidden_states=True).hidden_states
    model.config.output_hidden_states = by == "config"
    found = run(model, batch, **({"output_hidden_states": True} if by == "argument" else {}))
    real = real_tokens(batch)
    assert len(found.hidden_states) == len(expected) == 4
    for a, b in zip(found.hidden_states, expected, strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[0], without)
    # The recorders stay on the layers, and record nothing unless asked.
    model.config.output_hidden_states = False
    again = run(model, batch)
    assert again.hidden_states is None
    assert torch.equal(again[0], without)


def test_the_answer_can_be_a_tuple() -> None:
    model, batch = optimised(compressed()), inputs()
    (states,) = run(model, batch, return_dict=False)
    assert torch.equal(states, run(model, batch).last_hidden_state)


def test_a_hook_on_a_layer_sees_the_padded_batch() -> None:
    plain, batch = compressed().double(), inputs()
    model = optimised(plain)
    expected = run(model, batch).last_hidden_state
    seen: dict[str, list[Tensor]] = {"plain": [], "optimised": []}
    for name, watched in (("plain", plain), ("optimised", model)):
        for module in (*watched.layers, watched.final_norm):
            module.register_forward_hook(lambda _, args, out, name=name: seen[name].extend((args[0], out)))
    run(plain, batch)
    torch.testing.assert_close(run(model, batch).last_hidden_state, expected)
    real = real_tokens(batch)
    for a, b in zip(seen["optimised"], seen["plain"], strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("qkv", ["joint", "per-head"])
def test_what_was_first_run_in_inference_mode_runs_outside_of_it(qkv: str) -> None:
    model, batch = optimised(compressed(qkv=qkv)), inputs("holes")
    expected = run(model, batch).last_hidden_state
    assert torch.equal(model(**batch).last_hidden_state, expected)


def test_what_others_hold_of_the_embeddings_is_not_written_to() -> None:
    model = optimised(compressed())
    embedded, kept = torch.randn(2, LENGTH, 64), []
    before = embedded.clone()
    run(model, {"inputs_embeds": embedded})
    assert torch.equal(embedded, before)
    model.embeddings.norm.register_forward_hook(lambda *arguments: kept.append((arguments[2], arguments[2].clone())))
    run(model, {"inputs_embeds": embedded})
    ((states, copied),) = kept
    assert torch.equal(states, copied)


def test_transformers_still_finds_its_classes() -> None:
    model = optimised(compressed(head="classifier"))
    for found, known in (
        (model, modeling_modernbert.ModernBertForSequenceClassification),
        (model.model, modeling_modernbert.ModernBertModel),
    ):
        assert isinstance(found, known)
        assert str(type(found)) == str(known)
    assert all(isinstance(layer, modeling_modernbert.ModernBertEncoderLayer) for layer in model.model.layers)
    assert all(isinstance(layer, FusedModernBertLayer) for layer in model.model.layers)


def test_the_factors_are_gone_and_nothing_wants_a_gradient() -> None:
    model = optimised(compressed(head="classifier"))
    kept = {name.partition(".")[0] for name, _ in model.model.named_parameters()}
    assert kept == {"embeddings"}
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("qkv", ["dense", "joint", "per-head"])
def test_packed_weights_take_about_the_memory_of_the_factors(qkv: str) -> None:
    def numbers(model: nn.Module) -> int:
        return sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))

    plain = compressed(qkv=qkv, hidden_size=128, intermediate_size=256)
    assert numbers(optimised(plain).layers) <= 1.3 * numbers(plain.layers)


@pytest.mark.parametrize("qkv", ["joint", "per-head"])
def test_a_copy_and_another_dtype_compute_the_same(qkv: str) -> None:
    plain, batch = compressed(head="classifier", qkv=qkv), inputs()
    model = optimised(plain)
    expected = run(model, batch).logits
    assert torch.equal(run(copy.deepcopy(model), batch).logits, expected)
    wide = copy.deepcopy(model).double()
    assert run(wide, batch).logits.dtype == torch.float64
    torch.testing.assert_close(run(wide, batch).logits.float(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        run(model.to(torch.bfloat16), batch).logits, run(plain.to(torch.bfloat16), batch).logits, rtol=0.1, atol=0.1
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_tables_are_the_models_own_to_the_last_bit(dtype: torch.dtype) -> None:
    plain = compressed().to(dtype)
    model, x, positions = optimised(plain), torch.zeros(1, dtype=dtype), torch.arange(LENGTH)[None]
    for layer_type in ("full_attention", "sliding_attention"):
        expected = plain.rotary_emb(x, positions, layer_type)
        for table, whole in zip(model.tables.take(layer_type, LENGTH, x), expected, strict=True):
            assert table.dtype == dtype
            assert torch.equal(torch.cat([table[:LENGTH]] * 2, dim=1), whole[0])


def test_a_copy_has_tables_of_its_own() -> None:
    model = optimised(compressed())
    run(model, inputs())
    copied = copy.deepcopy(model)
    assert copied.tables is not model.tables
    assert copied.tables._embedding is copied.rotary_emb
    assert all(layer.block.attention.rotary.tables.func.__self__ is copied.tables for layer in copied.layers)
    copied.double()
    assert model.tables._tables
    assert not copied.tables._tables


@pytest.mark.slow
def test_a_compiled_model_computes_the_same() -> None:
    model, batch = optimised(compressed(head="classifier")), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(run(compiled, batch).logits, run(model, batch).logits)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        run(torch.compile(model, backend="eager", fullgraph=True), batch)


# What is refused of an optimised model.


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (lambda model, _: model.train(), "trained"),
        (lambda model, _: model.base_model.train(), "trained"),
        (lambda model, _: model.base_model.layers[0].train(), "trained"),
        (lambda model, _: model.state_dict(), "saved"),
        (lambda model, path: model.save_pretrained(path), "saved"),
        (lambda model, path: model.base_model.save_pretrained(path), "saved"),
        (lambda model, _: model.base_model.load_state_dict({}), "given other weights"),
    ],
)
def test_what_needs_the_factors_is_refused_and_leaves_no_trace(
    tmp_path: Path, use: Callable[[Any, Path], object], what: str
) -> None:
    model = optimised(compressed(head="classifier"))
    expected = run(model, inputs()).logits
    with pytest.raises(BackendError, match=f"an optimised model cannot be {what}; load the checkpoint again"):
        use(model, tmp_path / "written")
    assert not (tmp_path / "written").exists()
    assert not any(module.training for module in model.modules())
    assert torch.equal(run(model.eval(), inputs()).logits, expected)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"output_attentions": True}, "keeps no attention weights"),
        ({"is_causal": True}, "takes no is_causal"),
        ({"position_ids": torch.arange(1, LENGTH + 1)[None]}, "count positions from 0"),
        ({"position_ids": torch.arange(LENGTH - 1)[None]}, "count positions from 0"),
        ({"attention_mask": torch.ones(4, 1, LENGTH, LENGTH, dtype=torch.bool)}, r"not \[4, 1, 12, 12\]"),
        ({"attention_mask": {"full_attention": None, "sliding_attention": None}}, "not a dict"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("head", ["base", "masked-lm"])
def test_a_forward_that_asks_for_more_than_an_encoder_is_refused(head: str, options: dict[str, Any], why: str) -> None:
    with pytest.raises(BackendError, match=why):
        run(optimised(compressed(head=head)), inputs(None), **options)


def test_positions_that_say_what_is_so_anyway_will_do() -> None:
    model, batch = optimised(compressed()), inputs()
    positions = torch.arange(LENGTH)[None]
    expected = run(model, batch).last_hidden_state
    for given in (positions, positions.expand(4, -1)):
        assert torch.equal(run(model, batch, position_ids=given).last_hidden_state, expected)


def test_gradients_autocast_and_no_input_are_refused() -> None:
    model = optimised(compressed())
    embedded = torch.randn(1, 3, 64, requires_grad=True)
    with pytest.raises(BackendError, match=r"gives no gradients; use torch\.inference_mode"):
        model(inputs_embeds=embedded)
    with torch.autocast("cpu"), pytest.raises(BackendError, match="not under autocast"):
        model(**inputs())
    for given in ({}, {"input_ids": torch.ones(1, 3, dtype=torch.int64), "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
            model(**given)


# What `optimize` refuses to begin with.


def add_hook(model: Any) -> None:
    model.layers[1].mlp.register_forward_hook(lambda *_: None)


def add_hook_to_a_part(model: Any) -> None:
    factor(model)
    model.layers[1].attn.Wqkv.q.register_forward_hook(lambda *_: None)


def add_hook_to_the_tables(model: Any) -> None:
    model.rotary_emb.register_forward_hook(lambda *_: None)


def wrap(model: Any) -> None:
    model.forward = lambda *_: None


def replace_linear(model: Any) -> None:
    class Other(nn.Linear):
        pass

    model.layers[2].mlp.Wi = Other(64, 192, bias=False)


def turn_dynamically(model: Any) -> None:
    model.rotary_emb.rope_type["full_attention"] = "dynamic"


def repeat(model: Any) -> None:
    model.layers[2] = model.layers[0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda model: model.train(), "in training mode"),
        (lambda model: model.layers[1].mlp.double(), "float32 on cpu, float64 on cpu"),
        (lambda model: model.to("meta"), "meta device"),
        (lambda model: setattr(model.config, "is_causal", True), r"config\.is_causal is set"),
        (add_hook, r"layers\.1\.mlp has a hook"),
        (add_hook_to_a_part, r"layers\.1\.attn\.Wqkv\.q has a hook"),
        (add_hook_to_the_tables, "rotary_emb has a hook"),
        (wrap, "the model is wrapped by another library"),
        (replace_linear, r"layers\.2\.mlp\.Wi \(Other, of test_runtime_modernbert\) is no plain or low-rank"),
        (lambda model: setattr(model, "final_norm", nn.RMSNorm(64)), "final_norm is a RMSNorm"),
        (lambda model: setattr(model.layers[1], "mlp_norm", nn.Identity()), "mlp_norm is a Identity"),
        (lambda model: setattr(model, "layers", nn.ModuleList()), "has no layers that could be fused"),
        (repeat, "layers 0 and 2 are one and the same module; give each a copy"),
        (turn_dynamically, r"rotary positions \(dynamic\) depend on the batch's length"),
        (lambda model: optimize(model), "optimised already"),
    ],
)
def test_a_model_that_cannot_be_fused_is_refused(change: Callable[[Any], object], why: str) -> None:
    model = build_model("modernbert", "base", **SIZES)
    change(model)
    with pytest.raises(BackendError, match=why):
        optimize(model)


@pytest.mark.parametrize("change", [add_hook, repeat])
def test_a_refused_model_is_left_as_it_was(change: Callable[[Any], object]) -> None:
    plain = compressed()
    change(plain)
    before = {name: type(module) for name, module in plain.named_modules()}
    expected = run(plain, inputs()).last_hidden_state
    with pytest.raises(BackendError):
        optimize(plain)
    assert {name: type(module) for name, module in plain.named_modules()} == before
    assert plain.config._attn_implementation == "sdpa"
    assert torch.equal(run(plain, inputs()).last_hidden_state, expected)


@pytest.mark.slow
def test_triton_is_refused_for_layers_that_kernels_cannot_take() -> None:
    with pytest.raises(BackendError, match="it has no such activation; use backend auto or torch"):
        optimize(compressed(hidden_activation="quick_gelu"), backend="triton")
    with pytest.raises(BackendError, match="not float64"):
        optimize(compressed().double(), backend="triton")
    with pytest.raises(BackendError, match="attention heads of 640 are wider than 512; use backend auto or torch"):
        optimize(build_model("modernbert", "base", hidden_size=1280, num_attention_heads=2), backend="triton")


# The kernels, in Triton's interpreter.


@pytest.mark.parametrize(
    ("name", "qkv", "padding"),
    pairwise(
        ["modernbert", "modernbert with biases"],
        ["dense", "joint", "per-head"],
        [None, "right", "holes"],
        keep=[("modernbert with biases", "per-head", "holes")],
    ),
)
def test_on_triton_the_answers_are_the_same(name: str, qkv: str, padding: str | None, launched: list[str]) -> None:
    plain = compressed(name, qkv=qkv)
    model = optimised(plain, "triton")
    assert_same_states(plain, model, inputs(padding))
    streams = qkv == "per-head"
    assert {kernel: launched.count(kernel) for kernel in set(launched)} == {
        # Of seven norms, the first layer has none before its attention, and the last one is the model's.
        "_fused_ln": 6,
        "_fused_embeddings": 1,
        **({} if qkv == "dense" else {"_geglu": 3}),
        **({"_rope_attention": 3} if streams else {"_attention_rotary": 3}),
    }
    assert set(runtime.choices(model).values()) == {"triton"}


@pytest.mark.interpreted
@pytest.mark.parametrize("limit", ["head", "rank"])
def test_heads_that_the_rotary_kernel_cannot_take_are_lifted_in_memory(
    limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, most = ("LARGEST_LIFTED_RANK", 8) if limit == "rank" else ("HEAD_DIMS", (64,))
    monkeypatch.setattr(flashsvdropeattn, name, most)
    plain = compressed(qkv="per-head")
    model = optimised(plain, "triton")
    assert_same_states(plain, model, inputs())
    operations = {"rotation and attention", "gated ffn core", "norm"}
    assert {name.partition(",")[0] for name in runtime.choices(model)} == operations


@pytest.mark.interpreted
def test_heads_that_are_too_wide_to_rotate_on_chip_are_rotated_in_memory(
    monkeypatch: pytest.MonkeyPatch, launched: list[str]
) -> None:
    monkeypatch.setattr(flash_attn_rotary, "LARGEST_TURNED_HEAD", 16)
    plain = compressed()
    assert_same_states(plain, optimised(plain, "triton"), inputs())
    assert (launched.count("_rotate_heads"), launched.count("_attention")) == (3, 3)
    assert "_attention_rotary" not in launched


def test_what_was_picked_can_be_asked_for() -> None:
    model = optimised(compressed(qkv="per-head"), "auto")
    assert runtime.choices(model) == {}
    run(model, inputs())
    picked = runtime.choices(model)
    assert set(picked.values()) == {"torch"}
    operations = {name.partition(",")[0] for name in picked}
    assert operations == {"rotary attention", "attention", "gated ffn core", "norm"}
    # Local layers are another case than global ones.
    assert sum("3 to each side" in name for name in picked) == 1


# Checkpoints.


@pytest.mark.interpreted
@pytest.mark.parametrize("qkv", ["joint", "per-head"])
def test_a_checkpoint_loads_onto_fused_blocks(make_model: MakeModel, tmp_path: Path, qkv: str) -> None:
    source = make_model("modernbert", **SIZES)
    run_compress(CompressConfig(model=str(source), ratio=0.6, qkv=qkv, output=str(tmp_path / "out"), device="cpu"))
    plain = load_compressed(tmp_path / "out")
    for backend in ("auto", "torch", "triton"):
        fused = load_compressed(tmp_path / "out", optimize=True, backend=backend)
        assert_as_exact(run(fused, inputs()).logits, plain, inputs(), "logits")


def test_eval_runs_on_fused_blocks(make_model: MakeModel, tmp_path: Path) -> None:
    data = tmp_path / "validation.tsv"
    data.write_text("sentence\tlabel\n" + "\n".join(["a good movie .\t1", "a very bad film\t0"] * 3) + "\n")
    options: dict[str, Any] = {"checkpoint": str(make_model("modernbert", **SIZES)), "task": "sst2", "data": str(data)}
    plain, fused = (run_eval(EvalConfig(**options, device="cpu", backend=backend)) for backend in (None, "torch"))
    assert (plain.backend, fused.backend) == ("plain", "torch")
    assert json.loads(json.dumps(fused.metrics)) == pytest.approx(plain.metrics)
