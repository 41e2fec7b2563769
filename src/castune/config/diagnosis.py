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
    """`attribution`: log-prob margins to first order, all heads from one backward pass; some heads are measured exactly
    as well, and the map says how far both agree. `margin`: margins by ablating every head; no generation, no ties.
    `decision`: accuracy and refusal rate, as in the paper."""
    check_units: Count = 16
    """Of a map by attribution: units of each kind that are measured exactly as well, spread over layers and scores."""
    check_examples: Annotated[int, Field(ge=2)] = 16
    """Examples of each set that they are measured on."""
    verify: Literal["none", "zone"] = "none"
    """Of a map by attribution, measure exactly: `none` but what is checked; `zone`: units whose place inside or outside
    the safe zone, the quarter of lowest C, the estimate leaves open, nearest to its border first."""
    verify_units: Count = 64
    """So many of each kind at most."""
    ablation: Literal["zero", "mean"] = "zero"
    """What replaces a head's output: `zero`, or its `mean` over the calibration tokens."""
    max_new_tokens: Count = 24
    """Tokens of a reply that the judge sees."""
    margin_tokens: Count = 8
    """First tokens of the refusal and of the model's own reply that a safety margin compares, and of the two replies
    of `reply_domains`; at most `max_new_tokens`. Whether a reply refuses is settled in its first words."""
    problems: Literal["decision", "margin"] = "margin"
    """How utility is measured on problems, whatever `measure` says of the rest. `margin`: the log-probability of their
    worked solutions. `decision`: accuracy; answers are worked out without every head, which costs far more than
    anything else (`castune plan`)."""
    solution_tokens: Count = 256
    """Tokens that an answer may have that is worked out (`problems`)."""
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
    """Kinds of unit that are diagnosed: `q_heads`, the paper's query heads; `k_groups` and `v_groups`, KV groups by
    their keys or values; `o_heads`, columns of the output projection by head; `mlp_blocks`, whole MLPs; `mlp_groups`,
    groups of MLP neurons. Ranks are within a kind."""
    mlp_groups: Count = 8
    """Into how many equal groups the neurons of a layer are cut, for `mlp_groups`."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Diagnose these layers only; ranks are then among their heads. All layers when absent."""
    reply_domains: tuple[str, ...] = ()
    """Utility domains of harmless prompts, each with the reply that the model should give, so that heads are chosen
    against over-refusal too; `utility` is the set without a name. `decision`: the prompt is not refused. `margin`: the
    reply's log-probability over that of a standard refusal."""
    domains: Literal["mean", "worst"] = "mean"
    """How the maps of several utility domains become one. `mean`: of every column. `worst`: a head's row is that of
    the domain in which its C is highest."""

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
