"""What attacks leave of the refusals of a run's arms."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from castune.artifacts.formats import read_json, typed, write_json
from castune.artifacts.records import DataRecord, ModelRecord, Provenance, Settings

_KIND = "attack result"
ATTACKS_FILE = "attacks.json"
# In the order in which they are shown.
KINDS = ("relearn", "direction", "quantise", "dial")


@dataclass(frozen=True)
class Attack:
    """What is done to a model.

    Attributes:
        kind: relearn | direction | quantise | dial.
        amount: of `relearn` the number of rows, of `dial` what the adapter's update is multiplied by.
    """

    kind: str
    amount: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS or (self.amount is None) == (self.kind in ("relearn", "dial")):
            raise ValueError(f"no attack: {self.kind!r} with {self.amount!r}")

    @property
    def name(self) -> str:
        """Of its directory: `relearn-100`, `direction`, `dial-0.5`."""
        return self.kind if self.amount is None else f"{self.kind}-{self.amount:g}"


@dataclass(frozen=True)
class AttackedArm:
    """An arm as it was attacked.

    Attributes:
        name: of the arm.
        units: how many heads, or units of other kinds too, its adapter may change.
        of_units: how many there are.
        noun: what they are called: `heads`, or `units`.
        strength: what its adapter's update was multiplied by before any attack.
        adapter_hash: hash of its adapter.
    """

    name: str
    units: int
    of_units: int
    noun: str
    strength: float
    adapter_hash: str

    @property
    def share(self) -> float:
        """Share of the units that its adapter may change."""
        return self.units / self.of_units


@dataclass(frozen=True)
class RefusalRate:
    """Harmful prompts that are refused.

    Attributes:
        value: the rate over scored prompts; None where none is.
        standard_error: of `value`; None for fewer than two scored prompts.
        interval: Wilson's, 95 %; None without scored prompts.
        refused: how many are.
        n: scored prompts.
        unscored: prompts on which the judge could not decide.
        folder: where the replies are, in the run directory.
    """

    value: float | None
    standard_error: float | None
    interval: tuple[float, float] | None
    refused: int
    n: int
    unscored: int
    folder: str


@dataclass(frozen=True)
class AttackRow:
    """One attack on one arm.

    Attributes:
        arm: the arm.
        attack: what was done.
        strength: of the adapter while it was measured.
        before: the arm before.
        after: and after the attack.
        change: mean change of the same prompts; None without pairs.
        change_error: its standard error.
        change_interval: Tango's, 95 %.
        gained: prompts refused after and not before.
        lost: prompts refused before and not after.
        p: McNemar's exact test of the two, not adjusted.
        kept: of the prompts refused before the share refused after; None where none was, or nothing is scored after.
        kept_interval: Wilson's, 95 %.
        details: of `relearn` the rows' number that arms were trained on (`seen_rows`) and the losses of the first and
            the last steps; of `direction` its layer and separation.
        change_unscored: prompts left out of the change: unscored before or after. 0 in records of before.
        kept_unscored: prompts refused before and unscored after; they are not kept. 0 in records of before, which left
            them out.
    """

    arm: str
    attack: Attack
    strength: float
    before: RefusalRate
    after: RefusalRate
    change: float | None
    change_error: float | None
    change_interval: tuple[float, float] | None
    gained: int
    lost: int
    p: float | None
    kept: float | None
    kept_interval: tuple[float, float] | None
    details: dict[str, float]
    change_unscored: int = 0
    kept_unscored: int = 0


@dataclass(frozen=True)
class KeptComparison:
    """Share of refusals that an arm keeps minus that of the reference, under one attack, paired by prompt.

    Attributes:
        arm: the arm.
        reference: what it is compared with.
        attack: the attack.
        value: None where one of them refused nothing before, or nothing of it is scored after.
        interval: 95 %, not adjusted.
        p: two-sided, that belongs to the interval.
        p_adjusted: Holm's, over all comparisons of the result.
        smallest: the true difference that would be found in 80 of 100 such measurements, at most 1.
        n: prompts scored in both arms before.
        unscored: prompts left out.
    """

    arm: str
    reference: str
    attack: Attack
    value: float | None
    interval: tuple[float, float] | None
    p: float | None
    p_adjusted: float | None
    smallest: float | None
    n: int
    unscored: int

    @property
    def is_seen(self) -> bool:
        """Whether a difference is claimed: its interval excludes 0, and its adjusted p-value is below 5 %."""
        if self.interval is None or self.p_adjusted is None:
            return False
        return not self.interval[0] <= 0 <= self.interval[1] and self.p_adjusted < 0.05


@dataclass(frozen=True)
class AttackResult:
    """All attacks of one command on the arms of a run.

    Attributes:
        arms: in order, the reference first.
        target: the safety at which the arms' strengths meet; None where they are compared at full strength.
        why_full: why they are, in words; empty where they are not.
        rows: every attack on every arm, the arms of an attack together.
        comparisons: every other arm with the reference.
        left_out: kinds of attack that were not made, with the reason.
        suites: names of the suites of harmful prompts.
        judge: what decided on refusals.
        max_new_tokens: length limit of replies.
        data: `rows` that were relearnt on; `harmful` and `harmless` prompts of the direction.
        settings: the resolved `AttackConfig`, and what of the attacks is not a setting.
        model: identity of the model without an adapter.
        provenance: versions, machine, command, time.
        gone: names of arms that were attacked too, by another adapter than they have now (`without`); none as written.
    """

    arms: tuple[AttackedArm, ...]
    target: float | None
    why_full: str
    rows: tuple[AttackRow, ...]
    comparisons: tuple[KeptComparison, ...]
    left_out: dict[str, str]
    suites: tuple[str, ...]
    judge: str
    max_new_tokens: int
    data: dict[str, DataRecord]
    settings: Settings
    model: ModelRecord
    provenance: Provenance
    gone: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.arms or not self.rows:
            raise ValueError("no arms, or no attacks")
        names = {arm.name for arm in self.arms}
        if unknown := {row.arm for row in self.rows} - names:
            raise ValueError(f"attacks on arms that are not there: {', '.join(sorted(unknown))}")

    @property
    def attacks(self) -> list[Attack]:
        """Every attack, in order."""
        return list(dict.fromkeys(row.attack for row in self.rows))

    def rows_of(self, attack: Attack) -> list[AttackRow]:
        """An attack on every arm, in the order of `arms`."""
        return [row for row in self.rows if row.attack == attack]

    def comparisons_of(self, attack: Attack) -> Sequence[KeptComparison]:
        """What is compared under an attack."""
        return [one for one in self.comparisons if one.attack == attack]

    def without(self, names: Collection[str]) -> AttackResult:
        """What is left of it without some of the arms: rows of the others, and comparisons that need none of these.

        p-values stay adjusted for all comparisons that were made.
        """
        return replace(
            self,
            arms=tuple(arm for arm in self.arms if arm.name not in names),
            rows=tuple(row for row in self.rows if row.arm not in names),
            comparisons=tuple(one for one in self.comparisons if one.arm not in names and one.reference not in names),
            gone=(*self.gone, *names),
        )

    def save(self, path: str | Path) -> Path:
        """Write `attacks.json` into a directory (or to the given file), atomically. Returns the file."""
        path = _file(path)
        write_json(path, _KIND, asdict(self))
        return path

    @classmethod
    def load(cls, path: str | Path) -> AttackResult:
        """Read a result from its file or its directory.

        Raises:
            ArtifactError: missing, damaged, of another kind or schema version.
        """
        path = _file(path)
        return typed(path, _KIND, cls, read_json(path, _KIND, "castune attack RUN"))


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / ATTACKS_FILE
