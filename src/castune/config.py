"""Settings: a small model per stage, and the recipe that holds them. TOML in, resolved TOML out.

Unknown keys are refused. Values are checked where they are built, so a recipe fails before a model is loaded.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from castune.errors import CastuneError
from castune.names import KINDS, SEEDED_ZONES, ArmName, JudgeName, Score, SurgeryMethod, TuneMethod, UnitKind, Zone
from castune.secrets import has_secret

# What chat templates that print the date are told, so that two days, and the two sides of midnight, measure the same.
TEMPLATE_DATE = "2026-01-01"

Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]

SurgeryGranularity = Literal["global", "tensor", "head"]
SensitivityRank = Literal["difference", "of-difference"]
Measure = Literal["decision", "margin"]


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # Shows the user one line instead of pydantic's report.
    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise CastuneError(_one_line(error, type(self))) from None


class DataConfig(_Config):
    """A data source and how much of it. A plain string is a source without a limit."""

    source: str
    """Named source, `name=path`, file, or hub id."""
    limit: Count | None = None
    """Draw this many examples (by the recipe's seed); all when absent."""
    balance: str | None = None
    """A column of the source, of whose values equally many examples are drawn each."""


def _source(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


def _data(value: Any) -> DataConfig:
    value = _source(value)
    if isinstance(value, DataConfig):
        return value
    if not isinstance(value, Mapping):
        raise CastuneError("accepted: a source, or a table with the keys source, limit and balance")
    return DataConfig(**value)


def check_domain_names(names: Iterable[str]) -> None:
    """Refuse names of utility domains that could not be file names and keys of a recipe beside each other.

    Raises:
        CastuneError: the message names the first such name.
    """
    seen: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name):
            raise CastuneError(f"domain {name!r}: accepted are 1 to 100 letters (a to z, A to Z), digits, - and _")
        if name in DataConfig.model_fields:
            raise CastuneError(f"domain {name!r}: this is a key of a data source, and a domain needs another name")
        # Some file systems do not tell capitals from small letters.
        if (other := seen.setdefault(name.lower(), name)) != name:
            raise CastuneError(f"domains {other!r} and {name!r} differ in capitals only; rename one of them")


def _data_or_domains(value: Any) -> DataConfig | dict[str, DataConfig]:
    """One set, or several by the names of their domains."""
    if not isinstance(value, Mapping) or "source" in value or value.keys() <= DataConfig.model_fields.keys():
        return _data(value)
    check_domain_names(value)
    domains = {}
    for name, entry in value.items():
        try:
            domains[name] = _data(entry)
        except CastuneError as error:
            raise CastuneError(f"domain {name!r}: {error}") from None
    return domains


class DiagnoseConfig(_Config):
    """How heads are measured (Section 3 of the paper)."""

    measure: Measure = "decision"
    """`decision`: accuracy and refusal rate, as in the paper. `margin`: log-prob margins; no generation, no ties."""
    ablation: Literal["zero", "mean"] = "zero"
    """What replaces a head's output: zero, or its mean over the calibration tokens."""
    max_new_tokens: Count = 24
    """Tokens of a reply that the judge sees."""
    margin_tokens: Count = 8
    """First tokens of the refusal and of the model's own reply that a safety margin compares; at most
    `max_new_tokens`. Whether a reply refuses is settled in its first words."""
    problems: Measure = "margin"
    """How utility is measured on problems, whatever `measure` says of the rest. `margin`: the log-probability of their
    worked solutions. `decision`: accuracy; answers are worked out without every head, which costs far more than
    anything else (`castune plan`)."""
    solution_tokens: Count = 256
    """Tokens that such an answer may have."""
    judge: Literal["prefix", "opening"] = "prefix"
    """Who decides whether a reply refuses: rules, on its first 64 (`prefix`) or 300 characters (`opening`)."""
    batch_tokens: Count | Literal["auto"] = 2048
    """Rows x tokens of one forward. `auto`: what runs fastest on this machine, noted in the map."""
    max_length: Count = 1024
    """Limit of prompt + reply in tokens; prompts are cut on the left."""
    sensitivity_rank: SensitivityRank = "difference"
    """`difference`: Eq. 5, exp(rank - rank). `of-difference`: exp(rank of the difference), the scale of Table 7."""
    gradient_chunks: Annotated[int, Field(ge=2)] = 8
    """Parts of each set whose gradients are kept apart for the standard error of O(h)."""
    gradient_memory: Annotated[float, Field(gt=0)] = 40
    """Gigabytes that these parts may take together (in float32, in the memory of the CPU); what does not fit is
    measured in further passes over the examples. One projection at least is measured at a time."""
    units: tuple[UnitKind, ...] = ("q_heads",)
    """What is diagnosed (`core.units`): the paper's query heads, KV groups by their keys or values, columns of the
    output projection by head, whole MLPs, groups of MLP neurons. Ranks are within a kind."""
    mlp_groups: Count = 8
    """Into how many equal groups the neurons of a layer are cut, for `mlp_groups`."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Diagnose these layers only; ranks are then among their heads. All layers when absent."""
    domains: Literal["mean", "worst"] = "mean"
    """How the maps of several utility domains become one. `mean`: of every column. `worst`: a head's row is that of
    the domain in which its C is highest."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of unit that are diagnosed, in the singular."""
        return tuple(KINDS[kind] for kind in self.units)

    def measure_of(self, *, problems: bool) -> Measure:
        """How utility is measured on problems, or on questions."""
        return self.problems if problems else self.measure

    @field_validator("units")
    @classmethod
    def _some_units(cls, units: tuple[str, ...]) -> tuple[str, ...]:
        if not units or len(set(units)) != len(units):
            raise ValueError("needs at least one kind of unit, each named once")
        return units


class SelectConfig(_Config):
    """Which heads are trained (Section 3.5)."""

    zone: Zone = "safe"
    """`safe`: lowest scores; `risky`: highest; `random`; `layer-matched`: random, with as many heads in each layer as
    `safe`; `all`."""
    fraction: Share = 0.25
    """Share of all heads."""
    buckets: Count | None = None
    """Cut the sorted heads into this many equal buckets and take number `bucket` (1: highest scores)."""
    bucket: Count | None = None
    score: Score = "conflict"
    """What heads are sorted by: C(h), O(h) alone, or S(h) alone (Table 8)."""
    seed: int | None = None
    """Seed of a random selection."""
    compare: tuple[str, ...] = ()
    """More arms to train beside this one, for comparison, by their names (`castune.names`): `risky`, `random`,
    `safe-50`, `bucket-2-of-4`, `safe-gradient`, `safe+pcgrad`, ...; of the same size unless a name says another."""

    @model_validator(mode="after")
    def _can_be_made(self) -> SelectConfig:
        if (self.buckets is None) != (self.bucket is None):
            raise ValueError("select.buckets and select.bucket go together")
        if self.buckets is not None and self.bucket is not None and self.bucket > self.buckets:
            raise ValueError(f"select.bucket is {self.bucket}, accepted: 1 (highest conflict) to {self.buckets}")
        try:
            names = [ArmName.parse(name) for name in self.compare]
        except CastuneError as error:
            raise ValueError(f"select.compare: {error}") from None
        arms = [*([] if self.buckets else [ArmName(self.zone)]), *names]
        if len(set(arms)) != len(arms):
            raise ValueError(f"select.compare names an arm twice: {', '.join([self.zone, *self.compare])}")
        if self.seed is None and any(arm.is_seeded for arm in arms):
            raise ValueError(f"selections by {' and '.join(SEEDED_ZONES)} need select.seed, for example 21")
        return self


class TuneConfig(_Config):
    """How the chosen heads are trained. The defaults are the paper's Table 3."""

    method: TuneMethod = "sft"
    """`sft`: imitate replies. `dpo`: prefer chosen to rejected replies (needs the extra `dpo`)."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """DPO: how strongly the model is held to the base model."""
    replay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Data replay: share of the training examples that come from the utility data. Not with DPO."""
    rank: Count = 32
    alpha: Annotated[float, Field(gt=0)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    epochs: Annotated[float, Field(gt=0)] = 1
    max_steps: Count | None = None
    """Stop after this many optimiser steps, whatever `epochs` says."""
    batch_size: Count = 4
    """Examples a device and a micro-batch."""
    accumulation: Count = 2
    """Micro-batches an optimiser step."""
    max_length: Count = 1024
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    group_by_length: bool = True
    """Steps of examples of similar lengths, in random order: far less padding, and steps that are often nearly of one
    kind, as refusals are shorter than answers (docs/method.md)."""
    quantization: Literal["none", "nf4"] = "none"
    """How the base's linear layers are stored while it is trained (bitsandbytes, extra `qlora`): `nf4` takes a quarter
    of bfloat16's memory (QLoRA). The adapter belongs to the full model, on which it is evaluated and merged."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    checkpoint_steps: Count = 100
    """Optimiser steps between checkpoints, from which the same command continues after an interruption."""
    snapshot_steps: Count | None = None
    """Keep the adapter as it is after every so many optimiser steps beside the finished one (`castune drift`)."""
    reselect_steps: Count | None = None
    """Measure the map again on the model as it is after every so many optimiser steps, choose heads again by the arm's
    own rule, and train these from there on; what was learnt so far stays, frozen. Never when absent."""
    freeze_a: bool = False
    """Train B alone: budgets of equal head counts are then equal to the parameter."""
    seed: int = 21
    """Seed of the adapter's initial values and of the data order."""
    surgery: SurgeryMethod = "none"
    """What is done to a gradient that works against the utility gradient (Section 4.2). `pcgrad`: what points against
    it is taken out; D_util is the reference only. All others train on D_util too."""
    surgery_granularity: SurgeryGranularity = "global"
    """What conflicts and is changed on its own: the whole gradient, each A and B, or each head's rows of B (and A)."""
    surgery_batch_size: Count | None = None
    """Utility examples an optimiser step, over all processes; as many as alignment examples when absent."""

    @model_validator(mode="after")
    def _goes_together(self) -> TuneConfig:
        if self.method == "dpo" and self.replay:
            raise ValueError("tune.replay mixes in replies to imitate, which DPO does not; use one of them")
        not_with_reselection = {
            'method = "dpo"': self.method == "dpo",
            f'quantization = "{self.quantization}"': self.quantization != "none",
            "freeze_a": self.freeze_a,
            'surgery_granularity = "head"': self.surgery != "none" and self.surgery_granularity == "head",
        }
        for what, is_set in not_with_reselection.items():
            if is_set and self.reselect_steps is not None:
                raise ValueError(f"tune.reselect_steps does not go with {what} yet; use one of them")
        return self

    @property
    def needs_utility(self) -> bool:
        """Whether utility data take part in the training."""
        return self.surgery != "none" or self.replay > 0

    @property
    def trains_on_utility(self) -> bool:
        """Whether weights follow utility data too; of one-way PCGrad they are the reference alone."""
        return self.replay > 0 or self.surgery not in ("none", "pcgrad")

    def changed(self, **values: Any) -> TuneConfig:
        """These settings with some others, checked."""
        return TuneConfig(**{**self.model_dump(), **values})


class EvaluateConfig(_Config):
    """What is measured on the base model and on every arm."""

    suites: tuple[str, ...] = ("starter-utility-eval", "starter-safety-eval", "starter-overrefusal-eval")
    """Data sources; see `castune evaluate --help` for the named ones."""
    limit: Count | None = None
    """Examples a suite; all when absent."""
    judge: str = "opening"
    """Who decides whether a reply refuses: `prefix`, `opening`, `wildguard`, `openai=MODEL`, or several joined by `+`
    (`castune.names`)."""
    backend: Literal["hf", "vllm", "openai"] = "hf"
    """Where models run: transformers here, a vLLM engine here, or an OpenAI-compatible server (`OPENAI_BASE_URL`)."""
    served_model: str | None = None
    """What the server of backend `openai` calls the model, where that is not its name in the recipe."""
    max_new_tokens: Count = 64
    """Length limit of replies to harmful and harmless prompts."""
    reasoning_tokens: Count | None = None
    """Length limit of worked answers; when absent the paper's, 1,024 for gsm8k and 2,048 for math."""
    letters: Literal["argmax", "generated"] = "argmax"
    """How the letter of a multiple-choice answer is found: the likeliest of the option letters, or what the model
    writes."""
    batch_tokens: Count = 4096
    max_length: Count = 2048
    """Limit of a prompt in tokens; longer ones are cut on the left."""
    seed: int = 0
    """Seed of the subsets: the same everywhere."""
    overlap: Literal["refuse", "allow", "drop"] = "refuse"
    """What to do about prompts of a suite that the training data hold too: such a suite measures memory. `drop` trains
    without them."""

    @model_validator(mode="after")
    def _name_at_the_server(self) -> EvaluateConfig:
        if self.served_model is not None and self.backend != "openai":
            raise ValueError(f"evaluate.served_model has no effect with backend {self.backend}; it goes with openai")
        return self

    @field_validator("judge")
    @classmethod
    def _known_judge(cls, judge: str) -> str:
        try:
            return "+".join(map(str, JudgeName.parse(judge)))
        except CastuneError as error:
            raise ValueError(str(error)) from None

    @field_validator("suites")
    @classmethod
    def _some_suites(cls, suites: tuple[str, ...]) -> tuple[str, ...]:
        if not suites:
            raise ValueError("needs at least one suite")
        if len(set(suites)) != len(suites):
            raise ValueError("a suite is named twice")
        return suites


class CalibrationConfig(_Config):
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
    def _plain_source(cls, value: Any) -> Any:
        return _source(value)

    @field_validator("utility", mode="before")
    @classmethod
    def _one_set_or_domains(cls, value: Any) -> DataConfig | dict[str, DataConfig] | None:
        return None if value is None else _data_or_domains(value)

    @field_validator("arms")
    @classmethod
    def _known_arms(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        return _checked_arms(arms)


class StudyConfig(_Config):
    """What `castune study` trains and compares; the paper's study by default."""

    arms: tuple[str, ...] = ("all", "random", "risky", "safe")
    """Arms of Tables 1 and 2, by their names (`castune.names`)."""
    methods: tuple[str, ...] = ("sft", "pcgrad")
    """How every one of these arms is trained: `sft` as the recipe says, else a change of it: `pcgrad`, `cagrad`, `dpo`,
    `replay-10`, ..."""
    seeds: tuple[int, ...] = (21, 42, 84)
    """Seeds of random selections and of the training; every arm is trained with each."""
    buckets: tuple[Count, ...] = (4,)
    """Numbers M of equal buckets, each of which is trained (Table 7)."""
    scores: tuple[Score, ...] = ("conflict", "gradient", "sensitivity")
    """What heads are sorted by for these buckets (Table 8)."""
    shares: tuple[Annotated[float, Field(gt=0, lt=100)], ...] = (50, 75)
    """Further shares of all heads in per cent, from both ends of the map (Table 9)."""
    random_draws: Annotated[int, Field(ge=0)] = 0
    """Further random selections, with seeds of their own: the null distribution a zone is compared with."""
    calibrations: dict[str, CalibrationConfig] = {}
    """Further maps by name."""
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
        _checked_arms(self.main_arms)
        if unknown := set(self.drift) - set(self.main_arms):
            raise ValueError(f"study.drift names arms that the study does not train: {', '.join(sorted(unknown))}")
        return self

    @property
    def main_arms(self) -> tuple[str, ...]:
        """Names of the arms of the main map: tables 1 and 2, buckets, shares; each once."""
        names = [f"{arm}{method_suffix(method)}" for method in self.methods for arm in self.arms]
        for buckets in self.buckets:
            names += [self.bucket(n, buckets, score) for score in self.scores for n in range(1, buckets + 1)]
        names += [f"{zone}-{share:g}" for zone in ("risky", "safe") for share in self.shares]
        return tuple(dict.fromkeys(names))

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


class Recipe(_Config):
    """A whole run: which model, which data, the settings of every stage."""

    model: str = "default"
    revision: str | None = None
    trust_remote_code: bool = False
    """Run the Python code that comes with the model: for a repository and revision that you have read. Noted in the
    record of the model in every artifact."""
    template_date: str = TEMPLATE_DATE
    """The day (year-month-day) that a chat template which prints the date is told: the same for all of a run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    out: str
    """The run directory."""
    seed: int = 21
    """Seed of the calibration subsets; training has its own."""
    safety: DataConfig = DataConfig(source="starter-safety")
    """D_safe: harmful prompts with safe replies."""
    utility: DataConfig | dict[str, DataConfig] = DataConfig(source="starter-utility")
    """D_util: multiple-choice questions; or several such sets, by the names of their domains."""
    align: DataConfig = DataConfig(source="starter-align")
    """D_align: what is trained on."""
    diagnose: DiagnoseConfig = DiagnoseConfig()
    select: SelectConfig = SelectConfig()
    tune: TuneConfig = TuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    study: StudyConfig = StudyConfig()
    """For `castune study` alone."""

    @field_validator("safety", "align", mode="before")
    @classmethod
    def _plain_source(cls, value: Any) -> Any:
        return _source(value)

    @field_validator("template_date")
    @classmethod
    def _a_day(cls, value: str) -> str:
        try:
            return date.fromisoformat(value).isoformat()
        except ValueError:
            raise ValueError('accepted: a day as year-month-day, for example "2026-01-01"') from None

    # Before pydantic's own choice between the two kinds, which would tell of both where one is wrong.
    @field_validator("utility", mode="before")
    @classmethod
    def _one_set_or_domains(cls, value: Any) -> DataConfig | dict[str, DataConfig]:
        return _data_or_domains(value)

    @model_validator(mode="after")
    def _keeps_what_drifts(self) -> Recipe:
        if self.study.drift and self.tune.snapshot_steps is None:
            raise ValueError("study.drift needs adapters kept on the way: set tune.snapshot_steps, for example 25")
        return self

    @model_validator(mode="after")
    def _tells_no_secret(self) -> Recipe:
        # A recipe is written into every run directory, which others are sent.
        for key, text in _strings(self.model_dump(mode="json")):
            if has_secret(text):
                raise ValueError(
                    f"{key} holds what looks like a key or a password, and recipes are copied into run directories; "
                    "put it into the environment (HF_TOKEN, OPENAI_API_KEY)"
                )
        return self

    @classmethod
    def of(cls, **values: Any) -> Recipe:
        """A recipe from plain values, checked like those of a file."""
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a TOML recipe and apply `key.sub=value` overrides (values in TOML; bare words are strings).

        Raises:
            CastuneError: no such file, malformed TOML, an unknown key, or a value out of range.
        """
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CastuneError(f"{path}: no such recipe") from None
        except OSError as error:
            raise CastuneError(f"{path}: cannot be read as a recipe: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise CastuneError(f"{path}: malformed TOML: {error}") from None
        except RecursionError:
            raise CastuneError(f"{path}: malformed TOML: nested too deeply") from None
        for override in overrides:
            _apply(values, override)
        try:
            return cls.of(**values)
        except CastuneError as error:
            raise CastuneError(f"{path}: {error}") from None

    def to_toml(self) -> str:
        """The resolved recipe, every default written out; of the study only where it is not the default."""
        exclude = {"study"} if self.study == StudyConfig() else None
        return to_toml(self.model_dump(mode="json", exclude=exclude))


def to_toml(values: Mapping[str, Any], path: str = "") -> str:
    """TOML text of plain values and nested tables whose names need no quotes; absent values (None) are left out.

    `path` is the table that `values` are, with a dot at its end.
    """
    import json

    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping) and value is not None}
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    # JSON's strings, numbers, booleans and arrays are TOML's too, but for one control character.
    text = "".join(
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n".replace("\x7f", "\\u007f") for key, value in plain.items()
    )
    for name, table in tables.items():
        content = to_toml(table, f"{path}{name}.")
        # A table that holds nothing but tables is named by theirs.
        text += content if content.startswith("\n[") else f"\n[{path}{name}]\n{content}"
    return text


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in plain values, with the key it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _strings(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise CastuneError(f"--set {override}: expected key=value, for example tune.learning_rate=2e-4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text.strip()
    *path, last = key.strip().split(".")
    table = values
    for part in path:
        if not isinstance(table.setdefault(part, {}), dict):
            table[part] = _source(table[part])
        table = table[part]
        if not isinstance(table, dict):
            raise CastuneError(f"--set {override}: {part} is not a table")
    table[last] = value


def _one_line(error: ValidationError, model: type[BaseModel]) -> str:
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or model.__name__
        if item["type"] == "extra_forbidden":
            parts.append(f"unknown key {where!r}; accepted here: {', '.join(_accepted(model, item['loc'][:-1]))}")
        elif item["type"] == "missing":
            parts.append(f"{where!r} is missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            # A whole table as input: the message of the nested model names the key.
            plain = not item["loc"] or isinstance(item["input"], dict)
            parts.append(
                f"{where}: {message}"
                if plain and item["loc"]
                else message
                if plain
                else f"{where} = {item['input']!r}: {message}"
            )
    return "; ".join(parts)


def _accepted(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    for part in path:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return list(model.model_fields)
