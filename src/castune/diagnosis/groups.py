"""Ablating whole groups of heads: does a bucket matter more together than its heads do one by one?

The paper explains its inverted U (Section 5.3) by heads that stand in for one another: alone none of them is missed.
The joint shift of a bucket, beside the sum of its heads' single shifts, tests that.

Shape letters: G group, N example, D utility domain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from castune.artifacts import Unit
from castune.config import DiagnoseConfig
from castune.core.batching import tuned_batch_tokens
from castune.core.heads import HeadLayout
from castune.core.modes import evaluation_mode
from castune.core.progress import progress
from castune.core.units import UnitLayout
from castune.data.chat import ChatFormat
from castune.data.example import Example, require_replies
from castune.diagnosis.ablate import ScoredMeasure, replacements
from castune.diagnosis.ablator import Ablator
from castune.diagnosis.domains import Utility, UtilitySet, checked_sets
from castune.diagnosis.objectives import Objectives
from castune.diagnosis.score import Floats, shift_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class GroupShifts:
    """Shifts of each group, `[G]`, with standard errors (NaN where there is none), as in Eqs. 3-4.

    The utility shift is the mean over utility domains.
    """

    utility_shift: Floats
    utility_shift_se: Floats
    safety_shift: Floats
    safety_shift_se: Floats


def ablate_groups(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    groups: Sequence[Sequence[Unit]],
    safety: Sequence[Example],
    utility: Utility,
    config: DiagnoseConfig | None = None,
) -> GroupShifts:
    """H_gen and H_safe of groups of heads, each group ablated as a whole.

    Args:
        model: a transformers model for causal language modelling; it is left as it was.
        tokenizer: its tokenizer, with a chat template.
        groups: the units of each group.
        safety: D_safe, harmful prompts with a safe reply each.
        utility: D_util: questions, problems with worked solutions, or harmless prompts with replies (see
            `DiagnoseConfig.reply_domains`); or several such sets, by the names of their domains.
        config: settings of the diagnosis that the groups are compared with.

    Raises:
        UnsupportedArchitecture: the heads of this model could not be located.
        CastuneError: data without replies or answers.
    """
    config = config or DiagnoseConfig()
    require_replies(safety, "safety", "prompt, target")
    sets = checked_sets(utility, config)
    chat, heads = ChatFormat(tokenizer, max_length=config.max_length), HeadLayout.of(model)
    layout = UnitLayout.of(model, heads, config.kinds, n_mlp_groups=config.mlp_groups, layers=config.layers)
    with evaluation_mode(model), progress("groups of heads", len(groups) + 1) as advance:
        if config.batch_tokens == "auto":
            config = config.model_copy(update={"batch_tokens": tuned_batch_tokens(model)})
        rows = (chat.loss_row(example) for example in chain(safety, *(one.examples for one in sets)))
        filling = replacements(model, layout, chain(*groups), rows, config)
        ablator = Ablator(model, layout, (), resumable=False, replacements=filling)
        measured = _Measured.of(Objectives(ablator, tokenizer, chat, config), sets, safety)
        baseline = measured()
        advance()
        ablated: list[list[Floats]] = []
        for group in groups:
            with _without(ablator, group):
                ablated.append(measured())
            advance()
    measures = [one.measure(config) for one in sets] + [config.measure]
    outcomes = zip(map(shift_of, measures), zip(*ablated, strict=True), baseline, strict=True)
    *of_domains, (safety_shift, safety_se) = [shift(np.array(some_GN), whole_N) for shift, some_GN, whole_N in outcomes]
    shifts_D2G = np.array(of_domains)
    # Domains are independent samples.
    utility_se = np.sqrt((shifts_D2G[:, 1] ** 2).sum(0)) / len(sets)
    return GroupShifts(shifts_D2G[:, 0].mean(0), utility_se, safety_shift, safety_se)


@dataclass(frozen=True)
class _Measured:
    """Measures, of the model as it is when called, the outcomes of every utility set and then of the safety set.

    Attributes:
        objectives: what is measured.
        sets: the utility sets.
        safety: D_safe.
        of_utility: the measure of each utility set; None where decisions are on what the model writes, for there is
            nothing to be scored in one forward.
        of_margins: the measure of refusal margins; None where refusals are decided.
    """

    objectives: Objectives
    sets: Sequence[UtilitySet]
    safety: Sequence[Example]
    of_utility: Sequence[ScoredMeasure | None]
    of_margins: ScoredMeasure | None

    @classmethod
    def of(cls, objectives: Objectives, sets: Sequence[UtilitySet], safety: Sequence[Example]) -> _Measured:
        config, replies = objectives.config, objectives.replies(safety)
        of_utility = [None if one.is_decoded(config) else objectives.utility_measure(one.examples) for one in sets]
        of_margins = objectives.margin_measure(safety, replies) if config.measure != "decision" else None
        return cls(objectives, sets, safety, of_utility, of_margins)

    def __call__(self) -> list[Floats]:
        objectives = self.objectives
        found = [
            objectives.decoded(one) if measure is None else _outcomes(measure, len(one.examples))
            for measure, one in zip(self.of_utility, self.sets, strict=True)
        ]
        if self.of_margins is not None:
            return [*found, _outcomes(self.of_margins, len(self.safety))]
        return [*found, objectives.refusals(self.safety, objectives.replies(self.safety))]


def _outcomes(measure: ScoredMeasure, n_examples: int) -> Floats:
    outcomes_N = np.full(n_examples, np.nan)
    for batch in measure.batches:
        outcomes_N[batch.examples] = measure.baseline(batch)
    return outcomes_N


@contextmanager
def _without(ablator: Ablator, group: Sequence[Unit]) -> Iterator[None]:
    with ExitStack() as stack:
        for one in group:
            stack.enter_context(ablator.without(one.place, one.index))
        yield
