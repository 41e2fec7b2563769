"""Accelerators by their data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from castune.errors import CastuneError

# What big matrix products and weight streaming reach in practice, as shares of the data sheet.
COMPUTE_SHARE, BANDWIDTH_SHARE = 0.4, 0.8
# Assumed, not measured: what the host needs to launch a layer's kernels one by one, which is what transformers'
# `generate` does at every step. A step of few replies takes this long however fast the accelerator is.
LAUNCH_SECONDS = 0.5e-3


@dataclass(frozen=True)
class Accelerator:
    """Data sheet of an accelerator: dense bfloat16 FLOP/s, bytes/s of memory, and bytes of memory."""

    flops: float
    bandwidth: float
    memory: float

    def seconds(self, flops: float, n_bytes: float) -> float:
        """As long as the arithmetic or the memory traffic takes, whichever is longer: a roofline."""
        return max(flops / (COMPUTE_SHARE * self.flops), n_bytes / (BANDWIDTH_SHARE * self.bandwidth))

    def decoding_seconds(self, n_steps: int, n_layers: int, flops: float, n_bytes: float) -> float:
        """Decoding steps, which also wait for the host."""
        return max(self.seconds(flops, n_bytes), n_steps * n_layers * LAUNCH_SECONDS)


ACCELERATORS = {
    "a100": Accelerator(312e12, 2.0e12, 80e9),
    "h100": Accelerator(989e12, 3.35e12, 80e9),
    "h200": Accelerator(989e12, 4.8e12, 141e9),
    "l40s": Accelerator(362e12, 0.86e12, 48e9),
}


def accelerator_named(name: str) -> Accelerator:
    """The accelerator of that name.

    Raises:
        CastuneError: it is not known.
    """
    if name not in ACCELERATORS:
        raise CastuneError(f"accelerator {name!r}: accepted: {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name]
