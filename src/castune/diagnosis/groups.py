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
from typing import Any

import numpy as np

from castune.config import DiagnoseConfig
from castune.core.batching import tuned_batch_tokens
from castune.core.heads import HeadId, HeadLayout
from castune.core.modes import evaluation_mode
from castune.core.progress import progress
from castune.core.units import Unit, UnitId, UnitLayout
from castune.data.chat import ChatFormat
from castune.data.example import Example, require_replies
from castune.diagnosis.ablate import ScoredMeasure, mean_replacements
from castune.diagnosis.domains import Utility, utility_sets
from castune.diagnosis.objectives import Objectives
from castune.diagnosis.score import Floats, shift_of
from castune.diagnosis.sweep import Ablator, place_of


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
    model: Any,
    tokenizer: Any,
    *,
    groups: Sequence[Sequence[tuple[int, int] | Unit]],
    safety: Sequence[Example],
    utility: Utility,
    config: DiagnoseConfig | None = None,
) -> GroupShifts:
    """H_gen and H_safe of groups of heads, each group ablated as a whole.

    Args:
        model: a transformers model for causal language modelling; it is left as it was.
        tokenizer: its tokenizer, with a chat template.
        groups: the units of each group; plain (layer, head) pairs are query heads.
        safety: D_safe, harmful prompts with a safe reply each.
        utility: D_util, multiple-choice questions; or several such sets, by the names of their domains.
        config: settings of the diagnosis that the groups are compared with.

    Raises:
        UnsupportedArchitecture: the heads of this model could not be located.
        CastuneError: data without replies or answers.
    """
    config = config or DiagnoseConfig()
    require_replies(safety, "safety", "prompt, target")
    domains = utility_sets(utility)
    sets = [one.examples for one in domains]
    chat, layout = ChatFormat(tokenizer, max_length=config.max_length), HeadLayout.of(model)
    found = [[one if isinstance(one, UnitId) else HeadId(*one) for one in group] for group in groups]
    units = UnitLayout.of(model, layout, config.units, n_mlp_groups=config.mlp_groups, layers=config.layers)
    with evaluation_mode(model), progress("groups of heads", len(groups) + 1) as advance:
        if config.batch_tokens == "auto":
            config = config.model_copy(update={"batch_tokens": tuned_batch_tokens(model)})
        assert config.batch_tokens != "auto"
        filling = None
        if config.ablation == "mean":
            rows = [chat.loss_row(example) for example in chain(safety, *sets)]
            sites = dict.fromkeys(units.site(*place_of(one)) for group in found for one in group)
            filling = mean_replacements(model, sites, rows, batch_tokens=config.batch_tokens)
        ablator = Ablator(model, layout, (), resumable=False, replacements=filling, units=units)
        objectives = Objectives(ablator, tokenizer, chat, config)
        replies = objectives.replies(safety)
        # Where answers are worked out there is nothing to be scored in one forward.
        solves = [one.is_of_problems and one.measure(config) == "decision" for one in domains]
        of_utility = [None if solved else objectives.utility_measure(x) for x, solved in zip(sets, solves, strict=True)]
        of_margins = objectives.margin_measure(safety, replies) if config.measure == "margin" else None

        def measured() -> list[Floats]:
            """Outcomes of every utility set, then those of the safety set."""
            found = [
                objectives.right_answers(examples, objectives.solutions(examples))
                if measure is None
                else _outcomes(measure, len(examples))
                for measure, examples in zip(of_utility, sets, strict=True)
            ]
            if of_margins is not None:
                return [*found, _outcomes(of_margins, len(safety))]
            return [*found, objectives.refusals(safety, objectives.replies(safety))]

        baseline = measured()
        advance()
        ablated: list[list[Floats]] = []
        for group in found:
            with _without(ablator, group):
                ablated.append(measured())
            advance()
    shifts = [shift_of(one.measure(config)) for one in domains] + [shift_of(config.measure)]
    outcomes = zip(shifts, zip(*ablated, strict=True), baseline, strict=True)
    *of_domains, (safety_shift, safety_se) = [shift(np.array(some_GN), whole_N) for shift, some_GN, whole_N in outcomes]
    shifts_D2G = np.array(of_domains)
    # Domains are independent samples.
    utility_se = np.sqrt((shifts_D2G[:, 1] ** 2).sum(0)) / len(sets)
    return GroupShifts(shifts_D2G[:, 0].mean(0), utility_se, safety_shift, safety_se)


def _outcomes(measure: ScoredMeasure, n_examples: int) -> Floats:
    outcomes_N = np.full(n_examples, np.nan)
    for batch in measure.batches:
        outcomes_N[batch.examples] = measure.baseline(batch)
    return outcomes_N


@contextmanager
def _without(ablator: Ablator, group: Sequence[Unit]) -> Iterator[None]:
    with ExitStack() as stack:
        for one in group:
            stack.enter_context(ablator.without(one.layer, one.number, one.kind))
        yield
