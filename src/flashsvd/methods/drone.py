"""DRONE, data-aware low-rank compression (Chen et al., DRONE: Data-aware Low-rank Compression for Large NLP Models,
NeurIPS 2021).

Minimises E||x (W - U V)||^2 over the layer's inputs x: the error of what the layer computes instead of the error of
its weights (the paper's problem 3, theorem 1). Closed form as in `weighted.py`, with C = E[x^T x], whose Cholesky
factor whitens the input.

Departures: the paper takes SVDs of W and of the data matrix and one of a product of their factors; the covariance is
all that its solution depends on and streams. Where the inputs do not span all channels the paper's solution is
not unique: the free directions go to the standard SVD, and the report says so.
"""

from __future__ import annotations

from torch import Tensor

from flashsvd.methods.method import Factors, Method, Statistics
from flashsvd.methods.weighted import weighted_svd


def factorize(weight: Tensor, rank: int, statistics: Statistics) -> Factors:
    """The best factors of W [..., in, out] for inputs of the given covariance [in, in]."""
    assert statistics.covariance is not None, "the method's needs name it"
    return weighted_svd(weight, rank, covariance=statistics.covariance)


METHOD = Method("drone", factorize, frozenset({"covariance"}), aliases=("whiten", "whitening"))
