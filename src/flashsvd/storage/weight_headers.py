"""What the weight files of a model say before anything is loaded from them: which there are, their size and dtype."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flashsvd.common.json_file import read_json
from flashsvd.common.lfs import POINTER, is_lfs_pointer
from flashsvd.errors import ModelError, described, first_line
from flashsvd.storage.model_files import HubUnreachableError, companion_file
from flashsvd.storage.verify import INDEX, WEIGHTS, is_plain_name

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def find_weights(source: str, named: str | None = None) -> list[Path]:
    """The files that transformers reads a model's weights from, in its order of preference; none where it cannot be
    said.

    Args:
        source: a local directory or a hub name.
        named: the file that the model's config names, if it does.

    Raises:
        ModelError: the hub refuses, or a shard index cannot be read.
    """
    for ask_hub in (True, False):
        # Where the hub cannot be asked, its cache may still have them; if not, whoever loads the model says so.
        with contextlib.suppress(HubUnreachableError):
            return _found_weights(source, named, ask_hub)
    return []


def _found_weights(source: str, named: str | None, ask_hub: bool) -> list[Path]:
    if named is not None:
        file = companion_file(source, named, ask_hub=ask_hub)
        return [file] if file else []
    for single, index in ((WEIGHTS, INDEX), (PICKLE, PICKLE_INDEX)):
        if file := companion_file(source, single, ask_hub=ask_hub):
            return [file]
        if file := companion_file(source, index, ask_hub=ask_hub):
            names = sorted(set(weight_map(file).values()))
            found = (companion_file(source, name, ask_hub=ask_hub) for name in names)
            return [shard for shard in found if shard]
    return []


def weight_map(index: Path) -> dict[str, str]:
    """Which file beside a shard index holds each tensor; names that lead elsewhere are left out.

    Raises:
        ModelError: it is no such index.
    """
    try:
        entries = read_json(index)["weight_map"].items()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} is no shard index ({described(error)}); fetch it again") from error
    return {str(tensor): file for tensor, file in entries if is_plain_name(file)}


def stored_dtype(files: Sequence[Path]) -> torch.dtype | None:
    """The floating-point dtype that most of the numbers in weight files have; None where there are none.

    Raises:
        ModelError: naming a file that is truncated, damaged or a git-lfs pointer.
    """
    numbers: Counter[torch.dtype] = Counter()
    for file in files:
        if is_lfs_pointer(file):
            raise ModelError(f"{file} {POINTER}")
        numbers.update(_numbers(file))
    return max(numbers, key=numbers.__getitem__) if numbers else None


def _numbers(file: Path) -> Counter[torch.dtype]:
    """How many numbers of each floating-point dtype a file holds."""
    try:
        return _of_safetensors(file) if file.suffix == ".safetensors" else _of_pickle(file)
    except Exception as error:  # what a damaged pickle raises is anything from an EOFError to a KeyError
        raise ModelError(
            f"{file} cannot be read ({first_line(error)}); it is truncated or damaged, fetch it again"
        ) from error


def _of_safetensors(file: Path) -> Counter[torch.dtype]:
    from safetensors import safe_open

    numbers: Counter[torch.dtype] = Counter()
    with safe_open(str(file), framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - the handle is no mapping and cannot be iterated
            header = tensors.get_slice(name)
            if (dtype := _FLOATS.get(header.get_dtype())) is not None:
                numbers[dtype] += torch.Size(header.get_shape()).numel()
    return numbers


def _of_pickle(file: Path) -> Counter[torch.dtype]:
    numbers: Counter[torch.dtype] = Counter()
    # On the meta device the tensors are described and not read.
    state: Any = torch.load(file, map_location="meta", weights_only=True)
    for tensor in state.values():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            numbers[tensor.dtype] += tensor.numel()
    return numbers
