"""Modules that compute several projections at once, such as GPT-2's `c_attn` for Q, K and V.

Factors shared by Q, K and V would be a worse approximation than factors of their own, so each share of the output
columns is factored by itself, and a `JoinedProjections` of the parts stands where the one dense layer stood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flashsvd.lowrank.base import FactoredLayer, FactoredModule
from flashsvd.lowrank.build import build_layer
from flashsvd.lowrank.columns import Columns
from flashsvd.lowrank.layers import dense_parameters, weight_matrix
from flashsvd.lowrank.spec import JoinedSpec, ModuleSpec


class JoinedProjections(FactoredModule):
    """The outputs of the parts, each in its own columns of y. x [..., in] -> y [..., sum of the parts' out].

    The parts are children under their own names, each a factored layer or a plain `nn.Linear`.

    Attributes:
        columns: which columns of y each part has.
    """

    def __init__(self, parts: Mapping[str, nn.Module], columns: Columns | None = None) -> None:
        super().__init__()
        self.columns = columns or Columns.equal(len(parts))
        for name, part in parts.items():
            self.add_module(name, part)

    @classmethod
    def replacing(
        cls,
        dense: nn.Module,
        names: Sequence[str],
        factored: Mapping[str, nn.Module],
        columns: Columns | None = None,
    ) -> JoinedProjections:
        """The parts `names` of a dense layer: the factored ones as given, of the others its own weights, copied.

        Args:
            columns: which columns of the dense layer each part has; None gives them equal shares, in their order.
        """
        columns = columns or Columns.equal(len(names))
        parts = {}
        for i, name in enumerate(names):
            part = factored.get(name)
            parts[name] = _copy(dense_share(dense, columns, i)) if part is None else part
        return cls(parts, columns).train(dense.training)

    def parts(self) -> dict[str, nn.Module]:
        """The parts by name, in the order of their columns."""
        return dict(self.named_children())

    def forward(self, x: Tensor) -> Tensor:
        return join_columns([part(x) for part in self.children()], self.columns)

    @property
    def bias(self) -> Tensor | None:
        biases = [bias for part in self.children() if (bias := dense_bias(part)) is not None]
        return join_columns(biases, self.columns) if biases else None

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The parts' matrices in their columns, [in, out], computed in `dtype`."""
        return join_columns([dense_matrix(part, dtype) for part in self.children()], self.columns)

    def spec(self) -> JoinedSpec:
        parts = self.parts().items()
        return JoinedSpec(
            tuple((name, part.spec() if isinstance(part, FactoredLayer) else None) for name, part in parts),
            self.columns,
        )

    def extra_repr(self) -> str:
        return "" if self.columns == Columns.equal(len(self.columns.shares)) else str(self.columns)


def build_module(spec: ModuleSpec, dense: nn.Module) -> FactoredModule:
    """The uninitialised factored module of a description, of the dense layer's sizes, dtype and device.

    Raises:
        ValueError: it does not fit the dense layer, or a part has a name that no module can have.
    """
    if not isinstance(spec, JoinedSpec):
        return build_layer(spec, dense)
    columns = spec.columns or Columns.equal(len(spec.parts))
    parts: dict[str, nn.Module] = {}
    for i, (name, part) in enumerate(spec.parts):
        if hasattr(JoinedProjections({}, columns), name):
            raise ValueError(f"no part of a module can be called {name!r}")
        share = dense_share(dense, columns, i)
        parts[name] = _uninitialised(share) if part is None else build_layer(part, share)
    return JoinedProjections(parts, columns)


def separate(module: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The projections that a linear layer computes side by side in equal shares, each as a layer of its own.

    Args:
        module: a joined module whose parts have these names, or a dense layer, whose weights they then view.

    Raises:
        ValueError: the parts are others, or the columns do not divide so.
    """
    columns = Columns.equal(len(names))
    if not isinstance(module, JoinedProjections):
        return {name: dense_share(module, columns, i) for i, name in enumerate(names)}
    parts = module.parts()
    if tuple(parts) != tuple(names) or module.columns != columns:
        raise ValueError(f"its parts are {', '.join(parts)} ({module.columns}), not {', '.join(names)} ({columns})")
    return parts


def dense_share(dense: nn.Module, columns: Columns, index: int) -> nn.Linear:
    """One part of a dense layer's output columns as a layer of its own, which views its weights where it can.

    Raises:
        ValueError: the columns do not divide so.
    """
    weight, bias = dense_parameters(dense)
    matrix = share_of_columns(weight_matrix(dense), columns, index)
    with torch.device("meta"):
        share = nn.Linear(matrix.shape[0], matrix.shape[1], bias=bias is not None)
    share.weight = _view(matrix.T, like=weight)
    if bias is not None:
        share.bias = _view(share_of_columns(bias, columns, index), like=bias)
    return share.train(dense.training)


def share_of_columns(matrix: Tensor, columns: Columns, index: int) -> Tensor:
    """[..., all columns] -> [..., those of one part]: a view, unless the part has some in each of several groups.

    Raises:
        ValueError: the columns do not divide so.
    """
    start, width = columns.run(index, matrix.shape[-1])
    if columns.groups == 1:
        return matrix[..., start : start + width]
    return _grouped(matrix, columns.groups)[..., start : start + width].flatten(-2)


def join_columns(shares: Sequence[Tensor], columns: Columns) -> Tensor:
    """The inverse of `share_of_columns`: [..., those of one part] of every part -> [..., all columns]."""
    if columns.groups == 1:
        return torch.cat(list(shares), dim=-1)
    return torch.cat([_grouped(share, columns.groups) for share in shares], dim=-1).flatten(-2)


def _grouped(matrix: Tensor, groups: int) -> Tensor:
    """[..., groups * width] -> [..., groups, width]."""
    return matrix.reshape(*matrix.shape[:-1], groups, -1)


def dense_matrix(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """W [in, out] of a dense layer, or the one that a factored module stands for."""
    return module.matrix(dtype) if isinstance(module, FactoredModule) else weight_matrix(module).to(dtype)


def dense_bias(module: nn.Module) -> Tensor | None:
    """The bias [out] of a dense layer or a factored module."""
    return module.bias if isinstance(module, FactoredModule) else dense_parameters(module)[1]


def _uninitialised(share: nn.Linear) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(share.in_features, share.out_features, bias=share.bias is not None, dtype=share.weight.dtype)
    return layer.to_empty(device=share.weight.device)


def _copy(share: nn.Linear) -> nn.Linear:
    """The share with memory of its own: saved tensors must not overlap, and the dense weight has to be freed."""
    for parameter in share.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return share


def _view(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=like.requires_grad)
