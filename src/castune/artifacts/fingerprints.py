"""Comparing the fingerprints that artifacts carry; `castune.core.provenance` makes them."""

from __future__ import annotations

# What stands in the place of the last 8 digits for a quantised model.
QUANTISED = "-quantised"


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same model; of a quantised one as far as can be told."""
    if one.endswith(QUANTISED) or other.endswith(QUANTISED):
        return one[:8] == other[:8]
    return one == other
