"""Saving, loading and exporting compressed checkpoints."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from flashsvd.atomic import atomic_directory
from flashsvd.device import resolve_device, resolve_dtype
from flashsvd.errors import CheckpointError, ModelError, first_line
from flashsvd.metadata import INFO_FILE, CompressionInfo
from flashsvd.pretrained import copy_companions, load_config, load_model, own_class
from flashsvd.quantizer import QUANT_METHOD, FlashSVDConfig, describe_layers
from flashsvd.verify import check_no_extra, compare_tensors, tensor_shapes, weight_files

STATE_DICT_FILE = "flashsvd_state_dict.pt"


def save_compressed(
    model: Any,
    directory: str | Path,
    info: CompressionInfo,
    *,
    companions: str | None = None,
    overwrite: bool = False,
    state_dict: bool = False,
    max_shard_size: str = "5GB",
) -> None:
    """Write a checkpoint that plain `from_pretrained` loads, all of it or nothing.

    Args:
        model: a transformers model with factored layers.
        info: becomes `compression_info.json`.
        companions: local directory or hub name to copy the tokenizer and sentence-transformers files from.
        state_dict: also write `flashsvd_state_dict.pt` for tools that want one.

    Raises:
        CheckpointError: the directory exists, holds something else, or cannot be written.
    """
    model.config.quantization_config = FlashSVDConfig.of(model)
    with atomic_directory(Path(directory), overwrite) as temporary:
        _save_pretrained(model, temporary, max_shard_size)
        if companions is not None:
            copy_companions(companions, temporary)
        info.write(temporary)
        if state_dict:
            _save_state_dict(model, temporary / STATE_DICT_FILE)


def load_compressed(directory: str | Path, device: str | None = None, dtype: str | torch.dtype | None = None) -> Any:
    """Load a compressed checkpoint as the transformers class that saved it, in eval mode.

    Args:
        device: `cuda`, `cuda:1` or `cpu`; None leaves the model on the CPU.
        dtype: None keeps the checkpoint's own.

    Raises:
        CheckpointError: it is no compressed checkpoint, or a tensor is missing, extra, misshapen or unreadable.
    """
    directory = Path(directory).expanduser()
    CompressionInfo.read(directory)
    target = resolve_device(device) if device is not None else None
    files = weight_files(directory)
    found = tensor_shapes(files)
    config = _compressed_config(directory)
    # Some versions of transformers load a misshapen tensor of a quantized model without a word.
    dense_shapes = {name: tuple(tensor.shape) for name, tensor in _dense_skeleton(config).state_dict().items()}
    compare_tensors({name: dense_shapes[name] for name in found if name in dense_shapes}, found, str(directory))
    wanted = resolve_dtype(dtype) if isinstance(dtype, str) else dtype
    try:
        loaded = load_model(str(directory), config, own_class(config), wanted)
    except ModelError as error:
        raise CheckpointError(str(error)) from error
    if loaded.untrained:
        raise CheckpointError(f"{directory} lacks the tensor {loaded.untrained[0]}; compress the model again")
    check_no_extra(set(loaded.model.state_dict()), found, str(directory))
    return loaded.model.to(target) if target is not None else loaded.model


def export_dense(directory: str | Path, output: str | Path, *, overwrite: bool = False) -> None:
    """Multiply the factors out and write an ordinary dense model, for tools that know nothing of flashsvd.

    It computes the same function, at the dense model's size and cost.

    Raises:
        CheckpointError: the checkpoint cannot be read, or the output exists or cannot be written.
    """
    model = load_compressed(directory)
    skeleton = _dense_skeleton(_compressed_config(Path(directory)))
    for path in describe_layers(model):
        model.set_submodule(path, _dense_layer(model.get_submodule(path), skeleton.get_submodule(path)))
    model.config = skeleton.config
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    with atomic_directory(Path(output), overwrite) as temporary:
        _save_pretrained(model, temporary, "5GB")
        copy_companions(str(directory), temporary)


def is_compressed(directory: str | Path) -> bool:
    """Whether a directory holds one of our checkpoints."""
    return (Path(directory) / INFO_FILE).is_file()


def _compressed_config(directory: Path) -> Any:
    try:
        config = load_config(str(directory))
    except ModelError as error:
        raise CheckpointError(str(error)) from error
    described = getattr(config, "quantization_config", None)
    if not isinstance(described, dict) or described.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{directory}/config.json describes no factored layers; compress the model again")
    return config


def _dense_skeleton(config: Any) -> Any:
    """The dense model of a compressed checkpoint's config, without storage."""
    config = copy.deepcopy(config)
    del config.quantization_config
    with torch.device("meta"):
        return own_class(config)(config)


def _dense_layer(factored: Any, skeleton: Any) -> Any:
    """A dense layer of the skeleton's class that holds U V and the bias."""
    weight = factored.matrix()
    layer = skeleton.to_empty(device=weight.device).to(factored.u.weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight.T if isinstance(layer, torch.nn.Linear) else weight)
        if layer.bias is not None:
            layer.bias.copy_(factored.v.bias)
    return layer


def _save_state_dict(model: Any, file: Path) -> None:
    try:
        torch.save(model.state_dict(), file)
    except RuntimeError as error:
        # torch's writer reports a full disk so.
        raise OSError(first_line(error)) from error


def _save_pretrained(model: Any, directory: Path, max_shard_size: str) -> None:
    from safetensors import SafetensorError

    try:
        model.save_pretrained(directory, max_shard_size=max_shard_size)
    except SafetensorError as error:
        # The writer reports a full disk in a type of its own.
        raise OSError(str(error)) from error
    _read_back(directory)


def _read_back(directory: Path) -> None:
    """A last look before the rename: what was written must be readable."""
    tensor_shapes(weight_files(directory))
    json.loads((directory / "config.json").read_text(encoding="utf-8"))
