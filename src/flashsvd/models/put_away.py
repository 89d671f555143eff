"""A model whose weights are put away: each is read from its file when it is needed, and memory holds its shape alone.

`from_pretrained` maps the files and reads next to nothing, so that a model of any size can be loaded first and put away
then: what transformers makes of names, tied weights and missing heads holds for it as for any other.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd.errors import ModelError
from flashsvd.models.precision import is_finite
from flashsvd.storage.stored_weights import StoredWeights


class PutAway:
    """The weights of a model that from now on has parameters on the meta device only.

    Buffers stay in the model. Parameters that no file can stand in for stay in memory here.
    """

    def __init__(self, model: Any, source: str | None) -> None:
        """Put a model's weights away, in place.

        Args:
            model: on the CPU.
            source: the directory or hub name that it was loaded from; None keeps all weights in memory.
        """
        stored = StoredWeights(source, model) if source is not None else None
        self._model = model
        self._dtypes = {name: parameter.dtype for name, parameter in _named(model)}
        self._readers: dict[str, Callable[[], Tensor]] = {}
        self._kept: dict[nn.Parameter, nn.Parameter] = {}
        empty: dict[nn.Parameter, nn.Parameter] = {}
        for parameter, names in _names(model).items():
            place = next(filter(None, map(stored.place, names)), None) if stored else None
            empty[parameter] = _without_storage(parameter)
            if place is None:
                self._kept[empty[parameter]] = parameter
            self._readers |= dict.fromkeys(names, parameter.detach if place is None else place.read)
        _exchange(model, empty)

    def read(self, name: str) -> Tensor:
        """A parameter of the model as it was, on the CPU.

        Raises:
            CheckpointError: its file cannot be read any more.
        """
        return self._readers[name]()

    def dtype(self, name: str) -> torch.dtype:
        """That of a parameter of the model as it was."""
        return self._dtypes[name]

    def check_finite(self, name: str) -> Tensor:
        """`read`, for a parameter that has to be finite.

        Raises:
            ModelError: it is not.
        """
        if not is_finite(values := self.read(name)):
            raise ModelError(f"{name} holds NaN or infinite values; the model is damaged, fetch it again")
        return values

    def copy_of(self, path: str) -> nn.Module:
        """A module of the model with its weights, on the CPU; they are not to be written to.

        Raises:
            ModelError: one of them is not finite.
        """
        module = self._model.get_submodule(path)
        return _copy(module, {p: self.check_finite(f"{path}.{name}") for name, p in module.named_parameters()})

    @contextlib.contextmanager
    def in_place(self, names: Callable[[str], bool], device: torch.device, dtype: torch.dtype) -> Iterator[None]:
        """Some of the model's parameters, in a dtype, and all of its buffers on a device, for a while.

        Args:
            names: tells which parameters.
        """
        here = {
            parameter: _filled(parameter, self.read(name).to(device, dtype if parameter.is_floating_point() else None))
            for name, parameter in _named(self._model)
            if names(name)
        }
        buffers = [(m, n, b) for m in self._model.modules() for n, b in m._buffers.items() if b is not None]
        for module, name, buffer in buffers:
            # What is on the meta device has been done with.
            module._buffers[name] = buffer if buffer.is_meta else buffer.to(device)
        _exchange(self._model, here)
        try:
            yield
        finally:
            _exchange(self._model, {filled: empty for empty, filled in here.items()})
            for module, name, buffer in buffers:
                module._buffers[name] = buffer

    def put_back(self) -> None:
        """Give the model the parameters again that were kept in memory."""
        _exchange(self._model, self._kept)


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A model's parameters by every name that they have: tied ones have several."""
    return model.named_parameters(remove_duplicate=False)


def _names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in _named(model):
        names.setdefault(parameter, []).append(name)
    return names


def converted(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of a module on a device with its parameters in a dtype; its buffers keep theirs."""
    values = {p: p.detach().to(device, dtype if p.is_floating_point() else None) for p in module.parameters()}
    return _copy(module, values).to(device)


def _copy(module: nn.Module, values: Mapping[nn.Parameter, Tensor]) -> nn.Module:
    """A copy of a module with these values in the place of its parameters'."""
    return copy.deepcopy(module, {id(parameter): _filled(parameter, found) for parameter, found in values.items()})


def _without_storage(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)


def _filled(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=parameter.requires_grad)


def _exchange(root: nn.Module, others: dict[nn.Parameter, nn.Parameter]) -> None:
    """Other parameters in the places of a module's own; a tied one has several."""
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter in others:
                module._parameters[name] = others[parameter]
