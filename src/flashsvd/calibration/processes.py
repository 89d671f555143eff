"""The processes that torchrun started, each of which runs its share of the calibration batches."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed

from flashsvd.errors import ConfigError

T = TypeVar("T")
# A process may wait for another that factors the largest layer there is.
_PATIENCE = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Processes:
    """One of several processes, or the only one.

    Attributes:
        rank: its number, from 0 on.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def joined(cls) -> Processes:
        """This process among those of torchrun, whose group it joins."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        if not distributed.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(backend, timeout=_PATIENCE)
        return cls(distributed.get_rank(), count)

    @property
    def is_first(self) -> bool:
        """Whether it writes what all have found."""
        return self.rank == 0

    def own_device(self, device: torch.device) -> torch.device:
        """The GPU of this process, where all are on GPUs and none is named."""
        shared = self.count > 1 and device == torch.device("cuda")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if shared else device

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """What of some batches is this process's to run.

        Raises:
            ConfigError: there are fewer than processes.
        """
        if items and len(items) < self.count:
            raise ConfigError(
                f"{len(items)} calibration batches cannot be divided over {self.count} processes; "
                "lower --calib-batch-size, or start fewer"
            )
        return items[self.rank :: self.count]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place and the same in each."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Wait until all have come here."""
        if self.count > 1:
            # On the CPU, whatever device the work is on.
            distributed.all_reduce(torch.zeros(1))


ALONE = Processes()
