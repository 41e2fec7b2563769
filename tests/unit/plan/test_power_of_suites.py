"""What suites can show before they are run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from castune.data.example import Example
from castune.evaluation.suites import Suite
from castune.plan.power import CHANGED, GIVEN, visible_differences


def of_size(n: int, purpose: str, example: Example) -> Suite:
    return Suite(f"{purpose}-{n}", purpose, tuple(replace(example, id=str(i)) for i in range(n)))


def test_more_examples_show_smaller_differences_and_numbers_in_nats_wait_for_a_run(harmful: list[Example]) -> None:
    sizes = (30, 120, 480)
    suites = [of_size(n, "safety", harmful[0]) for n in sizes] + [of_size(50, "nll", harmful[0])]
    found = visible_differences(suites)
    assert [one.n for one in found] == list(sizes)
    for one, larger in zip(found, found[1:], strict=False):
        for few, many in zip(one.smallest, larger.smallest, strict=True):
            assert few / many == pytest.approx(2, rel=0.06)
        assert one.needed == larger.needed
    # A training that changes more hides more.
    assert all(len(one.smallest) == len(one.needed) == len(CHANGED) for one in found)
    assert all(one.smallest[0] < one.smallest[1] and one.needed[0] < one.needed[1] for one in found)


def test_so_many_examples_as_are_needed_show_the_difference(harmful: list[Example]) -> None:
    (found,) = visible_differences([of_size(120, "over-refusal", harmful[0])])
    for number, needed in enumerate(found.needed):
        (enough,) = visible_differences([of_size(needed, "over-refusal", harmful[0])])
        assert enough.smallest[number] <= GIVEN * (1 + 1e-9)


def test_one_example_shows_nothing(harmful: list[Example]) -> None:
    assert visible_differences([of_size(1, "safety", harmful[0])]) == []
