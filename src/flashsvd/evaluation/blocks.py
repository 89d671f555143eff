"""Which layers an evaluation runs on: fused blocks as asked, and by default wherever they take the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from flashsvd import runtime
from flashsvd.common.device import PLAIN
from flashsvd.errors import BackendError, one_line
from flashsvd.evaluation.subject import Subject
from flashsvd.evaluation.workload import Workload

if TYPE_CHECKING:
    from flashsvd.kernels.launch import Backend

WHY_DENSE = "it is dense, and by default runs as the baseline to compare with; --backend auto runs it on fused blocks"


@dataclass(frozen=True)
class Blocks:
    """The layers to run on.

    Attributes:
        backend: of the fused blocks; None for the plain model.
        asked: whether the backend was named, so that what cannot run is an error.
        why_plain: why it is the plain model by default; empty where it is not, or not by default.
    """

    backend: Backend | None
    asked: bool = True
    why_plain: str = ""

    @classmethod
    def choose(cls, asked: str | None, subject: Subject, workload: Workload, device: torch.device) -> Blocks:
        """What was asked for, or the default, as far as it is known before there is a model.

        Raises:
            BackendError: the backend that was asked for cannot run.
        """
        if asked == PLAIN:
            return cls(None)
        if asked is None and not subject.compressed:
            return cls._plain(WHY_DENSE)
        backend = cast("Backend", asked or "auto")
        try:
            runtime.check(subject.config, backend, device)
            workload.check_fused(subject)
        except BackendError as error:
            if asked is not None:
                raise
            return cls._plain(one_line(error))
        return cls(backend, asked is not None)

    def fuse(self, model: Any) -> Blocks:
        """Turn a model's layers into the blocks, in place, and say what it runs on now.

        Raises:
            BackendError: the backend that was asked for cannot run it.
        """
        if self.backend is None:
            return self
        try:
            runtime.optimize(model, self.backend)
        except BackendError as error:
            if self.asked:
                raise
            return self._plain(one_line(error))
        return self

    @classmethod
    def _plain(cls, why: str) -> Blocks:
        return cls(None, asked=False, why_plain=why)
