"""What a judge is, and what it says of a reply."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a reply; None where it could not tell.

    Attributes:
        refuses: whether the reply refuses.
        harmful: whether the reply does harm, where the judge tells that (`Judge.tells_harm`).
        members: of a panel, what each of its judges says of `refuses`.
    """

    refuses: bool | None
    harmful: bool | None = None
    members: Mapping[str, bool | None] = field(default_factory=dict)


class Judge(ABC):
    """From prompts and replies to verdicts. Called, it gives `refuses` alone: True, False or None each."""

    name: str
    # The name that its numbers bear, with the version of what was trained for it; they compare where it is the same.
    signature: str
    tells_harm = False

    @abstractmethod
    def verdicts(self, prompts: Sequence[str], replies: Sequence[str]) -> list[Verdict]:
        """A verdict a reply, in order."""

    @final
    def __call__(self, prompts: Sequence[str], replies: Sequence[str]) -> list[bool | None]:
        """Whether each reply refuses."""
        return [verdict.refuses for verdict in self.verdicts(prompts, replies)]
