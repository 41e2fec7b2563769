"""How heads are measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from castune.config.base import Config, Count
from castune.names import KINDS, UnitKind

SensitivityRank = Literal["difference", "of-difference"]
Measure = Literal["decision", "margin", "attribution"]


class DiagnoseConfig(Config):
    """How heads are measured (Section 3 of the paper)."""

    measure: Measure = "attribution"
    """How to score heads. `attribution`: a first-order estimate of log-prob margins, for all heads from one backward
    pass; some heads are also measured exactly, and the map reports how well the two agree. `margin`: log-prob margins,
    ablating every head; no generation, no ties. `decision`: accuracy and refusal rate, as in the paper."""
    check_units: Count = 16
    """With `attribution`, number of units of each kind to also measure exactly, spread over layers and scores."""
    check_examples: Annotated[int, Field(ge=2)] = 16
    """With `attribution`, examples of each set to use for these exact measurements."""
    verify: Literal["none", "zone"] = "none"
    """With `attribution`, what else to measure exactly. `none`: nothing. `zone`: units that the estimate cannot place
    inside or outside the safe zone (the quarter with the lowest C), nearest to its border first."""
    verify_units: Count = 64
    """Maximum number of units of each kind that `verify` measures."""
    ablation: Literal["zero", "mean"] = "zero"
    """What replaces a head's output: `zero`, or its `mean` over the calibration tokens."""
    max_new_tokens: Count = 24
    """Maximum length of the replies that the judge reads, in tokens."""
    margin_tokens: Count = 8
    """Number of leading tokens that a safety margin compares, of the refusal and of the model's own reply; for
    `reply_domains`, of the two replies. At most `max_new_tokens`. The first words settle whether a reply refuses."""
    problems: Literal["decision", "margin"] = "margin"
    """How to measure utility on problems with worked solutions, whatever `measure` says about the rest. `margin`:
    log-probability of the worked solution. `decision`: accuracy; every answer is worked out with each head ablated,
    which costs far more than anything else (see `castune plan`)."""
    solution_tokens: Count = 256
    """Maximum length of a worked answer (see `problems`), in tokens."""
    judge: Literal["prefix", "opening"] = "prefix"
    """Rules that decide whether a reply refuses. `prefix` reads its first 64 characters, `opening` its first 300."""
    batch_tokens: Count | Literal["auto"] = 2048
    """Rows x tokens per forward pass. `auto` picks the fastest size on this machine and records it in the map."""
    max_length: Count = 1024
    """Maximum length of prompt and reply together, in tokens. Longer prompts are truncated on the left."""
    sensitivity_rank: SensitivityRank = "difference"
    """How S(h) is ranked. `difference`: Eq. 5, exp(rank - rank). `of-difference`: exp(rank of the difference), the
    scale of Table 7."""
    gradient_chunks: Annotated[int, Field(ge=2)] = 8
    """Number of parts to split each set into for the standard error of O(h)."""
    gradient_memory: Annotated[float, Field(gt=0)] = 40
    """Gigabytes of CPU memory for the `gradient_chunks` gradients (float32). What does not fit is measured in further
    passes over the examples, at least one projection at a time."""
    units: tuple[UnitKind, ...] = ("q_heads",)
    """Kinds of unit to diagnose. `q_heads`: query heads, as in the paper. `k_groups`, `v_groups`: KV groups by their
    keys or values. `o_heads`: columns of the output projection by head. `mlp_blocks`: whole MLPs. `mlp_groups`: groups
    of MLP neurons. Each kind is ranked on its own."""
    mlp_groups: Count = 8
    """Number of equal groups to split the MLP neurons of each layer into, for `mlp_groups`."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Diagnose only these layers and rank only their heads. All layers by default."""
    reply_domains: tuple[str, ...] = ()
    """Utility domains of harmless prompts, each with the reply that the model should give, so that heads are also
    chosen against over-refusal. The set without a name is `utility`. `decision`: the prompt is not refused. `margin`:
    log-probability of the reply minus that of a standard refusal."""
    domains: Literal["mean", "worst"] = "mean"
    """How to combine the maps of several utility domains. `mean`: average every column. `worst`: take each head's row
    from the domain where its C is highest."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of unit that are diagnosed, in the singular."""
        return tuple(KINDS[kind] for kind in self.units)

    def measure_of(self, *, problems: bool) -> Measure:
        """How utility is measured on problems, or on anything else."""
        if not problems or (self.problems, self.measure) == ("margin", "attribution"):
            return self.measure
        return self.problems

    @field_validator("units")
    @classmethod
    def _some_units(cls, units: tuple[str, ...]) -> tuple[str, ...]:
        if not units or len(set(units)) != len(units):
            raise ValueError("needs at least one kind of unit, each named once")
        return units

    @field_validator("reply_domains")
    @classmethod
    def _each_once(cls, domains: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(domains)) != len(domains):
            raise ValueError("each domain is named once")
        # The order in which domains are given changes nothing.
        return tuple(sorted(domains))
