"""Dense models whose layers' matrices are weight-only int8: by torchao where it is installed, else by plain modules.

The matrices are those that `compress` would factor, so that what is rounded of a dense and of a low-rank model is the
same; each row has a scale.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from flashsvd.lowrank.int8 import Int8Linear
from flashsvd.lowrank.layers import dense_parameters, weight_matrix
from flashsvd.models.registry import find_targets

HAS_TORCHAO = find_spec("torchao") is not None
BY = "torchao" if HAS_TORCHAO else "plain modules"


class DenseInt8(NamedTuple):
    """A model to run, and one of plain modules with the same integers, which runs in any dtype."""

    model: Any
    plain: Any


class ScaledBehind(Int8Linear):
    """y = (x I^T) s + b: with the scale behind the product the compiler multiplies by the integers as it reads them."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


def dense_int8(dense: Any) -> DenseInt8:
    """A dense model with its linear layers' weights rounded, by torchao where it is installed."""
    if HAS_TORCHAO:
        return by_torchao(dense)
    plain = rounded_dense(dense)
    return DenseInt8(plain, plain)


def rounded_dense(dense: Any) -> Any:
    """A copy with plain modules, rounded as factors are."""
    plain = copy.deepcopy(dense)
    for path in _paths(plain):
        plain.set_submodule(path, _rounded(plain.get_submodule(path)))
    return plain


def _rounded(layer: nn.Module) -> nn.Module:
    stored = weight_matrix(layer).T.detach()
    _, bias = dense_parameters(layer)
    made = ScaledBehind(stored.shape[1], stored.shape[0], bias=bias is not None).eval()
    made.round(stored)
    made.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return made


def by_torchao(dense: Any) -> DenseInt8:
    """By torchao, which rounds by a scale of its own.

    Raises:
        ImportError: it is not installed.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, plain, paths = copy.deepcopy(dense), rounded_dense(dense), _paths(dense)
    for path in paths:
        model.set_submodule(path, _linear(model.get_submodule(path)))
    # What it would set of the compiler holds for all that is compiled afterwards; max-autotune tunes as much.
    rounding = Int8WeightOnlyConfig(set_inductor_config=False)
    quantize_(model, rounding, filter_fn=lambda _, path: path in paths)
    for path in paths:
        weight, own = model.get_submodule(path).weight, plain.get_submodule(path)
        own.weight, own.scale = nn.Parameter(weight.qdata, requires_grad=False), weight.scale.flatten().float()
    return DenseInt8(model, plain)


def _linear(layer: nn.Module) -> nn.Module:
    """The layer as the only kind of linear layer that torchao knows, which GPT-2's are not."""
    stored, (_, bias) = weight_matrix(layer).T.detach(), dense_parameters(layer)
    linear = nn.Linear(1, 1, bias=bias is not None, device="meta").eval()
    linear.weight = nn.Parameter(stored.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _paths(model: Any) -> list[str]:
    return sorted({target.module for target in find_targets(model)})
