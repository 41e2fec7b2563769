"""Tokens and which of them are scored: what a model forward is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One token sequence and the tokens whose log-probability is wanted.

    `tokens[t]` is scored by the logits at `positions[t]`; for a reply the positions are those just before its
    tokens. Several replies to one prompt can share it: `branches` then names the reply each input token belongs to
    (0: the prompt), and a token sees the prompt and its own branch only. `cut` tells that the prompt lost tokens on
    its left to fit the length limit.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[int, ...]
    cut: bool = False
    branches: tuple[int, ...] = ()

    @classmethod
    def of_replies(cls, prompt: Sequence[int], replies: Sequence[Sequence[int]], *, cut: bool = False) -> Row:
        """A row that scores every token of each reply after `prompt`, one reply after the other.

        The last token of a reply is predicted, never an input.
        """
        ids, branches = list(prompt), [0] * len(prompt)
        positions: list[int] = []
        for branch, reply in enumerate(replies, start=1):
            positions += [len(prompt) - 1, *range(len(ids), len(ids) + len(reply) - 1)]
            ids += reply[:-1]
            branches += [branch] * (len(reply) - 1)
        tokens = tuple(token for reply in replies for token in reply)
        return cls(tuple(ids), tuple(positions), tokens, cut, tuple(branches) if len(replies) > 1 else ())

    @property
    def places(self) -> list[int]:
        """Place of each input token in its own conversation: branches all start right behind the prompt."""
        if not self.branches:
            return list(range(len(self.ids)))
        n_prompt, used = self.branches.count(0), dict.fromkeys(self.branches, 0)
        places = []
        for branch in self.branches:
            places.append((n_prompt if branch else 0) + used[branch])
            used[branch] += 1
        return places
