"""Where a model meets a method: each target's weight is factored and its module replaced, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from flashsvd.compression import Method
from flashsvd.errors import ModelError
from flashsvd.layers import LayerSpec, weight_matrix
from flashsvd.models import Target
from flashsvd.ranks import MatrixShape, RankChoice, Role

QKVLayout = Literal["joint", "per-head"]
ReadWeight = Callable[[str], Tensor | None]


@dataclass(frozen=True)
class FactoredMatrix:
    """What became of one matrix.

    Attributes:
        rank: None where the matrix stayed dense; `reason` then says why.
        error: relative reconstruction error ||W - U V||_F / ||W||_F, 0 where dense.
    """

    name: str
    role: Role
    layer: int
    rank: int | None
    heads: int | None
    dense_parameters: int
    kept_parameters: int
    error: float
    reason: str = ""


def matrix_shapes(model: nn.Module, targets: Sequence[Target], qkv: QKVLayout) -> list[MatrixShape]:
    """The shapes that `ranks.plan_ranks` plans for: in the per-head layout each head of Q, K, V is a block."""
    shapes = []
    for target in targets:
        rows, columns = weight_matrix(model.get_submodule(target.module)).shape
        blocks = _blocks(target, qkv)
        if columns % blocks:
            raise ModelError(f"{target.module} has {columns} columns, which {blocks} heads do not divide")
        shapes.append(MatrixShape(target.module, target.role, rows, columns, blocks))
    return shapes


def factor_model(
    model: nn.Module,
    targets: Sequence[Target],
    plan: Mapping[str, RankChoice],
    method: Method,
    qkv: QKVLayout = "joint",
    device: torch.device | None = None,
    on_matrix: Callable[[FactoredMatrix], None] | None = None,
    read_weight: ReadWeight | None = None,
) -> list[FactoredMatrix]:
    """Replace the planned layers of `model`, in place, by low-rank ones.

    Args:
        plan: the rank of each target, by its module path.
        device: where the factorisation runs; the model itself stays where it is.
        on_matrix: called with each result as it comes.
        read_weight: another place to read a parameter from than the model's own memory; None from it means the
            model's own.

    Raises:
        ModelError: a weight is not finite; nothing has been replaced then.
    """
    check_finite(model, read_weight)
    results = []
    for target in targets:
        dense = model.get_submodule(target.module)
        stored = read_weight(f"{target.module}.weight") if read_weight else None
        weight = weight_matrix(dense, stored).detach()
        result, layer = _factor_layer(dense, weight, target, plan[target.module], method, _blocks(target, qkv), device)
        del stored, weight
        if layer is not None:
            model.set_submodule(target.module, layer)
        if on_matrix:
            on_matrix(result)
        results.append(result)
    return results


def check_finite(model: nn.Module, read_weight: ReadWeight | None = None) -> None:
    """Refuse a model with NaN or infinite weights, read as `factor_model` reads them.

    Raises:
        ModelError: naming the first such parameter.
    """
    for name, parameter in model.named_parameters():
        stored = read_weight(name) if read_weight else None
        values = parameter.detach() if stored is None else stored
        # NaN passes through aminmax, which unlike isfinite needs no memory of the parameter's own size.
        if values.numel() and not torch.stack(torch.aminmax(values)).isfinite().all():
            raise ModelError(f"{name} holds NaN or infinite values; the model is damaged, fetch it again")


def _factor_layer(
    dense: nn.Module,
    weight: Tensor,
    target: Target,
    choice: RankChoice,
    method: Method,
    blocks: int,
    device: torch.device | None,
) -> tuple[FactoredMatrix, nn.Module | None]:
    heads = blocks if blocks > 1 else None
    if choice.rank is None:
        size = weight.numel()
        return FactoredMatrix(
            target.module, target.role, target.layer, None, None, size, size, 0.0, choice.reason
        ), None
    work = weight.to(device) if device is not None else weight
    blocked = _split_columns(work, blocks) if heads else work
    factors = method.factorize(blocked, choice.rank)
    layer = LayerSpec(choice.rank, heads).build_from_factors(dense, factors.u, factors.v)
    kept = layer.u.weight.numel() + layer.v.weight.numel()
    # The error of what is stored, so in the stored dtype's rounding; in place, since these are the largest tensors.
    original = work.float()
    residual = layer.matrix().to(work.device).sub_(original)
    error = torch.linalg.vector_norm(residual) / torch.linalg.vector_norm(original).clamp_min(1e-30)
    return FactoredMatrix(
        target.module, target.role, target.layer, choice.rank, heads, weight.numel(), kept, error.item()
    ), layer


def _blocks(target: Target, qkv: QKVLayout) -> int:
    return target.heads if qkv == "per-head" and target.role == "attn" else 1


def _split_columns(weight: Tensor, blocks: int) -> Tensor:
    """[in, blocks * width] -> [blocks, in, width]."""
    return weight.reshape(weight.shape[0], blocks, -1).movedim(1, 0)
