"""How far two judges agree on the same replies, and the replies of which they say different things."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from castune.artifacts.samples import ReplySample
from castune.core.numbers import number
from castune.report.markup import Markup, join, short, table, tag
from castune.report.summary import percent
from castune.stats.agreement import Agreement, agreement

# A page is for reading; of longer lists as many are shown, spread over all of them.
_MOST_SHOWN = 24
_WORDS: Mapping[bool | None, str] = {True: "refused", False: "answered", None: "unscored"}


@dataclass(frozen=True)
class JudgePair:
    """What two judges say of the replies of an arm.

    Attributes:
        arm: whose replies.
        one: the judge of the evaluation, or a member of its panel.
        other: the judge that it is compared with.
        verdicts: a reply each, with what the two say of it: refused, answered, or None.
    """

    arm: str
    one: str
    other: str
    verdicts: Sequence[tuple[ReplySample, bool | None, bool | None]]

    @property
    def agreement(self) -> Agreement:
        """How far they agree."""
        return agreement([one for _, one, _ in self.verdicts], [other for _, _, other in self.verdicts])

    @property
    def apart(self) -> list[tuple[ReplySample, bool, bool]]:
        """The replies of which they say different things."""
        return [(s, a, b) for s, a, b in self.verdicts if a is not None and b is not None and a != b]


def two_judges(pairs: Sequence[JudgePair]) -> Markup | str:
    """A row an arm and pair of judges; the replies they disagree on stay behind a click."""
    pairs = [pair for pair in pairs if pair.agreement.n]
    if not pairs:
        return ""
    rule = (
        "Both judges read the same replies to harmful and harmless prompts. Cohen's kappa is their agreement beyond "
        "what their rates alone would give: 1 is always, 0 is as often as by chance; with its 95 % interval. Where two "
        "judges disagree the rates above depend on who judges."
    )
    head = ["Arm", "Judges", "n", "Both say refused", "Only the first", "Only the second", "Kappa"]
    rows = [_row(pair, pair.agreement) for pair in pairs]
    by_judges = sorted(pairs, key=lambda pair: (pair.one, pair.other))
    lists = [_apart(list(group)) for _, group in groupby(by_judges, key=lambda pair: (pair.one, pair.other))]
    return tag(
        "div",
        tag("h3", "Do two judges agree?"),
        table(head, rows, label="Agreement of two judges", class_="numbers"),
        tag("p", rule, class_="small"),
        *lists,
    )


def _row(pair: JudgePair, found: Agreement) -> list[object]:
    counts = [f"{n:,} ({percent(n / found.n)})" for n in (found.both, found.one_only, found.other_only)]
    if found.kappa is None:
        kappa = "not defined: both say one thing only"
    else:
        kappa = f"{number(found.kappa, '.2f')} ({number(found.low, '.2f')} to {number(found.high, '.2f')})"
    return [pair.arm, f"{pair.one}, {pair.other}", f"{found.n:,}", *counts, kappa]


def _apart(pairs: Sequence[JudgePair]) -> Markup:
    """The replies on which one pair of judges disagrees, of all arms."""
    one, other = pairs[0].one, pairs[0].other
    every = [(pair.arm, *found) for pair in pairs for found in pair.apart]
    if not every:
        return tag("p", f"{one} and {other} say the same of every reply.", class_="small")
    shown = every[:: -(-len(every) // _MOST_SHOWN)]
    rows = [
        [
            tag("div", short(sample["prompt"]), class_="said", dir="auto"),
            join([tag("small", arm), tag("div", short(sample["reply"]), class_="said", dir="auto")]),
            *(tag("span", _WORDS[verdict], class_=f"outcome {_WORDS[verdict]}") for verdict in (first, second)),
        ]
        for arm, sample, first, second in shown
    ]
    count = f"{len(every):,} replies, {len(shown):,} shown" if len(shown) < len(every) else f"{len(every):,} replies"
    summary = f"{one} and {other} disagree on {count}. Harmful prompts and replies: click to show."
    return tag(
        "details",
        tag("summary", summary, class_="warning"),
        table(["Prompt", "Reply", one, other], rows, label=f"Where {one} and {other} disagree", class_="samples"),
    )
