"""Makespans: bounds that hold for every list schedule, and small ones by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castune.errors import CastuneError
from castune.plan.makespan import Unit, makespan


@st.composite
def work(draw: st.DrawFn) -> list[Unit]:
    n = draw(st.integers(1, 12))
    units = []
    for i in range(n):
        after = draw(st.lists(st.integers(0, i - 1), max_size=3)) if i else []
        seconds = draw(st.floats(0, 1e6))
        units.append(Unit(str(i), seconds, tuple(map(str, after)), draw(st.booleans())))
    return draw(st.permutations(units))


def longest_chain(units: list[Unit], n_devices: int) -> float:
    """Seconds of the longest chain of units that wait for each other, each divisible one shared by all devices."""
    by_name = {unit.name: unit for unit in units}

    def end(unit: Unit) -> float:
        seconds = unit.seconds / n_devices if unit.is_divisible else unit.seconds
        return seconds + max((end(by_name[name]) for name in unit.after), default=0.0)

    return max(map(end, units))


@given(units=work(), n=st.integers(1, 9))
def test_a_makespan_keeps_its_bounds(units: list[Unit], n: int) -> None:
    total, chain = sum(unit.seconds for unit in units), longest_chain(units, n)
    found = makespan(units, n)
    assert found >= max(total / n, chain) * (1 - 1e-9)
    assert found <= (total / n + (1 - 1 / n) * chain) * (1 + 1e-9)


@given(units=work())
def test_one_device_takes_the_sum(units: list[Unit]) -> None:
    assert makespan(units, 1) == pytest.approx(sum(unit.seconds for unit in units))


@given(seconds=st.lists(st.floats(0, 1e6), min_size=1, max_size=8), n=st.integers(1, 9))
def test_a_chain_that_all_share_takes_its_sum_over_the_devices(seconds: list[float], n: int) -> None:
    units = [Unit(str(i), s, (str(i - 1),) if i else (), is_divisible=True) for i, s in enumerate(seconds)]
    assert makespan(units, n) == pytest.approx(sum(seconds) / n)


def test_a_study_by_hand() -> None:
    units = [
        Unit("diagnose", 8, is_divisible=True),
        *(Unit(f"tune {i}", 3, ("diagnose",)) for i in range(3)),
        *(Unit(f"evaluate {i}", 2, (f"tune {i}",)) for i in range(3)),
    ]
    assert makespan(units, 1) == 23
    # Both diagnose for 4; then 3 and 3, 3 beside 2 and 2, 2 ends at 14 -> tune 2 from 7 to 10, evaluate 2 until 12.
    assert makespan(units, 2) == 12
    assert makespan(units, 100) == pytest.approx(0.08 + 3 + 2)
    assert makespan([], 4) == 0


@pytest.mark.parametrize(
    ("units", "n", "said"),
    [
        ([Unit("a", 1)], 0, "at least 1"),
        ([Unit("a", 1), Unit("a", 2)], 1, "'a' stands there twice"),
        ([Unit("a", 1, ("b",))], 1, "waits for 'b'"),
        ([Unit("a", 1, ("b",)), Unit("b", 1, ("a",))], 1, "wait for each other: a, b"),
        ([Unit("a", 1, ("a",))], 1, "wait for each other: a"),
        ([Unit("a", -1)], 1, "-1 seconds"),
        ([Unit("a", float("nan"))], 1, "nan seconds"),
        ([Unit("a", float("inf"))], 1, "inf seconds"),
    ],
)
def test_what_cannot_be_scheduled_is_refused(units: list[Unit], n: int, said: str) -> None:
    with pytest.raises(CastuneError, match=said):
        makespan(units, n)
