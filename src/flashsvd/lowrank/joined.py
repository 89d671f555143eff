"""Modules that compute several projections at once, such as GPT-2's `c_attn` for Q, K and V.

Factors shared by Q, K and V would be a worse approximation than factors of their own, so each share of the output
columns is factored by itself, and a `JoinedProjections` of the parts stands where the one dense layer stood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from flashsvd.errors import CheckpointError
from flashsvd.lowrank.layers import FactoredLinear, LayerSpec, dense_parameters, weight_matrix


class JoinedProjections(nn.Module):
    """y = [y_1, y_2, ...], the outputs of the parts side by side. x [..., in] -> y [..., sum of the parts' out].

    The parts are children under their own names, each a factored layer or a plain `nn.Linear`.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    @classmethod
    def replacing(cls, dense: nn.Module, names: Sequence[str], factored: Mapping[str, nn.Module]) -> JoinedProjections:
        """The parts `names` of a dense layer: the factored ones as given, of the others its own weights, copied."""
        parts = {}
        for i, name in enumerate(names):
            part = factored.get(name)
            parts[name] = _copy(dense_share(dense, i, len(names))) if part is None else part
        return cls(parts).train(dense.training)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.children()], dim=-1)

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The parts' matrices side by side, [in, out], computed in `dtype`."""
        return torch.cat([dense_matrix(part, dtype) for part in self.children()], dim=1)


FactoredModule: TypeAlias = FactoredLinear | JoinedProjections


@dataclass(frozen=True)
class JoinedSpec:
    """What the checkpoint says of a module with parts: the name of each, in column order, and its factors' sizes.

    Attributes:
        parts: None for a part that stayed dense.
    """

    parts: tuple[tuple[str, LayerSpec | None], ...]

    @classmethod
    def of(cls, module: JoinedProjections) -> JoinedSpec:
        return cls(tuple((name, LayerSpec.of(part)) for name, part in module.named_children()))

    def to_json(self) -> dict[str, Any]:
        # A list, since transformers sorts the keys of its config and the order of the parts is that of the columns.
        return {"parts": [{"name": name} | (spec.to_json() if spec else {"rank": None}) for name, spec in self.parts]}

    @classmethod
    def from_json(cls, name: str, data: Any) -> JoinedSpec:
        """Raises CheckpointError where `data` is not what `to_json` writes."""
        parts = data["parts"] if isinstance(data, Mapping) and set(data) == {"parts"} else None
        if not isinstance(parts, list) or len(parts) < 2 or not all(isinstance(part, Mapping) for part in parts):
            raise CheckpointError(f"config.json describes {name} as {data!r}, which is no module of several parts")
        names = [part.get("name") for part in parts]
        if not all(_can_name_a_child(part) for part in names) or len(set(names)) < len(names):
            raise CheckpointError(f"config.json describes {name} with parts named {names!r}; compress the model again")
        return cls(tuple((part["name"], _part_from_json(f"{name}.{part['name']}", part)) for part in parts))

    def build(self, dense: nn.Module) -> JoinedProjections:
        """Uninitialised parts of the dense layer's sizes, dtype and device.

        Raises:
            ValueError: its columns do not divide into so many parts, or a part's into its heads.
        """
        parts: dict[str, nn.Module] = {}
        for i, (name, spec) in enumerate(self.parts):
            share = dense_share(dense, i, len(self.parts))
            parts[name] = _uninitialised(share) if spec is None else spec.build(share)
        return JoinedProjections(parts)


ModuleSpec: TypeAlias = LayerSpec | JoinedSpec


def describe(module: nn.Module) -> ModuleSpec | None:
    """What a checkpoint says of a module; None for one that is dense or no linear layer."""
    return JoinedSpec.of(module) if isinstance(module, JoinedProjections) else LayerSpec.of(module)


def spec_from_json(name: str, data: Any) -> ModuleSpec:
    """Raises CheckpointError where `data` describes no factored module."""
    if isinstance(data, Mapping) and "parts" in data:
        return JoinedSpec.from_json(name, data)
    return LayerSpec.from_json(name, data)


def dense_share(dense: nn.Module, index: int, count: int) -> nn.Linear:
    """One of `count` equal shares of a dense layer's output columns, as a layer of its own that views its weights.

    Raises:
        ValueError: the columns do not divide so.
    """
    weight, bias = dense_parameters(dense)
    in_features, out_features = weight_matrix(dense).shape
    if out_features % count:
        raise ValueError(f"its {out_features} columns do not make {count} equal parts")
    with torch.device("meta"):
        share = nn.Linear(in_features, out_features // count, bias=bias is not None)
    share.weight = _view(share_of_columns(weight_matrix(dense), index, count).T, like=weight)
    if bias is not None:
        share.bias = _view(share_of_columns(bias, index, count), like=bias)
    return share.train(dense.training)


def share_of_columns(matrix: Tensor, index: int, count: int) -> Tensor:
    """[..., count * width] -> [..., width], a view."""
    width = matrix.shape[-1] // count
    return matrix[..., index * width : (index + 1) * width]


def dense_matrix(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """W [in, out] of a dense layer, or the one that a factored module stands for."""
    return module.matrix(dtype) if isinstance(module, FactoredModule) else weight_matrix(module).to(dtype)


def dense_bias(module: nn.Module) -> Tensor | None:
    """The bias [out] of a dense layer or a factored module."""
    if isinstance(module, JoinedProjections):
        biases = [bias for part in module.children() if (bias := dense_bias(part)) is not None]
        return torch.cat(biases) if biases else None
    return module.v.bias if isinstance(module, FactoredLinear) else dense_parameters(module)[1]


def _part_from_json(name: str, data: Mapping[str, Any]) -> LayerSpec | None:
    rest = {key: value for key, value in data.items() if key != "name"}
    return None if rest == {"rank": None} else LayerSpec.from_json(name, rest)


def _can_name_a_child(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and not hasattr(nn.Module(), name)


def _uninitialised(share: nn.Linear) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(share.in_features, share.out_features, bias=share.bias is not None, dtype=share.weight.dtype)
    return layer.to_empty(device=share.weight.device)


def _copy(share: nn.Linear) -> nn.Linear:
    """The share with memory of its own: saved tensors must not overlap, and the fused weight shall be freed."""
    for parameter in share.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return share


def _view(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=like.requires_grad)
