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
    jailbreakbench-benign, xstest, xstest-unsafe, dan, wildjailbreak, wildguard. `NAME=PATH`: a local copy.
    `NAME@REVISION`: a revision on the hub. `PURPOSE:PATH`: your own data, with PURPOSE one of utility, safety,
    over-refusal, nll, kl, safety-margin, over-refusal-margin. Append `#500` to draw that many examples. Prefix `nll:`,
    `kl:` or `margin:` for a continuous measure: negative log-likelihood of the right answers or replies, divergence
    from the base model on the base model's own replies, or how much more likely a refusal is than the base model's
    reply."""
    limit: Count | None = None
    """Examples per suite. All by default."""
    judge: str = "opening"
    """What decides whether a reply refuses: `prefix` or `opening` (rules), `reading` (a small encoder that runs here,
    English only), `wildguard` (a classifier that runs here), `openai=MODEL` (a server; OPENAI_BASE_URL,
    OPENAI_API_KEY), or a panel of several, joined by `+`."""
    backend: Literal["hf", "vllm", "openai"] = "hf"
    """Where models run. `hf`: transformers, on this machine. `vllm`: one vLLM engine, on this machine. `openai`: a
    server (OPENAI_BASE_URL) that serves the model by its name and every adapter by the name of its arm."""
    served_model: str | None = None
    """Name of the model on the server of backend `openai`, if it differs from the recipe's."""
    strengths: tuple[Annotated[float, Field(gt=0, le=2)], ...] = (1.0,)
    """Adapter strengths at which to measure every arm: the adapter's update is multiplied, nothing is retrained. With
    several, the costs of arms are compared at equal safety. Full strength, 1, is always included."""
    max_new_tokens: Count = 64
    """Maximum length of replies to harmful and harmless prompts, in tokens."""
    reference_tokens: Count = 32
    """Maximum length of the base model's own replies, which `kl` and `margin` suites are measured on, in tokens."""
    margin_tokens: Count = 8
    """Number of leading tokens that a `margin` suite compares, of the refusal and of the base model's reply."""
    reasoning_tokens: Count | None = None
    """Maximum length of worked answers, in tokens. By default the paper's: 1,024 for gsm8k, 2,048 for math."""
    letters: Literal["argmax", "generated"] = "argmax"
    """How to find the letter of a multiple-choice answer. `argmax`: the most likely option letter. `generated`: the
    letter that the model writes."""
    batch_tokens: Count = 4096
    """Rows x tokens per forward pass."""
    max_length: Count = 2048
    """Maximum length of a prompt, in tokens. Longer prompts are truncated on the left."""
    seed: int = 0
    """Seed for drawing subsets of suites. Independent of the recipe's seed, so that runs draw the same subsets."""
    overlap: Literal["refuse", "allow", "drop"] = "refuse"
    """What to do if a suite contains training prompts, on which it would measure memorisation. `refuse`: stop. `allow`:
    measure it anyway. `drop`: train without them."""

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
