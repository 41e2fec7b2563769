"""Phases of a training that selects again: between two of them the map is measured and other heads are chosen.

A phase begins as a training is continued from a checkpoint, with the step, the order of the data, the random state and
the learning-rate schedule of the one before; but with a new A, B = 0 and a new optimiser. What the phases before came
to is frozen under it (`stacking`).

In the workspace, `phases/STEP/` belongs to the phase that begins after STEP: `adapter` is what the one before it came
to, `stacked` all before it as one adapter, `map` the map of the model with that one, `selection.json` what is trained
now. It is written in this order, each whole or absent.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from castune.artifacts import HeadSelection
from castune.artifacts.files import new_directory
from castune.artifacts.head_selection import SELECTION_FILE
from castune.artifacts.records import Phase
from castune.artifacts.tune_result import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from castune.config import TuneConfig
from castune.errors import CastuneError
from castune.tuning.stacking import stack
from castune.tuning.workspace import Workspace

logger = logging.getLogger(__name__)

Reselect = Callable[[Path, HeadSelection, int, Path], HeadSelection]
"""`reselect(adapter, selection, step, out)`: the heads to train after a step, from the map of the base with `adapter`
merged in, which changes what is in `selection`. `out` is a directory for the map. The base is as it was then."""


@dataclass(frozen=True)
class Phases:
    """The phases of a training up to the current one. A training that does not select again has one.

    Attributes:
        workspace: of the training.
        every: optimiser steps of a phase; None: all.
        selections: of every phase so far, the current one last.
    """

    workspace: Workspace
    every: int | None
    selections: tuple[HeadSelection, ...]

    @property
    def selection(self) -> HeadSelection:
        """What the current phase trains."""
        return self.selections[-1]

    @property
    def union(self) -> HeadSelection:
        """What all phases so far trained."""
        return self.selections[0].joined(self.selections[1:])

    @property
    def starts(self) -> list[int]:
        """The step after which every phase begins."""
        return [number * (self.every or 0) for number in range(len(self.selections))]

    @property
    def start(self) -> int:
        """The step after which the current phase begins."""
        return self.starts[-1]

    @property
    def end(self) -> int | None:
        """The step after which the current phase ends, if the training does not end before; None: it has no end."""
        return None if self.every is None else self.start + self.every

    @property
    def frozen(self) -> Path | None:
        """All phases before the current one as one adapter; None: there were none."""
        return self._folder(self.start) / "stacked" if self.start else None

    def are_over(self) -> bool:
        """Whether a checkpoint says that the current phase has ended, and another one is to come."""
        found = self.workspace.last_checkpoint()
        if found is None or self.end is None:
            return False
        checkpoint, state = found
        return int(checkpoint.name.removeprefix("checkpoint-")) >= self.end < int(state["max_steps"])

    def next(self, reselect: Reselect) -> Phases:
        """The phases with the one that comes after the current one, whose end has a checkpoint."""
        assert self.end is not None
        step, folder = self.end, self._folder(self.end)
        if (folder / SELECTION_FILE).is_file():
            return self._with(HeadSelection.load(folder))
        with self.workspace.writing(f"the phase after step {step}"):
            if not (folder / "adapter").is_dir():
                checkpoint = self.workspace.folder / f"checkpoint-{step}"
                with new_directory(folder / "adapter") as aside:
                    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "README.md"):
                        if (checkpoint / name).is_file():
                            shutil.copyfile(checkpoint / name, aside / name)
            with new_directory(folder / "stacked", replace=True) as aside:
                stack([*self._ended(), folder / "adapter"], aside)
        logger.info("selecting again after step %d", step)
        selection = reselect(folder / "stacked", self.union, step, folder / "map")
        with self.workspace.writing(f"the selection after step {step}"):
            selection.save(folder)
        return self._with(selection)

    def write(self, adapter: Path, out: Path, *, step: int | None = None) -> None:
        """Write what all phases came to as one plain adapter of the layers of all of them.

        Args:
            adapter: what the current phase came to; with `step` what the phase at that time had come to after it.
            out: an existing directory.
            step: leave out what came after it.
        """
        ended = self._ended()
        before = ended if step is None else ended[: sum(start < step for start in self.starts[1:])]
        if not ended:
            shutil.copytree(adapter, out, dirs_exist_ok=True)
            return
        last = self.workspace.last_phase
        stack([*before, adapter], out, layers_of=[*ended, *([last] if last.is_dir() else [])])

    def maps(self) -> dict[int, Path]:
        """Where the map is that every phase but the first was selected from, by step."""
        return {start: self._folder(start) / "map" for start in self.starts[1:]}

    def record(self) -> tuple[Phase, ...]:
        """For `TuneResult.selections`."""
        if self.every is None:
            return ()
        return tuple(
            {
                "step": start,
                "units": [list(one) for one in found.units],
                "map_hash": found.conflict_map_hash,
            }
            for start, found in zip(self.starts, self.selections, strict=True)
        )

    def _with(self, selection: HeadSelection) -> Phases:
        return Phases(self.workspace, self.every, (*self.selections, selection))

    def _ended(self) -> list[Path]:
        """What every phase before the current one came to."""
        return [self._folder(start) / "adapter" for start in self.starts[1:]]

    def _folder(self, start: int) -> Path:
        return self.workspace.folder / "phases" / str(start)


def require_reselection(config: TuneConfig, selection: HeadSelection, reselect: Reselect | None) -> None:
    """Refuse a training that selects again and could not.

    Raises:
        CastuneError: no way to select again, or units that are no query heads.
    """
    if config.reselect_steps is None:
        return
    if not selection.only_heads:
        raise CastuneError(
            f"reselect_steps = {config.reselect_steps} is for query heads; selected are {selection.counted}"
        )
    if reselect is None:
        raise CastuneError(
            f"reselect_steps = {config.reselect_steps} needs a way to measure the map again: train in a run directory "
            "(castune tune, castune run), or give `reselect`"
        )
