"""How many scored examples are too few: exactly the share that is said, whatever the rounding."""

from __future__ import annotations

from fractions import Fraction

from castune.stats.scored import FEWEST_SCORED, is_far_fewer


def test_the_share_itself_is_enough() -> None:
    share = Fraction(str(FEWEST_SCORED))
    for of in range(300):
        for n in range(of + 1):
            assert is_far_fewer(n, of) == (n < share * of), (n, of)
    assert not is_far_fewer(0, 0)
