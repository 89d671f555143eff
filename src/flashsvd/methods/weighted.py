"""The closed form that all methods share: low-rank approximation under a quadratic form on the input side.

    minimise  tr((W - U V)^T C (W - U V))   over U [in, r], V [r, out],       C [in, in] positive semidefinite

With C = S^T S this is ||S W - S U V||_F, so S U V must be the truncated SVD of M = S W (Eckart and Young, 1936), that
is M B^T B with B [r, out] the leading right singular vectors of M. U V = W B^T B has that image, whatever S is: no
inverse of S is taken, and at full rank the product is W itself even where C is singular.

Directions that C does not see (M has fewer than r singular values above rounding) cost nothing under the objective;
they are filled with the best ones for ||W - U V||_F, and `Factors.note` says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashsvd.methods.method import Factors

EPS = torch.finfo(torch.float64).eps


def weighted_svd(
    weight: Tensor, rank: int, *, covariance: Tensor | None = None, diagonal: Tensor | None = None
) -> Factors:
    """The best factors of W [..., in, out] under C.

    Args:
        covariance: C, [in, in].
        diagonal: the diagonal of a C that has nothing else, [in] or [..., in]. With neither, C is the identity.

    Returns:
        float64 factors U [..., in, r] and V [..., r, out], in the order of the singular values of S W, their column
        and row norms balanced.

    Raises:
        ValueError: the rank does not lie between 1 and min(in, out).
    """
    rows, columns = weight.shape[-2:]
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"rank {rank} does not lie between 1 and {min(rows, columns)}")
    w = weight.double()
    if columns <= rows:
        # M^T M = W^T C W needs no root of C.
        basis, found = _leading(w.mT @ _times(w, covariance, diagonal), rank, max(rows, columns))
    else:
        basis, found = _row_basis(_times_root(w, covariance, diagonal), rank)
    note = ""
    if (found < rank).any():
        note = f"calibration determines {int(found.min())} of {rank} directions, standard SVD the others"
        basis = _complete(w, basis, found)
    u = w @ basis.mT
    size = torch.linalg.vector_norm(u, dim=-2, keepdim=True)
    balance = torch.where(size > 0, size, 1.0).sqrt()
    return Factors(u / balance, basis * balance.mT, note)


def _times(w: Tensor, covariance: Tensor | None, diagonal: Tensor | None) -> Tensor:
    """C W."""
    if covariance is not None:
        return covariance.double() @ w
    return w if diagonal is None else diagonal.double().unsqueeze(-1) * w


def _times_root(w: Tensor, covariance: Tensor | None, diagonal: Tensor | None) -> Tensor:
    """M = S W."""
    if covariance is not None:
        return _root(covariance) @ w
    return w if diagonal is None else diagonal.double().sqrt().unsqueeze(-1) * w


def _root(covariance: Tensor) -> Tensor:
    """S [in, in] with S^T S = C: the Cholesky factor, or where C is singular the root from its eigenvalues."""
    c = covariance.double()
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(c)
    if not failed:
        return factor.mT
    values, vectors = torch.linalg.eigh(c)
    # Eigenvalues below rounding are zeros of a singular matrix; their roots would pass for directions with data.
    values = torch.where(values > values.amax() * len(values) * EPS, values, 0.0)
    factor = vectors * values.sqrt()
    return factor.mT


def _leading(gram: Tensor, rank: int, size: int, energy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors of a Gram matrix as rows, [..., r, n], and how many are above rounding, [...].

    Rounding is relative to `energy` [...], the trace where not given, and grows with the `size` of the product.
    """
    values, vectors = torch.linalg.eigh(gram)
    scale = gram.diagonal(dim1=-2, dim2=-1).sum(-1) if energy is None else energy
    values = values[..., -rank:].flip(-1)
    return vectors[..., -rank:].flip(-1).mT, (values > scale.unsqueeze(-1) * size * EPS).sum(-1)


def _row_basis(m: Tensor, rank: int, energy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The leading right singular vectors of M, [..., r, out], and how many are above rounding, [...]."""
    rows, columns = m.shape[-2:]
    if columns <= rows:
        return _leading(m.mT @ m, rank, rows, energy)
    left, found = _leading(m @ m.mT, rank, columns, energy)
    # From left singular vectors A: the columns of M^T A are s B^T, orthogonal but for the rounding that QR removes.
    return torch.linalg.qr(m.mT @ left.mT).Q.mT, found


def _complete(w: Tensor, basis: Tensor, found: Tensor) -> Tensor:
    """Replace the basis rows from `found` on by the leading directions of what W has outside the others."""
    rank, columns = basis.shape[-2:]
    completed = []
    for block, rows, count in zip(
        w.reshape(-1, *w.shape[-2:]), basis.reshape(-1, rank, columns), found.reshape(-1), strict=True
    ):
        kept = rows[: int(count)]
        rest = block - block @ kept.mT @ kept
        extra, more = _row_basis(rest, rank - len(kept), block.square().sum()) if len(kept) < rank else (kept, 0)
        extra = extra[: int(more)]
        # Beyond the rank of W itself there is nothing left to add.
        empty = rows.new_zeros(rank - len(kept) - len(extra), columns)
        completed.append(torch.cat([kept, extra, empty]))
    return torch.stack(completed).reshape(basis.shape)
