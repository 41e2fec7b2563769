"""How the chosen heads are trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from castune.config.base import Config, Count
from castune.names import SurgeryMethod, TuneMethod

SurgeryGranularity = Literal["global", "tensor", "head"]


class TuneConfig(Config):
    """How the chosen heads are trained. The defaults are the paper's Table 3."""

    method: TuneMethod = "sft"
    """`sft`: imitate replies. `dpo`: prefer chosen to rejected replies (needs the extra `dpo`)."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """DPO: how strongly the model is held to the base model."""
    replay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Data replay: share of the training examples that come from the utility data. Not with DPO."""
    rank: Count = 32
    """LoRA rank."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """LoRA alpha: what the adapter adds is scaled by alpha / rank."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Highest learning rate of AdamW; the default is the paper's, for its 1,250 steps."""
    epochs: Annotated[float, Field(gt=0)] = 1
    """Passes over the data; parts of one too."""
    max_steps: Count | None = None
    """Stop after this many optimiser steps, whatever `epochs` says."""
    batch_size: Count = 4
    """Examples a device and a micro-batch."""
    accumulation: Count = 2
    """Micro-batches an optimiser step."""
    max_length: Count = 1024
    """Limit of prompt and reply together, in tokens."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the optimiser steps in which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Norm that gradients are cut to."""
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up: `linear` or `cosine` to 0, or `constant`."""
    group_by_length: bool = True
    """Steps of examples of similar lengths, in random order: far less padding, and steps that are often nearly of one
    kind, as refusals are shorter than answers (docs/method.md)."""
    quantization: Literal["none", "nf4"] = "none"
    """How the base's linear layers are stored while it is trained: `none`, as they are; `nf4` (bitsandbytes, extra
    `qlora`) in a quarter of bfloat16's memory (QLoRA). The adapter belongs to the full model, on which it is evaluated
    and merged."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    checkpoint_steps: Count = 100
    """Optimiser steps between checkpoints, from which the same command continues after an interruption."""
    snapshot_steps: Count | None = None
    """Keep the adapter as it is after every so many optimiser steps beside the finished one (`castune drift`);
    never when absent."""
    reselect_steps: Count | None = None
    """Measure the map again on the model as it is after every so many optimiser steps, choose heads again by the arm's
    own rule, and train these from there on; what was learnt so far stays, frozen. Never when absent."""
    freeze_a: bool = False
    """Train B alone: budgets of equal head counts are then equal to the parameter."""
    seed: int = 21
    """Seed of initial values and data order, and of a random selection where none is set for it."""
    surgery: SurgeryMethod = "none"
    """What is done to a gradient that works against the utility gradient (Section 4.2). `pcgrad`: what points against
    it is taken out; D_util is the reference only. `pcgrad-symmetric`, and by torchjd `cagrad`, `upgrad`, `mgda`,
    `gradvac`, `alignedmtl`, `imtlg`: train on D_util too."""
    surgery_granularity: SurgeryGranularity = "global"
    """What conflicts and is changed on its own: the whole gradient (`global`), each A and B (`tensor`), or each head's
    rows of B and A (`head`)."""
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

    def changed(self, **values: object) -> TuneConfig:
        """These settings with some others, checked."""
        return TuneConfig(**{**self.model_dump(), **values})
