"""Adaptive ranks (Gao et al., Adaptive Rank Selections for Low-Rank Approximation of Language Models, NAACL 2024).

Minimises, over the weights of a hypernetwork that proposes a mask m_l in {0, 1}^k for the k singular components of
each matrix l,

    L(m) + lambda R(m) + gamma A(m),     R = log(max(T(m), p T) / (p T)),     A = mean_l ||m_l - sorted(m_l)||^2 / k

L is the model's loss (the distance from the dense model's outputs, where it has none) with every component multiplied
by its mask, R holds the parameters T(m) that the masks keep to the budget p T, counted against the dense matrices, and
A pulls each mask towards a prefix, so that its sum is a rank (equations 5-9). Masks are rounded Gumbel-sigmoid samples
with straight-through gradients. The rank of a matrix is how many components have a probability above one half; the
factors are those of a base method, truncated there.

Departures: the masks start at the ranks that a uniform ratio gives, not at full rank, and are judged once more
against them: the learned ranks are kept where their loss on the calibration data is lower. A matrix whose
factors would hold more than the dense form counts, and stays, as dense. The weights and the number of steps below
are ours, chosen on small models. Ranks are always learned on the dense model's inputs, whatever inputs the base method
is then shown.
"""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from flashsvd.common.making_modules import making_modules
from flashsvd.errors import ConfigError
from flashsvd.lowrank.ranks import fit_to_budget
from flashsvd.lowrank.shapes import MatrixShape
from flashsvd.methods import drone, fwsvd, standard_svd
from flashsvd.methods.method import Method, RankProblem

log = logging.getLogger("flashsvd")

BASES = {method.name: method for method in (drone.METHOD, fwsvd.METHOD, standard_svd.METHOD)}
DEFAULT_BASE = "drone"

STEPS = 200
LEARNING_RATE = 3e-3
TEMPERATURE = 0.4
BUDGET_WEIGHT = 16.0
ALIGN_WEIGHT = 1.0
# How fast the first probabilities fall along the components, from one side of the uniform rank to the other.
START_SLOPE = 8.0
EMBEDDING, HIDDEN = 32, 64


class RankHypernetwork(nn.Module):
    """Logits of the mask of each matrix, from one fixed random embedding each, through a bidirectional GRU that
    lets every matrix know of the others."""

    embeddings: Tensor

    def __init__(self, shapes: list[MatrixShape], start: dict[str, int]) -> None:
        super().__init__()
        # Whatever the caller's default dtype is.
        dtype = torch.float32
        self.register_buffer("embeddings", torch.randn(len(shapes), EMBEDDING, dtype=dtype))
        self.gru = nn.GRU(EMBEDDING, HIDDEN, bidirectional=True, dtype=dtype)
        self.norm = nn.LayerNorm(2 * HIDDEN, dtype=dtype)
        self.heads = nn.ModuleList(nn.Linear(2 * HIDDEN, shape.full_rank, dtype=dtype) for shape in shapes)
        self.starts = [
            START_SLOPE * (start[shape.name] - torch.arange(shape.full_rank, dtype=dtype) - 0.5) / shape.full_rank
            for shape in shapes
        ]
        for head in self.heads:
            nn.init.zeros_(head.weight)  # type: ignore[arg-type]  # ModuleList forgets that these are Linears
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]  # as above

    def forward(self) -> list[Tensor]:
        states = F.gelu(self.norm(self.gru(self.embeddings)[0]))
        return [head(state) + start for head, state, start in zip(self.heads, states, self.starts, strict=True)]


def choose_ranks(problem: RankProblem) -> dict[str, int]:
    """Learn the rank of each matrix; `full_rank` where it should stay dense."""
    shapes, uniform = list(problem.shapes), dict(problem.uniform)
    generator = torch.Generator().manual_seed(problem.seed)
    with making_modules(generator):
        network = RankHypernetwork(shapes, uniform)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    progress = tqdm(range(STEPS), desc="learning ranks", unit="step")
    for step in progress:
        masks = [_sample(logits, generator) for logits in network()]
        task = problem.loss(_named(shapes, masks), step % problem.batches)
        kept = _kept_parameters(shapes, masks)
        loss = task + BUDGET_WEIGHT * _over_budget(kept, problem.budget) + ALIGN_WEIGHT * _misaligned(masks)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        progress.set_postfix(loss=f"{task.item():.4f}", kept=f"{kept.item() / problem.budget:.3f}")
    with torch.no_grad():
        learned = {shape.name: max(1, int((logits > 0).sum())) for shape, logits in zip(shapes, network(), strict=True)}
    learned, uniform = (fit_to_budget(shapes, ranks, problem.budget, problem.steps) for ranks in (learned, uniform))
    losses = {"learned": _mean_loss(problem, learned), "uniform": _mean_loss(problem, uniform)}
    log.info("calibration loss %.4g with the learned ranks, %.4g with uniform ones", *losses.values())
    return learned if losses["learned"] < losses["uniform"] else uniform


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A rounded Gumbel-sigmoid sample, with the gradient of the unrounded one."""
    uniform = torch.rand(logits.shape, dtype=logits.dtype, generator=generator).clamp(1e-6, 1 - 1e-6)
    soft = torch.sigmoid((logits + uniform.log() - (-uniform).log1p()) / TEMPERATURE)
    return soft + (soft.round() - soft).detach()


def _kept_parameters(shapes: list[MatrixShape], masks: list[Tensor]) -> Tensor:
    """T(m), no matrix counting for more than its dense form."""
    kept = [
        (mask.sum() * shape.parameters_per_rank).clamp(max=shape.dense_parameters)
        for shape, mask in zip(shapes, masks, strict=True)
    ]
    return torch.stack(kept).sum()


def _over_budget(kept: Tensor, budget: int) -> Tensor:
    return (kept / budget).clamp(min=1.0).log()


def _misaligned(masks: list[Tensor]) -> Tensor:
    return torch.stack([(mask - mask.sort(descending=True).values.detach()).square().mean() for mask in masks]).mean()


def _mean_loss(problem: RankProblem, ranks: dict[str, int]) -> float:
    masks = {
        shape.name: (torch.arange(shape.full_rank) < ranks[shape.name]).float()
        for shape in problem.shapes
        if shape.saves(ranks[shape.name])
    }
    with torch.no_grad():
        return sum(problem.loss(masks, batch).item() for batch in range(problem.batches)) / problem.batches


def _named(shapes: list[MatrixShape], masks: list[Tensor]) -> dict[str, Tensor]:
    return {shape.name: mask for shape, mask in zip(shapes, masks, strict=True)}


def configure(adasvd_base: str = DEFAULT_BASE) -> Method:
    """Adaptive ranks over the factors of another method.

    Raises:
        ConfigError: there is no such base.
    """
    for base in BASES.values():
        if adasvd_base == base.name or adasvd_base in base.aliases:
            options = {"adasvd_base": base.name}
            return dataclasses.replace(METHOD, factorize=base.factorize, needs=base.needs, options=options)
    raise ConfigError(f"--adasvd-base {adasvd_base!r} is not known; choose from {', '.join(BASES)}")


METHOD = Method(
    "adasvd",
    BASES[DEFAULT_BASE].factorize,
    BASES[DEFAULT_BASE].needs,
    aliases=("ada",),
    choose_ranks=choose_ranks,
    search="learned",
    options={"adasvd_base": DEFAULT_BASE},
    configure=configure,
)
