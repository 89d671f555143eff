"""The hidden states between two layers, one tensor for each forward of the model: in memory, in files, or in both."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from torch import Tensor

from flashsvd.errors import CheckpointError, first_line
from flashsvd.storage.shards import write_piece

# Of one set. A walk has up to four: before and after a layer, in the dense model and in the compressed one.
IN_MEMORY = 1 << 28
_NAME = "states"


class HiddenStates(Sequence[Tensor]):
    """[B, S, hidden] of each forward, on the CPU; what does not fit in memory is read from its file every time."""

    def __init__(self, directory: Path | None, count: int, kept: list[Tensor]) -> None:
        self._directory, self._count, self._kept = directory, count, kept

    @classmethod
    def of(cls, states: Iterable[Tensor], directory: Path | None) -> HiddenStates:
        """Take states as they come.

        Args:
            directory: is made, or made anew, and gets a file of each; None keeps all of them in memory.
        """
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
        kept: list[Tensor] = []
        count = size = 0
        for tensor in states:
            if directory is not None:
                write_piece({_NAME: tensor}, _file(directory, count))
            size += tensor.nbytes
            if directory is None or size <= IN_MEMORY:
                kept.append(tensor)
            count += 1
        return cls(directory, count, kept)

    @classmethod
    def stored(cls, directory: Path, count: int) -> HiddenStates:
        """Those that `of` wrote for so many forwards."""
        return cls(directory, count, [])

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._kept[index] if index < len(self._kept) else self._read(index)

    def __len__(self) -> int:
        return self._count

    def _read(self, index: int) -> Tensor:
        from safetensors import SafetensorError, safe_open

        assert self._directory is not None, "what is not kept is in a file"
        file = _file(self._directory, index)
        try:
            with safe_open(str(file), framework="pt") as tensors:
                states: Tensor = tensors.get_tensor(_NAME)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({first_line(error)}); compress without --resume") from error
        return states

    def discard(self) -> None:
        """Remove their files, which nothing reads any more."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


@dataclass(frozen=True)
class StateFolder:
    """Where the hidden states before each layer lie; None for nowhere but in memory.

    Attributes:
        rank: of the process whose states they are.
    """

    directory: Path | None
    rank: int = 0

    def of(self, index: int, whose: str) -> Path | None:
        return None if self.directory is None else self.directory / f"states-{index:05}-{whose}-{self.rank}"

    def stored(self, index: int, whose: str, count: int) -> HiddenStates:
        """Those that an earlier run wrote."""
        directory = self.of(index, whose)
        assert directory is not None, "what was written is somewhere"
        return HiddenStates.stored(directory, count)


def _file(directory: Path, index: int) -> Path:
    return directory / f"{index:05}.safetensors"
