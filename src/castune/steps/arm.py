"""An arm of a run: a selection of heads and the adapter made for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from castune.artifacts import HeadSelection
from castune.artifacts.head_selection import SELECTION_FILE
from castune.artifacts.masked_adapter import MASK_FILE
from castune.artifacts.projected_adapter import PROJECTION_FILE
from castune.artifacts.tune_result import TUNE_FILE
from castune.names import heads_name


@dataclass(frozen=True)
class Arm:
    """One selection with its adapter: the main arm, or one beside it."""

    name: str
    folder: Path

    @property
    def selection_file(self) -> Path:
        """Where its heads are."""
        return self.folder / SELECTION_FILE

    @property
    def adapter(self) -> Path:
        """Its adapter directory."""
        return self.folder / "adapter"

    @property
    def is_trained(self) -> bool:
        """Whether its adapter is there, and was trained here."""
        return (self.adapter / TUNE_FILE).is_file()

    @property
    def is_made_of_others(self) -> bool:
        """Whether its adapter is there, and was made of others (`castune mask`, `castune project`)."""
        return any((self.adapter / name).is_file() for name in (MASK_FILE, PROJECTION_FILE))

    @property
    def has_adapter(self) -> bool:
        """Whether its adapter is there, however it was made."""
        return self.is_trained or self.is_made_of_others


def arm_name(selection: HeadSelection) -> str:
    """The name of a selection's arm (`castune.names`)."""
    return heads_name(selection.zone, selection.fraction, selection.bucket, selection.buckets, selection.score)
