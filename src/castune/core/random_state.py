"""Random state that a measurement leaves as it was, so that what goes on afterwards draws what it would have drawn."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Give Python, numpy and torch, on the CPU and all CUDA devices, their random state back after the `with` block."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    # All devices are meant, of which torch would warn.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
