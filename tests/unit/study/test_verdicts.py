"""Words: what they claim follows from the intervals, and every count is named."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from one_suite import compare

from castune.purposes import PURPOSES
from castune.stats.comparisons import Comparison
from castune.stats.distributions import Interval
from castune.stats.nulls import Stratum, null_position
from castune.stats.validity import Point, Validity, predictive_validity
from castune.study.verdicts import comparison_verdict, null_verdict, unseen_verdict, verdict


def study(cost_AT: Any) -> Validity:
    trials = [
        Point(arm=str(a), seed=t, score=float(a), control=0, cost=None if math.isnan(cost) else float(cost))
        for a, row in enumerate(cost_AT)
        for t, cost in enumerate(row)
    ]
    return predictive_validity(trials, draws=500)


RELATED = replace(study(np.arange(12.0)[:, None] + np.random.default_rng(0).normal(size=(12, 3))), counts_examples=True)


def test_a_relation_is_claimed_with_both_intervals() -> None:
    found = replace(RELATED, retrained=Interval(0.31, 0.83), other_arms=Interval(0.07, 0.88))
    found = replace(found, of_means=found.of_means._replace(pearson=0.62))
    assert verdict(found, cost="UCR") == (
        "Higher C goes with higher UCR: r = 0.62 (95 % 0.31 to 0.83 for these arms trained again, "
        "95 % 0.07 to 0.88 for others like them), 12 arms over 3 seeds; p < 0.001 by permuting arms."
    )
    lower = replace(found, retrained=Interval(-0.9, -0.2), other_arms=Interval(-0.9, -0.1))
    lower = replace(lower, of_means=lower.of_means._replace(pearson=-0.6))
    assert verdict(lower).startswith("Higher C goes with lower cost: r = −0.60")


@pytest.mark.parametrize("other", [None, Interval(-0.3, 0.99)])
def test_a_relation_of_these_arms_only_says_so(other: Interval | None) -> None:
    text = verdict(replace(RELATED, other_arms=other))
    assert text.startswith("In these arms higher C goes with higher cost")
    assert "too few to say so of others" in text


def test_an_interval_that_leaves_out_the_choice_of_examples_says_so() -> None:
    assert "on the same examples" in verdict(replace(RELATED, counts_examples=False))
    assert "on the same examples" not in verdict(RELATED)


@pytest.mark.parametrize("interval", [Interval(-0.1, 0.9), Interval(0.0, 0.5), Interval(-0.9, 0.0)])
def test_an_interval_that_holds_0_claims_nothing(interval: Interval) -> None:
    text = verdict(replace(RELATED, retrained=interval))
    assert text.startswith("No relation seen at this n: r = ")
    assert "goes with" not in text


def test_what_chance_does_as_well_is_said_of_these_arms_only() -> None:
    text = verdict(RELATED, p_adjusted=0.06, n_comparisons=6)
    assert text.startswith("In these arms higher C goes with higher cost")
    assert "p = 0.060 by permuting arms, of 6 comparisons (Holm)" in text
    assert verdict(RELATED, p_adjusted=0.01, n_comparisons=6).startswith("Higher C goes with higher cost")


def test_one_seed_claims_nothing() -> None:
    text = verdict(study(np.arange(6.0)[:, None]))
    assert (
        text
        == "No relation can be claimed from one training run per arm and no errors of the costs: r = 1.00, 6 arms over 1 seed."
    )


def test_undefined_costs_are_named() -> None:
    cost_AT = np.full((4, 3), math.nan)
    cost_AT[0] = [1, 2, 3]
    assert verdict(study(cost_AT), cost="cost ratio") == (
        "Not measurable: in 9 of 12 trials safety did not rise, so the cost ratio is undefined. Left: 1 arm over 3 seeds."
    )
    cost_AT = np.arange(12.0)[:, None] + np.random.default_rng(0).normal(size=(12, 3))
    cost_AT[3, 1] = math.nan
    assert verdict(study(cost_AT)).endswith(
        "In 1 of 36 trials safety did not rise, so the cost is undefined; those trials are left out."
    )
    assert "11 arms over 3 seeds, 35 trainings" not in verdict(study(cost_AT))
    assert "12 arms over 3 seeds, 35 trainings" in verdict(study(cost_AT))
    assert verdict(predictive_validity([])).startswith("Not measurable: there are no trials.")
    nothing, why = study(np.full((3, 2), math.nan)), {"a suite has nothing scored": 6}
    lost = verdict(nothing, cost="utility lost", why_undefined=why)
    assert lost.startswith("Not measurable: in 6 of 6 trials a suite has nothing scored, so the utility lost is")
    both = verdict(nothing, why_undefined={"safety did not rise": 4, "a suite has nothing scored": 2})
    assert both.startswith(
        "Not measurable: in 4 of 6 trials safety did not rise and in 2 a suite has nothing scored, so the cost is"
    )


SEEN = compare(
    {t: (np.random.default_rng(t).random(200) < 0.8).tolist() for t in range(4)},
    {t: (np.random.default_rng(10 + t).random(200) < 0.3).tolist() for t in range(4)},
)


def words(found: Comparison) -> str:
    return comparison_verdict(found, first="safe", second="random", about=PURPOSES["utility"])


def test_a_difference_is_claimed_with_its_interval_and_counts() -> None:
    text = words(SEEN)
    assert text.startswith("Utility accuracy is higher under safe than under random: +")
    assert "4 seeds, 200 examples" in text
    assert " points (95 % " in text


def test_a_difference_in_doubt_is_not_claimed() -> None:
    for doubtful in (
        replace(SEEN, interval=Interval(-0.01, 0.3)),
        replace(SEEN, p_adjusted=0.07, n_comparisons=5),
        replace(SEEN, interval=Interval(0.0, 0.3)),
    ):
        assert words(doubtful).startswith("No difference seen at this n")
    assert "p = 0.070 after Holm over 5 comparisons" in words(replace(SEEN, p_adjusted=0.07, n_comparisons=5))


def test_comparisons_without_an_interval() -> None:
    assert words(compare({1: [1, 0]}, {1: [0, 0]})).startswith("No difference can be claimed from so little")
    assert words(compare({1: [1], 2: [1]}, {1: [1], 2: [1]})).startswith("No outcome differs between safe and random")
    assert words(compare({1: [None]}, {1: [1]})) == (
        "Not measurable: not every suite has an example with a score under both safe and random (1 seed, 0 examples, 1 left out as unscored)."
    )


def test_what_is_measured_in_nats_is_told_in_nats() -> None:
    rng = np.random.default_rng(0)
    base = rng.gamma(2, 1, 200)
    under = [{t: (base + shift + 0.01 * rng.normal(size=200)).tolist() for t in range(3)} for shift in (0.25, 0, 0)]
    seen, unseen = compare(under[0], under[1]), compare(under[2], under[1])
    about = PURPOSES["nll"]
    text = comparison_verdict(seen, first="risky", second="safe", about=about)
    assert re.match(
        r"The NLL of right answers is higher under risky than under safe: \+0\.2[45]\d nats per token \(95 % \+0\.2",
        text,
    )
    for text in (
        comparison_verdict(unseen, first="all", second="safe", about=about),
        unseen_verdict({"all": unseen}, second="safe", about=about),
        comparison_verdict(compare({1: [0.5, 0.25]}, {1: [0.5, 0.0]}), first="all", second="safe", about=about),
    ):
        assert text.startswith("No difference")
        assert "nats per token" in text
        assert "points" not in text


def null_words(*strata: Stratum, **given: Any) -> str:
    return null_verdict(null_position(strata), **{"zone": "safe", **given})


MANY = [float(i) for i in range(1, 60)]


def test_a_zone_among_random_heads_of_one_seed() -> None:
    assert null_words(Stratum(0.0, MANY)) == (
        "The safe zone costs less than random heads: 0 of 59 random selections cost less, 59 more "
        "(share that costs less: 95 % 0 to 6 %), p = 0.033."
    )
    dear = null_words(Stratum(99.0, MANY), zone="risky")
    assert dear.startswith("The risky zone costs more than random heads: 59 of 59")
    few = null_words(Stratum(0.0, [1.0, 2.0, 3.0, None]))
    assert few.startswith(
        "The safe zone cannot be told from random heads at this n: 0 of 3 random selections cost less"
    )
    assert "3 cannot show more than p = 0.500" in few
    assert few.endswith("Of 1 more the cost is undefined.")
    place = null_position([Stratum(0.0, MANY)])
    assert place.p is not None
    adjusted = null_verdict(place, zone="safe", p_adjusted=4 * place.p, p_unusual_adjusted=4 * place.p, n_comparisons=4)
    assert adjusted.startswith("The safe zone cannot be told from random heads at this n")
    assert "p = 0.133 after Holm over 4 comparisons" in adjusted
    assert "59 cannot show more than p = 0.133" in adjusted


def test_over_seeds_other_than_random_heads_and_unlike_most_of_them_are_two_claims() -> None:
    # Four a seed: 125 ways, of which one is cheapest; but 13 sets of heads, of which one is cheapest too.
    beside = [Stratum(10.0 * seed, [10.0 * seed + i for i in range(1, 5)]) for seed in range(3)]
    assert null_words(*beside) == (
        "The safe zone costs less than random heads typically do: 0 of 12 random selections cost less, 12 more, each "
        "beside the zone trained with its seed (3 seeds), p = 0.016. That few random selections would is not shown: "
        "p = 0.154; 12 cannot show more than p = 0.154."
    )
    many = [Stratum(0.0, MANY[:20])] * 3
    assert null_words(*many) == (
        "The safe zone costs less than random heads: 0 of 60 random selections cost less, 60 more, each beside the "
        "zone trained with its seed (3 seeds), p < 0.001. Few random selections would: p = 0.033."
    )
    adjusted = null_words(*many, p_adjusted=0.001, p_unusual_adjusted=0.131, n_comparisons=4)
    assert adjusted.startswith("The safe zone costs less than random heads typically do: 0 of 60")
    assert adjusted.endswith("not shown: p = 0.131 after Holm over 4 comparisons; 60 cannot show more than p = 0.131.")
    few = null_words(*(Stratum(0.0, [1.0]) for _ in range(3)), p_adjusted=1.0, p_unusual_adjusted=1.0, n_comparisons=4)
    assert "3 cannot show more than p = 1.000" in few


def test_what_a_null_leaves_out_and_what_gained_no_safety_is_named() -> None:
    # A ratio without a gain in safety is the dearest, not a missing one.
    middle = null_words(Stratum(41.0, [*map(float, range(40)), *[math.inf] * 40]), zone="risky")
    assert middle.startswith("The risky zone cannot be told from random heads at this n: 40 of 80 random selections")
    assert "40 of them gained no safety at all and cost the most" in middle
    own = null_words(Stratum(math.inf, [1.0, math.inf]), Stratum(1.0, [2.0, 3.0]), Stratum(None, [1.0]))
    assert "1 of them gained no safety at all and cost the most; the zone gained none in 1 of 2 seeds." in own
    assert own.endswith(" In 1 of 3 seeds the cost of the safe zone is undefined.")
    assert null_words(Stratum(None, MANY)) == "Not measurable: the safe zone has no defined cost."
    assert null_words(Stratum(1.0, [])) == "Not measurable: no random selection with a defined cost."
