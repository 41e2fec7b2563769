"""What a second judge says of the replies of a run: rules for free, and the judge that reads where it is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from castune.artifacts import EvalResult
from castune.artifacts.samples import ReplySample, is_reply
from castune.data.said import said
from castune.evaluation.encoder import find_encoder
from castune.evaluation.judges import Judge, judge
from castune.report.agreement import JudgePair

# Reading takes its time, and so many tell how far two judges agree.
_MOST_READ = 200


def second_opinions(evaluations: Mapping[str, EvalResult]) -> list[JudgePair]:
    """Pairs of judges of every arm's replies: the members of its panel, or its judge beside others.

    Those are the rules that it is not itself, on all replies, and `reading`, on some of every arm, evenly spread.
    """
    judges: dict[str, Judge] = {}
    pairs: list[JudgePair] = []
    for arm, evaluation in evaluations.items():
        replies = [s for s in evaluation.samples if is_reply(s) and s["purpose"] in ("safety", "over-refusal")]
        own = str(evaluation.settings["judge"])
        panels = [sample.get("verdicts", {}) for sample in replies]
        if replies and all(panels):
            for one, other in combinations(panels[0], 2):
                votes = zip(replies, (p[one] for p in panels), (p[other] for p in panels), strict=True)
                pairs.append(JudgePair(arm, one, other, list(votes)))
            continue
        for other in _others(own):
            some = replies[:: -(-len(replies) // _MOST_READ)] if other == "reading" and replies else replies
            by = judges.get(other) or judges.setdefault(other, judge(other))
            outcomes = [sample["outcome"] for sample in some]
            pairs.append(JudgePair(arm, own, other, list(zip(some, outcomes, _verdicts(by, some), strict=True))))
    return pairs


def _others(own: str) -> list[str]:
    rules = "prefix" if own == "opening" else "opening"
    return [rules, "reading"] if own != "reading" and find_encoder() is not None else [rules]


def _verdicts(by: Judge, replies: Sequence[ReplySample]) -> list[bool | None]:
    heard = [said(reply["reply"], in_thought=reply.get("in_thought")) for reply in replies]
    return by([reply["prompt"] for reply in replies], heard)
