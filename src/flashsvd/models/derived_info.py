"""What is known of a compressed checkpoint that another program saved, from its config alone.

transformers' `save_pretrained` and Trainer, and peft after a merge, write a whole checkpoint of a compressed model but
no `compression_info.json`. Its config describes the factored modules, and says of the compression what it carries along
under `about`; the rest is counted on the model without storage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flashsvd.lowrank.spec import factor_kind, layer_specs, read_modules
from flashsvd.models.factored import build_layers, dense_skeleton
from flashsvd.models.loading import own_dtype
from flashsvd.models.registry import find_targets
from flashsvd.storage.metadata import ABOUT, CompressionInfo, check_fields

UNKNOWN = "unknown"
_NOTHING: dict[str, Any] = {
    "method": UNKNOWN, "method_options": {}, "ranks": {}, "ratio": None, "ranks_json": None, "rank_steps": None,
    "rank_search": None, "base_model": "", "task": None, "calibration": None, "calib_inputs": "dense",
    "refine_steps": 0, "untrained": [], "versions": {}, "git_commit": None, "timestamp": UNKNOWN, "trainings": [],
}  # fmt: skip


def derive_info(config: Any, source: str) -> CompressionInfo:
    """Say what a compressed model's config says of it.

    Args:
        config: of transformers, with our `quantization_config`.
        source: what the checkpoint is called in an error.

    Raises:
        CheckpointError: the config describes layers that cannot be.
        ModelError: the architecture is not supported.
    """
    described = config.quantization_config
    described = described if isinstance(described, Mapping) else described.to_dict()
    specs = read_modules(described.get("modules"), described.get("format_version", 1))
    said = described.get("about")
    about = _NOTHING | {name: said[name] for name in ABOUT if isinstance(said, Mapping) and name in said}
    check_fields(about, f"`about` in config.json of {source}")
    about |= {name: tuple(about[name]) for name in ("untrained", "trainings")}
    model = dense_skeleton(config)
    targets = find_targets(model)
    modules = sorted({target.module for target in targets})
    dense, target_dense = _count(model), _count_matrices(model, modules)
    build_layers(model, specs)
    layers = layer_specs(specs)
    dtype = own_dtype(source, config) or torch.float32
    about.setdefault("dense_bytes", dense * dtype.itemsize)
    return CompressionInfo(
        **about,
        module_ranks={t.name: layers[t.name].rank if t.name in layers else None for t in targets},
        module_places={target.name: target.place for target in targets},
        qkv="per-head" if any(layer.heads for layer in layers.values()) else "joint",
        factors=factor_kind(specs),
        model_type=str(config.model_type),
        architecture=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        parameters={
            "dense": dense,
            "compressed": _count(model),
            "target_dense": target_dense,
            "target_compressed": _count_matrices(model, modules),
        },
    )


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _count_matrices(model: nn.Module, modules: Sequence[str]) -> int:
    """The parameters of these modules that are no biases."""
    named = (entry for path in modules for entry in model.get_submodule(path).named_parameters())
    return sum(parameter.numel() for name, parameter in named if not name.endswith("bias"))
