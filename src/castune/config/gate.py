"""What a run must reach to pass `castune gate`: rules on the ends of 95 % intervals, as TOML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from castune.config.base import Config
from castune.config.toml import read_toml
from castune.errors import CastuneError

_LEVELS, _CHANGES = ("at_least", "at_most"), ("no_worse_than", "better_by")
# Text is no number, and `true` is none either.
Number = Annotated[float, Field(strict=True)]
Distance = Annotated[float, Field(strict=True, ge=0)]


class GateRule(Config):
    """One requirement: a threshold for a metric, or the certificate.

    Thresholds of rates are shares from 0 to 1 (0.9 is 90 %), those of continuous metrics nats per token. A rule passes
    where the whole 95 % interval keeps its threshold, and fails where the whole interval misses it.
    """

    arm: str | None = None
    """The arm of the run that must keep it; the main arm when absent. `base` is the base model."""
    metric: str | None = None
    """`safety`, `over-refusal`, `utility`, `nll`, `kl`, `safety-margin` or `over-refusal-margin`: the mean over the
    suites of that purpose. Or a suite by its name."""
    at_least: Number | None = None
    """The lower end of the metric's interval reaches this."""
    at_most: Number | None = None
    """The upper end of the metric's interval does not exceed this."""
    against: str | None = None
    """What `no_worse_than` and `better_by` compare with, on the same examples: `base`, another arm of the run, or
    `baseline`, the arm of the same name (the main arm for the main arm) in the run that --baseline names."""
    no_worse_than: Distance | None = None
    """By how much the arm may at most be worse than `against`, in the direction that is bad for the metric."""
    better_by: Distance | None = None
    """By how much the arm must at least be better than `against`, in the direction that is good for the metric."""
    certificate: Literal[True] | None = None
    """The adapter is the one that its certificate was made for: nothing outside the selected heads was changed."""

    @model_validator(mode="after")
    def _asks_for_one_thing(self) -> GateRule:
        given = [key for key, value in self if value is not None]
        if self.certificate:
            if others := [key for key in given if key not in ("arm", "certificate")]:
                raise ValueError(f"certificate = true stands alone or with arm; also found: {_listed(others)}")
            return self
        thresholds = [key for key in (*_LEVELS, *_CHANGES) if key in given]
        if len(thresholds) != 1:
            raise ValueError(
                f"a rule has one threshold, found {_listed(thresholds) or 'none'}; accepted: one of "
                f"{_listed((*_LEVELS, *_CHANGES))} with a metric, or certificate = true"
            )
        if self.metric is None:
            raise ValueError(f"'metric' is missing: which metric is {thresholds[0]} a threshold for?")
        if (self.against is None) != (thresholds[0] in _LEVELS):
            raise ValueError(
                f"{thresholds[0]} is a threshold of the metric itself, 'against' is for {_listed(_CHANGES)}"
                if self.against is not None
                else f"'against' is missing: {thresholds[0]} compares with base, another arm, or baseline"
            )
        if self.against is not None and self.against == self.arm:
            raise ValueError(f"arm and against are both {self.arm!r}: an arm is not compared with itself")
        return self

    @property
    def threshold(self) -> tuple[str, float] | None:
        """The key of the threshold and its value; None of a certificate."""
        return next(
            ((key, float(value)) for key in (*_LEVELS, *_CHANGES) if (value := getattr(self, key)) is not None), None
        )

    @property
    def words(self) -> str:
        """The rule without its arm, for people."""
        if self.threshold is None:
            return "certificate: nothing outside the selection moved"
        key, value = self.threshold
        return {
            "at_least": f"{self.metric} at least {value:g}",
            "at_most": f"{self.metric} at most {value:g}",
            "no_worse_than": f"{self.metric} at most {value:g} worse than {self.against}",
            "better_by": f"{self.metric} at least {value:g} better than {self.against}",
        }[key]


class GatePolicy(Config):
    """The rules of a gate, each a table `[[rule]]`."""

    rule: tuple[GateRule, ...]
    """The rules, all of which must pass. At least one; no duplicates, no two that contradict each other."""

    @model_validator(mode="after")
    def _can_be_kept(self) -> GatePolicy:
        if not self.rule:
            raise ValueError("no rule in it: a policy without rules would pass anything; write one as [[rule]]")
        for number, rule in enumerate(self.rule, 1):
            for before, other in enumerate(self.rule[: number - 1], 1):
                if rule == other:
                    raise ValueError(f"rule {number} is rule {before} again; drop one")
                if (rule.arm, rule.metric) == (other.arm, other.metric) and _contradict(rule, other):
                    raise ValueError(
                        f"rules {before} and {number} contradict each other: {other.words}, and {rule.words}"
                    )
        return self

    def check_named(self, main: str) -> None:
        """Check the rules once more with the name of the main arm in place of its absence.

        Raises:
            CastuneError: one rule twice, two that contradict each other, or an arm compared with itself.
        """
        named = [{**rule.model_dump(exclude_none=True), "arm": rule.arm or main} for rule in self.rule]
        GatePolicy.of({"rule": named})

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> GatePolicy:
        """A policy from plain values, as a TOML file has them.

        Raises:
            CastuneError: an unknown key, a value out of range, or rules that cannot be kept; the message names the rule
                by its number and the key.
        """
        tables = values.get("rule", [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise CastuneError("rule is no list of tables; write each rule as [[rule]]")
        rules = []
        for number, table in enumerate(tables, 1):
            try:
                rules.append(GateRule(**table))
            except CastuneError as error:
                raise CastuneError(f"rule {number}: {error}") from None
        return cls(**{**values, "rule": rules})

    @classmethod
    def load(cls, path: str | Path) -> GatePolicy:
        """Read a policy from a TOML file.

        Raises:
            CastuneError: no such file, malformed TOML, or see `of`.
        """
        path = Path(path)
        values = read_toml(path, "policy")
        try:
            return cls.of(values)
        except CastuneError as error:
            raise CastuneError(f"{path}: {error}") from None


def _contradict(*rules: GateRule) -> bool:
    floors = [rule.at_least for rule in rules if rule.at_least is not None]
    ceilings = [rule.at_most for rule in rules if rule.at_most is not None]
    return bool(floors and ceilings) and max(floors) > min(ceilings)


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(keys)
