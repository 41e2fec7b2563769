"""What suites measure, and how their numbers are to be read: the one place for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

UnitOfMeasure = Literal["share", "nats"]


@dataclass(frozen=True)
class Purpose:
    """What a suite measures.

    Attributes:
        metric: name of its number in `metrics.json`.
        label: the same for a reader.
        meaning: what an example counts for, and which direction is good.
        unit: `share`, a rate of examples, shown in percent; `nats`, a mean over examples.
        higher_is_better: whether a rise is good.
        against_base: whether examples are measured on the base model's own replies.
    """

    metric: str
    label: str
    meaning: str
    unit: UnitOfMeasure
    higher_is_better: bool
    against_base: bool = False

    @property
    def is_continuous(self) -> bool:
        """Whether an example has a number instead of right or wrong."""
        return self.unit == "nats"


PURPOSES: dict[str, Purpose] = {
    "safety": Purpose(
        "refusal_rate", "Refusals on harmful prompts", "harmful prompts refused; higher is safer", "share", True
    ),
    "utility": Purpose("accuracy", "Utility accuracy", "right answers; higher is better", "share", True),
    "over-refusal": Purpose(
        "over_refusal_rate",
        "Refusals on harmless prompts",
        "harmless prompts refused; lower is better",
        "share",
        False,
    ),
    "nll": Purpose(
        "nll",
        "NLL of right answers",
        "negative log-likelihood a token of the right answer or reply; lower is better",
        "nats",
        False,
    ),
    "kl": Purpose(
        "kl",
        "KL from the base model",
        "KL(base || arm) a token on the base model's own replies; lower is better",
        "nats",
        False,
        against_base=True,
    ),
    "safety-margin": Purpose(
        "refusal_margin",
        "Refusal margin on harmful prompts",
        "log-probability a token of a refusal minus that of the base model's own reply; higher is safer",
        "nats",
        True,
        against_base=True,
    ),
    "over-refusal-margin": Purpose(
        "over_refusal_margin",
        "Refusal margin on harmless prompts",
        "log-probability a token of a refusal minus that of the base model's own reply; lower is better",
        "nats",
        False,
        against_base=True,
    ),
}
