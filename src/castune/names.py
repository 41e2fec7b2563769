"""Names of arms (which heads an arm trains, and how), of judges, and of kinds of unit.

    safe  risky-50  random  layer-matched  all  bucket-2-of-4  safe-gradient  risky-sensitivity  safe+pcgrad  all+dpo

HEADS[-PERCENT][-SCORE][+CHANGE]...: a zone or a bucket, the share of all heads, what heads are sorted by, and what is
trained differently from the recipe: a method of gradient surgery, `dpo`, `replay-PERCENT` or `nullspace-PERCENT`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from castune.errors import CastuneError

Zone = Literal["safe", "risky", "random", "layer-matched", "all"]
Score = Literal["conflict", "gradient", "sensitivity", "magnitude"]
TuneMethod = Literal["sft", "dpo"]
SurgeryMethod = Literal[
    "none", "pcgrad", "pcgrad-symmetric", "cagrad", "upgrad", "mgda", "gradvac", "alignedmtl", "imtlg"
]
Tracker = Literal["tensorboard", "wandb", "trackio"]
UnitKind = Literal["q_heads", "k_groups", "v_groups", "o_heads", "mlp_blocks", "mlp_groups"]
ZONES: tuple[str, ...] = get_args(Zone)
SCORES: tuple[str, ...] = get_args(Score)
# Zones that are drawn at random, and need a seed.
SEEDED_ZONES = ("random", "layer-matched")

# Kinds of unit as they are asked for and counted, and what a single one is called.
KINDS: dict[UnitKind, str] = {
    "q_heads": "q_head",
    "k_groups": "k_group",
    "v_groups": "v_group",
    "o_heads": "o_head",
    "mlp_blocks": "mlp_block",
    "mlp_groups": "mlp_group",
}
_PLURALS: dict[str, str] = {single: many for many, single in KINDS.items()}
# The same for people, one and several.
_WORDS: dict[str, tuple[str, str]] = {
    "q_head": ("query head", "query heads"),
    "k_group": ("KV group by keys", "KV groups by keys"),
    "v_group": ("KV group by values", "KV groups by values"),
    "o_head": ("head by output columns", "heads by output columns"),
    "mlp_block": ("whole MLP", "whole MLPs"),
    "mlp_group": ("group of MLP neurons", "groups of MLP neurons"),
}

_HEADS = re.compile(
    rf"(?:(?P<zone>{'|'.join(ZONES)})(?:-(?P<percent>\d+(?:\.\d+)?))?|bucket-(?P<bucket>\d+)-of-(?P<buckets>\d+))"
    rf"(?:-(?P<score>{'|'.join(SCORES)}))?"
)
# Settings that are shares, and what they are called in a name, before a percentage.
_SHARES = {"replay": "replay", "null_space": "nullspace"}
_SHARE = re.compile(rf"(?P<word>{'|'.join(_SHARES.values())})-(?P<percent>\d+(?:\.\d+)?)")
_USUAL_PERCENT = 25.0


@dataclass(frozen=True)
class ArmName:
    """What the name of an arm says; None: as the recipe has it.

    Attributes:
        zone: the zone; None for a bucket.
        fraction: share of all heads.
        bucket: number of the bucket, 1 (highest scores) to `buckets`.
        buckets: how many buckets there are.
        score: what heads are sorted by.
        changes: settings of the training, by their names in `TuneConfig`.
    """

    zone: str | None = None
    fraction: float | None = None
    bucket: int | None = None
    buckets: int | None = None
    score: str | None = None
    changes: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> ArmName:
        """Read a name.

        Raises:
            CastuneError: no name of an arm; the message says what is accepted.
        """
        heads, *changes = text.split("+")
        match = _HEADS.fullmatch(heads)
        if match is None:
            raise CastuneError(
                f"arm {text!r}: accepted: {', '.join(ZONES)}, each with an optional share (safe-50: half of all "
                f"heads), or bucket-1-of-4; then optionally -gradient, -sensitivity or -magnitude, what heads are "
                "sorted by; then +pcgrad and the like, +dpo, +replay-10 or +nullspace-95, what is trained differently"
            )
        fraction = None if match["percent"] is None else round(float(match["percent"]) / 100, 8)
        if fraction is not None and not 0 < fraction <= 1:
            raise CastuneError(f"arm {text!r}: a share is above 0 and at most 100 percent")
        bucket, buckets = (None if match[key] is None else int(match[key]) for key in ("bucket", "buckets"))
        if bucket is not None and buckets is not None and not 1 <= bucket <= buckets:
            raise CastuneError(f"arm {text!r}: buckets are numbered 1 (highest conflict) to {buckets}")
        found = [_change(text, change) for change in changes]
        if len({key for key, _ in found}) != len(found):
            raise CastuneError(f"arm {text!r}: one setting is changed twice")
        return cls(match["zone"], fraction, bucket, buckets, match["score"], tuple(sorted(found)))

    @classmethod
    def is_name(cls, text: str) -> bool:
        """Whether `parse` can read it."""
        try:
            cls.parse(text)
        except CastuneError:
            return False
        return True

    @property
    def is_seeded(self) -> bool:
        """Whether its heads are drawn at random."""
        return self.zone in SEEDED_ZONES

    @property
    def suffix(self) -> str:
        """The changes as they stand in a name."""
        return "".join(f"+{_change_name(key, value)}" for key, value in self.changes)


def heads_name(zone: str, fraction: float | None, bucket: int | None, buckets: int | None, score: str) -> str:
    """The name of a selection of heads; a share of a quarter and the score C(h) are usual and not named."""
    if zone == "bucket":
        name = f"bucket-{bucket}-of-{buckets}"
    else:
        percent = _USUAL_PERCENT if fraction is None or zone == "all" else round(100 * fraction, 1)
        # 68 of 270 heads are a quarter too.
        name = zone if round(percent) == _USUAL_PERCENT else f"{zone}-{percent:g}"
    return name if score == "conflict" or zone in ("random", "all") else f"{name}-{score}"


def _change(text: str, change: str) -> tuple[str, Any]:
    if change in get_args(SurgeryMethod):
        return "surgery", change
    if change in get_args(TuneMethod):
        return "method", change
    share = _SHARE.fullmatch(change)
    if share is not None and 0 < float(share["percent"]) < 100:
        key = next(key for key, word in _SHARES.items() if word == share["word"])
        return key, round(float(share["percent"]) / 100, 8)
    methods = ", ".join(f"+{method}" for method in (*get_args(SurgeryMethod), *get_args(TuneMethod)))
    shares = " and ".join(f"+{word}-PERCENT" for word in _SHARES.values())
    raise CastuneError(f"arm {text!r}: +{change}: accepted: {methods}, {shares}, above 0 and below 100")


def _change_name(key: str, value: Any) -> str:
    return f"{_SHARES[key]}-{round(100 * value, 6):g}" if key in _SHARES else str(value)


def plural(kind: str) -> str:
    """What several units of a kind are called in settings and records; an unknown kind keeps its name."""
    return _PLURALS.get(kind, kind)


def kind_words(kind: str, n: int = 2, *, alone: bool = False) -> str:
    """What n units of a kind are called where people read of them; an unknown kind keeps its name.

    `alone`: where there is no other kind, query heads are plain heads.
    """
    one, several = ("head", "heads") if alone and kind == "q_head" else _WORDS.get(kind, (kind, kind))
    return one if n == 1 else several


def units_counted(numbers: Mapping[str, int]) -> str:
    """How many units of each kind, in words: `270 heads`, `90 query heads, 1 group of MLP neurons`."""
    alone = len(numbers) == 1
    return ", ".join(f"{n:,} {kind_words(kind, n, alone=alone)}" for kind, n in numbers.items())


# The kinds, and what stands after the equals sign where none is given; "" needs none, None needs one.
RULES = ("prefix", "opening")
_KINDS: dict[str, str | None] = {
    "prefix": "",
    "opening": "",
    "reading": "",
    "wildguard": "allenai/wildguard",
    "openai": None,
}
# Version of the head of judge `reading`, raised with every training of it (`evaluation/reading_head.json`).
READING_HEAD = 1

ACCEPTED = (
    "prefix, opening, reading, wildguard (or wildguard=MODEL_OR_DIRECTORY), openai=MODEL (any compatible server; "
    "address and key from OPENAI_BASE_URL and OPENAI_API_KEY), or several joined by +, for example prefix+opening"
)


@dataclass(frozen=True)
class JudgeName:
    """One judge.

    Attributes:
        kind: `prefix` and `opening`: rules, on the first 64 or 300 characters of a reply; `reading`: a small encoder
            with a head that was trained for it; `wildguard`: a classifier that runs here; `openai`: a model behind an
            OpenAI-compatible server.
        model: the model that judges; empty for rules and `reading`.
    """

    kind: str
    model: str = ""

    @classmethod
    def parse(cls, text: str) -> list[JudgeName]:
        """The judges that a name stands for: one, or the members of a panel.

        Raises:
            CastuneError: not the name of a judge; the message says what is accepted.
        """
        members = [cls._one(part.strip(), text) for part in text.split("+")]
        if len(set(members)) != len(members):
            raise CastuneError(f"judge {text!r}: a panel has a judge twice")
        return members

    @classmethod
    def _one(cls, part: str, whole: str) -> JudgeName:
        kind, equals, model = part.partition("=")
        default = _KINDS.get(kind)
        if kind not in _KINDS or (equals and (default == "" or not model.strip())) or (default is None and not equals):
            raise CastuneError(f"unknown judge {whole!r}; accepted: {ACCEPTED}")
        return cls(kind, model.strip() or default or "")

    @property
    def is_rule(self) -> bool:
        """Whether it needs no model."""
        return self.kind in RULES

    @property
    def signature(self) -> str:
        """The name that numbers bear: with the version of what castune trained for it, `reading-1`."""
        return f"{self}-{READING_HEAD}" if self.kind == "reading" else str(self)

    def __str__(self) -> str:
        return self.kind if self.model == (_KINDS[self.kind] or "") else f"{self.kind}={self.model}"
