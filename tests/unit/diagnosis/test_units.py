"""Units of a sweep: every head on every batch once, layers whole."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from castune.artifacts import Unit
from castune.core.batching import ExampleBatch
from castune.data.rows import Row
from castune.diagnosis.sweep import units_of


def batch_of(n_tokens: int) -> ExampleBatch:
    return ExampleBatch([0], [Row.of_replies(range(n_tokens), [[1]])], [[(0, 1)]])


@given(
    n_heads=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    unit_tokens=st.integers(0, 300),
)
def test_units_cover_everything_once_and_are_as_large_as_asked(
    n_heads: list[int], lengths: list[int], unit_tokens: int
) -> None:
    heads = [Unit.head(layer, head) for layer, n in enumerate(n_heads) for head in range(n)]
    batches = [batch_of(length) for length in lengths]
    units = units_of(heads, batches, unit_tokens)
    assert Counter((unit.batch, number) for unit in units for number in unit.heads) == Counter(
        (batch, number) for batch in range(len(batches)) for number in range(len(heads))
    )
    for number, length in enumerate(lengths):
        of_batch = [unit for unit in units if unit.batch == number]
        layers = [{heads[n].layer for n in unit.heads} for unit in of_batch]
        assert sum(map(len, layers)) == len(n_heads), "no layer is in two units"
        sizes = [len(unit.heads) * length for unit in of_batch]
        assert all(size >= unit_tokens for size in sizes[:-1])
        # None holds a layer more than it has to.
        for unit, unit_layers in zip(of_batch, layers, strict=True):
            last = sum(heads[n].layer == max(unit_layers) for n in unit.heads)
            assert len(unit_layers) == 1 or (len(unit.heads) - last) * length < unit_tokens
    assert [unit.batch for unit in units] == sorted(unit.batch for unit in units)
