"""Tokens and which of them are scored: what a model forward is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One token sequence and the tokens whose log-probability is wanted.

    `tokens[t]` is scored by the logits at `positions[t]`; for a reply the positions are those just before its
    tokens. `cut` tells that the prompt lost tokens on its left to fit the length limit.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[int, ...]
    cut: bool = False

    @classmethod
    def of_reply(cls, prompt: Sequence[int], reply: Sequence[int], *, cut: bool = False) -> Row:
        """A row that scores every token of `reply` after `prompt`."""
        start = len(prompt)
        # The last reply token is predicted, never an input.
        ids = (*prompt, *reply[:-1])
        return cls(ids, tuple(range(start - 1, start - 1 + len(reply))), tuple(reply), cut)
