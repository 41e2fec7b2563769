"""How much of a gain is kept: plain values, what has none, and how often intervals hold the truth."""

from __future__ import annotations

import numpy as np
import pytest

from castune.stats.kept_gain import kept_gain

BASE, ADAPTER = [0, 0, 0, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 1]


def test_values_by_hand() -> None:
    other = [1, 1, 0, 1, 1, 0, 0, 0]
    found = kept_gain([(BASE, ADAPTER, other)])
    assert found.value == pytest.approx(3 / 5)
    assert found.gain == pytest.approx(5 / 8)
    assert found.n == 8
    assert found.interval is not None
    assert found.interval.holds(3 / 5)
    assert kept_gain([(BASE, ADAPTER, BASE)]).value == 0
    # More safety than the adapter itself is more than all of it.
    assert (kept_gain([(BASE, ADAPTER, [1] * 8)]).value or 0) > 1


def test_suites_count_alike() -> None:
    few, many = ([0], [1], [1]), ([0] * 10, [1] * 10, [0] * 10)
    found = kept_gain([few, many])
    assert (found.value, found.n) == (pytest.approx(0.5), 11)


def test_unscored_prompts_are_left_out() -> None:
    found = kept_gain([([0, None, 0, 0], [1, 1, None, 1], [1, 1, 1, None])])
    assert (found.value, found.n) == (1, 1)
    with pytest.raises(ValueError, match="scored in all three"):
        kept_gain([([0, None], [1, 1], [None, 1])])


def test_what_has_no_share_and_no_interval() -> None:
    assert kept_gain([(ADAPTER, BASE, ADAPTER)]).value is None
    assert kept_gain([(BASE, BASE, ADAPTER)]).value is None
    same = kept_gain([(BASE, ADAPTER, ADAPTER)])
    assert (same.value, same.interval) == (1, None)
    # A gain of one prompt in eight is absent in a third of the resamples.
    unsure = kept_gain([(BASE, [1, *BASE[1:]], [0, 1, *BASE[2:]])])
    assert (unsure.value, unsure.interval) == (1, None)


def test_one_prompt_does_not_show_how_others_would_differ() -> None:
    assert kept_gain([([0], [1], [0])]).interval is None
    assert kept_gain([([0], [1], [0]), (BASE, ADAPTER, [1, 1, 0, 1, 1, 0, 0, 0])]).interval is None


def test_intervals_hold_the_truth() -> None:
    generator, held, n_tries = np.random.default_rng(3), 0, 200
    for _ in range(n_tries):
        chance = generator.random(120)
        # 0.1, 0.8 and 0.7 in the long run: six sevenths are kept.
        interval = kept_gain(
            [((chance < 0.1).tolist(), (chance < 0.8).tolist(), (chance < 0.7).tolist())], resamples=500
        ).interval
        held += interval is not None and interval.holds(6 / 7)
    assert 0.9 <= held / n_tries <= 0.99
