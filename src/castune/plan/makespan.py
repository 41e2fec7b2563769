"""How long units of work take on several devices: list scheduling with dependencies."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from castune.errors import CastuneError


@dataclass(frozen=True)
class Unit:
    """A piece of work for one device.

    Attributes:
        name: its name, no other unit's.
        seconds: how long it takes on one device.
        after: names of the units it waits for.
        is_divisible: whether several devices may share it (`--shard i/n`), without loss.
    """

    name: str
    seconds: float
    after: tuple[str, ...] = ()
    is_divisible: bool = False


def makespan(units: Sequence[Unit], n_devices: int) -> float:
    """Seconds until all units are done, when a free device takes the ready unit with the longest chain behind it.

    At most sum / n + (1 - 1/n) longest chain (Graham 1966); never below sum / n and the longest chain.

    Args:
        units: the work; a divisible unit becomes as many equal parts as there are devices.
        n_devices: how many devices there are.

    Raises:
        CastuneError: no device, two units of one name, one that waits for none that is there, units that wait for each
            other, or seconds that are negative or not finite.
    """
    if n_devices < 1:
        raise CastuneError(f"{n_devices} devices: accepted is at least 1")
    ordered = _order(units)
    seconds = {unit.name: unit.seconds / (n_devices if unit.is_divisible else 1) for unit in ordered}
    parts = {unit.name: n_devices if unit.is_divisible else 1 for unit in ordered}
    behind = {unit.name: 0.0 for unit in ordered}
    for unit in reversed(ordered):
        for name in unit.after:
            behind[name] = max(behind[name], behind[unit.name] + seconds[unit.name])
    waits = {unit.name: len(set(unit.after)) for unit in ordered}
    follow = {unit.name: [other.name for other in ordered if unit.name in other.after] for unit in ordered}
    left = dict(parts)
    place = {unit.name: number for number, unit in enumerate(ordered)}

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


def _order(units: Sequence[Unit]) -> list[Unit]:
    """The units, each behind those it waits for; checked."""
    by_name = {unit.name: unit for unit in units}
    if len(by_name) < len(units):
        names = [unit.name for unit in units]
        raise CastuneError(f"unit {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    for unit in units:
        if not (math.isfinite(unit.seconds) and unit.seconds >= 0):
            raise CastuneError(f"unit {unit.name!r} takes {unit.seconds} seconds; accepted are finite numbers from 0")
        if missing := [name for name in unit.after if name not in by_name]:
            raise CastuneError(f"unit {unit.name!r} waits for {missing[0]!r}, which is not there")
    ordered: list[Unit] = []
    done: set[str] = set()
    left = list(units)
    while left:
        free = [unit for unit in left if done.issuperset(unit.after)]
        if not free:
            raise CastuneError(f"units wait for each other: {', '.join(unit.name for unit in left)}")
        ordered += free
        done |= {unit.name for unit in free}
        left = [unit for unit in left if unit.name not in done]
    return ordered
