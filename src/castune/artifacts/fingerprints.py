"""Comparing the identities of models that artifacts carry; `castune.core.provenance` makes them."""

from __future__ import annotations

from castune.artifacts.records import ModelRecord

# What stands in the place of the last 8 digits for a quantised model.
QUANTISED = "-quantised"
# What of a model's record tells whether what was measured is of this one.
_IDENTITY = ("fingerprint", "chat_template", "adapter", "strength", "dtype", "server")


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same model; of a quantised one as far as can be told."""
    if one.endswith(QUANTISED) or other.endswith(QUANTISED):
        return one[:8] == other[:8]
    return one == other


def same_model_identity(one: ModelRecord, other: ModelRecord) -> bool:
    """Whether two records are of one model with one adapter, in one precision, behind one template."""
    return all(one.get(key) == other.get(key) for key in _IDENTITY)


def at_strength(model: ModelRecord, strength: float) -> ModelRecord:
    """Identity of a model whose adapter is at a strength."""
    return model if strength == 1 else {**model, "strength": strength}
