"""`optimize`: the same answers as the plain model, and clear refusals of what packed weights cannot do."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import itertools
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertModel
from transformers.models.bert import modeling_bert

from conftest import MakeModel, build_model, factor
from flashsvd import CompressConfig, load_compressed, optimize, run_compress, runtime, save_compressed
from flashsvd.blocks import bert
from flashsvd.blocks.parts.qkv import PackedQKV
from flashsvd.blocks.running.choice import Choices
from flashsvd.blocks.running.graph import Graphs
from flashsvd.blocks.running.layer import FusedLayer
from flashsvd.blocks.running.whole import add_graphs
from flashsvd.compression.factoring import Factoring
from flashsvd.compression.factorize import factor_model
from flashsvd.errors import BackendError, ConfigError
from flashsvd.lowrank.ranks import RankChoice
from flashsvd.methods.registry import get_method
from flashsvd.models.registry import find_targets
from flashsvd.storage.metadata import CompressionInfo
from model_accuracy import assert_as_exact

# Heads of 16, wide enough for thinner ranks to stay in rank space.
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}

POST_LN = ["bert", "roberta", "xlm-roberta", "distilbert", "mpnet"]


def inputs(padding: str | None = "right") -> dict[str, Tensor]:
    """Four rows of nine tokens; where there is padding, the last has a single real one."""
    ids = torch.randint(5, 20, (4, 9), generator=torch.Generator().manual_seed(1))
    if padding is None:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    match padding:
        case "right":
            mask[1, 5:] = mask[2, 7:] = mask[3, 1:] = 0
        case "left":
            mask[1, :4] = mask[2, :2] = mask[3, :8] = 0
        case "holes":
            mask[1, [0, 2, 3, 7]] = mask[2, 4] = mask[3, [0, 1, 2, 3, 5, 6, 7, 8]] = 0
    return {"input_ids": ids, "attention_mask": mask}


def compressed(family: str = "bert", head: str = "base", qkv: str = "joint", **options: Any) -> Any:
    model = build_model(family, head, **(SIZES | options))
    if qkv != "dense":
        factor(model, qkv, ratio=0.6)
    return model


def optimised(plain: Any, backend: Any = "torch") -> Any:
    return optimize(copy.deepcopy(plain), backend=backend)


@torch.inference_mode()
def run(model: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    return model(**batch, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("padding", [None, "right", "left", "holes"])
@pytest.mark.parametrize("qkv", ["dense", "joint", "per-head", "joint int8", "per-head int8"])
@pytest.mark.parametrize("family", POST_LN)
def test_real_tokens_get_the_plain_models_states_and_padding_gets_zeros(
    family: str, qkv: str, padding: str | None, dtype: torch.dtype
) -> None:
    plain = compressed(family, qkv=qkv).to(dtype)
    batch = inputs(padding)
    expected, found = (run(model, batch).last_hidden_state for model in (plain, optimised(plain)))
    real = batch.get("attention_mask", torch.ones(4, 9)).bool()
    if dtype == torch.float64:
        torch.testing.assert_close(found[real], expected[real], rtol=1e-10, atol=1e-10)
    else:
        assert_as_exact(found, plain, batch)
    assert not found[~real].any()


@pytest.mark.parametrize("qkv", ["joint", "per-head"])
@pytest.mark.parametrize("head", ["classifier", "masked-lm", "token-classifier"])
@pytest.mark.parametrize("family", POST_LN)
def test_models_with_a_head_answer_the_same(family: str, head: str, qkv: str) -> None:
    plain, batch = compressed(family, head, qkv).double(), inputs()
    expected, found = (run(model, batch).logits for model in (plain, optimised(plain)))
    if head != "classifier":
        expected, found = (logits[batch["attention_mask"].bool()] for logits in (expected, found))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu", "quick_gelu"])
def test_any_activation_will_do(hidden_act: str) -> None:
    plain = compressed(hidden_act=hidden_act).double()
    expected, found = (run(model, inputs(None)).last_hidden_state for model in (plain, optimised(plain)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def ranks(name: str) -> int | None:
    """Unequal ones, and None for what stays dense: of layer 0 K, of layer 1 the first FFN matrix and V."""
    layer, _, part = name.removeprefix("encoder.layer.").partition(".")
    if (layer, part) in {("0", "attention.self.key"), ("1", "intermediate.dense"), ("1", "attention.self.value")}:
        return None
    return {"attention.self.query": 3, "attention.self.key": 9, "attention.self.value": 12}.get(part, 20)


@pytest.mark.parametrize("qkv", ["joint", "per-head"])
def test_unequal_ranks_and_layers_that_stayed_dense_will_do(qkv: Any) -> None:
    plain = build_model("bert", "base", **SIZES).double()
    plan = {target.name: RankChoice(ranks(target.name)) for target in find_targets(plain)}
    factor_model(plain, Factoring(find_targets(plain), plan, get_method("standard"), qkv))
    for padding in (None, "right"):
        batch = inputs(padding)
        expected, found = (run(model, batch).last_hidden_state for model in (plain, optimised(plain)))
        real = batch.get("attention_mask", torch.ones(4, 9)).bool()
        torch.testing.assert_close(found[real], expected[real], rtol=1e-10, atol=1e-10)


def test_per_head_factors_attend_in_their_rank_space() -> None:
    model = optimised(compressed(qkv="per-head"))
    packed = [module for module in model.modules() if isinstance(module, PackedQKV)]
    assert len(packed) == 2
    assert all(width < SIZES["hidden_size"] for module in packed for width in module.widths)


def test_a_row_without_any_token_is_zeros_and_leaves_the_others_alone() -> None:
    plain, batch = compressed(), inputs()
    batch["attention_mask"][2] = 0
    others = torch.tensor([0, 1, 3])
    model = optimised(plain)
    found = run(model, batch).last_hidden_state
    assert not found[2].any()
    without = {name: tensor[others] for name, tensor in batch.items()}
    torch.testing.assert_close(found[others], run(model, without).last_hidden_state)
    batch["attention_mask"][:] = 0
    assert not run(model, batch).last_hidden_state.any()


@pytest.mark.parametrize("by", ["argument", "config"])
@pytest.mark.parametrize("padding", [None, "holes"])
def test_hidden_states_are_those_of_the_plain_model(padding: str | None, by: str) -> None:
    plain, batch = compressed("roberta", "classifier").double(), inputs(padding)
    model = optimised(plain)
    without = run(model, batch).logits
    expected = run(plain, batch, output_hidden_states=True).hidden_states
    model.config.output_hidden_states = by == "config"
    found = run(model, batch, **({"output_hidden_states": True} if by == "argument" else {}))
    real = batch.get("attention_mask", torch.ones(4, 9)).bool()
    assert len(found.hidden_states) == len(expected) == 3
    for a, b in zip(found.hidden_states, expected, strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.logits, without)
    # The recorders stay on the layers, and record nothing unless asked.
    model.config.output_hidden_states = False
    again = run(model, batch)
    assert again.hidden_states is None
    assert torch.equal(again.logits, without)


def test_a_hook_on_a_layer_sees_the_padded_batch() -> None:
    plain, batch = compressed().double(), inputs()
    model = optimised(plain)
    expected = run(model, batch).last_hidden_state
    seen: dict[str, list[Tensor]] = {"plain": [], "optimised": []}
    for name, watched in (("plain", plain), ("optimised", model)):
        for layer in watched.encoder.layer:
            layer.register_forward_hook(lambda _, args, out, name=name: seen[name].extend((args[0], out)))
    run(plain, batch)
    assert torch.equal(run(model, batch).last_hidden_state, expected)
    real = batch["attention_mask"].bool()
    for a, b in zip(seen["optimised"], seen["plain"], strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-10, atol=1e-10)


def test_a_layer_can_be_called_by_itself() -> None:
    plain, batch = compressed().double(), inputs()
    x = torch.randn(4, 9, 64, dtype=torch.float64)
    mask = batch["attention_mask"].bool()
    expected = plain.encoder.layer[0](x, mask[:, None, None, :])
    torch.testing.assert_close(optimised(plain).encoder.layer[0](x, mask)[mask], expected[mask])


@pytest.mark.parametrize("shape", [(9, 64), (64,), (2, 2, 9, 64)])
def test_a_layer_that_is_called_with_no_batch_says_to_call_the_model(shape: tuple[int, ...]) -> None:
    layer = optimised(compressed()).encoder.layer[0]
    with pytest.raises(BackendError, match=r"takes a batch \[batch, length, hidden\], not \[.*64\]; call the model"):
        layer(torch.randn(*shape))


def test_what_was_first_run_in_inference_mode_runs_outside_of_it() -> None:
    model = optimised(compressed())
    embedded = torch.randn(7, 11, 64)
    with torch.inference_mode():
        expected = model.encoder(embedded).last_hidden_state
    assert torch.equal(model.encoder(embedded).last_hidden_state, expected)


def test_the_embeddings_that_a_caller_passes_in_are_not_written_to() -> None:
    model = optimised(compressed())
    embedded = torch.randn(2, 5, 64)
    before = embedded.clone()
    with torch.inference_mode():
        model.encoder(embedded)
    assert torch.equal(embedded, before)


def test_transformers_still_finds_its_classes() -> None:
    model = optimised(compressed(head="classifier"))
    assert isinstance(model, modeling_bert.BertForSequenceClassification)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert all(isinstance(layer, modeling_bert.BertLayer) for layer in model.bert.encoder.layer)


def test_the_factors_are_gone_and_nothing_wants_a_gradient() -> None:
    plain = compressed(head="classifier")
    model = optimised(plain)
    kept = {name for name, _ in model.named_parameters()}
    assert not any("encoder" in name for name in kept)
    assert kept < {name for name, _ in plain.named_parameters()}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def numbers(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("qkv", ["dense", "joint", "per-head"])
def test_packed_weights_take_about_the_memory_of_the_factors(qkv: str) -> None:
    plain = compressed(qkv=qkv, hidden_size=128, intermediate_size=256)
    assert numbers(optimised(plain).encoder) <= 1.3 * numbers(plain.encoder)


def test_a_copy_and_another_dtype_compute_the_same() -> None:
    plain, batch = compressed("bert", "classifier"), inputs()
    model = optimised(plain)
    expected = run(model, batch).logits
    assert torch.equal(run(copy.deepcopy(model), batch).logits, expected)
    wide = copy.deepcopy(model).double()
    assert run(wide, batch).logits.dtype == torch.float64
    torch.testing.assert_close(run(wide, batch).logits.float(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        run(model.to(torch.bfloat16), batch).logits, run(plain.to(torch.bfloat16), batch).logits, rtol=0.1, atol=0.1
    )


def test_a_copy_shares_nothing_and_a_shallow_one_its_modules() -> None:
    model, batch = optimised(compressed("bert", "classifier")), inputs()
    add_graphs(model, Graphs(40))
    deep, shallow = copy.deepcopy(model), copy.copy(model)
    tensors = [{t.data_ptr() for t in (*each.parameters(), *each.buffers())} for each in (model, deep, shallow)]
    assert tensors[0].isdisjoint(tensors[1])
    assert tensors[0] == tensors[2]
    assert deep.graphs is not model.graphs
    assert shallow.graphs is model.graphs
    assert deep.bert.config is deep.config is not model.config
    assert shallow.bert is model.bert
    assert torch.equal(run(shallow, batch).logits, run(model, batch).logits)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_threads_that_share_a_model_get_their_own_answers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashsvd.blocks.running.tokens.MOST_KNOWN", 2)
    model = optimised(compressed(family))
    ids = torch.randint(5, 20, (4, 24), generator=torch.Generator().manual_seed(1))
    batches = [
        {"input_ids": ids[:rows, :length]} | ({"attention_mask": mask} if masked else {})
        for rows, length in ((1, 3), (2, 24), (3, 9), (4, 17))
        for masked in (False, True)
        for mask in [(torch.arange(length) <= torch.arange(rows)[:, None] + 1).long()]
    ]
    expected = [run(copy.deepcopy(model), batch).last_hidden_state for batch in batches]

    def ask(first: int) -> None:
        for i in range(first, first + 24):
            found = run(model, batches[i % len(batches)], output_hidden_states=i % 5 == 0)
            torch.testing.assert_close(found.last_hidden_state, expected[i % len(batches)])
            assert (found.hidden_states is None) == (i % 5 > 0)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(ask, first) for first in range(8)]:
            done.result()


@pytest.mark.slow
def test_a_compiled_model_computes_the_same() -> None:
    model, batch = optimised(compressed("bert", "classifier")), inputs()
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
        (lambda model, _: nn.ModuleList([model]).train(), "trained"),
        (lambda model, _: model.state_dict(), "saved"),
        (lambda model, _: nn.ModuleList([model]).state_dict(), "saved"),
        (lambda model, path: model.save_pretrained(path), "saved"),
        (lambda model, path: model.base_model.save_pretrained(path), "saved"),
        (lambda model, _: pickle.dumps(model), "pickled"),
        (lambda model, _: pickle.dumps(model.base_model.encoder), "pickled"),
        (lambda model, _: torch.save(nn.ModuleList([model]), io.BytesIO()), "pickled"),
        (lambda model, path: save_compressed(model, path, CompressionInfo.read(path.parent / "out")), "saved"),
        (lambda model, _: model.load_state_dict({}), "given other weights"),
        (lambda model, _: nn.ModuleList([model]).load_state_dict({}, strict=False), "given other weights"),
    ],
)
def test_what_needs_the_factors_is_refused_and_leaves_no_trace(
    make_model: MakeModel, tmp_path: Path, use: Callable[[Any, Path], object], what: str
) -> None:
    run_compress(CompressConfig(model=str(make_model()), rank=4, output=str(tmp_path / "out")))
    model = load_compressed(tmp_path / "out", optimize=True)
    config, expected = model.config.to_json_string(), run(model, inputs()).logits
    with pytest.raises(BackendError, match=f"an optimised model cannot be {what}; load the checkpoint again"):
        use(model, tmp_path / "written")
    assert not (tmp_path / "written").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]
    assert model.config.to_json_string() == config
    assert not any(module.training for module in model.modules())
    assert torch.equal(run(model.eval(), inputs()).logits, expected)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"output_attentions": True}, "keeps no attention weights"),
        ({"encoder_hidden_states": torch.zeros(4, 9, 64)}, "takes no encoder_hidden_states"),
        ({"is_causal": True}, "takes no is_causal"),
        ({"attention_mask": torch.ones(4, 1, 9, 9, dtype=torch.bool)}, r"not \[4, 1, 9, 9\]"),
        ({"attention_mask": torch.ones(4, 9, 9)}, r"not \[4, 9, 9\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_forward_that_asks_for_more_than_an_encoder_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(BackendError, match=why):
        run(optimised(compressed()), inputs(None), **options)


NO_MASKS = [
    torch.ones(9), torch.ones(4, 8), torch.ones(3, 9), torch.ones(4, 9, 9), torch.zeros(4, 9, 9),
    torch.ones(4, 1, 9, 9), torch.ones(4, 1, 1, 9, 9), torch.tensor(1), [[1] * 9] * 4, "mask",
]  # fmt: skip


@pytest.mark.parametrize("family", [*POST_LN, "modernbert"])
def test_whatever_is_no_mask_of_the_batch_is_refused_by_its_shape_or_type(family: str) -> None:
    model = optimised(compressed(family))
    for mask in NO_MASKS:
        given = re.escape(str(list(mask.shape)) if isinstance(mask, Tensor) else f"a {type(mask).__name__}")
        with pytest.raises(
            BackendError, match=rf"takes an attention mask \[batch, length\], here \[4, 9\], not {given}"
        ):
            run(model, inputs(None), attention_mask=mask)


@pytest.mark.parametrize("family", [*POST_LN, "modernbert"])
def test_the_gradient_of_a_loss_is_refused(family: str) -> None:
    plain, batch = compressed(family, "classifier"), inputs() | {"labels": torch.tensor([0, 1, 0, 1])}
    model = optimised(plain)
    loss = model(**batch).loss
    assert loss.item() == pytest.approx(plain(**batch).loss.item(), rel=1e-5)
    with pytest.raises(BackendError, match="an optimised model gives no gradients"):
        loss.backward()
    with torch.no_grad():
        assert not model(**batch).loss.requires_grad
    assert inspect.signature(type(model).forward) == inspect.signature(type(plain).forward)


def test_a_head_that_somebody_trains_has_its_gradients() -> None:
    model = optimised(compressed("bert", "classifier"))
    model.classifier.requires_grad_(True)
    model(**inputs(), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    assert model.classifier.weight.grad.any()


@pytest.mark.parametrize("family", POST_LN)
def test_a_layer_by_itself_refuses_what_the_model_does(family: str) -> None:
    model, x = optimised(compressed(family)), torch.randn(2, 3, 64)
    layer = next(module for module in model.modules() if isinstance(module, FusedLayer))
    with pytest.raises(BackendError, match="an optimised model gives no gradients"):
        layer(x.requires_grad_())
    with torch.inference_mode(), pytest.raises(BackendError, match=r"not \[3\]"):
        layer(x, torch.ones(3))


def test_gradients_and_autocast_are_refused() -> None:
    model = optimised(compressed())
    embedded = torch.randn(1, 3, 64, requires_grad=True)
    with pytest.raises(BackendError, match=r"gives no gradients; use torch\.inference_mode"):
        model(inputs_embeds=embedded)
    with torch.no_grad():
        assert not model(inputs_embeds=embedded).last_hidden_state.requires_grad
    assert not model(**inputs()).last_hidden_state.requires_grad
    with torch.autocast("cpu"), pytest.raises(BackendError, match="not under autocast"):
        model(**inputs())


# What `optimize` refuses to begin with.


def add_hook(model: Any) -> None:
    model.encoder.layer[1].output.dense.register_forward_hook(lambda *_: None)


def wrap(model: Any) -> None:
    model.encoder.layer[0].forward = lambda *_: None


def replace_linear(model: Any) -> None:
    class Other(nn.Linear):
        pass

    model.encoder.layer[0].intermediate.dense = Other(64, 96)


def replace_norm(model: Any) -> None:
    model.encoder.layer[0].output.LayerNorm = nn.RMSNorm(64)


def repeat(model: Any) -> None:
    model.encoder.layer[1] = model.encoder.layer[0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda model: model.train(), "in training mode"),
        (lambda model: model.encoder.layer[1].output.double(), "float32 on cpu, float64 on cpu"),
        (
            lambda model: setattr(model.config, "is_decoder", True),
            r"config\.is_decoder is set, with .*; run the model as it is",
        ),
        (
            lambda model: setattr(model.config, "is_causal", True),
            r"config\.is_causal is set, with .*; run the model as it is",
        ),
        (
            lambda model: setattr(model.config, "add_cross_attention", True),
            r"config\.add_cross_attention is set, with .*; run the model as it is",
        ),
        (add_hook, r"encoder\.layer\.1\.output\.dense has a hook"),
        (wrap, r"encoder\.layer\.0 is wrapped"),
        (replace_linear, r"encoder\.layer\.0\.intermediate\.dense \(Other, of test_runtime\) is no plain or low-rank"),
        (replace_norm, r"output\.LayerNorm is a RMSNorm"),
        (lambda model: delattr(model, "encoder"), "encoder is a NoneType, not a BertEncoder"),
        (lambda model: setattr(model.encoder, "layer", nn.ModuleList()), "has no layers that could be fused"),
        (repeat, "layers 0 and 1 are one and the same module; give each a copy"),
        (lambda model: optimize(model), "optimised already"),
    ],
)
def test_a_model_that_cannot_be_fused_is_refused(change: Callable[[Any], object], why: str) -> None:
    model = build_model("bert", "base", **SIZES)
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


def test_layers_may_share_parts_and_parameters() -> None:
    plain = compressed().double()
    first, second = plain.encoder.layer
    second.output = first.output
    second.intermediate.dense.u.weight = first.intermediate.dense.u.weight
    torch.testing.assert_close(
        run(optimised(plain), inputs(None)).last_hidden_state,
        run(plain, inputs(None)).last_hidden_state,
        rtol=1e-10,
        atol=1e-10,
    )


def interrupt(monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException, calls: int = 1) -> None:
    """Make what is called at `where` raise at the call of this number."""
    module, _, name = where.rpartition(".")
    original, count = getattr(importlib.import_module(module), name), itertools.count(1)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if next(count) == calls:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(where, interrupted)


BLOCKS = {
    "bert": "flashsvd.blocks.encoder.PostLNBlock",
    "roberta": "flashsvd.blocks.encoder.PostLNBlock",
    "distilbert": "flashsvd.blocks.encoder.PostLNBlock",
    "mpnet": "flashsvd.blocks.encoder.PostLNBlock",
    "modernbert": "flashsvd.blocks.modernbert.PreLNBlock",
}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt()], ids=type)
@pytest.mark.parametrize("family", BLOCKS)
def test_a_model_whose_fusing_was_interrupted_says_so_from_then_on(
    family: str, error: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = compressed(family, "classifier")
    interrupt(monkeypatch, BLOCKS[family], error, calls=2)
    with pytest.raises(type(error)):
        optimize(model)
    base, written = model.base_model, tmp_path / "written"
    layers = next(module for module in base.modules() if isinstance(module, nn.ModuleList))
    no_info: Any = None
    uses: list[tuple[str, Callable[[], object]]] = [
        ("run", lambda: run(model, inputs())),
        ("run", lambda: run(base, inputs())),
        ("run", lambda: layers[0](torch.zeros(1, 3, 64))),
        ("optimised", lambda: optimize(model)),
        ("optimised", lambda: optimize(base)),
        ("saved", lambda: model.state_dict()),
        ("saved", lambda: model.save_pretrained(written)),
        ("saved", lambda: save_compressed(model, written, no_info)),
        ("pickled", lambda: pickle.dumps(model)),
        ("trained", lambda: model.train()),
        ("given other weights", lambda: model.load_state_dict({})),
    ]
    if family != "modernbert":
        stack = base.transformer if family == "distilbert" else base.encoder
        uses.append(("run", lambda: stack(torch.zeros(1, 3, 64))))
    for what, use in uses:
        with pytest.raises(BackendError, match=f"interrupted, so that .* cannot be {what}: .*; load the checkpoint"):
            use()
    assert not written.exists()


def test_the_last_norm_counts_as_a_layer_that_may_not_be_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compressed("modernbert")
    interrupt(monkeypatch, "flashsvd.blocks.modernbert.NormBlock", torch.OutOfMemoryError("no memory"))
    with pytest.raises(torch.OutOfMemoryError):
        optimize(model)
    with pytest.raises(BackendError, match="interrupted, so that the model cannot be run"):
        run(model, inputs())


@pytest.mark.parametrize("family", BLOCKS)
def test_a_model_of_which_no_layer_was_fused_yet_is_left_as_it_was(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compressed(family, "base")
    plain = copy.deepcopy(model)
    expected, kinds = run(model, inputs()).last_hidden_state, [type(module) for module in model.modules()]
    with monkeypatch.context() as patch:
        interrupt(patch, BLOCKS[family], torch.OutOfMemoryError("no memory"))
        with pytest.raises(torch.OutOfMemoryError):
            optimize(model)
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(run(model, inputs()).last_hidden_state, expected)
    assert_as_exact(run(optimize(model), inputs()).last_hidden_state, plain, inputs())


def test_eager_attention_that_returns_its_weights_is_refused() -> None:
    model = build_model("bert", "base", attn_implementation="eager", output_attentions=True)
    with pytest.raises(BackendError, match=r"config\.output_attentions is set; set it to False"):
        optimize(model)


def test_other_architectures_are_refused() -> None:
    sizes = {"vocab_size": 64, "embedding_size": 16, "hidden_size": 32, "intermediate_size": 48}
    with pytest.raises(
        BackendError, match="no fused blocks for 'albert', only for bert, roberta, xlm-roberta, distilbert, mpnet"
    ):
        optimize(AlbertModel(AlbertConfig(num_attention_heads=4, **sizes)).eval())


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: "path/to/model",
        lambda: nn.Linear(2, 2),
        lambda: nn.Sequential(nn.Linear(2, 2)),
        lambda: build_model("bert", "base").config,
        lambda: nn.DataParallel(build_model("bert", "base")),
        lambda: torch.compile(build_model("bert", "base")),
    ],
)
def test_what_is_no_transformers_model_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(
        BackendError, match=r"takes a transformers model, or a .*, not a \w+; give it what from_pretrained or"
    ):
        optimize(make())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"backend": "cuda"}, "backend 'cuda' is not known; choose from auto, torch, triton"),
        ({"graph": True}, "CUDA graphs cannot run here: the model is on cpu; leave out graph"),
        (
            {"backend": "torch", "graph": True},
            "CUDA graphs need the attention kernel; use backend auto or triton, or leave out graph",
        ),
    ],
)
def test_a_backend_that_cannot_run_is_refused(options: Any, why: str) -> None:
    with pytest.raises(BackendError, match=why):
        optimize(build_model("bert", "base"), **options)


def test_triton_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashsvd.kernels.launch.interpreting", lambda: False)
    with pytest.raises(BackendError, match="backend triton cannot run here: the kernels run on a GPU, not on cpu"):
        optimize(build_model("bert", "base"), backend="triton")


def test_triton_is_refused_for_layers_that_kernels_cannot_take() -> None:
    with pytest.raises(BackendError, match="it has no such activation; use backend auto or torch"):
        optimize(compressed(hidden_act="quick_gelu"), backend="triton")
    with pytest.raises(BackendError, match="not float64"):
        optimize(compressed().double(), backend="triton")


WIDE: dict[str, Any] = {"hidden_size": 1280, "num_attention_heads": 2, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"backend": "triton"}, "backend triton cannot run this model: attention heads of 640 are wider than 512"),
        ({"graph": True}, "CUDA graphs cannot run this model: attention heads of 640 are wider than 512; leave out"),
    ],
)
def test_heads_too_wide_for_the_attention_kernel_are_refused_where_it_is_forced(
    options: dict[str, Any], why: str
) -> None:
    plain = build_model("bert", "base", **WIDE)
    expected = run(plain, inputs()).last_hidden_state
    with pytest.raises(BackendError, match=why):
        optimize(plain, **options)
    assert torch.equal(run(plain, inputs()).last_hidden_state, expected)
    assert_as_exact(run(optimised(plain, "auto"), inputs()).last_hidden_state, plain, inputs())


@pytest.mark.slow
def test_heads_that_are_narrow_enough_in_their_rank_space_will_do() -> None:
    plain = build_model("bert", "base", **WIDE)
    factor(plain, "per-head", ratio=0.3)
    bert.check(plain, "triton", graph=True)


def test_an_activation_that_someone_put_in_place_is_kept() -> None:
    plain = compressed().double()
    for layer in plain.encoder.layer:
        layer.intermediate.intermediate_act_fn = torch.nn.ReLU()
    batch = inputs(None)
    expected, found = run(plain, batch), run(optimised(plain, "torch"), batch)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-10, atol=1e-10)


def test_a_layer_with_another_attention_is_refused() -> None:
    class Another(modeling_bert.BertSelfAttention):
        pass

    model = compressed()
    model.encoder.layer[0].attention.self.__class__ = Another
    with pytest.raises(BackendError, match=r"encoder\.layer\.0\.attention\.self is a Another, not a BertSelfAttention"):
        optimize(model)


def test_dropout_left_in_training_mode_is_refused() -> None:
    model = compressed()
    model.encoder.layer[1].output.dropout.train()
    with pytest.raises(BackendError, match=r"model\.eval\(\) first"):
        optimize(model)


def test_what_a_wrapper_of_a_layer_returns_counts() -> None:
    model, batch = optimised(compressed(), "torch"), inputs()
    before = run(model, batch).last_hidden_state
    layer = model.encoder.layer[0]
    forward = layer.forward
    layer.forward = lambda hidden, *arguments, **options: forward(hidden.clone(), *arguments, **options)
    assert torch.equal(run(model, batch).last_hidden_state, before)


def test_an_optimised_model_is_not_exported() -> None:
    model = optimised(compressed(), "torch")
    with pytest.raises(BackendError, match="cannot be traced or exported"):
        torch.export.export(model, (torch.zeros(1, 11, dtype=torch.long),))
    # Nothing of the attempt is left behind.
    assert run(model, {"input_ids": torch.zeros(1, 11, dtype=torch.long)}).last_hidden_state.isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_an_optimised_model_is_not_traced(family: str) -> None:
    ids = torch.zeros(1, 11, dtype=torch.long)
    model = optimised(compressed(family, "classifier"), "torch")
    before = run(model, {"input_ids": ids}).logits
    with pytest.raises(BackendError, match=r"cannot be traced or exported \(torch\.jit\.trace\); use the plain model"):
        torch.jit.trace(model, (ids,))
    assert torch.equal(run(model, {"input_ids": ids}).logits, before)


# The kernels, in Triton's interpreter.


@pytest.mark.parametrize("padding", [None, "holes"])
@pytest.mark.parametrize("qkv", ["dense", "joint", "per-head"])
def test_on_triton_the_answers_are_the_same(qkv: str, padding: str | None, launched: list[str]) -> None:
    plain, batch = compressed(qkv=qkv, hidden_size=32, num_attention_heads=2), inputs(padding)
    model = optimised(plain, "triton")
    assert_as_exact(run(model, batch).last_hidden_state, plain, batch)
    assert launched.count("_attention") == 2
    assert launched.count("_fused_ln") == 4
    assert launched.count("_fused_embeddings") == 1
    assert launched.count("_ffn_v1") == (0 if qkv == "dense" else 2)
    assert launched.count("_activated_linear") == (2 if qkv == "dense" else 0)
    assert set(runtime.choices(model).values()) == {"triton", "products"} - {"" if qkv == "dense" else "products"}


def test_what_was_picked_can_be_asked_for() -> None:
    model = optimised(compressed(qkv="per-head"), "auto")
    assert runtime.choices(model) == {}
    run(model, inputs())
    picked = runtime.choices(model)
    assert set(picked.values()) == {"torch"}
    assert {name.partition(",")[0] for name in picked} == {"attention", "ffn core", "norm"}
    with pytest.raises(BackendError, match="not optimised, so nothing was picked"):
        runtime.choices(compressed())


def test_a_batch_that_padding_would_blow_up_has_a_choice_of_its_own() -> None:
    model = optimised(compressed(), "auto")
    for lengths in ([8, 8], [8, 2, 2, 2, 2]):
        mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
        run(model, {"input_ids": torch.full(mask.shape, 7), "attention_mask": mask})
    attention = [name for name in runtime.choices(model) if name.startswith("attention")]
    assert [name.split(", ")[3:5] for name in attention] == [
        ["padded 16 tokens", "up to 16 tokens"],
        ["padded 64 tokens", "up to 16 tokens"],
    ]


def test_the_layers_share_what_was_measured() -> None:
    model = optimised(compressed())
    found = {id(module.choices) for module in model.modules() if isinstance(getattr(module, "choices", None), Choices)}
    assert len(found) == 1
    assert all(isinstance(layer, FusedLayer) for layer in model.encoder.layer)


def test_fused_layers_go_by_the_names_of_their_family() -> None:
    for family, name in (("bert", "Bert"), ("roberta", "Roberta")):
        plain = compressed(family)
        fused = optimised(plain).encoder
        (kind,) = {type(layer) for layer in fused.layer}
        assert (type(fused).__name__, kind.__name__) == (f"Fused{name}Encoder", f"Fused{name}Layer")
        assert issubclass(kind, type(plain.encoder.layer[0]))


@pytest.mark.slow
def test_only_the_familys_own_file_of_transformers_is_imported() -> None:
    code = (
        "import sys, flashsvd\n"
        "from transformers import BertConfig, BertModel\n"
        "config = BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)\n"
        "flashsvd.optimize(BertModel(config).eval(), backend='torch')\n"
        "print([name for name in sys.modules if 'modeling_roberta' in name or 'modeling_modernbert' in name])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# Configs, which a model may share with others, and be given anew.


@pytest.mark.parametrize("family", BLOCKS)
def test_the_config_stays_the_models_own_and_as_it_was(family: str) -> None:
    plain = compressed(family, "classifier")
    config, before, attention = plain.config, plain.config.to_json_string(), plain.config._attn_implementation
    model = optimize(plain)
    assert model.config is model.base_model.config is config
    assert config.to_json_string() == before
    assert config._attn_implementation == attention


def fresh(config: Any) -> Any:
    return type(config).from_dict(config.to_dict())


CHANGES: dict[str, Callable[[Any], object]] = {
    "a copy": lambda model: setattr(model, "config", copy.deepcopy(model.config)),
    "a fresh one": lambda model: setattr(model, "config", fresh(model.config)),
    "a copy below the head": lambda model: setattr(model.base_model, "config", copy.deepcopy(model.config)),
    "a fresh one below the head": lambda model: setattr(model.base_model, "config", fresh(model.config)),
    "eager attention": lambda model: model.set_attn_implementation("eager"),
}


@pytest.mark.parametrize("family", BLOCKS)
@pytest.mark.parametrize("change", CHANGES)
def test_another_config_or_attention_changes_no_answer(family: str, change: str) -> None:
    model, batch = optimised(compressed(family, "classifier")), inputs("holes")
    expected = run(model, batch).logits
    CHANGES[change](model)
    assert torch.equal(run(model, batch).logits, expected)


@pytest.mark.parametrize("family", BLOCKS)
def test_another_config_that_asks_for_hidden_states_gets_them(family: str) -> None:
    plain, batch = compressed(family).double(), inputs("holes")
    model = optimised(plain)
    model.config = copy.deepcopy(model.config)
    model.config.output_hidden_states = True
    expected = run(plain, batch, output_hidden_states=True).hidden_states
    real = batch["attention_mask"].bool()
    for a, b in zip(run(model, batch).hidden_states, expected, strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-6, atol=1e-6)


# Checkpoints.


def test_a_checkpoint_loads_onto_fused_blocks(make_model: MakeModel, tmp_path: Path) -> None:
    run_compress(CompressConfig(model=str(make_model()), rank=4, output=str(tmp_path / "out")))
    plain, fused = load_compressed(tmp_path / "out"), load_compressed(tmp_path / "out", optimize=True, backend="torch")
    assert set(runtime.choices(fused)) == set()
    assert_as_exact(run(fused, inputs()).logits, plain, inputs(), "logits")
    with pytest.raises(ConfigError, match=r"backend, graph and kv_cache .* pass optimize=True"):
        load_compressed(tmp_path / "out", kv_cache="dense")
    with pytest.raises(ConfigError, match="pass optimize=True"):
        load_compressed(tmp_path / "out", backend="torch")
    name: Any = "triton"
    with pytest.raises(ConfigError, match="not 'triton'; pass optimize=True, backend='triton'"):
        load_compressed(tmp_path / "out", optimize=name)


def test_a_backend_that_cannot_run_is_refused_before_the_weights_are_read(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_compress(CompressConfig(model=str(make_model()), rank=4, output=str(tmp_path / "out")))
    monkeypatch.setattr("flashsvd.io.load_factored", None)
    with pytest.raises(BackendError, match="CUDA graphs cannot run here"):
        load_compressed(tmp_path / "out", optimize=True, graph=True)
