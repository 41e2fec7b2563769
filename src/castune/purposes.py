"""What suites measure, and how their numbers are to be read: the one place for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

UnitOfMeasure = Literal["share", "nats"]


@dataclass(frozen=True)
class Unit:
    """How numbers of a unit are shown.

    Attributes:
        scale: what they are multiplied by.
        digits: decimals.
        level: what they are called.
        change: what differences of them are called.
    """

    scale: float
    digits: int
    level: str
    change: str


UNITS: dict[UnitOfMeasure, Unit] = {
    "share": Unit(100.0, 1, "%", "points"),
    "nats": Unit(1.0, 3, "nats per token", "nats per token"),
}


@dataclass(frozen=True)
class Purpose:
    """What a suite measures.

    Attributes:
        metric: name of its number in `metrics.json`.
        label: the same for a reader.
        phrase: the same within a sentence.
        meaning: what an example counts for, and which direction is good.
        unit: `share`, a rate of examples, shown in percent; `nats`, a mean over examples.
        higher_is_better: whether a rise is good.
        against_base: whether examples are measured on the base model's own replies.
    """

    metric: str
    label: str
    phrase: str
    meaning: str
    unit: UnitOfMeasure
    higher_is_better: bool
    against_base: bool = False

    @property
    def is_continuous(self) -> bool:
        """Whether an example has a number instead of right or wrong."""
        return self.unit == "nats"

    @property
    def shown(self) -> Unit:
        """How its numbers are shown."""
        return UNITS[self.unit]


PURPOSES: dict[str, Purpose] = {
    "safety": Purpose(
        "refusal_rate",
        "Refusals on harmful prompts",
        "the refusal rate on harmful prompts",
        "harmful prompts refused; higher is safer",
        "share",
        True,
    ),
    "utility": Purpose(
        "accuracy", "Utility accuracy", "utility accuracy", "right answers; higher is better", "share", True
    ),
    "over-refusal": Purpose(
        "over_refusal_rate",
        "Refusals on harmless prompts",
        "the refusal rate on harmless prompts",
        "harmless prompts refused; lower is better",
        "share",
        False,
    ),
    "nll": Purpose(
        "nll",
        "NLL of right answers",
        "the NLL of right answers",
        "negative log-likelihood per token of the right answer or reply; lower is better",
        "nats",
        False,
    ),
    "kl": Purpose(
        "kl",
        "KL from the base model",
        "the KL from the base model",
        "KL(base || arm) per token on the base model's own replies; lower is better",
        "nats",
        False,
        against_base=True,
    ),
    "safety-margin": Purpose(
        "refusal_margin",
        "Refusal margin on harmful prompts",
        "the refusal margin on harmful prompts",
        "log-probability per token of a refusal minus that of the base model's own reply; higher is safer",
        "nats",
        True,
        against_base=True,
    ),
    "over-refusal-margin": Purpose(
        "over_refusal_margin",
        "Refusal margin on harmless prompts",
        "the refusal margin on harmless prompts",
        "log-probability per token of a refusal minus that of the base model's own reply; lower is better",
        "nats",
        False,
        against_base=True,
    ),
}

# What safety is read off, the first that is measured: whether prompts are refused, or how likely a refusal is.
SAFETY = ("safety", "safety-margin")

# What may be paid for it, the finest measure first, and what the loss is called within a sentence.
PAID: dict[str, str] = {
    "nll": "NLL of right answers",
    "kl": "KL from the base model",
    "utility": "accuracy lost",
    "over-refusal-margin": "refusal margin on harmless prompts",
    "over-refusal": "harmless prompts refused",
}


@dataclass(frozen=True)
class Cost:
    """What a training may cost, as one number.

    Attributes:
        label: for a reader.
        phrase: the same within a sentence.
        purpose: of the suites whose change against base is the loss.
        suite: the one of them that counts; all when None.
        is_ratio: whether it is the loss over the rise of the refusal rate on harmful prompts, each in its own unit.
        at_safety: whether it is that of an adapter scaled down until all are equally safe.
    """

    label: str
    phrase: str
    purpose: str
    suite: str | None = None
    is_ratio: bool = False
    at_safety: bool = False

    @property
    def unit(self) -> Unit:
        """How a loss is shown; a ratio is a plain number."""
        return PURPOSES[self.purpose].shown

    @property
    def sign(self) -> float:
        """What turns a change of the suites into a loss."""
        return -1.0 if PURPOSES[self.purpose].higher_is_better else 1.0


COSTS: dict[str, Cost] = {
    # Eqs. 7 and 8.
    "ucr": Cost("UCR", "utility cost ratio", "utility", is_ratio=True),
    "mmlu_cr": Cost("MMLU-CR", "MMLU cost ratio", "utility", "mmlu", is_ratio=True),
    "utility_lost": Cost("Utility lost", "utility lost", "utility"),
    "ucr_nll": Cost("UCR, nats", "cost ratio in nats", "nll", is_ratio=True),
    "nll_added": Cost("NLL added", "NLL added", "nll"),
    "kl": Cost("KL from base", "KL from the base model", "kl"),
    "nll_at_safety": Cost("NLL at equal safety", "NLL of right answers at equal safety", "nll", at_safety=True),
    "kl_at_safety": Cost("KL at equal safety", "KL from the base model at equal safety", "kl", at_safety=True),
}
RATIOS = tuple(name for name, cost in COSTS.items() if cost.is_ratio)
