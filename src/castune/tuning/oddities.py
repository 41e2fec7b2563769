"""What is odd about an adapter: findings in sentences, each with what it is about. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from castune.artifacts import Unit
from castune.core.numbers import counted, percent
from castune.core.updates import Size
from castune.tuning.adapter_update import AdapterUpdate

# Share of an update's squared norm from which one direction is said to dominate it. A rank that is used evenly leaves
# each direction far less; above it the rank that was paid for does next to nothing.
DOMINANT = 0.9
_MOST_NAMED = 4


@dataclass(frozen=True)
class Finding:
    """Something odd.

    Attributes:
        what: its kind: not-loaded | certificate | outside | zero | dominated | embeddings | other | no-unit |
            first-order.
        said: a sentence.
        where: the units, modules or tensors it is about.
    """

    what: str
    said: str
    where: tuple[str, ...]


def findings(
    update: AdapterUpdate,
    sizes: Mapping[Unit, Size],
    *,
    selected: Collection[Unit] | None,
    without_unit: Sequence[str],
    stale_certificate: bool,
) -> list[Finding]:
    """What is odd, the gravest first.

    Args:
        update: what the adapter adds.
        sizes: of its share in every unit.
        selected: what the training was to touch; None where that is not known.
        without_unit: projections it updates of which no unit owns a part.
        stale_certificate: whether the certificate beside it was made for another adapter.
    """
    return [
        *_of_the_file(update, stale_certificate),
        *_outside(sizes, selected),
        *_of_values(update, sizes),
        *_of_modules(update, without_unit),
    ]


def _of_the_file(update: AdapterUpdate, stale_certificate: bool) -> Iterator[Finding]:
    for why, n in Counter(update.not_loaded.values()).items():
        names = [name for name, reason in update.not_loaded.items() if reason == why]
        said = f"{counted(n, 'tensor')} would not be loaded by PEFT, which does not say so: {_named(names, 1)} {why}"
        yield Finding("not-loaded", said, tuple(names))
    if not update.updates and not update.others:
        yield Finding("zero", "nothing of this adapter is loaded: with it the model is the base model", ())
    if stale_certificate:
        said = "the certificate beside it was made for another adapter: this one has changed since"
        yield Finding("certificate", said, ())


def _outside(sizes: Mapping[Unit, Size], selected: Collection[Unit] | None) -> Iterator[Finding]:
    if selected is None:
        return
    outside = [str(one) for one, size in sizes.items() if size.norm and one not in selected]
    if outside:
        said = f"{counted(len(outside), 'unit')} outside the selection changed: {_named(outside)}"
        yield Finding("outside", said, tuple(outside))


def _of_values(update: AdapterUpdate, sizes: Mapping[Unit, Size]) -> Iterator[Finding]:
    zero = [path for path, one in update.updates.items() if not one.norm]
    if zero:
        said = f"{counted(len(zero), 'adapted module')} of {len(update.updates):,} have an update of exactly zero: "
        yield Finding("zero", said + _named(zero, 2), tuple(zero))
    changed = {one: size for one, size in sizes.items() if size.top_share is not None and size.rank > 1}
    shares = {one: share for one, size in changed.items() if (share := size.top_share or 0) >= DOMINANT}
    if shares:
        named = [str(one) for one in sorted(shares, key=lambda one: -shares[one])]
        said = (
            f"one direction holds {percent(DOMINANT, 0)} or more of the update in {len(named):,} of {len(changed):,} "
            f"units: {_named(named)}"
        )
        yield Finding("dominated", said, tuple(named))


def _of_modules(update: AdapterUpdate, without_unit: Sequence[str]) -> Iterator[Finding]:
    if update.ends:
        said = f"input embeddings or output head are trained: {_named(update.ends)}"
        yield Finding("embeddings", said, tuple(update.ends))
    for what in dict.fromkeys(other.what for other in update.others):
        paths = [other.path for other in update.others if other.what == what]
        yield Finding("other", f"also changed, with no effect measured: {what} ({_named(paths, 1)})", tuple(paths))
    if without_unit:
        n = len(without_unit)
        said = f"{counted(n, 'adapted module')} {'has' if n == 1 else 'have'} parts that belong to no unit: "
        yield Finding("no-unit", said + _named(without_unit, 2), tuple(without_unit))


def _named(names: Iterable[str], most: int = _MOST_NAMED) -> str:
    names = list(names)
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")
