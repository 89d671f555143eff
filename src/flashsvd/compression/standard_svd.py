"""Standard truncated SVD: minimises ||W - U V||_F over all U, V of rank r.

Closed form (Eckart and Young, 1936): with W = A diag(s) B^T, keep the r largest singular values. Here the singular
vectors of the smaller side come from the eigenvectors Q of W^T W (or W W^T) in float64, and the other factor is
W Q: the product is W projected on its leading singular directions, so at full rank it is W itself, and it costs a
fraction of a full SVD. The singular values are shared evenly: U = A diag(s)^1/2, V = diag(s)^1/2 B^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashsvd.compression.method import Factors, Method


def truncated_svd(weight: Tensor, rank: int) -> Factors:
    """The best rank-r approximation of W [..., in, out] in the Frobenius norm.

    Returns:
        float64 factors U [..., in, r] and V [..., r, out], columns by falling singular value.

    Raises:
        ValueError: the rank does not lie between 1 and min(in, out).
    """
    rows, columns = weight.shape[-2:]
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"rank {rank} does not lie between 1 and {min(rows, columns)}")
    w = weight.double()
    if rows < columns:
        v, u = truncated_svd(w.mT, rank)
        return Factors(u.mT, v.mT)
    _, directions = torch.linalg.eigh(w.mT @ w)
    q = directions[..., -rank:].flip(-1)
    projected = w @ q
    del w
    s = torch.linalg.vector_norm(projected, dim=-2, keepdim=True)
    # Where s is zero the column of W Q is zero too, and any scale leaves the product as it is.
    scale = torch.where(s > 0, s, 1.0).sqrt()
    return Factors(projected.div_(scale), (q * scale).mT)


METHOD = Method("standard", truncated_svd, aliases=("svd",))
