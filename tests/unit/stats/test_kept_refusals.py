"""How many refusals are kept, and whether one arm keeps fewer: counts by hand, and properties of the interval."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castune.stats.estimates import wilson_interval
from castune.stats.kept_refusals import kept, kept_difference

Outcomes = list[bool | None]


def pair(n: int, refused: int, still: int, *, gained: int = 0) -> tuple[Outcomes, Outcomes]:
    """Of n prompts so many refused before, so many of these after, and so many new ones."""
    before = [i < refused for i in range(n)]
    return before, [i < still or refused <= i < refused + gained for i in range(n)]


def test_the_share_is_of_what_was_refused_before() -> None:
    found = kept(*pair(10, 8, 6, gained=2))
    assert (found.value, found.kept, found.refused) == (0.75, 6, 8)
    assert found.interval == wilson_interval(6, 8)


def test_what_is_unscored_before_is_in_neither_part_and_after_it_is_not_kept() -> None:
    found = kept([True, True, None, True], [True, None, True, False])
    assert (found.value, *found[2:]) == (pytest.approx(1 / 3), 1, 3, 1)
    nothing = kept([False, None], [True, True])
    assert (nothing.value, nothing.interval, nothing.refused) == (None, None, 0)
    with pytest.raises(ValueError, match="argument 2 is"):
        kept([True], [])


def test_a_difference_by_hand() -> None:
    found = kept_difference(pair(100, 80, 48), pair(100, 80, 72))
    assert found.value == pytest.approx(0.6 - 0.9)
    assert found.n == 100
    assert found.interval is not None
    assert found.interval.high < 0
    assert found.p is not None
    assert found.p < 0.001
    # The arms lose nested sets of prompts: the first loses 32, of which the second loses 8.
    p1, p2 = 0.6, 0.9
    errors = [np.array([1 - p if i < k else -p if i < 80 else 0 for i in range(100)]) for p, k in ((p1, 48), (p2, 72))]
    r = float(errors[0] @ errors[1]) / float(np.sqrt((errors[0] ** 2).sum() * (errors[1] ** 2).sum()))
    (l1, u1), (l2, u2) = wilson_interval(48, 80) or (0, 0), wilson_interval(72, 80) or (0, 0)
    low = -0.3 - np.sqrt((p1 - l1) ** 2 - 2 * r * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    high = -0.3 + np.sqrt((u1 - p1) ** 2 - 2 * r * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2)
    assert found.interval == pytest.approx((low, high))


def test_what_arms_have_in_common_makes_the_interval_narrower() -> None:
    before, after = pair(80, 60, 40)
    other = [*after[20:60], *after[:20], *after[60:]]
    alike, unlike = kept_difference((before, after), (before, after)), kept_difference((before, after), (before, other))
    assert alike.value == unlike.value == 0
    assert alike.interval is not None
    assert unlike.interval is not None
    assert alike.interval.high - alike.interval.low < 0.5 * (unlike.interval.high - unlike.interval.low)


def test_all_kept_by_both_still_has_a_width_and_a_smallest_difference() -> None:
    found = kept_difference(pair(40, 30, 30), pair(40, 20, 20))
    assert (found.value, found.p) == (0, 1)
    assert found.interval is not None
    assert found.interval.low < -0.05
    assert found.interval.high > 0.05
    assert found.smallest is not None
    assert 0.1 < found.smallest < 1


def test_where_an_arm_refused_nothing_nothing_can_be_said() -> None:
    found = kept_difference(pair(10, 0, 0), pair(10, 5, 4))
    assert found[:4] == (None, None, None, None)
    assert found.n == 10


def test_prompts_unscored_before_in_one_arm_leave_the_pair_and_after_they_are_lost() -> None:
    first, second = pair(20, 12, 9), pair(20, 12, 6)
    first[0][0] = None
    found = kept_difference(first, second)
    assert (found.n, found.unscored) == (19, 1)
    assert found.value == pytest.approx(8 / 11 - 5 / 11)
    first, second = pair(20, 12, 9), pair(20, 12, 6)
    first[1][0] = first[1][15] = None
    found = kept_difference(first, second)
    assert (found.n, found.unscored) == (20, 0)
    assert found.value == pytest.approx(8 / 12 - 6 / 12)


def test_an_arm_that_falls_silent_keeps_what_it_still_refuses() -> None:
    before, heard = pair(100, 80, 60)
    silent: Outcomes = [*[True] * 8, *[None] * 72, *[False] * 20]
    assert kept(before, silent) == (0.1, wilson_interval(8, 80), 8, 80, 72)
    found = kept_difference((before, heard), (before, silent))
    # As if the replies were there and no refusals.
    assert found == kept_difference((before, heard), (before, [one is True for one in silent]))
    assert found.value == pytest.approx(0.65)
    # Not one refusal and something that was heard: nothing is kept. Nothing heard at all: nothing is known.
    assert kept(before, [*[None] * 80, *[False] * 20]).value == 0
    assert kept(before, [None] * 100) == (None, None, 0, 80, 80)
    assert kept_difference((before, heard), (before, [None] * 100))[:4] == (None, None, None, None)


@pytest.mark.parametrize("n", [2, 4, 6, 40])
def test_no_difference_is_larger_than_all(n: int) -> None:
    """Arms that keep the one and the other half."""
    before, after = pair(n, n, n // 2)
    smallest = kept_difference((before, after), (before, after[::-1])).smallest
    assert smallest is not None
    # By n - 1 degrees of freedom 4 pairs would show a difference of 1.8 or more.
    assert smallest == 1 if n <= 4 else 0 < smallest < 1 + 1e-12
    assert n < 40 or smallest < 0.6


def test_more_prompts_show_smaller_differences() -> None:
    sizes = [kept_difference(pair(n, n // 2, n // 3), pair(n, n // 2, n // 4)).smallest for n in (24, 96, 384)]
    assert sizes[0] is not None
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] == pytest.approx(2 * (sizes[2] or 0), rel=0.1)


arms = st.lists(st.tuples(*[st.sampled_from([True, True, False, None])] * 4), min_size=1, max_size=60)


@given(arms)
def test_the_interval_holds_the_value_and_agrees_with_p(rows: list[tuple[bool | None, ...]]) -> None:
    columns = [list(column) for column in zip(*rows, strict=True)]
    one, two = (columns[0], columns[1]), (columns[2], columns[3])
    found, turned = kept_difference(one, two), kept_difference(two, one)
    if found.value is None:
        assert turned.value is None
        return
    assert found.interval is not None
    assert turned.interval is not None
    assert found.p is not None
    assert -1 <= found.interval.low <= found.value <= found.interval.high <= 1
    assert (found.p < 0.05) == (not found.interval.holds(0)) or abs(found.p - 0.05) < 1e-6
    assert turned.value == pytest.approx(-found.value)
    assert turned.interval == pytest.approx((-found.interval.high, -found.interval.low))
    assert turned.p == pytest.approx(found.p)


def test_it_holds_the_truth_as_often_as_it_says() -> None:
    """The simulation of the docstring, in small: arms that lose the same prompts in half of the cases."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        shared_N = rng.random(60) < 0.5
        luck_TN = rng.random((2, 60))
        before_N, luck_N = rng.random(60) < 0.6, np.where(shared_N, luck_TN[0], luck_TN[1])
        pairs = [
            (before_N.tolist(), (before_N & (luck < share)).tolist())
            for luck, share in ((luck_TN[0], 0.6), (luck_N, 0.8))
        ]
        found = kept_difference(*pairs)
        held += found.interval is not None and found.interval.holds(-0.2)
    assert 0.92 < held / 400 < 0.985
