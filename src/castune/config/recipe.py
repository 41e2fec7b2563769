"""The recipe: which model, which data, the settings of every stage. TOML in, resolved TOML out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator, model_validator

from castune.config.base import Config
from castune.config.data import DataConfig, data_or_domains, plain_source
from castune.config.diagnosis import DiagnoseConfig
from castune.config.evaluation import EvaluateConfig
from castune.config.selection import SelectConfig
from castune.config.study import StudyConfig
from castune.config.toml import apply_override, read_toml, to_toml
from castune.config.tuning import TuneConfig
from castune.errors import CastuneError
from castune.secrets import has_secret

# What chat templates that print the date are told, so that two days, and the two sides of midnight, measure the same.
TEMPLATE_DATE = "2026-01-01"


class Recipe(Config):
    """A whole run: which model, which data, the settings of every stage."""

    model: str = "default"
    """`default`, a hub id, a model directory, or a .gguf file."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Use it only for a repository and revision that you have read. Every
    artifact's record of the model notes it."""
    template_date: str = TEMPLATE_DATE
    """Date (YYYY-MM-DD) to give to chat templates that print one, the same for the whole run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the model: `auto`, `float32`, `bfloat16` or `float16`."""
    device: str = "auto"
    """Device to compute on: `auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    out: str
    """The run directory."""
    seed: int = 21
    """Seed for drawing the calibration data. Training has its own."""
    safety: DataConfig = DataConfig(source="starter-safety")
    """D_safe: harmful prompts with safe replies."""
    utility: DataConfig | dict[str, DataConfig] = DataConfig(source="starter-utility")
    """D_util: multiple-choice questions, or problems with worked solutions. Several named sets (domains) get one map
    each. For harmless prompts with replies, see `diagnose.reply_domains`."""
    align: DataConfig = DataConfig(source="starter-align")
    """D_align: prompts with the replies to train on."""
    diagnose: DiagnoseConfig = DiagnoseConfig()
    """How heads are measured."""
    select: SelectConfig = SelectConfig()
    """Which heads are trained."""
    tune: TuneConfig = TuneConfig()
    """How they are trained."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What is measured before and after."""
    study: StudyConfig = StudyConfig()
    """Only for `castune study`."""

    @field_validator("safety", "align", mode="before")
    @classmethod
    def _plain_source(cls, value: object) -> Any:
        return plain_source(value)

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
    def _one_set_or_domains(cls, value: object) -> DataConfig | dict[str, DataConfig]:
        return data_or_domains(value)

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
    def of(cls, /, **values: Any) -> Recipe:
        """A recipe from plain values, checked like those of a file."""
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a TOML recipe and apply `key.sub=value` overrides (values in TOML; bare words are strings).

        Raises:
            CastuneError: no such file, malformed TOML, an unknown key, or a value out of range.
        """
        path = Path(path)
        values = read_toml(path, "recipe")
        for override in overrides:
            apply_override(values, override)
        try:
            return cls.of(**values)
        except CastuneError as error:
            raise CastuneError(f"{path}: {error}") from None

    def to_toml(self) -> str:
        """The resolved recipe, every default written out; of the study only where it is not the default."""
        exclude = {"study"} if self.study == StudyConfig() else None
        return to_toml(self.model_dump(mode="json", exclude=exclude))


def _strings(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in plain values, with the key it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _strings(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)
