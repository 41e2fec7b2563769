"""What a run is worth by a policy: a verdict a rule, and one for all."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from castune.artifacts.formats import read_json, typed, write_json
from castune.artifacts.records import Settings

Verdict = Literal["pass", "fail", "inconclusive"]
_KIND = "gate result"


@dataclass(frozen=True)
class RuleResult:
    """One rule, and what was found.

    Attributes:
        rule: its keys, as the policy has them.
        words: the same for people, without the arm.
        arm: which arm it is about.
        verdict: pass, where the interval keeps the threshold; fail, where it misses it; else inconclusive.
        detail: what there is to say beside the numbers; empty for nothing.
        is_measured: False where something is missing, not merely examples.
        unit: `share` or `nats` per token; None of a certificate, and of what was not measured.
        value: mean over suites, or mean change against another model; None where nothing is scored.
        low: lower end of its 95 % interval; None without.
        high: upper end.
        n: scored examples, or pairs, of all suites.
        unscored: the others.
        examples_needed: how many examples of all suites would decide it, if the value is the truth; None where that is
            not asked, or no number would.
        suites: that were measured.
        judges: that decided their outcomes.
    """

    rule: Settings
    words: str
    arm: str
    verdict: Verdict = "inconclusive"
    detail: str = ""
    is_measured: bool = True
    unit: str | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    unscored: int = 0
    examples_needed: int | None = None
    suites: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()


@dataclass(frozen=True)
class GateResult:
    """A run by a policy.

    Attributes:
        run: the run directory.
        baseline: that of the run it was compared with; None without.
        policy: file of the policy.
        adapters: hash of the adapter of every arm that a rule is about; None of the base model, and without an adapter.
        rules: in the order of the policy.
    """

    run: str
    baseline: str | None
    policy: str
    adapters: dict[str, str | None]
    rules: tuple[RuleResult, ...]

    @property
    def verdict(self) -> Verdict:
        """Fail where a rule fails, else inconclusive where one is, else pass."""
        verdicts = {rule.verdict for rule in self.rules}
        return "fail" if "fail" in verdicts else "inconclusive" if "inconclusive" in verdicts else "pass"

    def save(self, path: str | Path) -> Path:
        """Write a JSON file, atomically."""
        write_json(path, _KIND, {"verdict": self.verdict, **asdict(self)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> GateResult:
        """Read what `save` wrote."""
        path = Path(path)
        return typed(path, _KIND, cls, read_json(path, _KIND, "castune gate RUN --policy FILE --json FILE"))
