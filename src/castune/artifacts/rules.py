"""By which rules of castune an artifact was made, and what has changed since.

A rule decides what a number means: what a loss is a loss of, which reply is wrong. Artifacts of older rules can be read
and say so; numbers of different rules do not compare.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

from castune.artifacts.records import Provenance

logger = logging.getLogger(__name__)

# Raised with every entry below.
RULES = 4

# What each number of rules changed, by the kind of artifact that it changed, and how to make that one again.
_CHANGES: dict[int, dict[str, str]] = {
    2: {
        "conflict map": "O(h) of lettered questions was mostly the gradient of the end of the turn; prompts of models "
        "without a chat template lacked their first token; diagnose again to compare it with newer maps",
        "adapter": "surgery and replay with lettered questions followed the end of the turn; prompts of models "
        "without a chat template lacked their first token; train again to compare it with newer adapters",
        "evaluation": "refused, cut off and unreadable answers to problems and lettered questions were left out of "
        "accuracy; castune judge reads the stored replies again",
    },
    3: {
        "evaluation": "a part of what was stated could be read as the answer (2 of 2√3, 5 of '5 or 7'), some stated "
        "answers and some refusals in other typography were not found; castune judge reads the stored replies again",
    },
    4: {
        "evaluation": "a reply without a word, such as a row of dots, was unscored and is no refusal now, so that an "
        "adapter which silences the model no longer looks safe; castune judge reads the stored replies again",
    },
}


def warn_of_old_rules(path: str | Path, kind: str, provenance: Provenance) -> None:
    """Say, once for each file and process, that an artifact was made by older rules, and what they were.

    Args:
        path: of the artifact.
        kind: what it is: conflict map, adapter or evaluation.
        provenance: its record; one that holds no rules is of the first.
    """
    made_by = provenance.get("rules", 1)
    if isinstance(made_by, int) and made_by < RULES:
        _warn(str(path), kind, made_by)


@lru_cache(maxsize=1024)
def _warn(path: str, kind: str, made_by: int) -> None:
    changes = [_CHANGES[rules][kind] for rules in range(made_by + 1, RULES + 1) if kind in _CHANGES[rules]]
    if changes:
        logger.warning("%s: this %s was made under older rules of castune, by which %s", path, kind, "; ".join(changes))
