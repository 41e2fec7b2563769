"""Utility domains: several named sets of questions, each with its own map, instead of one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from castune.config import DiagnoseConfig, Measure, check_domain_names
from castune.data.example import Example, content_hash, require_questions, require_solutions
from castune.errors import CastuneError, DataError

Utility = Sequence[Example] | Mapping[str, Sequence[Example]]
"""D_util: examples, or examples by the name of their domain."""


@dataclass(frozen=True)
class UtilitySet:
    """The questions of one domain.

    Attributes:
        name: of the domain; `utility` for a set without a name.
        objective: what it is called in journal, `ablation.parquet` and errors: `utility`, or `utility:NAME` where
            there are others beside it.
        examples: the questions, or problems with worked solutions.
    """

    name: str
    objective: str
    examples: Sequence[Example]

    @property
    def is_of_problems(self) -> bool:
        """Whether these are problems, which have a measure of their own (`DiagnoseConfig.problems`)."""
        return self.examples[0].is_problem

    def measure(self, config: DiagnoseConfig) -> Measure:
        """How the set is measured."""
        return config.measure_of(problems=self.is_of_problems)


def utility_sets(utility: Utility) -> list[UtilitySet]:
    """The utility sets of a diagnosis, sorted by name: the order in which domains are given changes nothing.

    Raises:
        CastuneError: no domain, or a name that cannot be one.
        DataError: a set of fewer than two examples, or that is neither of multiple-choice questions nor of problems
            with worked solutions.
    """
    if not isinstance(utility, Mapping):
        _check(utility, "utility")
        return [UtilitySet("utility", "utility", utility)]
    if not utility:
        raise CastuneError("utility: no domains; give questions, or questions by the name of their domain")
    try:
        check_domain_names(utility)
    except CastuneError as error:
        raise CastuneError(f"utility: {error}") from None
    for name, examples in utility.items():
        _check(examples, f"utility: domain {name!r}")
    alone = len(utility) == 1
    return [UtilitySet(name, "utility" if alone else f"utility:{name}", utility[name]) for name in sorted(utility)]


def utility_hash(sets: Sequence[UtilitySet]) -> str:
    """Digest of all utility sets (first 16 hex digits of SHA-256); of a single one, that of its examples."""
    hashes = {one.name: content_hash(one.examples) for one in sets}
    if len(hashes) == 1:
        return hashes.popitem()[1]
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]


def _check(examples: Sequence[Example], name: str) -> None:
    if len(examples) < 2:
        raise DataError(f"{name}: {len(examples)} examples, a diagnosis needs at least 2")
    if examples[0].is_problem:
        require_solutions(examples, name)
    else:
        require_questions(examples, name)
