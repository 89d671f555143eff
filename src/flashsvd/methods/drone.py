"""DRONE, data-aware low-rank compression (Chen et al., DRONE: Data-aware Low-rank Compression for Large NLP Models,
NeurIPS 2021).

Minimises E||x (W - U V)||^2 over the layer's inputs x: the error of what the layer computes instead of the error of
its weights (the paper's problem 3, theorem 1). Closed form as in `weighted.py`, with C = E[x^T x], whose Cholesky
factor whitens the input.

Departures: the paper takes SVDs of W and of the data matrix and one of a product of their factors; the covariance is
all that its solution depends on and streams. Where the inputs do not span all channels the paper's solution is
not unique: the free directions go to the standard SVD, and the report says so.

Where the layers before are compressed already, and the layer gets inputs x' in the place of x, what is minimised is

    E||x W - x' U V||^2,    with A = E[x'^T x'] and B = E[x'^T x]

which takes what the dense model gives for the goal (arXiv 2604.02119) and is not in DRONE's paper. It has the solutions
of DRONE's problem for inputs x' and the weight A^-1 B W = W + A^-1 (B - A) W. A ridge on A, a hundredth of its mean
diagonal, keeps the weight at W in directions of which the calibration data say little.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashsvd.methods.method import Factors, Method, Statistics
from flashsvd.methods.weighted import weighted_svd

RIDGE = 0.01


def factorize(weight: Tensor, rank: int, statistics: Statistics) -> Factors:
    """The best factors of W [..., in, out] for inputs of the given covariance [in, in], and of the given drift."""
    assert statistics.covariance is not None, "the method's needs name it"
    if statistics.drift is not None:
        weight = anchored(weight, statistics.covariance, statistics.drift)
    return weighted_svd(weight, rank, covariance=statistics.covariance)


def anchored(weight: Tensor, covariance: Tensor, drift: Tensor) -> Tensor:
    """W + (A + ridge I)^-1 (B - A) W, [..., in, out] in float64, for A [in, in] and the drift B - A [in, in]."""
    w, a = weight.double(), covariance.double()
    # Of a stream of zeros too there is a solution, W.
    ridge = (RIDGE * a.diagonal().mean()).clamp_min(torch.finfo(a.dtype).tiny)
    regular = a + ridge * torch.eye(len(a), dtype=a.dtype, device=a.device)
    change: Tensor = torch.linalg.solve(regular, drift.double() @ w)
    return w + change


METHOD = Method("drone", factorize, frozenset({"covariance"}), aliases=("whiten", "whitening"))
