"""How far two judges agree beyond what their rates alone would give: Cohen's kappa. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from castune.stats.distributions import percentile_interval

_DRAWS = 4_000


class Agreement(NamedTuple):
    """What two judges say of the same replies.

    Attributes:
        kappa: Cohen's kappa (1960), agreement beyond chance: 1 always, 0 as often as by chance; None where it is not
            defined, because both say the same of every reply.
        low: lower end of its 95 % interval; None with `kappa`.
        high: upper end.
        n: replies of which both told something.
        unscored: replies left out, of which one or both could not tell.
        both: replies of which both say yes.
        one_only: replies of which the first alone says yes.
        other_only: replies of which the second alone says yes.
    """

    kappa: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int
    both: int
    one_only: int
    other_only: int

    @property
    def share(self) -> float | None:
        """Share of replies of which both say the same; None without replies."""
        return 1 - (self.one_only + self.other_only) / self.n if self.n else None


def agreement(one: Sequence[bool | None], other: Sequence[bool | None]) -> Agreement:
    """Agreement of two judges on the same replies in the same order.

    The interval is of draws from the four shares' posterior under Jeffreys' prior: with few disagreements, or none, it
    has a width where that of the normal approximation has none.
    """
    if len(one) != len(other):
        raise ValueError(f"verdicts differ in number: {len(one)} and {len(other)}")
    counts = Counter((bool(a), bool(b)) for a, b in zip(one, other, strict=True) if a is not None and b is not None)
    cells = np.array([counts[True, True], counts[True, False], counts[False, True], counts[False, False]], dtype=float)
    n = int(cells.sum())
    kappa = float(_kappa(cells / n)) if n else float("nan")
    rest = (n, len(one) - n, counts[True, True], counts[True, False], counts[False, True])
    if np.isnan(kappa):
        return Agreement(None, None, None, *rest)
    draws = _kappa(np.random.default_rng(0).dirichlet(cells + 0.5, _DRAWS))
    low, high = percentile_interval(draws)
    # The draws of perfect agreement lie below it.
    return Agreement(kappa, min(low, kappa), max(high, kappa), *rest)


def _kappa(shares: np.ndarray) -> np.ndarray:
    """Kappa of the shares of yes-yes, yes-no, no-yes, no-no in the last axis; NaN where chance alone agrees always."""
    yes_yes, yes_no, no_yes, no_no = np.moveaxis(shares, -1, 0)
    one, other = yes_yes + yes_no, yes_yes + no_yes
    by_chance = one * other + (1 - one) * (1 - other)
    with np.errstate(invalid="ignore"):
        return np.where(by_chance < 1, (yes_yes + no_no - by_chance) / (1 - by_chance), np.nan)
