"""Utility domains: several named sets of examples, each with its own map, instead of one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from castune.config import DiagnoseConfig, Measure, check_domain_names
from castune.data.example import (
    Example,
    content_hash,
    require_helpful_replies,
    require_questions,
    require_solutions,
)
from castune.errors import CastuneError, DataError

Utility = Sequence[Example] | Mapping[str, Sequence[Example]]
"""D_util: examples, or examples by the name of their domain."""


@dataclass(frozen=True)
class UtilitySet:
    """The examples of one domain.

    Attributes:
        name: of the domain; `utility` for a set without a name.
        objective: what it is called in journal, `ablation.parquet` and errors: `utility`, or `utility:NAME` where
            there are others beside it.
        examples: questions, problems with worked solutions, or harmless prompts with replies.
    """

    name: str
    objective: str
    examples: Sequence[Example]

    @property
    def is_of_problems(self) -> bool:
        """Whether these are problems, which have a measure of their own (`DiagnoseConfig.problems`)."""
        return self.examples[0].is_problem

    @property
    def is_of_replies(self) -> bool:
        """Whether these are harmless prompts, each with the reply that it should get."""
        return not (self.examples[0].is_question or self.is_of_problems)

    def is_decoded(self, config: DiagnoseConfig) -> bool:
        """Whether the outcomes are decisions on what the model writes."""
        return self.measure(config) == "decision" and not self.examples[0].is_question

    def measure(self, config: DiagnoseConfig) -> Measure:
        """How the set is measured."""
        return config.measure_of(problems=self.is_of_problems)


def utility_sets(utility: Utility) -> list[UtilitySet]:
    """The utility sets of a diagnosis, sorted by name: the order in which domains are given changes nothing.

    Raises:
        CastuneError: no domain, or a name that cannot be one.
    """
    if not isinstance(utility, Mapping):
        return [UtilitySet("utility", "utility", utility)]
    if not utility:
        raise CastuneError("utility: no domains; give questions, or questions by the name of their domain")
    try:
        check_domain_names(utility)
    except CastuneError as error:
        raise CastuneError(f"utility: {error}") from None
    alone = len(utility) == 1
    return [UtilitySet(name, "utility" if alone else f"utility:{name}", utility[name]) for name in sorted(utility)]


def checked_sets(utility: Utility, config: DiagnoseConfig) -> list[UtilitySet]:
    """The utility sets of a diagnosis, each fit to be measured.

    Raises:
        CastuneError: see `utility_sets`; or `reply_domains` names a domain that is not there.
        DataError: a set of fewer than two examples, or that is neither of multiple-choice questions nor of problems
            with worked solutions, nor, where `reply_domains` names it, of prompts with replies.
    """
    sets = utility_sets(utility)
    names = [one.name for one in sets]
    for name in config.reply_domains:
        if name not in names:
            raise CastuneError(
                f"diagnose.reply_domains names {name!r}, and there is no such utility domain; there "
                f"{'is' if len(names) == 1 else 'are'} {', '.join(map(repr, names))}"
            )
    for one in sets:
        what = f"utility: domain {one.name!r}" if isinstance(utility, Mapping) else "utility"
        if len(one.examples) < 2:
            raise DataError(f"{what}: {len(one.examples)} examples, a diagnosis needs at least 2")
        if one.name in config.reply_domains:
            require_helpful_replies(one.examples, what)
        elif one.is_of_problems:
            require_solutions(one.examples, what)
        else:
            require_questions(one.examples, what, one.name)
    return sets


def utility_hash(sets: Sequence[UtilitySet]) -> str:
    """Digest of all utility sets (first 16 hex digits of SHA-256); of a single one, that of its examples."""
    hashes = {one.name: content_hash(one.examples) for one in sets}
    if len(hashes) == 1:
        return hashes.popitem()[1]
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]
