"""Which heads are trained."""

from __future__ import annotations

from pydantic import model_validator

from castune.config.base import Config, Count, Share
from castune.errors import CastuneError
from castune.names import SEEDED_ZONES, ArmName, Score, Zone


class SelectConfig(Config):
    """Which heads are trained (Section 3.5)."""

    zone: Zone = "safe"
    """Which heads to train. `safe`: lowest scores. `risky`: highest scores. `random`: drawn at random. `layer-matched`:
    random, with as many heads in each layer as `safe`. `all`: every head."""
    fraction: Share = 0.25
    """Share of all heads, in (0, 1]."""
    buckets: Count | None = None
    """Split the sorted heads into this many equal buckets and take one of them (see `bucket`)."""
    bucket: Count | None = None
    """Number of the bucket to take (see `buckets`). 1 has the highest scores."""
    score: Score = "conflict"
    """Score to sort heads by: `conflict` C(h); `gradient` O(h) alone or `sensitivity` S(h) alone (Table 8); `magnitude`
    O(h) times the sizes of both gradients."""
    seed: int | None = None
    """Seed of a random or layer-matched selection."""
    compare: tuple[str, ...] = ()
    """Further arms to train for comparison, by their names (`castune.names`): `risky`, `random`, `safe-50`,
    `bucket-2-of-4`, `safe-gradient`, `safe+pcgrad`, ... They have the same size unless a name says otherwise."""

    @model_validator(mode="after")
    def _can_be_made(self) -> SelectConfig:
        if (self.buckets is None) != (self.bucket is None):
            raise ValueError("select.buckets and select.bucket go together")
        if self.buckets is not None and self.bucket is not None and self.bucket > self.buckets:
            raise ValueError(f"select.bucket is {self.bucket}, accepted: 1 (highest conflict) to {self.buckets}")
        try:
            names = [ArmName.parse(name) for name in self.compare]
        except CastuneError as error:
            raise ValueError(f"select.compare: {error}") from None
        arms = [*([] if self.buckets else [ArmName(self.zone)]), *names]
        if len(set(arms)) != len(arms):
            raise ValueError(f"select.compare names an arm twice: {', '.join([self.zone, *self.compare])}")
        if self.seed is None and any(arm.is_seeded for arm in arms):
            raise ValueError(f"selections by {' and '.join(SEEDED_ZONES)} need select.seed, for example 21")
        return self
