"""Saving, loading and exporting compressed checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsvd import runtime
from flashsvd.blocks.parts.kept import KVCache
from flashsvd.blocks.running.graph import GraphOption
from flashsvd.blocks.running.packed import refuse_packed
from flashsvd.common.device import resolve_device, resolve_dtype
from flashsvd.common.json_file import read_json
from flashsvd.common.paths import expand
from flashsvd.errors import CheckpointError, ConfigError, ModelError, first_line
from flashsvd.integrations.quantizer import FlashSVDConfig
from flashsvd.kernels.launch import Backend
from flashsvd.lowrank.base import FactoredLayer
from flashsvd.lowrank.build import rounded
from flashsvd.lowrank.spec import factor_kind
from flashsvd.models.factored import build_layers, dense_skeleton, describe_layers, mark_as_stored
from flashsvd.models.found import find_info, is_compressed, load_config
from flashsvd.models.heads import own_class
from flashsvd.models.loading import load_model
from flashsvd.models.state import check_state
from flashsvd.storage.atomic import atomic_directory, check_target
from flashsvd.storage.companions import MODULES_FILE, Companions, find_companions
from flashsvd.storage.digests import digests_of
from flashsvd.storage.digests import verify as verify_digests
from flashsvd.storage.metadata import CompressionInfo
from flashsvd.storage.model_card import CARD_FILE, model_card
from flashsvd.storage.own_files import EXPORT_MARKER, STATE_DICT_FILE
from flashsvd.storage.rank_file import write_ranks
from flashsvd.storage.shards import disk_errors, write_weights
from flashsvd.storage.verify import INDEX, all_shapes, tensor_shapes, weight_files

__all__ = ["export_dense", "load_compressed", "round_factors", "save_compressed"]


def save_compressed(
    model: Any,
    directory: str | Path,
    info: CompressionInfo,
    *,
    companions: str | Companions | None = None,
    overwrite: bool = False,
    state_dict: bool = False,
    ranks: Mapping[str, int | None] | None = None,
    max_shard_size: str = "5GB",
) -> CompressionInfo:
    """Write a checkpoint that plain `from_pretrained` loads, all of it or nothing.

    Args:
        model: a transformers model with factored layers.
        info: becomes `compression_info.json`, with the kind of factors that the model has.
        companions: the tokenizer and sentence-transformers files, or the local directory or hub name to copy them from.
        state_dict: also write `flashsvd_state_dict.pt` for tools that want one.
        ranks: also write them, by matrix, as `ranks.json` for further runs.

    Returns:
        The info as it was written, with the digests of the files.

    Raises:
        CheckpointError: the directory exists, holds something else, or cannot be written.
        ModelError: a companion cannot be had.
        BackendError: the model is optimised, so its factors are gone.
    """
    refuse_packed(model)
    if isinstance(companions, str):
        companions = find_companions(companions)
    companions = companions or Companions({})

    def write(temporary: Path) -> None:
        _save_pretrained(model, temporary, max_shard_size)

    return _save(
        model, Path(directory), info, write, lambda _: model.state_dict(), companions, overwrite, state_dict, ranks
    )


def save_pieces(
    model: Any,
    pieces: Callable[[Collection[str]], Sequence[Path]],
    directory: Path,
    info: CompressionInfo,
    *,
    companions: Companions,
    overwrite: bool = False,
    state_dict: bool = False,
    ranks: Mapping[str, int | None] | None = None,
) -> CompressionInfo:
    """Write the same checkpoint as `save_compressed` of a model without weights, which lie in files already.

    Args:
        pieces: safetensors files that hold the tensors of these names, each once.

    Raises:
        CheckpointError: the directory exists, holds something else, or cannot be written.
    """

    def write(temporary: Path) -> None:
        names = _save_without_weights(model, temporary)
        write_weights(pieces(names), temporary, model.num_parameters())
        _read_back(temporary)

    def state(temporary: Path) -> dict[str, Tensor]:
        return _state_in(model, weight_files(temporary))

    return _save(model, directory, info, write, state, companions, overwrite, state_dict, ranks)


def _save(
    model: Any,
    directory: Path,
    info: CompressionInfo,
    write: Callable[[Path], None],
    state: Callable[[Path], Mapping[str, Tensor]],
    companions: Companions,
    overwrite: bool,
    state_dict: bool,
    ranks: Mapping[str, int | None] | None,
) -> CompressionInfo:
    """Write a checkpoint, all of it or nothing.

    Args:
        write: writes the config and the weights.
        state: the model's state, from where the weights have been written, for `state_dict`.
    """
    info = dataclasses.replace(info, factors=factor_kind(describe_layers(model)))
    model.config.quantization_config = FlashSVDConfig.of(model, info.about())
    with atomic_directory(directory, overwrite) as temporary:
        write(temporary)
        companions.copy_to(temporary)
        weights = weight_files(temporary)
        size = sum(file.stat().st_size for file in weights)
        card = model_card(info, directory.name, size, sentence_encoder=MODULES_FILE in companions.files)
        (temporary / CARD_FILE).write_text(card, encoding="utf-8")
        names = [
            CARD_FILE,
            *companions.files,
            *(file.name for file in weights),
            *(file.name for file in temporary.glob(INDEX)),
        ]
        info = dataclasses.replace(info, digests=digests_of(temporary, names))
        info.write(temporary)
        if ranks is not None:
            write_ranks(temporary, info.qkv, ranks)
        if state_dict:
            _save_state_dict(state(temporary), temporary / STATE_DICT_FILE)
    return info


def save_dense(
    model: Any, directory: str | Path, companions: Companions, marker: str, *, overwrite: bool = False
) -> None:
    """Write an ordinary model of transformers, all of it or nothing.

    Args:
        companions: what goes beside the weights.
        marker: a file among the companions, by which the directory can be told from others and replaced.

    Raises:
        CheckpointError: the directory exists, holds something else, or cannot be written.
    """
    with atomic_directory(Path(directory), overwrite, marker) as temporary:
        _save_pretrained(model, temporary, "5GB")
        companions.copy_to(temporary)


def load_compressed(
    directory: str | Path,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    optimize: bool = False,
    backend: Backend = "auto",
    graph: GraphOption = "auto",
    kv_cache: KVCache = "auto",
    verify: bool = False,
) -> Any:
    """Load a compressed checkpoint as the transformers class that saved it, in eval mode.

    Args:
        device: `cuda`, `cuda:1` or `cpu`; None leaves the model on the CPU.
        dtype: None keeps the checkpoint's own.
        optimize: run on fused blocks; `backend`, `graph` and `kv_cache` say how, as in `flashsvd.optimize`.
        verify: hold its weight and tokenizer files against the digests that they were saved with.

    Raises:
        CheckpointError: it is not a compressed checkpoint, a tensor is missing, extra, misshapen or unreadable, or a
            file is not the one that was saved.
        BackendError: its architecture has no fused blocks, or the backend cannot run on the device.
        ConfigError: the options do not fit one another.
    """
    _refuse_name(optimize)
    directory = expand(directory)
    info = find_info(directory)
    if verify:
        verify_digests(directory, info.digests)
    target = resolve_device(device) if device is not None else None
    wanted = resolve_dtype(dtype) if isinstance(dtype, str) else dtype
    config = _compressed_config(directory)
    if optimize:
        runtime.check(config, backend, target or torch.device("cpu"), graph, kv_cache)
    elif (backend, graph, kv_cache) != ("auto", "auto", "auto"):
        raise ConfigError("backend, graph and kv_cache say how fused blocks run; pass optimize=True with them")
    model = load_factored(str(directory), config, wanted)
    # Checkpoints from before do not carry it in their config.
    model.config.quantization_config.about = model.config.quantization_config.about or info.about()
    model = model.to(target) if target is not None else model
    return runtime.optimize(model, backend, graph, kv_cache) if optimize else model


def _refuse_name(optimize: Any) -> None:
    """A backend's name in the place of the switch, which would be taken for `True` and forgotten."""
    if isinstance(optimize, str):
        raise ConfigError(f"optimize is True or False, not {optimize!r}; pass optimize=True, backend={optimize!r}")


def load_factored(source: str, config: Any, dtype: torch.dtype | None = None) -> Any:
    """Load a compressed checkpoint in a directory or on the hub, with or without its `compression_info.json`.

    Raises:
        CheckpointError: a tensor is missing, extra, misshapen, not finite or unreadable.
    """
    # On the hub, the quantizer checks the same as soon as the files are there.
    if Path(source).is_dir():
        # Some versions of transformers load a misshapen tensor of a quantized model without a word.
        found = tensor_shapes(weight_files(Path(source)))
        model = _skeleton(config)
        mark_as_stored(model, found)
        check_state(model, found, source)
    try:
        loaded = load_model(source, config, own_class(config), dtype)
    except ModelError as error:
        raise CheckpointError(error.message) from error
    if loaded.untrained:
        raise CheckpointError(f"{source} lacks the tensor {loaded.untrained[0]}; compress the model again")
    return loaded.model


def round_factors(model: Any) -> None:
    """Round the factors of a compressed model to integers of 8 bits with a scale for each row, in place.

    It is what `flashsvd compress --factors int8` does in the end, for a model that was trained in between. Layers that
    stayed dense stay as they are.

    Raises:
        ModelError: no layer has factors to round.
        BackendError: the model is optimised, so its factors are gone.
    """
    refuse_packed(model, "rounded")
    layers = {path: module for path, module in model.named_modules() if isinstance(module, FactoredLayer)}
    if not layers:
        raise ModelError("the model has no factors to round; compress it first")
    if all(layer.spec().factors == "int8" for layer in layers.values()):
        raise ModelError("the model's factors are integers already; nothing is left to round")
    for path, layer in layers.items():
        model.set_submodule(path, rounded(layer))
    # For whatever program saves it next.
    about = getattr(getattr(model.config, "quantization_config", None), "about", None)
    model.config.quantization_config = FlashSVDConfig.of(model, about)


def export_dense(directory: str | Path, output: str | Path, *, overwrite: bool = False) -> None:
    """Multiply the factors out and write an ordinary dense model, for tools that know nothing of flashsvd.

    It computes the same function, at the dense model's size and cost.

    Args:
        overwrite: replace an earlier export.

    Raises:
        CheckpointError: the checkpoint cannot be read, or the output exists, is not an export or cannot be written.
    """
    directory, output = expand(directory), expand(output)
    check_target(output, overwrite, EXPORT_MARKER)
    model = load_compressed(directory)
    model.dequantize()
    companions = find_companions(str(directory))
    with atomic_directory(output, overwrite, EXPORT_MARKER) as temporary:
        _save_pretrained(model, temporary, "5GB")
        companions.copy_to(temporary)
        (temporary / EXPORT_MARKER).write_text(json.dumps({"exported_from": str(directory)}) + "\n", encoding="utf-8")


def _compressed_config(directory: Path) -> Any:
    try:
        config = load_config(str(directory))
    except ModelError as error:
        raise CheckpointError(error.message) from error
    if not is_compressed(config):
        raise CheckpointError(f"{directory}/config.json describes no factored layers; compress the model again")
    return config


def _skeleton(config: Any) -> Any:
    """The model of a compressed checkpoint's config, with its factored modules, without storage."""
    described = config.quantization_config
    described = described if isinstance(described, FlashSVDConfig) else FlashSVDConfig(**described)
    model = dense_skeleton(config)
    build_layers(model, described.specs())
    return model


def _save_state_dict(state: Mapping[str, Tensor], file: Path) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # torch's writer reports a full disk so.
        raise OSError(first_line(error)) from error


def _save_pretrained(model: Any, directory: Path, max_shard_size: str) -> None:
    with disk_errors():
        # Under the names that the model has now: those of the file it came from may be legacy ones (LayerNorm.gamma).
        model.save_pretrained(directory, max_shard_size=max_shard_size, save_original_format=False)
    _read_back(directory)


def _save_without_weights(model: Any, directory: Path) -> list[str]:
    """Save all of a model but its weights; the names of the tensors that would be its weights.

    Each tensor is represented by one number, and tied ones by the same, so that transformers says what it saves.
    """
    stand_ins: dict[int, Tensor] = {}
    state = {
        name: stand_ins.setdefault(id(tensor), torch.zeros(1))
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    with disk_errors():
        model.save_pretrained(directory, state_dict=state, save_original_format=False)
    (file,) = weight_files(directory)
    names = list(all_shapes([file]))
    file.unlink()
    return names


def _state_in(model: Any, files: Sequence[Path]) -> dict[str, Tensor]:
    """A model's state from its weight files, where a tied tensor lies under one of its names."""
    from safetensors.torch import load_file

    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    own = model.state_dict(keep_vars=True)
    saved = {id(tensor): name for name, tensor in own.items() if name in tensors}
    return {name: tensors[saved[id(tensor)]] for name, tensor in own.items()}


def _read_back(directory: Path) -> None:
    """A last look before the rename: what was written must be readable."""
    tensor_shapes(weight_files(directory))
    read_json(directory / "config.json")
