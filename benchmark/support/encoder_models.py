"""Encoders of random weights, dense and low-rank, and the plain forms of running them."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, ModernBertConfig

from flashsvd import runtime
from flashsvd.blocks.running.graph import GraphOption
from flashsvd.compression.factoring import Factoring, QKVLayout
from flashsvd.compression.factorize import factor_model, matrix_shapes
from flashsvd.errors import BackendError
from flashsvd.lowrank.ranks import RankRequest, plan_ranks
from flashsvd.methods.method import Factors, Method, Statistics
from flashsvd.models.registry import find_targets
from support.harness import Check, Prepared, Settings
from support.timing import Graphed

CompileMode = Literal["default", "reduce-overhead"]
# (hidden states, mask [batch, length] or None) -> hidden states
Forward = Callable[[Tensor, Tensor | None], Tensor]
# A forward of whatever arguments.
F = TypeVar("F")

# Of a unit: what each factor leaves of its input's size.
GAIN = 0.7
# No embeddings are measured, so there are hardly any.
SPECIAL: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
MODERNBERT = SPECIAL | {"cls_token_id": 2, "sep_token_id": 3}
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def bert(settings: Settings) -> Any:
    """BERT-base, or a tiny one."""
    sizes = TINY if settings.sizes == "tiny" else {}
    return _build(BertConfig(**SPECIAL | sizes), settings)


def modernbert(settings: Settings) -> Any:
    """ModernBERT-base, or a tiny one whose second layer is local."""
    sizes = TINY | {"local_attention": 6} if settings.sizes == "tiny" else {}
    return _build(ModernBertConfig(**MODERNBERT | sizes), settings)


def low_rank(dense: Any, request: RankRequest, qkv: QKVLayout) -> tuple[Any, float]:
    """A copy with random factors in place of its linear layers, and the fraction of their parameters that is kept."""
    model = copy.deepcopy(dense)
    targets = find_targets(model)
    plan = plan_ranks(matrix_shapes(model, targets, qkv), request)
    matrices = factor_model(model, Factoring(targets, plan, Method("random", _random_factors), qkv))
    kept = sum(m.kept_parameters for m in matrices) / sum(m.dense_parameters for m in matrices)
    return model.requires_grad_(False), kept


def hidden_states(settings: Settings, batch: int, length: int, model: Any) -> Tensor:
    generator = torch.Generator(settings.device).manual_seed(1)
    shape = (batch, length, model.config.hidden_size)
    return torch.randn(shape, generator=generator, device=settings.device).to(settings.dtype)


def check(forward_of: Callable[[Any], Forward], plain: Any, x: Tensor, mask: Tensor | None = None) -> Check:
    """A batch's first and last row, real tokens only, through the plain module: in its own dtype, and in fp64."""
    rows = sorted({0, len(x) - 1})
    mask = None if mask is None else mask[rows]

    def real(result: Tensor) -> Tensor:
        return result if mask is None else result[mask.bool()]

    exact = forward_of(copy.deepcopy(plain).double())(x[rows].double(), mask)
    return Check(real(exact), real(forward_of(plain)(x[rows], mask)), lambda result: real(result[rows]))


def eager(forward: Forward, run: Callable[[Forward], Tensor]) -> Callable[[], Prepared]:
    """As it is."""
    return lambda: Prepared(lambda: run(forward))


def graphed(forward: Forward, run: Callable[[Forward], Tensor]) -> Callable[[], Prepared]:
    """As one CUDA graph of this very input, which is neither copied in nor copied out."""

    def make() -> Prepared:
        graph = Graphed(lambda: run(forward))
        return Prepared(graph, graph.forget)

    return make


def compiled(
    forward_of: Callable[[Any], F], module: nn.Module, run: Callable[[F], Tensor], settings: Settings,
    mode: CompileMode = "default",
) -> Callable[[], Prepared]:  # fmt: skip
    """By torch.compile, for the one shape that `run` calls it with."""

    def make() -> Prepared:
        # Without what was compiled for other shapes, of which it would only take so many.
        torch._dynamo.reset()
        # Inductor compiles for a minute, which is too long for trying a script out.
        tiny = settings.sizes == "tiny" and not settings.cuda
        backend = "eager" if tiny else "inductor"
        options: dict[str, Any] = {} if tiny else {"mode": mode}
        if backend == "inductor" and not settings.cuda and shutil.which(os.environ.get("CXX", "g++")) is None:
            raise BackendError("torch.compile needs a C++ compiler and finds none here; install g++")
        forward = forward_of(torch.compile(module, backend=backend, dynamic=False, **options))
        return Prepared(lambda: run(forward))

    return make


def optimized(
    model: Any, forward_of: Callable[[Any], F], run: Callable[[F], Tensor], *, graph: GraphOption
) -> Callable[[], Prepared]:
    """On fused blocks, each implementation by measurement."""

    def make() -> Prepared:
        fused = runtime.optimize(copy.deepcopy(model), graph=graph)
        forward = forward_of(fused)

        def describe() -> str:
            picked = runtime.choices(fused)
            return " | ".join(f"{case}: {choice}" for case, choice in picked.items())

        return Prepared(lambda: run(forward), (lambda: _forget_graphs(fused)) if graph else None, describe)

    return make


def _forget_graphs(model: nn.Module) -> None:
    for module in model.modules():
        if getattr(module, "graphs", None) is not None:
            module.graphs.forget()


def _build(config: Any, settings: Settings) -> Any:
    torch.manual_seed(0)
    # In its dtype from the start, as from_pretrained does, which leaves the rotary frequencies in fp32.
    model = AutoModel.from_config(config, dtype=settings.dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.02)
    return model.to(settings.device).requires_grad_(False)


def _random_factors(weight: Tensor, rank: int, statistics: Statistics) -> Factors:
    (*heads, rows, columns) = weight.shape
    u = torch.randn(*heads, rows, rank, device=weight.device) * (GAIN * rows**-0.5)
    v = torch.randn(*heads, rank, columns, device=weight.device) * (GAIN * rank**-0.5)
    return Factors(u, v)
