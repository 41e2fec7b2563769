"""How an adapter is cut down to what is worth its cost."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from castune.config.base import Config, Share

RepairCost = Literal["nll", "utility", "over-refusal-margin", "over-refusal", "kl"]


class RepairConfig(Config):
    """How an adapter is cut down to what is worth its cost."""

    keep_safety: Share = 0.95
    """Share of the gain in refusals to keep."""
    cost: RepairCost | None = None
    """Cost to minimise, measured by the suites: `nll`, `utility`, `over-refusal-margin`, `over-refusal` or `kl`. By
    default the first of these that is measured."""
    shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.05, 0.1, 0.2, 0.35)
    """Shares of the changed units that candidates drop."""
    draws: Annotated[int, Field(ge=0, le=100)] = 3
    """Random sets of units to drop instead, for comparison."""
    seed: int = 0
    """Seed of these sets."""
    unaligned: Annotated[str, Field(min_length=1)] | None = None
    """The base model as it was before its alignment: the adapter projected by Safe LoRA joins the comparison."""

    @field_validator("shares")
    @classmethod
    def _some_rising(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if not shares:
            raise ValueError("needs at least one share")
        return tuple(sorted(set(shares)))
