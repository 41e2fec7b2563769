"""Tokens and which of them are scored: what a model forward is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile


@dataclass(frozen=True)
class Row:
    """One token sequence and the tokens whose log-probability is wanted.

    `tokens[t]` is scored by the logits at `positions[t]`; for a reply the positions are those just before its
    tokens. `cut` tells that the prompt lost tokens on its left to fit the length limit, `reply_cut` that a reply lost
    its end.

    Several continuations can share what they have in common, as a tree: `branches` names the branch of each input
    token, `parents` the branch each branch continues (-1: none), and a token sees the earlier tokens of its own
    branch and of those above it. Both are empty for a plain sequence.

    `float32_logits` asks for logits in float32 whatever the model's dtype: of tokens that compete at one position,
    bfloat16 logits, which near 20 are 1/8 apart, often tie.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[int, ...]
    cut: bool = False
    branches: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    float32_logits: bool = False
    reply_cut: bool = False

    @classmethod
    def of_replies(
        cls,
        prompt: Sequence[int],
        replies: Sequence[Sequence[int]],
        *,
        cut: bool = False,
        reply_cut: bool = False,
    ) -> Row:
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
        row = cls(tuple(ids), tuple(positions), tokens, cut, reply_cut=reply_cut)
        if len(replies) == 1:
            return row
        return replace(row, branches=tuple(branches), parents=(-1, *(0,) * len(replies)))

    @classmethod
    def packed(cls, rows: Sequence[Row]) -> Row:
        """One row that scores the tokens of all `rows`, in their order, with the prefix they share run once."""
        if len(rows) == 1:
            return rows[0]
        n_shared = shared_prefix(rows)
        ids, branches = list(rows[0].ids[:n_shared]), [0] * n_shared
        parents, positions = [-1], []
        for row in rows:
            moved = len(ids) - n_shared
            positions += [place if place < n_shared else place + moved for place in row.positions]
            first = len(parents)
            parents += [0, *(first + parent for parent in row.parents[1:])]
            ids += row.ids[n_shared:]
            branches += [first + branch for branch in (row.branches or (0,) * len(row.ids))[n_shared:]]
        tokens = tuple(token for row in rows for token in row.tokens)
        return cls(
            tuple(ids),
            tuple(positions),
            tokens,
            any(row.cut for row in rows),
            tuple(branches),
            tuple(parents),
            any(row.float32_logits for row in rows),
            any(row.reply_cut for row in rows),
        )

    @property
    def reply_lengths(self) -> list[int]:
        """How many tokens are scored of each reply to the one prompt, in their order."""
        # The first token of every reply is scored at the last of the prompt.
        starts = [t for t, position in enumerate(self.positions) if position == self.positions[0]]
        return [end - start for start, end in pairwise([*starts, len(self.positions)])]

    @property
    def places(self) -> list[int]:
        """Place of each input token in its own conversation: a branch starts right behind the one it continues."""
        if not self.branches:
            return list(range(len(self.ids)))
        lengths = [self.branches.count(branch) for branch in range(len(self.parents))]
        next_place: list[int] = []
        for parent in self.parents:
            next_place.append(0 if parent < 0 else next_place[parent] + lengths[parent])
        places = []
        for branch in self.branches:
            places.append(next_place[branch])
            next_place[branch] += 1
        return places

    def context(self, position: int) -> list[int]:
        """The input tokens that the one at `position` sees, in order, itself included."""
        if not self.branches:
            return list(range(position + 1))
        seen = self.sees()[self.branches[position]]
        return [i for i, branch in enumerate(self.branches[: position + 1]) if seen[branch]]

    def sees(self) -> list[list[bool]]:
        """`[branch][other]`: whether tokens of `branch` see those of `other` that come before them."""
        above = [[branch == other for other in range(len(self.parents))] for branch in range(len(self.parents))]
        for branch, parent in enumerate(self.parents):
            if parent >= 0:
                above[branch] = [a or b for a, b in zip(above[branch], above[parent], strict=True)]
        return above


def shared_prefix(rows: Sequence[Row]) -> int:
    """How many input tokens all `rows` begin with, within their root branches."""
    roots = [row.ids[: row.branches.count(0)] if row.branches else row.ids for row in rows]
    same = takewhile(lambda column: len(set(column)) == 1, zip(*roots, strict=False))
    return sum(1 for _ in same)
