"""How the chosen heads are trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from castune.config.base import Config, Count
from castune.names import SurgeryMethod, Tracker, TuneMethod

SurgeryGranularity = Literal["global", "tensor", "head"]


class TuneConfig(Config):
    """How the chosen heads are trained. The defaults are the paper's Table 3."""

    method: TuneMethod = "sft"
    """`sft`: imitate replies. `dpo`: prefer chosen over rejected replies (needs the extra `dpo`)."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """DPO beta: how strongly to keep the model close to the base model."""
    replay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of training examples drawn from the utility data (data replay). Not with DPO."""
    rank: Count = 32
    """LoRA rank."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """LoRA alpha. The adapter's update is scaled by alpha / rank."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate of AdamW. The default is the paper's, for its 1,250 steps."""
    epochs: Annotated[float, Field(gt=0)] = 1
    """Passes over the data. Fractions are allowed."""
    max_steps: Count | None = None
    """Stop after this many optimiser steps, regardless of `epochs`."""
    batch_size: Count = 4
    """Examples per device and micro-batch."""
    accumulation: Count = 2
    """Micro-batches per optimiser step."""
    max_length: Count = 1024
    """Maximum length of prompt and reply together, in tokens."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the optimiser steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Norm to clip gradients to."""
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up: `linear` or `cosine` to 0, or not at all (`constant`)."""
    group_by_length: bool = False
    """Form steps from examples of similar length, in random order. This saves much padding, but refusals are shorter
    than answers, so a step often holds almost only one kind (docs/method.md)."""
    quantization: Literal["none", "nf4"] = "none"
    """How to store the base model's linear layers during training. `none`: as they are. `nf4`: in 4 bits (QLoRA), a
    quarter of bfloat16's memory; needs bitsandbytes (extra `qlora`). The adapter belongs to the full model, on which it
    is evaluated and merged."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, more time."""
    checkpoint_steps: Count = 100
    """Optimiser steps between checkpoints. After an interruption, the same command continues from the last one."""
    snapshot_steps: Count | None = None
    """Keep a snapshot of the adapter after every N optimiser steps, for `castune drift`. Off by default."""
    reselect_steps: Count | None = None
    """After every N optimiser steps, measure the map again on the current model, choose heads again by the arm's own
    rule, and train those from there on. What was learned so far is kept frozen. Off by default."""
    report_to: tuple[Tracker, ...] = ()
    """Where to log loss and learning rate while training: `tensorboard`, `wandb` or `trackio`, each of which has to be
    installed. Changes no result: a run that logs elsewhere is the same run."""
    freeze_a: bool = False
    """Train only B. Arms with equally many heads then have exactly equally many trainable parameters."""
    seed: int = 21
    """Seed of initial values and data order, and of a random selection that has no seed of its own."""
    surgery: SurgeryMethod = "none"
    """What to do with a gradient that conflicts with the utility gradient (Section 4.2). `pcgrad`: remove the
    conflicting component; D_util is only the reference. `pcgrad-symmetric` and, in torchjd, `cagrad`, `upgrad`, `mgda`,
    `gradvac`, `alignedmtl`, `imtlg`: train on D_util too."""
    surgery_granularity: SurgeryGranularity = "global"
    """Scope at which conflicts are found and resolved: the whole gradient (`global`), each A and B (`tensor`), or each
    head's rows of B and A (`head`)."""
    surgery_batch_size: Count | None = None
    """Utility examples per optimiser step, over all processes. By default as many as alignment examples."""
    null_space: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Train in the null space of the utility activations: the update ignores the fewest input directions that hold this
    share of the inputs' second moment on D_util. D_util is only the reference. Off by default."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _goes_together(self) -> TuneConfig:
        if self.method == "dpo" and self.replay:
            raise ValueError("tune.replay mixes in replies to imitate, which DPO does not; use one of them")
        not_with_reselection = {
            'method = "dpo"': self.method == "dpo",
            f'quantization = "{self.quantization}"': self.quantization != "none",
            "freeze_a": self.freeze_a,
            'surgery_granularity = "head"': self.surgery != "none" and self.surgery_granularity == "head",
            f"null_space = {self.null_space}": self.null_space is not None,
        }
        for what, is_set in not_with_reselection.items():
            if is_set and self.reselect_steps is not None:
                raise ValueError(f"tune.reselect_steps does not go with {what} yet; use one of them")
        return self

    @property
    def needs_utility(self) -> bool:
        """Whether utility data take part in the training."""
        return self.surgery != "none" or self.replay > 0 or self.null_space is not None

    @property
    def trains_on_utility(self) -> bool:
        """Whether weights follow utility data too; of one-way PCGrad and null spaces they are the reference alone."""
        return self.replay > 0 or self.surgery not in ("none", "pcgrad")

    def record(self) -> dict[str, Any]:
        """The settings that decide the adapter, as plain JSON: all but where its training is logged."""
        return self.model_dump(mode="json", exclude={"report_to"})

    def changed(self, **values: object) -> TuneConfig:
        """These settings with some others, checked."""
        return TuneConfig(**{**self.model_dump(), **values})
