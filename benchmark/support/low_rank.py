"""Low-rank models of random factors, which take seconds to make and run like any others of their ranks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from flashsvd.compression.factoring import Factoring, QKVLayout
from flashsvd.compression.factorize import factor_model, matrix_shapes
from flashsvd.compression.run import division
from flashsvd.lowrank.ranks import RankRequest, plan_ranks
from flashsvd.methods.method import Factors, Method, Statistics
from flashsvd.models.registry import find_targets

# Of a unit: what each factor leaves of its input's size.
GAIN = 0.7


def low_rank(dense: Any, request: RankRequest, qkv: QKVLayout) -> tuple[Any, float]:
    """A copy with random factors in place of its linear layers, and the fraction of their parameters that is kept."""
    model = copy.deepcopy(dense)
    targets = find_targets(model)
    plan = plan_ranks(matrix_shapes(model, targets, qkv), division(request, model.config))
    matrices = factor_model(model, Factoring(targets, plan, Method("random", _random_factors), qkv))
    kept = sum(m.kept_parameters for m in matrices) / sum(m.dense_parameters for m in matrices)
    return model.requires_grad_(False), kept


def _random_factors(weight: Tensor, rank: int, statistics: Statistics) -> Factors:
    (*heads, rows, columns) = weight.shape
    u = torch.randn(*heads, rows, rank, device=weight.device) * (GAIN * rows**-0.5)
    v = torch.randn(*heads, rank, columns, device=weight.device) * (GAIN * rank**-0.5)
    return Factors(u, v)
