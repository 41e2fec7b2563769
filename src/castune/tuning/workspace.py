"""Where an unfinished training lies: its checkpoints, and what it is a training of.

The folder stands beside the adapter that will come out. The same training continues from its last whole checkpoint; any
other one starts anew. Optimiser and random state are the Trainer's own files, which torch reads without running code in
them (`weights_only`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from castune.artifacts.files import write_text
from castune.artifacts.records import DataRecord, Settings
from castune.artifacts.tune_result import SNAPSHOTS
from castune.errors import CheckpointError, TrainingError

# Written into a checkpoint after everything else: a checkpoint without it is not whole.
_STATE = "castune.json"


@dataclass(frozen=True)
class Workspace:
    """The folder of one training until its adapter is finished."""

    folder: Path

    @classmethod
    def beside(cls, out: Path) -> Workspace:
        """The workspace of adapter directory `out`."""
        return cls(out.parent / f".{out.name}.unfinished")

    def open(self, training: dict[str, Any]) -> None:
        """Make room for the training that `training` (plain JSON) describes, and keep its whole checkpoints.

        What another training, or a checkpoint that was not finished, left here is removed.
        """
        file, text = self.folder / "training.json", json.dumps(training, sort_keys=True, indent=1)
        if not file.is_file() or file.read_bytes() != text.encode():
            self.remove()
            write_text(file, text)
        for path in self._checkpoints():
            if _state_in(path) is None:
                shutil.rmtree(path)

    @property
    def adapter(self) -> Path:
        """Where the adapter is put together."""
        return self.folder / "adapter"

    @property
    def last_phase(self) -> Path:
        """Where the adapter of the last phase is kept, of a training that selected again."""
        return self.folder / "last"

    def snapshot(self, step: int) -> Path:
        """Where the adapter of a step is kept, of its phase alone.

        It is there before the checkpoint of that step is whole.
        """
        return self.folder / SNAPSHOTS / str(step)

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Around writes: a full disk and the like become a clear error.

        Raises:
            CheckpointError: it could not be written.
        """
        try:
            yield
        # torch's zip writer and safetensors have errors of their own.
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            last = self.last_checkpoint()
            kept = f"{last[0].name} is kept, and the same command continues from it" if last else "none was before it"
            raise CheckpointError(
                f"{self.folder}: {what} could not be written ({error}); {kept}. Free some space, or write checkpoints "
                "less often with checkpoint_steps"
            ) from error

    def last_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The last whole checkpoint, and the state that was marked in it; None without one."""
        for path in reversed(self._checkpoints()):
            state = _state_in(path)
            if state is not None:
                return path, state
        return None

    def mark(self, step: int, state: dict[str, Any]) -> None:
        """Make the checkpoint of a step a whole one, with what its training has to know beside the Trainer's state."""
        write_text(self.folder / f"checkpoint-{step}" / _STATE, json.dumps(state))

    def leave(self) -> None:
        """Keep what a training that stopped can continue from; without any, remove everything."""
        shutil.rmtree(self.adapter, ignore_errors=True)
        if self.last_checkpoint() is None:
            self.remove()

    @contextmanager
    def kept_for_later(self) -> Iterator[None]:
        """Around a training: what it left can be continued from, unless it would come to the same error again."""
        try:
            yield
        except TrainingError:
            self.remove()
            raise
        except BaseException:
            self.leave()
            raise

    def remove_of(self, settings: Settings, data: DataRecord) -> None:
        """Remove the folder if it is of a training with these settings and data, which has ended since."""
        try:
            training = json.loads((self.folder / "training.json").read_text(encoding="utf-8"))
            same = (training.get("settings"), training.get("data")) == (settings, data)
        except (OSError, ValueError, AttributeError, RecursionError):
            return
        if same:
            self.remove()

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _checkpoints(self) -> list[Path]:
        numbers = [path.name.removeprefix("checkpoint-") for path in self.folder.glob("checkpoint-*")]
        return [self.folder / f"checkpoint-{n}" for n in sorted(int(n) for n in numbers if n.isdecimal())]


def _state_in(checkpoint: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return state if isinstance(state, dict) else None
