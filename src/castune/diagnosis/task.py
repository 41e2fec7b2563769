"""What a diagnosis measures, on what and how: checked, before anything is measured."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from castune.artifacts import Unit
from castune.config import DiagnoseConfig
from castune.core.ablation import can_resume
from castune.core.answer_equality import require_math_verify
from castune.core.answers import require_readable
from castune.core.heads import HeadLayout
from castune.core.journal import Journal
from castune.core.quantisation import is_quantised
from castune.core.refusals import read_by
from castune.core.units import UnitLayout
from castune.data.chat import ChatFormat
from castune.data.example import Example, require_replies
from castune.data.rows import Row
from castune.diagnosis.ablate import replacements
from castune.diagnosis.ablator import Ablator
from castune.diagnosis.domains import Utility, UtilitySet, checked_sets
from castune.diagnosis.grams import Gram, measure_grams
from castune.errors import CastuneError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What is measured, on what, and how.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        config: settings.
        chat: how the model is talked to.
        sets: the utility sets.
        examples: by objective: `safety`, then those of utility.
        rows: their tokens, a row an example.
        layout: where the units are.
        units: the units that are measured.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: DiagnoseConfig
    chat: ChatFormat
    sets: list[UtilitySet]
    examples: dict[str, Sequence[Example]]
    rows: dict[str, list[Row]]
    layout: UnitLayout
    units: list[Unit]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        safety: Sequence[Example],
        utility: Utility,
        config: DiagnoseConfig,
    ) -> Task:
        """What there is to do, checked: data first, then the model."""
        chat = ChatFormat(tokenizer, max_length=config.max_length)
        sets = _checked(safety, utility, config)
        examples = {"safety": safety, **{one.objective: one.examples for one in sets}}
        rows = {name: [chat.loss_row(example) for example in found] for name, found in examples.items()}
        if is_quantised(model):
            raise CastuneError(
                "the model is quantised, and its packed weights have no gradients; diagnose the full model. Its "
                "selections can be trained on the quantised one (castune tune --quantization nf4)"
            )
        heads = HeadLayout.of(model)
        layers = _layers(heads, config)
        layout = UnitLayout.of(model, heads, config.kinds, n_mlp_groups=config.mlp_groups, layers=layers)
        units = [one for one in layout.units if layers is None or one.layer in layers]
        return cls(model, tokenizer, config, chat, sets, examples, rows, layout, units)

    def grams(self, journal: Journal) -> dict[str, Gram]:
        """Inner products of gradients by utility objective: those in the journal, the others measured."""
        return measure_grams(self.model, self.layout, self.units, self.rows, self.config, journal)

    def ablator(self, swept: Sequence[Unit]) -> Ablator:
        """The model without each of some units."""
        filling = replacements(self.model, self.layout, swept, chain(*self.rows.values()), self.config)
        return Ablator(self.model, self.layout, swept, can_resume(self.model, self.layout.heads), filling)


def _checked(safety: Sequence[Example], utility: Utility, config: DiagnoseConfig) -> list[UtilitySet]:
    """The utility sets; refuses data that cannot be diagnosed."""
    if len(safety) < 2:
        raise DataError(f"safety: {len(safety)} examples, a diagnosis needs at least 2")
    require_replies(safety, "safety", "prompt, target")
    sets = checked_sets(utility, config)
    for one in sets:
        if one.is_of_problems and one.measure(config) == "decision":
            if any(example.scoring == "boxed" for example in one.examples):
                require_math_verify()
            for example in one.examples:
                require_readable(str(example.target), str(example.scoring), f"{one.objective}: example {example.id!r}")
            logger.warning(
                "%s: %d problems are answered in up to %d tokens without every head, which costs far more than "
                "anything else (castune plan says how much); diagnose.problems = margin takes the log-probability of "
                "their worked solutions instead",
                one.objective,
                len(one.examples),
                config.solution_tokens,
            )
        if one.is_of_replies:
            replies = [str(example.reply) for example in one.examples]
            refusing = sum(verdict is True for verdict in read_by(config.judge)(replies, replies))
            if 2 * refusing > len(replies):
                logger.warning(
                    "%s: %d of the %d replies that the model should give refuse; are these the examples of D_safe?",
                    one.objective,
                    refusing,
                    len(replies),
                )
    if len(sets) == 1 and config.domains != DiagnoseConfig.model_fields["domains"].default:
        logger.warning("diagnose.domains = %r has no effect: there is one utility set", config.domains)
    return sets


def _layers(layout: HeadLayout, config: DiagnoseConfig) -> Sequence[int] | None:
    """The layers that are diagnosed, None for all; refuses those that have no units."""
    layers = config.layers
    if layers is None:
        return None
    of_mlps = {"mlp_block", "mlp_group"} & set(config.kinds)
    unknown = [layer for layer in layers if layer >= layout.n_layers or not (of_mlps or layout.n_heads(layer))]
    if unknown or not layers:
        what = "layers" if of_mlps else "layers with heads"
        raise CastuneError(f"layers {list(layers)}: accepted are {what}, of 0 to {layout.n_layers - 1}")
    return layers
