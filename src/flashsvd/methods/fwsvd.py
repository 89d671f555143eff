"""Fisher-weighted SVD (Hsu et al., Language model compression with weighted low-rank factorization, ICLR 2022,
arXiv 2207.00112).

Minimises sum_ij D_i (W - U V)_ij^2, where D_i sums the squared gradients of the loss over row i of W (equations 6-9):
the empirical Fisher information, taken equal along a row. Closed form as in `weighted.py`, with C = diag(D); the
paper's S^-1 svd(S W) is the same product, but needs every D_i > 0.

Departures: in the per-head layout each head has row sums of its own; a matrix whose gradients are all zero gets its
standard SVD, and the report says so.
"""

from __future__ import annotations

from torch import Tensor

from flashsvd.methods.method import Factors, Method, Statistics
from flashsvd.methods.weighted import weighted_svd


def factorize(weight: Tensor, rank: int, statistics: Statistics) -> Factors:
    """The best factors of W [..., in, out] under its row-wise Fisher information [..., in]."""
    assert statistics.row_gradients is not None, "the method's needs name it"
    return weighted_svd(weight, rank, diagonal=statistics.row_gradients)


METHOD = Method("fwsvd", factorize, frozenset({"row_gradients"}), aliases=("fw",))
