"""The extension point through which plain `from_pretrained` loads a compressed checkpoint.

transformers lets a checkpoint name a `quant_method` in its config; the quantizer registered for it swaps modules on
the meta device before the weights are read. Ours swaps the dense linears for the factored modules that the config's
`modules` map describes, and refuses weights that do not fill them exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from flashsvd.errors import CheckpointError
from flashsvd.lowrank.factored import FactoredModule
from flashsvd.lowrank.joined import build_module
from flashsvd.lowrank.spec import QUANT_METHOD, ModuleSpec, read_modules, version_of
from flashsvd.models.counts import check_counts
from flashsvd.models.precision import check_loaded_finite
from flashsvd.models.state import check_base_state
from flashsvd.storage.verify import TensorShape, check_same_directory, tensor_shapes


@register_quantization_config(QUANT_METHOD)
class FlashSVDConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped
    """The `quantization_config` of a compressed checkpoint: the factored modules, by path."""

    def __init__(self, modules: Any = None, format_version: Any = 1, **rest: Any) -> None:
        self.quant_method = rest.pop("quant_method", QUANT_METHOD)
        specs = read_modules(modules, format_version, rest)
        self.format_version = format_version
        self.modules = {path: spec.to_json() for path, spec in specs.items()}

    @classmethod
    def of(cls, model: nn.Module) -> FlashSVDConfig:
        """Describe the factored modules that `model` has now."""
        specs = describe_layers(model)
        return cls({path: spec.to_json() for path, spec in specs.items()}, version_of(specs.values()))

    def specs(self) -> dict[str, ModuleSpec]:
        return read_modules(self.modules, self.format_version)


def describe_layers(model: nn.Module) -> dict[str, ModuleSpec]:
    """The factored modules of a model, by path; the parts of a joined one within its own description."""
    specs: dict[str, ModuleSpec] = {}
    for path, module in model.named_modules():
        is_part = path.rpartition(".")[0] in specs
        if isinstance(module, FactoredModule) and not is_part:
            specs[path] = module.spec()
    return specs


def build_layers(model: Any, specs: Mapping[str, ModuleSpec]) -> None:
    """Put uninitialised factored modules in the place of a model's dense ones.

    Args:
        specs: by the path of each in this model, or in its base model or one with a head.

    Raises:
        CheckpointError: there is no such layer in the model, or it does not fit its description.
    """
    for path, spec in specs.items():
        here = _path_in(model, path)
        parent = model.get_submodule(here.rpartition(".")[0])
        try:
            layer = build_module(spec, model.get_submodule(here))
        except ValueError as error:
            raise CheckpointError(f"config.json describes {path} as {spec.to_json()}, but {error}") from error
        model.set_submodule(here, layer)
        # Some models initialise `parent.child.weight` by name, which a factored child no longer has.
        parent._is_hf_initialized = True


@register_quantizer(QUANT_METHOD)
class FlashSVDQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped
    """Builds the factored modules before the weights are loaded, and checks that each one was filled."""

    _shapes: Mapping[str, TensorShape] = {}

    def update_attn_implementation(self, config: Any) -> Any:
        # The first that transformers asks with the config in hand, before it builds all of its layers.
        check_counts(config.to_dict(), str(config.name_or_path or ""))
        return config

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        build_layers(model, self.quantization_config.specs())
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if checkpoint_files:
            check_same_directory(checkpoint_files, str(model.config.name_or_path or ""))
            check_base_state(model, tensor_shapes(checkpoint_files), str(checkpoint_files[0]))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for path in describe_layers(model):
            for name, parameter in model.get_submodule(path).named_parameters():
                if not getattr(parameter, "_is_hf_initialized", False):
                    raise CheckpointError(f"the weights of {path}.{name} were not loaded; compress the model again")
        for name, parameter in model.named_parameters():
            # Some versions of transformers put a tensor of another shape into a quantized model without a word.
            if tuple(parameter.shape) != self._shapes.get(name, tuple(parameter.shape)):
                raise CheckpointError(
                    f"the checkpoint's {name} is {list(parameter.shape)}, not {list(self._shapes[name])}"
                )
        check_loaded_finite(model, str(model.config.name_or_path or "the checkpoint"))
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
            module = model.get_submodule(candidate)
        except AttributeError:
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            return candidate
    raise CheckpointError(f"config.json names the layer {path!r}, no linear layer of a {type(model).__name__}")


def _spellings(model: Any, path: str) -> tuple[str, str]:
    """The path as it is, and with the base model's prefix taken off or put on."""
    prefix = f"{model.base_model_prefix}."
    return path, path.removeprefix(prefix) if path.startswith(prefix) else prefix + path
