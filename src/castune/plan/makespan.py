"""How long jobs take on several devices: list scheduling with dependencies."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from castune.errors import CastuneError


@dataclass(frozen=True)
class Job:
    """A piece of work for one device.

    Attributes:
        name: its name, no other job's.
        seconds: how long it takes on one device.
        after: names of the jobs it waits for.
        is_divisible: whether several devices may share it (`--shard i/n`), without loss.
    """

    name: str
    seconds: float
    after: tuple[str, ...] = ()
    is_divisible: bool = False


def makespan(jobs: Sequence[Job], n_devices: int) -> float:
    """Seconds until all jobs are done, when a free device takes the ready job with the longest chain behind it.

    At most sum / n + (1 - 1/n) longest chain (Graham 1966); never below sum / n and the longest chain.

    Args:
        jobs: the work; a divisible job becomes as many equal parts as there are devices.
        n_devices: how many devices there are.

    Raises:
        CastuneError: no device, two jobs of one name, one that waits for none that is there, jobs that wait for each
            other, or seconds that are negative or not finite.
    """
    if n_devices < 1:
        raise CastuneError(f"{n_devices} devices: accepted: at least 1")
    ordered = _order(jobs)
    seconds = {job.name: job.seconds / (n_devices if job.is_divisible else 1) for job in ordered}
    parts = {job.name: n_devices if job.is_divisible else 1 for job in ordered}
    behind = {job.name: 0.0 for job in ordered}
    for job in reversed(ordered):
        for name in job.after:
            behind[name] = max(behind[name], behind[job.name] + seconds[job.name])
    waits = {job.name: len(set(job.after)) for job in ordered}
    follow = {job.name: [other.name for other in ordered if job.name in other.after] for job in ordered}
    left = dict(parts)
    place = {job.name: number for number, job in enumerate(ordered)}

    def ready(name: str) -> list[tuple[float, int, str]]:
        return [(-(behind[name] + seconds[name]), place[name], name)] * parts[name]

    waiting = [entry for name, n in waits.items() if not n for entry in ready(name)]
    heapq.heapify(waiting)
    running: list[tuple[float, int, str]] = []
    now = 0.0
    while waiting or running:
        while waiting and len(running) < n_devices:
            *_, name = heapq.heappop(waiting)
            heapq.heappush(running, (now + seconds[name], place[name], name))
        now, _, name = heapq.heappop(running)
        left[name] -= 1
        if left[name]:
            continue
        for other in follow[name]:
            waits[other] -= 1
            if not waits[other]:
                for entry in ready(other):
                    heapq.heappush(waiting, entry)
    return now


def _order(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, each behind those it waits for; checked."""
    by_name = {job.name: job for job in jobs}
    if len(by_name) < len(jobs):
        names = [job.name for job in jobs]
        raise CastuneError(f"job {next(name for name in names if names.count(name) > 1)!r} appears twice")
    for job in jobs:
        if not (math.isfinite(job.seconds) and job.seconds >= 0):
            raise CastuneError(f"job {job.name!r} takes {job.seconds} seconds; accepted: finite numbers from 0")
        if missing := [name for name in job.after if name not in by_name]:
            raise CastuneError(f"job {job.name!r} waits for {missing[0]!r}, which is not there")
    ordered: list[Job] = []
    done: set[str] = set()
    left = list(jobs)
    while left:
        free = [job for job in left if done.issuperset(job.after)]
        if not free:
            raise CastuneError(f"jobs wait for each other: {', '.join(job.name for job in left)}")
        ordered += free
        done |= {job.name for job in free}
        left = [job for job in left if job.name not in done]
    return ordered
