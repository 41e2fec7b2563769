"""What is measured on the base model and on every arm."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from castune.config.base import Config, Count
from castune.errors import CastuneError
from castune.names import JudgeName


class EvaluateConfig(Config):
    """What is measured on the base model and on every arm."""

    suites: tuple[str, ...] = ("starter-utility-eval", "starter-safety-eval", "starter-overrefusal-eval")
    """Data sources: starter-utility-eval, starter-safety-eval, starter-overrefusal-eval, starter-solutions-eval,
    starter-helpful-eval, mmlu, csqa, gsm8k, math, strongreject, or-bench, advbench, harmbench, jailbreakbench,
    jailbreakbench-benign, xstest, xstest-unsafe, dan, wildjailbreak, wildguard; `NAME=PATH` for a local copy,
    `NAME@REVISION` of the hub; `PURPOSE:PATH` for own data with PURPOSE one of utility, safety, over-refusal, nll, kl,
    safety-margin, over-refusal-margin; `#500` behind any of them draws so many examples. `nll:`, `kl:` and `margin:`
    before a source measure continuously: the negative log-likelihood of its right answers or replies, the divergence
    from the base model on the base's own replies, how much likelier a refusal is than the base's reply."""
    limit: Count | None = None
    """Examples a suite; all when absent."""
    judge: str = "opening"
    """Who decides whether a reply refuses: `prefix` or `opening` (rules), `reading` (a small encoder, here; English),
    `wildguard` (a classifier, here), `openai=MODEL` (a server; OPENAI_BASE_URL, OPENAI_API_KEY), or a panel of several,
    joined by `+`."""
    backend: Literal["hf", "vllm", "openai"] = "hf"
    """Where models run. `hf`: transformers, here. `vllm`: one engine, here. `openai`: a server (OPENAI_BASE_URL) that
    serves the model by its name and every adapter by the name of its arm."""
    served_model: str | None = None
    """What the server of backend `openai` calls the model, where that is not its name in the recipe."""
    strengths: tuple[Annotated[float, Field(gt=0, le=2)], ...] = (1.0,)
    """Every arm is measured at these strengths too: its adapter's update is multiplied, nothing is trained again. With
    several, what arms cost is compared at equal safety. Full strength, 1, is always among them."""
    max_new_tokens: Count = 64
    """Length limit of replies to harmful and harmless prompts."""
    reference_tokens: Count = 32
    """Length limit of the base model's own replies that `kl` and `margin` suites are measured on."""
    margin_tokens: Count = 8
    """First tokens of the refusal and of the base model's reply that a `margin` suite compares."""
    reasoning_tokens: Count | None = None
    """Length limit of worked answers; when absent the paper's, 1,024 for gsm8k and 2,048 for math."""
    letters: Literal["argmax", "generated"] = "argmax"
    """How the letter of a multiple-choice answer is found: `argmax`, the likeliest of the option letters; `generated`,
    what the model writes."""
    batch_tokens: Count = 4096
    """Rows x tokens of one forward."""
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

    @field_validator("strengths")
    @classmethod
    def _rising(cls, strengths: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted({*strengths, 1.0}))

    @field_validator("suites")
    @classmethod
    def _some_suites(cls, suites: tuple[str, ...]) -> tuple[str, ...]:
        if not suites:
            raise ValueError("needs at least one suite")
        if len(set(suites)) != len(suites):
            raise ValueError("a suite is named twice")
        return suites
