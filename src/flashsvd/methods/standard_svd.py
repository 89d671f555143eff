"""Standard truncated SVD.

Minimises ||W - U V||_F over all U, V of rank r. Closed form: the r leading singular triplets of W (Eckart and Young,
The approximation of one matrix by another of lower rank, Psychometrika 1936). As in `weighted.py`, with C = I.
"""

from __future__ import annotations

from torch import Tensor

from flashsvd.methods.method import Factors, Method, Statistics
from flashsvd.methods.weighted import weighted_svd


def factorize(weight: Tensor, rank: int, statistics: Statistics) -> Factors:
    """The best rank-r approximation of W [..., in, out] in the Frobenius norm."""
    factors = weighted_svd(weight, rank)
    # Without statistics the note could only say that W itself is of lower rank, which its factors represent exactly.
    return Factors(factors.u, factors.v)


METHOD = Method("standard", factorize, aliases=("svd",))
