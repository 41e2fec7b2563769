"""What a study trains and compares."""

from __future__ import annotations

import fnmatch
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from castune.config.base import Config, Count
from castune.config.data import DataConfig, check_domain_names, data_or_domains, plain_source
from castune.config.diagnosis import Measure, SensitivityRank
from castune.errors import CastuneError
from castune.names import ArmName, Score

Paid = Literal["nll", "kl", "utility", "over-refusal-margin", "over-refusal"]

# Seeds of the random draws' selections follow on this, far from those a user would choose.
FIRST_DRAW = 1_000


class CalibrationConfig(Config):
    """Another conflict map of a study beside the main one: other data or another measure (Tables 10 and 11)."""

    safety: DataConfig | None = None
    """D_safe; the recipe's when absent."""
    utility: DataConfig | dict[str, DataConfig] | None = None
    """D_util; the recipe's when absent. Gradient surgery takes it too."""
    measure: Measure | None = None
    """How heads are measured; as in the recipe when absent."""
    sensitivity_rank: SensitivityRank | None = None
    """Which S(h): see `DiagnoseConfig`; as in the recipe when absent. A map that differs from another one in nothing
    else is made from what that one measured."""
    arms: tuple[str, ...] = ()
    """Arms to train from this map, by their names; when empty the map is only compared with the main one."""

    @field_validator("safety", mode="before")
    @classmethod
    def _plain_source(cls, value: object) -> Any:
        return plain_source(value)

    @field_validator("utility", mode="before")
    @classmethod
    def _one_set_or_domains(cls, value: object) -> DataConfig | dict[str, DataConfig] | None:
        return None if value is None else data_or_domains(value)

    @field_validator("arms")
    @classmethod
    def _known_arms(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        return _checked_arms(arms)


class PrimaryContrast(Config):
    """The one comparison that a study is made to decide, declared before it runs: how many times as much the first arm
    costs as the second where both are equally safe. It stands alone; all others are adjusted for their number."""

    arms: tuple[str, str] = ("risky", "safe")
    """The two arms, by their names."""
    cost: Paid = "kl"
    """What is paid: `nll`, `kl`, `utility`, `over-refusal-margin` or `over-refusal`; `evaluate.suites` measures it."""
    seen_above: Annotated[float, Field(ge=0)] = 1.0
    """An effect is seen where the whole 95 % interval of the ratio lies above this."""
    refuted_below: Annotated[float, Field(gt=0)] = 1.5
    """The paper's size (2.1 on average over its Llama tables) is refuted at this scale where the whole interval lies
    below this."""
    equivalent_within: Annotated[float, Field(gt=0)] | None = None
    """Costs that differ by less than this, in nats per token or as a share of examples, are called equivalent; never
    when absent."""
    power: Annotated[float, Field(gt=0.05, lt=1)] = 0.8
    """Power at which the smallest visible difference is reported."""
    seeds_sd: Annotated[float, Field(gt=0)] | None = None
    """Expected standard deviation of the difference of the two costs over seeds, from a pilot: from it follows what the
    design can see before anything is measured."""
    items_se: Annotated[float, Field(ge=0)] = 0.0
    """Expected standard error of the difference that the choice of examples leaves, however many seeds there are."""
    second_cost: Annotated[float, Field(gt=0)] | None = None
    """Expected cost of the second arm, which turns the smallest visible difference into a ratio."""

    @model_validator(mode="after")
    def _of_two_arms(self) -> PrimaryContrast:
        if self.arms[0] == self.arms[1]:
            raise ValueError(f"study.primary.arms names {self.arms[0]} twice; it compares two arms")
        return self


class StudyConfig(Config):
    """What `castune study` trains and compares; the paper's study by default."""

    arms: tuple[str, ...] = ("all", "random", "risky", "safe")
    """Arms of Tables 1 and 2, by their names (`castune.names`)."""
    methods: tuple[str, ...] = ("sft", "pcgrad")
    """How every one of these arms is trained: `sft` as the recipe says, else a change of it: `pcgrad`, `cagrad`, `dpo`,
    `replay-10`, `nullspace-95`, ..."""
    seeds: tuple[int, ...] = (21, 42, 84)
    """Seeds of random selections and of the training; every arm is trained with each, unless it has its own."""
    arm_seeds: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """Seeds of single arms of the main map in the place of `seeds`, by their names or by patterns such as `bucket-*`:
    more for what matters most, and none for an arm that is not to be trained. Arms are compared over the seeds that
    they have in common."""
    buckets: tuple[Count, ...] = (4,)
    """Numbers M of equal buckets, each of which is trained (Table 7)."""
    scores: tuple[Score, ...] = ("conflict", "gradient", "sensitivity")
    """What heads are sorted by for these buckets (Table 8)."""
    shares: tuple[Annotated[float, Field(gt=0, lt=100)], ...] = (50, 75)
    """Further shares of all heads in per cent, from both ends of the map (Table 9)."""
    random_draws: Annotated[int, Field(ge=0)] = 0
    """Further random selections: the null distribution a zone is compared with. Their heads are drawn with seeds of
    their own (1000, 1001, ...); they are trained with `seeds`, in turn, as the zones are."""
    calibrations: dict[str, CalibrationConfig] = Field(default_factory=dict)
    """Further maps by name."""
    primary: PrimaryContrast | None = None
    """The comparison that the study is made to decide."""
    drift: tuple[str, ...] = ()
    """Arms, by their names, whose conflict drift is measured: the map again at every adapter their training keeps
    (`tune.snapshot_steps`), with the first seed."""

    @model_validator(mode="after")
    def _can_be_made(self) -> StudyConfig:
        for name in ("arms", "methods", "seeds", "buckets", "scores", "shares"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"study.{name} names one twice: {', '.join(map(str, values))}")
        if not self.seeds:
            raise ValueError("study.seeds needs at least one seed, for example 21")
        if "main" in self.calibrations:
            raise ValueError("study.calibrations: main is the name of the recipe's own map")
        check_domain_names(self.calibrations)
        _checked_arms(self._arm_names)
        named = {"drift": self.drift, "primary.arms": () if self.primary is None else self.primary.arms}
        for key, arms in named.items():
            if unknown := set(arms) - set(self.main_arms):
                raise ValueError(f"study.{key} names arms that the study does not train: {', '.join(sorted(unknown))}")
        self._check_seeds()
        return self

    def _check_seeds(self) -> None:
        if unknown := [name for name in self.arm_seeds if not fnmatch.filter(self._arm_names, name)]:
            raise ValueError(
                f"study.arm_seeds names arms that the study does not train: {', '.join(sorted(unknown))}; "
                f"accepted are {', '.join(self._arm_names)}, and patterns of them such as bucket-*"
            )
        for arm, seeds in self.arm_seeds.items():
            if len(set(seeds)) != len(seeds):
                raise ValueError(f"study.arm_seeds.{arm} names one twice: {', '.join(map(str, seeds))}")
        drawn = [selection for _, selection in self.draws]
        if taken := set(drawn) & set(self.main_seeds):
            raise ValueError(
                f"study.seeds and study.arm_seeds: {', '.join(map(str, sorted(taken)))} is among the seeds that heads "
                f"of random draws are chosen with, {drawn[0]} to {drawn[-1]}; take another"
            )
        first = self.main_seeds[0] if self.main_seeds else None
        if late := [arm for arm in self.drift if first not in self.seeds_of(arm)]:
            raise ValueError(
                f"study.drift is measured with the first seed, {first}, which study.arm_seeds does not give to "
                f"{', '.join(late)}"
            )

    @property
    def _arm_names(self) -> tuple[str, ...]:
        """Names of all arms of the main map: tables 1 and 2, buckets, shares; each once."""
        names = [f"{arm}{method_suffix(method)}" for method in self.methods for arm in self.arms]
        for buckets in self.buckets:
            names += [self.bucket(n, buckets, score) for score in self.scores for n in range(1, buckets + 1)]
        names += [f"{zone}-{share:g}" for zone in ("risky", "safe") for share in self.shares]
        return tuple(dict.fromkeys(names))

    @property
    def main_arms(self) -> tuple[str, ...]:
        """Names of the arms of the main map that have a seed to be trained with."""
        return tuple(name for name in self._arm_names if self.seeds_of(name))

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """The seeds that an arm of the main map is trained with: its own, those of the first pattern it matches, or
        those of all."""
        matching = (seeds for name, seeds in self.arm_seeds.items() if fnmatch.fnmatchcase(arm, name))
        return self.arm_seeds.get(arm, next(matching, self.seeds))

    @property
    def main_seeds(self) -> tuple[int, ...]:
        """All seeds that arms of the main map are trained with: those of `seeds` first, then what single arms add."""
        used = [seed for arm in self.main_arms for seed in self.seeds_of(arm)]
        return tuple(dict.fromkeys([*(seed for seed in self.seeds if seed in used), *used]))

    @property
    def draws(self) -> tuple[tuple[int, int], ...]:
        """The seeds of every random draw: of its training, and of the selection of its heads.

        A draw and a zone that are trained with the same seed differ in their heads alone.
        """
        return tuple((self.seeds[n % len(self.seeds)], FIRST_DRAW + n) for n in range(self.random_draws))

    @staticmethod
    def bucket(number: int, buckets: int, score: str) -> str:
        """Name of the arm of a bucket."""
        return f"bucket-{number}-of-{buckets}" + ("" if score == "conflict" else f"-{score}")


def method_suffix(method: str) -> str:
    """What a method of a study adds to the names of arms."""
    return "" if method == "sft" else f"+{method}"


def _checked_arms(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        try:
            ArmName.parse(name)
        except CastuneError as error:
            raise ValueError(str(error)) from None
    return names
