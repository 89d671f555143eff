"""Classifiers of random weights, dense and low-rank, and the ways to run them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, ModernBertConfig

from flashsvd import runtime
from flashsvd.compression.factoring import Factoring, QKVLayout
from flashsvd.compression.factorize import factor_model, matrix_shapes
from flashsvd.lowrank.ranks import RankRequest, plan_ranks
from flashsvd.methods.method import Factors, Method, Statistics
from flashsvd.models.registry import find_targets
from support.harness import Check, Prepared, Settings

CompileMode = Literal["default", "reduce-overhead"]
# (ids, mask or None), [batch, length] each
Batch = tuple[Tensor, Tensor | None]
# A model -> the logits of what it is called with last.
Run = Callable[[Any], Tensor]

# Of a unit: what each factor leaves of its input's size.
GAIN = 0.7
CONFIGS: dict[str, Any] = {"bert": BertConfig, "modernbert": ModernBertConfig}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def classifier(family: str, settings: Settings) -> Any:
    """A model of base size, or a tiny one, of random weights."""
    sizes = TINY if settings.sizes == "tiny" else {}
    torch.manual_seed(0)
    # In its dtype from the start, as from_pretrained does, which leaves the rotary frequencies in fp32.
    config = CONFIGS[family](**sizes, **SPECIAL)
    model = AutoModelForSequenceClassification.from_config(config, dtype=settings.dtype)
    return model.eval().to(settings.device).requires_grad_(False)


def low_rank(dense: Any, request: RankRequest, qkv: QKVLayout) -> tuple[Any, float]:
    """A copy with random factors in place of its linear layers, and the fraction of their parameters that is kept."""
    model = copy.deepcopy(dense)
    targets = find_targets(model)
    plan = plan_ranks(matrix_shapes(model, targets, qkv), request)
    matrices = factor_model(model, Factoring(targets, plan, Method("random", _random_factors), qkv))
    kept = sum(m.kept_parameters for m in matrices) / sum(m.dense_parameters for m in matrices)
    return model.requires_grad_(False), kept


def ids_of(mask: Tensor, config: Any) -> Tensor:
    """Random ids [batch, length] where the mask is 1, padding elsewhere."""
    ids = torch.randint(4, config.vocab_size, mask.shape, device=mask.device)
    return ids.masked_fill(mask == 0, config.pad_token_id)


def call(batches: Sequence[Batch], model: Any) -> Tensor:
    """One batch after the other."""
    for ids, mask in batches:
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits


def call_in_parts(batch: Batch, parts: int, model: Any) -> Tensor:
    """One part of the batch's rows after the other."""
    ids, mask = batch
    masks = [None] * parts if mask is None else mask.chunk(parts)
    return torch.cat([call([part], model) for part in zip(ids.chunk(parts), masks, strict=True)])


def check(model: Any, batch: Batch) -> Check:
    """The first and last rows of a batch."""
    rows = sorted({0, len(batch[0]) - 1})
    some = [(batch[0][rows], None if batch[1] is None else batch[1][rows])]
    exact = call(some, copy.deepcopy(model).double())
    return Check(exact, call(some, model), lambda logits: logits[rows])


def eager(model: Any, run: Run) -> Prepared:
    """As it is."""
    return Prepared(partial(run, model))


def compiled(
    model: Any, run: Run, settings: Settings, mode: CompileMode = "default", *, one_shape: bool = True
) -> Prepared:
    """By torch.compile: for the one shape that `run` calls it with, or for whichever come."""
    # Without what was compiled for other shapes, of which it would only take so many.
    torch._dynamo.reset()
    # Inductor needs a C++ compiler on a CPU, where this is only tried out.
    how: dict[str, Any] = {"mode": mode} if settings.cuda else {"backend": "eager"}
    return Prepared(partial(run, torch.compile(model, dynamic=False if one_shape else None, **how)))


def optimized(model: Any, run: Run) -> Prepared:
    """On fused blocks, with all defaults."""
    fused = runtime.optimize(copy.deepcopy(model))

    def describe() -> str:
        return " | ".join(f"{case}: {choice}" for case, choice in runtime.choices(fused).items())

    graphs = getattr(fused, "graphs", None)
    return Prepared(partial(run, fused), None if graphs is None else graphs.forget, describe)


def _random_factors(weight: Tensor, rank: int, statistics: Statistics) -> Factors:
    (*heads, rows, columns) = weight.shape
    u = torch.randn(*heads, rows, rank, device=weight.device) * (GAIN * rows**-0.5)
    v = torch.randn(*heads, rank, columns, device=weight.device) * (GAIN * rank**-0.5)
    return Factors(u, v)
