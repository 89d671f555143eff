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
# What a process under torchrun says to the command line, which then divides its work with the others.
_together = False
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
        """This process among those of torchrun, whose group it joins where they all came to compress."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1 or not _together:
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
        """The GPU of this process, where all are on GPUs.

        Raises:
            ConfigError: one GPU is named for all, or there are fewer than processes.
        """
        if self.count == 1 or device.type != "cuda":
            return device
        if device != torch.device("cuda"):
            raise ConfigError(f"--device {device} is one GPU for {self.count} processes; pass --device cuda")
        place, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if place >= there:
            raise ConfigError(f"there are {there} GPUs here, and more processes; start one for each")
        return torch.device("cuda", place)

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


def together() -> None:
    """Let the compressions of this process be divided among all that torchrun started.

    Not by themselves: the first process of a training script may be the only one of it that compresses.
    """
    global _together
    _together = True


ALONE = Processes()
