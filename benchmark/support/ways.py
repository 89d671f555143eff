"""The ways to run a model that benchmarks hold against each other."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from flashsvd import runtime
from flashsvd.blocks.running.graph import GraphOption
from flashsvd.errors import BackendError
from support.harness import Prepared, Settings

CompileMode = Literal["default", "reduce-overhead", "max-autotune"]
# A model -> what it makes of the inputs that it is called with last.
Run = Callable[[Any], Tensor]


def eager(model: Any, run: Run) -> Prepared:
    """As it is."""
    return Prepared(partial(run, model))


def compiled(
    model: Any, run: Run, settings: Settings, mode: CompileMode = "default", *, one_shape: bool = True
) -> Prepared:
    """By torch.compile: for the one shape that `run` calls it with, or for whichever come."""
    # Without what was compiled for other shapes, of which it would only take so many.
    torch._dynamo.reset()
    # Inductor compiles for a minute, which is too long for trying a script out.
    tiny = settings.sizes == "tiny" and not settings.cuda
    if not (tiny or settings.cuda) and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise BackendError("torch.compile needs a C++ compiler and finds none here; install g++")
    how: dict[str, Any] = {"backend": "eager"} if tiny else {"mode": mode}
    return Prepared(partial(run, torch.compile(model, dynamic=False if one_shape else None, **how)))


def optimized(
    model: Any,
    run: Run,
    graph: GraphOption = "auto",
    less: Run | None = None,
    note: Callable[[Any], str] | None = None,
) -> Prepared:
    """On fused blocks, with all defaults, or without graphs.

    Args:
        less: what of `run` is not to be measured.
        note: what to say of the optimised model, before what was picked for it.
    """
    fused = runtime.optimize(copy.deepcopy(model), graph=graph)

    def describe() -> str:
        notes = [] if note is None else [note(fused)]
        return " | ".join(notes + [f"{case}: {choice}" for case, choice in runtime.choices(fused).items()])

    # Graphs of forwards, or those of generating with the caches that they write to.
    kept = getattr(fused, "decoders", getattr(fused, "graphs", None))
    forget = None if kept is None else kept.forget
    return Prepared(partial(run, fused), forget, describe, None if less is None else partial(less, fused))
