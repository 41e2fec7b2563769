"""DPO through TRL: prefer chosen to rejected replies, on the rows of the selected heads.

Tokens and label masks are castune's own (`ChatFormat`); loss, reference model and batching are TRL's. The reference is
the base model: an adapter whose B is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from castune.config import TuneConfig
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.errors import CastuneError, DataError
from castune.tuning.surgery import Operation
from castune.tuning.trainer import SparseTraining
from castune.tuning.workspace import Workspace

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRL = "trl==1.16.0"

Pair = dict[str, list[int]]


def require_trl() -> None:
    """Refuse DPO where TRL is not installed: before a model is loaded, not after.

    Raises:
        CastuneError: the message says what to install.
    """
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise CastuneError(
            f'method "dpo" needs TRL, which cannot be imported ({error}): python -m pip install "{TRL}"'
        ) from None


def preference_pairs(chat: ChatFormat, examples: Sequence[Example]) -> list[Pair]:
    """Token ids of prompt, chosen and rejected reply of every example, as TRL's collator takes them.

    What does not fit is cut as in `ChatFormat.fit`.

    Raises:
        DataError: an example without a rejected reply, or with one that equals the chosen one.
    """
    pairs = []
    for example in examples:
        if example.reply is None or example.rejected is None:
            raise DataError(
                f"training data: example {example.id!r} has no pair of replies; "
                "columns needed: prompt, chosen, rejected"
            )
        if example.reply == example.rejected:
            raise DataError(f"training data: example {example.id!r}: chosen and rejected are the same reply")
        prompt, (chosen, rejected) = chat.continuations(example, [example.reply, example.rejected])
        prompt, (chosen, rejected) = chat.fit(prompt, [chosen, rejected])
        pairs.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return pairs


def preference_trainer(
    peft_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    pairs: Sequence[Pair],
    config: TuneConfig,
    workspace: Workspace,
    operation: Operation | None = None,
) -> Any:
    """A `DPOTrainer` of TRL with what castune adds to a Trainer.

    Args:
        peft_model: what is trained; its B is zero, so that the base model is the reference.
        tokenizer: its tokenizer.
        settings: see `trainer_settings`.
        pairs: see `preference_pairs`.
        config: settings.
        workspace: where checkpoints go; a whole one that is there is continued from.
        operation: gradient surgery.
    """
    require_trl()
    import datasets
    from trl import DPOConfig, DPOTrainer

    class PreferenceTrainer(SparseTraining, DPOTrainer):
        def _prepare_dataset(self, dataset: object, *_args: object, **_kwargs: object) -> Any:
            return dataset  # it holds tokens already

        def compute_loss(
            self, model: PreTrainedModel, inputs: dict[str, Any], *args: object, **kwargs: object
        ) -> Tensor:
            """TRL's loss of a batch of pairs."""
            self.tokens_seen += int(inputs["attention_mask"].sum())
            loss: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
            return self.finite(loss)

        def create_model_card(self, *_args: object, **_kwargs: object) -> None:
            """None in checkpoints."""

    arguments = DPOConfig(**settings, beta=config.beta, max_length=None)
    trainer = PreferenceTrainer(
        model=peft_model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(list(pairs)),
        processing_class=tokenizer,
    )
    lengths = [len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs]
    trainer.prepare(config, workspace, lengths, operation)
    return trainer
