"""Data sources: starter data of the package, named public sets, files and hub ids.

`examples("starter-utility")`, `examples("mmlu")` (from the hub), `examples("mmlu@REVISION")` (a branch, tag or commit),
`examples("mmlu=my/copy.jsonl")` (a local copy with the hub's columns), `examples("my/data.jsonl")` (castune's own
columns) and `examples("owner/name")` all give `list[Example]`.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from castune.data.columns import check_example, example_of, is_nan
from castune.data.example import Example
from castune.data.named import NAMED_SOURCES, NamedSource
from castune.data.tables import FILE_FORMATS, Row, is_file, is_table_of_text, one_line, read_rows
from castune.errors import DataError, SourceUnreachable

logger = logging.getLogger(__name__)

_STARTER = Path(__file__).parent / "starter"

# Values of a column in a message.
_LISTED = 20


@dataclass(frozen=True)
class _StarterSource:
    purpose: str
    files: tuple[str, ...]


_STARTER_SOURCES = {
    "starter-utility": _StarterSource("utility", ("utility.jsonl",)),
    "starter-utility-eval": _StarterSource("utility", ("utility-eval.jsonl",)),
    "starter-safety": _StarterSource("safety", ("safety.jsonl",)),
    "starter-safety-eval": _StarterSource("safety", ("safety-eval.jsonl",)),
    "starter-overrefusal-eval": _StarterSource("over-refusal", ("overrefusal-eval.jsonl",)),
    "starter-helpful-eval": _StarterSource("nll", ("helpful-eval.jsonl",)),
    "starter-solutions-eval": _StarterSource("utility", ("solutions-eval.jsonl",)),
    "starter-align": _StarterSource(
        "alignment", ("align-harmful.jsonl", "align-benign.jsonl", "align-borderline.jsonl")
    ),
    "starter-borderline": _StarterSource("alignment", ("align-borderline.jsonl",)),
}


SOURCE_NAMES = (*_STARTER_SOURCES, *NAMED_SOURCES)


def examples(
    source: str | Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    balance: str | None = None,
    shares: Mapping[str, float] | None = None,
) -> list[Example]:
    """Examples of a data source.

    Args:
        source: a named source, `name=path` (a local copy with the hub's columns), a path, or a hub id; of the hub,
            `@revision` behind it takes that branch, tag or commit.
        limit: how many to draw; the subset depends on `seed` alone and keeps the source's order.
        seed: seed of the subset.
        balance: a column of the source, of whose values equally many rows are drawn each: together `limit`, or as many
            as the rarest value has. Of a value that has fewer there are fewer, and a warning says so.
        shares: shares of these values of the column `balance` (`kind` when absent) among the rows that are drawn, in
            proportion to each other; of other values none are. Together they are `limit`, or as many as the scarcest
            value allows, and a warning says so where these are fewer. Those of a smaller limit are among them.

    Raises:
        DataError: the source is unknown, missing, malformed (file and line are named), empty, or lacks columns.
        SourceUnreachable: it is on the hub, which cannot be reached.
    """
    source = str(source)
    if shares is not None:
        balance = balance or "kind"
    found, kinds = [], []
    for example, kind in _converted(source, balance):
        found.append(example)
        kinds.append(kind)
    if not found:
        raise DataError(f"{source}: no examples in it")
    if limit is not None and limit < 1:
        raise DataError(f"{source}: limit is {limit}, accepted: at least 1")
    if shares is not None:
        chosen = _in_shares(kinds, shares, limit, seed, f"{source}: shares of {balance}")
    elif balance is not None:
        chosen = _balanced(kinds, limit, seed, f"{source}: balanced by {balance}")
    elif limit is not None and limit < len(found):
        chosen = random.Random(seed).sample(range(len(found)), limit)
    else:
        return found
    return [found[i] for i in sorted(chosen)]


def _balanced(kinds: Sequence[str], limit: int | None, seed: int, what: str) -> list[int]:
    """Numbers of rows of which every kind has its equal share of `limit`."""
    rows = {kind: [row for row, found in enumerate(kinds) if found == kind] for kind in sorted(set(kinds))}
    rarest = min(map(len, rows.values()))
    total = rarest * len(rows) if limit is None else limit
    chosen = []
    for number, (kind, found) in enumerate(rows.items()):
        share = total // len(rows) + (number < total % len(rows))
        if share > len(found):
            logger.warning("%s: %s has only %d of the %d rows of its share", what, kind, len(found), share)
        # What is drawn of one kind does not depend on the others.
        chosen += random.Random(f"{seed}/{kind}").sample(found, min(share, len(found)))
    return chosen


def _in_shares(kinds: Sequence[str], shares: Mapping[str, float], limit: int | None, seed: int, what: str) -> list[int]:
    """Numbers of rows of which every kind has its share, to less than a row more or fewer."""
    if not shares or not all(0 < share < math.inf for share in shares.values()):
        raise DataError(f"{what} are {dict(shares)}, accepted: a number above 0 for every value that is to be drawn")
    there = sorted(set(kinds))
    if absent := sorted(set(shares) - set(there)):
        listed = ", ".join(there[:_LISTED]) + (f" and {len(there) - _LISTED} more" if len(there) > _LISTED else "")
        raise DataError(f"{what}: no row has {', '.join(map(repr, absent))}; accepted: {listed}")
    rows = {kind: [row for row, found in enumerate(kinds) if found == kind] for kind in sorted(shares)}
    # As in `_balanced`; all in random order, so that a smaller limit draws the first ones of the same.
    rows = {kind: random.Random(f"{seed}/{kind}").sample(found, len(found)) for kind, found in rows.items()}
    # Exact, as they were written: 0.1 is a tenth.
    weights = {kind: Fraction(str(float(shares[kind]))) for kind in rows}
    whole = sum(weights.values())
    most = {kind: len(found) * whole // weights[kind] for kind, found in rows.items()}
    scarcest = min(most, key=lambda kind: most[kind])
    total = most[scarcest] if limit is None else min(limit, most[scarcest])
    if limit is not None and total < limit:
        logger.warning(
            "%s: %d rows instead of %d, for %s has only %d", what, total, limit, scarcest, len(rows[scarcest])
        )
    counts = dict.fromkeys(rows, 0)
    # The quota method (Balinski and Young, 1975): every count is within one of its share, whatever the total is.
    for n in range(1, total + 1):
        due = [kind for kind in rows if counts[kind] * whole < weights[kind] * n]
        counts[max(due, key=lambda kind: weights[kind] / (counts[kind] + 1))] += 1
    return [row for kind, found in rows.items() for row in found[: counts[kind]]]


def purpose_of(source: str) -> str | None:
    """What a named source measures (utility, safety, over-refusal, nll) or is for (alignment); None for any other."""
    name = source_name(source)
    if name in _STARTER_SOURCES:
        return _STARTER_SOURCES[name].purpose
    return NAMED_SOURCES[name].purpose if name in NAMED_SOURCES else None


def source_name(source: str) -> str:
    """A source without the place or revision it is read from: `mmlu` of `mmlu=my/copy.jsonl` and of `mmlu@v1`."""
    for mark in "=@":
        name = source.partition(mark)[0]
        if name in NAMED_SOURCES:
            return name
    return source


def _converted(source: str, column: str | None) -> Iterator[tuple[Example, str]]:
    """Examples of a source, each with what its row has in `column`."""
    name, equals, path = source.partition("=")
    on_hub, _, revision = source.partition("@")
    if is_file(Path(source)):
        yield from _own_columns(Path(source), column)
    elif source in _STARTER_SOURCES:
        for file in _STARTER_SOURCES[source].files:
            yield from _own_columns(_STARTER / file, column)
    elif equals:
        if name not in NAMED_SOURCES:
            raise DataError(f"{source}: unknown named source {name!r}; accepted: {', '.join(NAMED_SOURCES)}")
        yield from _convert_all(NAMED_SOURCES[name].convert, read_rows(Path(path)), name, column)
    elif on_hub in NAMED_SOURCES:
        named = NAMED_SOURCES[on_hub]
        found = list(_convert_all(named.convert, _read_hub(on_hub, named, revision), on_hub, column))
        if named.size not in (None, len(found)):
            logger.warning(
                "%s: %d examples on the hub, %d when castune was written: numbers will not compare with older ones",
                source,
                len(found),
                named.size,
            )
        yield from found
    elif Path(source).suffix in FILE_FORMATS or _exists(Path(source)):
        yield from _own_columns(Path(source), column)
    elif on_hub.count("/") == 1:
        yield from _convert_all(example_of, _read_hub(on_hub, None, revision), on_hub, column)
    else:
        raise DataError(
            f"{source}: neither a file nor a named source; named sources: {', '.join(SOURCE_NAMES)}; "
            "a hub id has the form owner/name"
        )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _own_columns(path: Path, column: str | None) -> Iterator[tuple[Example, str]]:
    rows = read_rows(path)
    if is_table_of_text(path):
        rows = ((where, {key: value for key, value in row.items() if value != ""}) for where, row in rows)
    yield from _convert_all(example_of, rows, path.stem, column)


def _convert_all(
    convert: Callable[[Row], Example | None], rows: Iterator[tuple[str, Row]], name: str, column: str | None
) -> Iterator[tuple[Example, str]]:
    seen: set[str] = set()
    for index, (where, row) in enumerate(rows):
        try:
            example = convert({key: None if is_nan(value) else value for key, value in row.items()})
            kind = "" if column is None else row[column]
        except KeyError as error:
            raise DataError(
                f"{where}: column {error.args[0]!r} is missing; found: {', '.join(map(str, row))}"
            ) from None
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{where}: {error}") from None
        if example is None:
            continue
        if column is not None and not isinstance(kind, (str, int, bool)):
            raise DataError(f"{where}: {column} is {kind!r}, and only a text can be balanced by")
        check_example(example, where)
        identifier = example.id or f"{name}-{index:05d}"
        if identifier in seen:
            raise DataError(f"{where}: id {identifier!r} appears twice; ids must be unique")
        seen.add(identifier)
        yield replace(example, id=identifier), str(kind)


def _read_hub(name: str, source: NamedSource | None, revision: str) -> Iterator[tuple[str, Row]]:
    import datasets

    hub_id, config, split = (name, None, "train") if source is None else (source.hub_id, source.config, source.split)
    datasets.disable_progress_bars()
    try:
        options = {} if source is None else source.options
        table = datasets.load_dataset(hub_id, config, split=split, revision=revision or None, **options)
    except Exception as error:  # network, gating, missing data set: datasets and its clients raise many kinds
        # A split, configuration or data set that is not there, or closed to this user: it will not be there later.
        is_refused = isinstance(error, (ValueError, FileNotFoundError)) and not isinstance(error, ConnectionError)
        kind = DataError if is_refused else SourceUnreachable
        gated = (
            f" {hub_id} is gated: accept its terms on its hub page and log in first." if source and source.gated else ""
        )
        local = f" Or give a local copy: {name}=PATH." if source else ""
        raise kind(f"{name}: could not load {hub_id} from the hub ({one_line(error)}).{gated}{local}") from error
    for index, row in enumerate(table):
        yield f"{hub_id} row {index + 1}", dict(row)
