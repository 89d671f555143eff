"""Where a model meets a method: each target's weight is factored, one at a time, and then the modules are replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flashsvd.compression.factoring import Factoring, QKVLayout, block_count
from flashsvd.errors import ModelError
from flashsvd.lowrank.base import FactoredLayer
from flashsvd.lowrank.build import layer_from_factors
from flashsvd.lowrank.joined import JoinedProjections, dense_share
from flashsvd.lowrank.layers import weight_matrix
from flashsvd.lowrank.shapes import MatrixShape, Role
from flashsvd.models.architecture import Target
from flashsvd.models.precision import check_finite


@dataclass(frozen=True)
class FactoredMatrix:
    """What became of one matrix.

    Attributes:
        rank: None where the matrix stayed dense; `reason` then says why.
        error: relative reconstruction error ||W - U V||_F / ||W||_F, 0 where dense.
        note: what was degenerate about the statistics, empty as a rule.
        stack: the stack of layers that `layer` counts in, empty where the model has one only.
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
    note: str = ""
    stack: str = ""


def matrix_shapes(model: nn.Module, targets: Sequence[Target], qkv: QKVLayout) -> list[MatrixShape]:
    """The shapes that `ranks.plan_ranks` plans for: in the per-head layout each head of Q, K, V is a block.

    Raises:
        ModelError: a matrix does not divide into its parts or its heads.
    """
    shapes = []
    for target in targets:
        rows, columns = weight_matrix(dense_layer(model, target)).shape
        blocks = block_count(target, qkv)
        if columns % blocks:
            raise ModelError(f"{target.name} has {columns} columns, which {blocks} heads do not divide")
        shapes.append(MatrixShape(target.name, target.role, rows, columns, blocks))
    return shapes


def factor_model(
    model: nn.Module, factoring: Factoring, on_matrix: Callable[[FactoredMatrix], None] | None = None
) -> list[FactoredMatrix]:
    """Replace the planned layers of `model`, in place, by low-rank ones.

    Nothing is replaced before the last matrix has been factored, so that an error leaves the model as it was.

    Args:
        on_matrix: called with each result as it comes.

    Raises:
        ModelError: a weight is not finite.
    """
    results, layers = factor_layers(model, factoring, on_matrix)
    install(model, layers)
    return results


def factor_layers(
    model: nn.Module, factoring: Factoring, on_matrix: Callable[[FactoredMatrix], None] | None = None
) -> tuple[list[FactoredMatrix], dict[Target, FactoredLayer]]:
    """What `factor_model` would put into the model, and where; the model is left as it is."""
    check_finite(model, factoring.read_weight)
    results = []
    layers: dict[Target, FactoredLayer] = {}
    for target in factoring.targets:
        result, layer = factor_target(model, target, factoring)
        if layer is not None:
            layers[target] = layer
        if on_matrix:
            on_matrix(result)
        results.append(result)
    return results, layers


def dense_layer(model: nn.Module, target: Target) -> nn.Module:
    """The target's module, or its share of a joined one.

    Raises:
        ModelError: the module's columns do not divide into the parts that it is said to have.
    """
    module = model.get_submodule(target.module)
    if target.part is None:
        return module
    try:
        return dense_share(module, target.part.columns, target.part.index)
    except ValueError as error:
        raise ModelError(f"{target.module} cannot be split into {', '.join(target.part.names)}: {error}") from error


def install(model: nn.Module, layers: Mapping[Target, nn.Module]) -> None:
    """Put layers in place of the targets' dense modules; those of one joined module together."""
    parts: dict[str, dict[Target, nn.Module]] = {}
    for target, layer in layers.items():
        parts.setdefault(target.module, {})[target] = layer
    for path, factored in parts.items():
        (target, layer), *_ = factored.items()
        if target.part is not None:
            by_name = {t.part.name: part for t, part in factored.items() if t.part is not None}
            dense = model.get_submodule(path)
            layer = JoinedProjections.replacing(dense, target.part.names, by_name, target.part.columns)
        model.set_submodule(path, layer)


def factor_target(
    model: nn.Module, target: Target, factoring: Factoring
) -> tuple[FactoredMatrix, FactoredLayer | None]:
    """What becomes of one target, and the layer to put in its place; None where it stays dense."""
    dense, weight = dense_layer(model, target), dense_weight(model, target, factoring)
    choice, blocks, size = factoring.plan[target.name], factoring.blocks(target), weight.numel()
    result = FactoredMatrix(
        target.name, target.role, target.layer, None, None, size, size, 0.0, choice.reason, stack=target.stack
    )
    if choice.rank is None:
        return result, None
    work = _on_device(weight, factoring)
    factors = factoring.method.factorize(
        _in_blocks(work, blocks), choice.rank, factoring.statistics(target).to(work.device)
    )
    layer = layer_from_factors(dense, factors.u, factors.v, factoring.factors).to(dtype=factoring.dtype)
    result = replace(
        result,
        rank=choice.rank,
        heads=blocks if blocks > 1 else None,
        kept_parameters=factors.u.numel() + factors.v.numel(),
        error=relative_error(layer, work),
        reason="",
        note=factors.note,
    )
    return result, layer


def blocked_weight(model: nn.Module, target: Target, factoring: Factoring) -> Tensor:
    """The target's W as a method is given it, where the factorisation runs: [in, out], or [blocks, in, width]."""
    return _in_blocks(_on_device(dense_weight(model, target, factoring), factoring), factoring.blocks(target))


def relative_error(layer: FactoredLayer, weight: Tensor) -> float:
    """||W - U V||_F / ||W||_F of what is stored, so with its rounding, against W [in, out]."""
    original = weight.float()
    # In place, since these are the largest tensors.
    residual = layer.matrix().to(weight.device).sub_(original)
    error = torch.linalg.vector_norm(residual) / torch.linalg.vector_norm(original).clamp_min(1e-30)
    return float(error.item())


def dense_weight(model: nn.Module, target: Target, factoring: Factoring) -> Tensor:
    """The target's W [in, out], from where it is to be read."""
    stored = factoring.read_weight(f"{target.module}.weight") if factoring.read_weight else None
    return target.own_columns(weight_matrix(model.get_submodule(target.module), stored).detach())


def _on_device(weight: Tensor, factoring: Factoring) -> Tensor:
    return weight.to(factoring.device) if factoring.device is not None else weight


def _in_blocks(weight: Tensor, blocks: int) -> Tensor:
    """[in, blocks * width] -> [blocks, in, width]; as it is where there is one block."""
    return weight if blocks == 1 else weight.reshape(weight.shape[0], blocks, -1).movedim(1, 0)
