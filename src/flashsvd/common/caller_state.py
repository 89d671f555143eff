"""What a call finds in the process of its caller, and leaves there as it was."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator

import numpy as np
import torch

_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Gradients and tensors as in a fresh process, whatever `no_grad` or `inference_mode` the caller is in."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextlib.contextmanager
def own_random_numbers() -> Iterator[None]:
    """Whatever is drawn or seeded inside, Python's, NumPy's and torch's random numbers go on afterwards as before.

    There is one state of each for all threads, so that one thread at a time is inside.
    """
    with _ONE_AT_A_TIME:
        python, numpy = random.getstate(), np.random.get_state()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]  # torch leaves it untyped
        cpu = torch.get_rng_state()
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state_all(cuda)
