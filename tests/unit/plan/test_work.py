"""Work and costs add up."""

from __future__ import annotations

from dataclasses import fields

from castune.data.rows import Row
from castune.plan.work import Cost, Size, Work

COUNTS = [field.name for field in fields(Work)]


def work_of(k: int) -> Work:
    return Work(**{name: (i + 1) * k for i, name in enumerate(COUNTS)})


def test_works_and_costs_add_up() -> None:
    assert work_of(1) + work_of(2) == work_of(3) == work_of(1) * 3
    assert Cost(work_of(1), 2.0) + Cost(work_of(4), 0.5) == Cost(work_of(5), 2.5)
    assert Cost(work_of(2), 3.0) * 2 == Cost(work_of(4), 6.0)
    assert sum([Cost(work_of(1), 1.0)] * 3, Cost()) == Cost(work_of(3), 3.0)


def test_sizes_are_those_of_padded_batches() -> None:
    rows = [Row.of_replies(range(5), [range(3)]), Row.of_replies(range(10), [range(9)])]
    found = Size.of(rows)
    assert found == (2, max(len(row.ids) for row in rows), 2 * 16)
    assert found.n_tokens == 2 * found.length
