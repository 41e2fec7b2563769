"""Makespans: bounds that hold for every list schedule, and small ones by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castune.errors import CastuneError
from castune.plan.makespan import Job, makespan


@st.composite
def work(draw: st.DrawFn) -> list[Job]:
    n = draw(st.integers(1, 12))
    jobs = []
    for i in range(n):
        after = draw(st.lists(st.integers(0, i - 1), max_size=3)) if i else []
        seconds = draw(st.floats(0, 1e6, allow_subnormal=False))
        jobs.append(Job(str(i), seconds, tuple(map(str, after)), draw(st.booleans())))
    return draw(st.permutations(jobs))


def longest_chain(jobs: list[Job], n_devices: int) -> float:
    """Seconds of the longest chain of jobs that wait for each other, each divisible one shared by all devices."""
    by_name = {job.name: job for job in jobs}

    def end(job: Job) -> float:
        seconds = job.seconds / n_devices if job.is_divisible else job.seconds
        return seconds + max((end(by_name[name]) for name in job.after), default=0.0)

    return max(map(end, jobs))


@given(jobs=work(), n=st.integers(1, 9))
def test_a_makespan_keeps_its_bounds(jobs: list[Job], n: int) -> None:
    total, chain = sum(job.seconds for job in jobs), longest_chain(jobs, n)
    found = makespan(jobs, n)
    assert found >= max(total / n, chain) * (1 - 1e-9)
    assert found <= (total / n + (1 - 1 / n) * chain) * (1 + 1e-9)


@given(jobs=work())
def test_one_device_takes_the_sum(jobs: list[Job]) -> None:
    assert makespan(jobs, 1) == pytest.approx(sum(job.seconds for job in jobs))


@given(seconds=st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=8), n=st.integers(1, 9))
def test_a_chain_that_all_share_takes_its_sum_over_the_devices(seconds: list[float], n: int) -> None:
    jobs = [Job(str(i), s, (str(i - 1),) if i else (), is_divisible=True) for i, s in enumerate(seconds)]
    assert makespan(jobs, n) == pytest.approx(sum(seconds) / n)


def test_a_study_by_hand() -> None:
    jobs = [
        Job("diagnose", 8, is_divisible=True),
        *(Job(f"tune {i}", 3, ("diagnose",)) for i in range(3)),
        *(Job(f"evaluate {i}", 2, (f"tune {i}",)) for i in range(3)),
    ]
    assert makespan(jobs, 1) == 23
    # Both diagnose for 4; then 3 and 3, 3 beside 2 and 2, 2 ends at 14 -> tune 2 from 7 to 10, evaluate 2 until 12.
    assert makespan(jobs, 2) == 12
    assert makespan(jobs, 100) == pytest.approx(0.08 + 3 + 2)
    assert makespan([], 4) == 0


@pytest.mark.parametrize(
    ("jobs", "n", "said"),
    [
        ([Job("a", 1)], 0, "at least 1"),
        ([Job("a", 1), Job("a", 2)], 1, "'a' appears twice"),
        ([Job("a", 1, ("b",))], 1, "waits for 'b'"),
        ([Job("a", 1, ("b",)), Job("b", 1, ("a",))], 1, "wait for each other: a, b"),
        ([Job("a", 1, ("a",))], 1, "wait for each other: a"),
        ([Job("a", -1)], 1, "-1 seconds"),
        ([Job("a", float("nan"))], 1, "nan seconds"),
        ([Job("a", float("inf"))], 1, "inf seconds"),
    ],
)
def test_what_cannot_be_scheduled_is_refused(jobs: list[Job], n: int, said: str) -> None:
    with pytest.raises(CastuneError, match=said):
        makespan(jobs, n)
