"""The extension point through which plain `from_pretrained` loads a compressed checkpoint.

transformers lets a checkpoint name a `quant_method` in its config; the quantizer registered for it swaps modules on
the meta device before the weights are read. Ours swaps the dense linears for the factored ones that the config's
`modules` map describes, and refuses weights that do not fill them exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from flashsvd.errors import CheckpointError
from flashsvd.layers import FactoredLinear, LayerSpec, LowRankLinear, PerHeadLowRankLinear
from flashsvd.verify import Shape, check_same_directory, compare_tensors, tensor_shapes

QUANT_METHOD = "flashsvd"
FORMAT_VERSION = 1


@register_quantization_config(QUANT_METHOD)
class FlashSVDConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped
    """The `quantization_config` of a compressed checkpoint: the factored layers, by module path."""

    def __init__(self, modules: Mapping[str, Any], format_version: int = FORMAT_VERSION, **rest: Any) -> None:
        self.quant_method = rest.pop("quant_method", QUANT_METHOD)
        if rest or format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"config.json is of a format this flashsvd does not read (format {format_version!r}, "
                f"unknown {sorted(rest)}); upgrade flashsvd"
            )
        self.format_version = format_version
        self.modules = {path: LayerSpec.from_json(path, spec).to_json() for path, spec in modules.items()}

    @classmethod
    def of(cls, model: nn.Module) -> FlashSVDConfig:
        """Describe the factored layers that `model` has now."""
        return cls({path: spec.to_json() for path, spec in describe_layers(model).items()})

    def specs(self) -> dict[str, LayerSpec]:
        return {path: LayerSpec(**spec) for path, spec in self.modules.items()}


def describe_layers(model: nn.Module) -> dict[str, LayerSpec]:
    """The factored layers of a model, by module path."""
    specs = {}
    for path, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            specs[path] = LayerSpec(module.rank)
        elif isinstance(module, PerHeadLowRankLinear):
            specs[path] = LayerSpec(module.rank, module.v.heads)
    return specs


@register_quantizer(QUANT_METHOD)
class FlashSVDQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped
    """Builds the factored layers before the weights are loaded, and checks that each one was filled."""

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        swapped: dict[str, FactoredLinear] = {}
        for path, spec in self.quantization_config.specs().items():
            here = _path_in(model, path)
            parent = model.get_submodule(here.rpartition(".")[0])
            layer = spec.build(model.get_submodule(here))
            model.set_submodule(here, layer)
            # Some models initialise `parent.child.weight` by name, which a factored child no longer has.
            parent._is_hf_initialized = True
            swapped[path] = layer
        if checkpoint_files:
            check_same_directory(checkpoint_files)
            found = tensor_shapes(checkpoint_files)
            where = str(checkpoint_files[0])
            for path, layer in swapped.items():
                compare_tensors(_expected_tensors(path, layer), _under_any_prefix(model, path, found), where)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for path in describe_layers(model):
            for name, parameter in model.get_submodule(path).named_parameters():
                if not getattr(parameter, "_is_hf_initialized", False):
                    raise CheckpointError(f"the weights of {path}.{name} were not loaded; compress the model again")
        # Nothing here forbids casting or training, as it would for integer weights.
        model.is_quantized = False
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _path_in(model: Any, path: str) -> str:
    """The path inside this model of a layer that a base or a head checkpoint of it named."""
    for candidate in _spellings(model, path):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    raise CheckpointError(f"config.json names the layer {path}, which {type(model).__name__} does not have")


def _spellings(model: Any, path: str) -> tuple[str, str]:
    """The path as it is, and with the base model's prefix taken off or put on."""
    prefix = f"{model.base_model_prefix}."
    return path, path.removeprefix(prefix) if path.startswith(prefix) else prefix + path


def _expected_tensors(path: str, layer: nn.Module) -> dict[str, Shape]:
    return {f"{path}.{name}": tuple(p.shape) for name, p in layer.named_parameters()}


def _under_any_prefix(model: Any, path: str, found: Mapping[str, Shape]) -> dict[str, Shape]:
    """The tensors of one layer, named as `path` spells it, whichever way the file does."""
    return {
        path + name.removeprefix(spelling): shape
        for spelling in _spellings(model, path)
        for name, shape in found.items()
        if name.startswith(spelling + ".")
    }
