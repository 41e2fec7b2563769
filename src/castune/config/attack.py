"""How the safety of a run's arms is attacked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from castune.config.base import Config, Count

AttackKind = Literal["relearn", "direction", "quantise", "dial"]


class AttackConfig(Config):
    """How the safety of a run's arms is attacked."""

    kinds: tuple[AttackKind, ...] | None = None
    """`relearn`: train on a few benign rows. `direction`: project the refusal direction out. `quantise`: store the base
    in 4 bits. `dial`: turn the adapter down. By default all of them that this machine can do."""
    n_rows: tuple[Count, ...] = (10, 100)
    """How many benign rows to relearn on: an attack for each number."""
    # Once over a hundred rows.
    steps: Count = 25
    """Optimiser steps of relearning, of four rows each, however many rows there are."""
    # At 1e-3 neither a quarter nor all of the heads of the default model kept a refusal: nothing was left to compare.
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Learning rate of relearning."""
    strengths: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.75, 0.5, 0.25)
    """What the adapter's update is multiplied by to turn it down."""
    limit: Count | None = None
    """Prompts per suite. By default those of the run's evaluations."""
    seed: int = 0
    """Seed of the rows that are drawn, of their order, and of the LoRA that relearns."""

    @field_validator("kinds", "n_rows", "strengths")
    @classmethod
    def _some_once(cls, values: tuple[object, ...] | None) -> tuple[object, ...] | None:
        if values is not None and not values:
            raise ValueError("needs at least one")
        if values is not None and len(set(values)) < len(values):
            raise ValueError("one is named twice")
        return values
