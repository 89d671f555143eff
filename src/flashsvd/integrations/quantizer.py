"""The extension point through which plain `from_pretrained` loads a compressed checkpoint.

transformers lets a checkpoint name a `quant_method` in its config; the quantizer registered for it swaps modules on
the meta device before the weights are read. Ours swaps the dense linears for the factored modules that the config's
`modules` map describes, and refuses weights that do not fill them exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from flashsvd.errors import CheckpointError
from flashsvd.lowrank.base import FactoredModule
from flashsvd.lowrank.spec import FORMAT_VERSION, QUANT_METHOD, ModuleSpec, factor_kind, read_modules
from flashsvd.models.counts import check_counts
from flashsvd.models.factored import build_layers, describe_layers, floating_dtype, mark_as_stored, multiply_out
from flashsvd.models.precision import check_loaded_finite
from flashsvd.models.state import check_base_state
from flashsvd.storage.verify import TensorShape, check_same_directory, tensor_shapes


@register_quantization_config(QUANT_METHOD)
class FlashSVDConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped
    """The `quantization_config` of a compressed checkpoint: the factored modules, by path.

    Args:
        about: what is known of the compression (`CompressionInfo.about`). It goes wherever the model is saved, by
            whatever program.
    """

    def __init__(self, modules: Any = None, format_version: Any = 1, about: Any = None, **rest: Any) -> None:
        self.quant_method = rest.pop("quant_method", QUANT_METHOD)
        specs = read_modules(modules, format_version, rest)
        self.format_version = format_version
        self.modules = {path: spec.to_json() for path, spec in specs.items()}
        self.about = dict(about) if isinstance(about, Mapping) else {}

    @classmethod
    def of(cls, model: nn.Module, about: Mapping[str, Any] | None = None) -> FlashSVDConfig:
        """Describe the factored modules that `model` has now."""
        return cls({path: spec.to_json() for path, spec in describe_layers(model).items()}, FORMAT_VERSION, about)

    def specs(self) -> dict[str, ModuleSpec]:
        return read_modules(self.modules, self.format_version)


@register_quantizer(QUANT_METHOD)
class FlashSVDQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped
    """Builds the factored modules before the weights are loaded, and checks that each one was filled."""

    quantization_config: FlashSVDConfig
    _shapes: Mapping[str, TensorShape] = {}

    def update_attn_implementation(self, config: Any) -> Any:
        # The first that transformers asks with the config in hand, before it builds all of its layers.
        # Not against the weights, which may lie in a folder below.
        check_counts(config.to_dict(), "")
        return config

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        build_layers(model, self.quantization_config.specs())
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if checkpoint_files:
            check_same_directory(checkpoint_files, str(model.config.name_or_path or ""))
            found = tensor_shapes(checkpoint_files)
            check_base_state(model, found, str(checkpoint_files[0]))
            # What is not there, transformers would report as missing.
            mark_as_stored(model, found)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for path in describe_layers(model):
            for name, parameter in model.get_submodule(path).named_parameters():
                # What stays on disk is on the meta device here. Its name and shape were held against the files before.
                if not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False):
                    raise CheckpointError(f"the weights of {path}.{name} were not loaded; compress the model again")
        for name, parameter in model.named_parameters():
            # Some versions of transformers put a tensor of another shape into a quantized model without a word.
            if tuple(parameter.shape) != self._shapes.get(name, tuple(parameter.shape)):
                raise CheckpointError(
                    f"the checkpoint's {name} is {list(parameter.shape)}, not {list(self._shapes[name])}"
                )
        for module in model.modules():
            if isinstance(module, FactoredModule):
                module.mark(True)
                dtype, device = floating_dtype(module, model.dtype), next(module.parameters()).device
                module.weight = torch.empty(0, dtype=dtype, device=device)
        # As it would be written now, by whatever program, of this model, which may be another one than was saved.
        self.quantization_config = FlashSVDConfig.of(model, self.quantization_config.about)
        model.config.quantization_config = self.quantization_config
        check_loaded_finite(model, str(model.config.name_or_path or "the checkpoint"))
        # transformers would forbid casting, which integers of ours survive, and the training of all that is none.
        model.is_quantized = False
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        """Multiply the factors out in place: an ordinary dense model that computes the same."""
        multiply_out(model)
        # transformers passes the dtype of the config where the user gave none.
        return model if dtype in (None, model.config.dtype) else model.to(dtype)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return factor_kind(self.quantization_config.specs()) == "float"

    @property
    def is_compileable(self) -> bool:
        return True
