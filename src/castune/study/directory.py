"""The study directory: where runs, maps, logs and results of a study lie."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from castune.core.shards import Shard


@dataclass(frozen=True)
class StudyDirectory:
    """Paths of one study; what lies in the directory of a run says `steps.directory`."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.toml"

    @property
    def status_file(self) -> Path:
        """How far the units are, for whoever watches."""
        return self.path / "status.json"

    def status_file_of(self, share: Shard) -> Path:
        """How far the units of one of several jobs are."""
        return self.path / f"status-{share.index + 1}-of-{share.count}.json"

    @property
    def report_file(self) -> Path:
        """The page."""
        return self.path / "report.html"

    @property
    def figures(self) -> Path:
        """Every chart as files."""
        return self.path / "figures"

    @property
    def tables(self) -> Path:
        """The tables as CSV."""
        return self.path / "tables"

    @property
    def maps(self) -> Path:
        """A run directory for every conflict map."""
        return self.path / "maps"

    @property
    def runs(self) -> Path:
        """A run directory for every map and seed."""
        return self.path / "runs"

    @property
    def logs(self) -> Path:
        """A log for every unit and every worker."""
        return self.path / "logs"

    def log(self, unit: str) -> Path:
        """The log of a unit."""
        return self.logs / f"{re.sub(r'[^A-Za-z0-9.+-]+', '-', unit)}.log"
