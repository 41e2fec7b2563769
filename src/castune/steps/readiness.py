"""What can be refused before the first expensive step: every example as tokens, every module that is to be trained.

A map costs hours, and a training comes after it: what would stop the training must not be found then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from castune.config import DiagnoseConfig, EvaluateConfig, TuneConfig
from castune.core.heads import HeadLayout
from castune.core.loading import LoadedModel
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.diagnosis.domains import Utility, utility_sets
from castune.errors import DataError
from castune.evaluation.suites import Suite
from castune.tuning.preferences import preference_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[str, Example, Iterable[int]]


def require_ready(loaded: LoadedModel, *sets: Iterator[Tokens]) -> None:
    """Refuse data that the model's chat template or its vocabulary cannot take, before anything is computed.

    Args:
        loaded: the model and its tokenizer.
        sets: what is to be measured or trained on, as `calibration_tokens`, `training_tokens` and `suite_tokens` make
            it.

    Raises:
        DataError: the message names the set and the example.
        UnsupportedArchitecture: the heads of this model could not be located.
    """
    model, tokenizer = loaded
    HeadLayout.of(model)
    n_rows = int(model.get_input_embeddings().weight.shape[0])
    for name, example, ids in chain(*sets):
        if (largest := max(ids)) >= n_rows:
            raise DataError(
                f"{name}: example {example.id!r} contains token {tokenizer.convert_ids_to_tokens(largest)!r} with id "
                f"{largest}, but the model has only {n_rows} embeddings: the tokenizer belongs to another model, or "
                "has added tokens that the model lacks"
            )


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase, config: DiagnoseConfig, safety: Sequence[Example], utility: Utility
) -> Iterator[Tokens]:
    """Every example of D_safe and D_util as a diagnosis takes it."""
    chat = ChatFormat(tokenizer, max_length=config.max_length)
    sets = {"safety": safety, **{one.objective: one.examples for one in utility_sets(utility)}}
    for name, examples in sets.items():
        for example in examples:
            row = chat.loss_row(example)
            yield name, example, (*row.ids, *row.tokens)
            if example.is_question:
                yield name, example, _choice_tokens(chat, example)
            elif name == "safety" or not example.is_problem:
                yield name, example, chat.prompt_ids(example, reserve=config.max_new_tokens)[0]


def training_tokens(
    tokenizer: PreTrainedTokenizerBase, configs: Iterable[TuneConfig], align: Sequence[Example]
) -> Iterator[Tokens]:
    """Every example of D_align as the trainings of these settings take it."""
    for config in {(config.method, config.max_length): config for config in configs}.values():
        chat = ChatFormat(tokenizer, max_length=config.max_length)
        if config.method == "dpo":
            for example, pair in zip(align, preference_pairs(chat, align), strict=True):
                yield "training data", example, [token for part in pair.values() for token in part]
            continue
        for example in align:
            row = chat.loss_row(example)
            yield "training data", example, (*row.ids, *row.tokens)


def suite_tokens(
    tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig, suites: Sequence[Suite]
) -> Iterator[Tokens]:
    """Every example of the suites as an evaluation takes it; none where a server tokenises."""
    if config.backend == "openai":
        return
    chat = ChatFormat(tokenizer, max_length=config.max_length)
    for suite in suites:
        for example in suite.examples:
            yield f"suite {suite.name}", example, _suite_tokens(chat, suite, example, config)


def _suite_tokens(chat: ChatFormat, suite: Suite, example: Example, config: EvaluateConfig) -> Sequence[int]:
    if suite.purpose == "nll":
        row = chat.loss_row(example)
        return (*row.ids, *row.tokens)
    if suite.is_scored(config) and not suite.about.is_continuous:
        return _choice_tokens(chat, example)
    return chat.prompt_ids(example)[0]


def _choice_tokens(chat: ChatFormat, example: Example) -> list[int]:
    prompt, choices = chat.choices(example)
    return [*prompt, *(token for choice in choices for token in choice)]
