"""Cohen's kappa: known values, its properties, and how often its interval holds the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castune.stats.agreement import agreement

VERDICTS = st.lists(st.tuples(st.sampled_from([True, False, None]), st.sampled_from([True, False, None])), max_size=60)


def votes(both: int, one: int, other: int, neither: int) -> tuple[list[bool | None], list[bool | None]]:
    pairs = [(True, True)] * both + [(True, False)] * one + [(False, True)] * other + [(False, False)] * neither
    return [a for a, _ in pairs], [b for _, b in pairs]


def test_known_values() -> None:
    # The example of Cohen (1960) in its usual form: 35 of 50 alike, half of them by chance.
    found = agreement(*votes(20, 5, 10, 15))
    assert found.kappa == pytest.approx(0.4)
    assert (found.n, found.unscored, found.both, found.one_only, found.other_only) == (50, 0, 20, 5, 10)
    assert found.share == pytest.approx(0.7)
    assert agreement(*votes(10, 0, 0, 10)).kappa == 1
    assert agreement(*votes(0, 10, 10, 0)).kappa == -1
    assert agreement(*votes(25, 25, 25, 25)).kappa == 0


def test_perfect_agreement_on_few_replies_is_no_certainty() -> None:
    few, many = agreement(*votes(5, 0, 0, 5)), agreement(*votes(100, 0, 0, 100))
    assert few.high == many.high == 1
    assert few.low is not None
    assert many.low is not None
    assert few.low < 0.9 < many.low < 1


@pytest.mark.parametrize("same", [True, False])
def test_judges_who_always_say_one_thing_have_no_kappa(same: bool) -> None:
    found = agreement([same] * 9, [same] * 9)
    assert (found.kappa, found.low, found.high, found.n) == (None, None, None, 9)


def test_without_replies() -> None:
    found = agreement([None, True], [True, None])
    assert (found.kappa, found.n, found.unscored, found.share) == (None, 0, 2, None)
    with pytest.raises(ValueError, match="2 and 1"):
        agreement([True, True], [True])


@given(VERDICTS)
def test_neither_order_of_judges_nor_the_meaning_of_yes_changes_kappa(
    pairs: list[tuple[bool | None, bool | None]],
) -> None:
    one, other = [a for a, _ in pairs], [b for _, b in pairs]
    found, turned = agreement(one, other), agreement(other, one)
    negated = agreement(*([None if v is None else not v for v in votes] for votes in (one, other)))
    if found.kappa is None:
        assert turned.kappa is None
        assert negated.kappa is None
        return
    assert turned.kappa == pytest.approx(found.kappa)
    assert negated.kappa == pytest.approx(found.kappa)
    assert -1 <= found.low <= found.kappa <= found.high <= 1 + 1e-12  # type: ignore[operator]


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng, shares = np.random.default_rng(5), np.array([0.25, 0.05, 0.1, 0.6])
    truth = agreement(*votes(*(shares * 10_000).astype(int))).kappa
    assert truth is not None
    held = 0
    for _ in range(200):
        found = agreement(*votes(*rng.multinomial(80, shares)))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
    assert 180 <= held <= 200
