"""Where `castune repair` finds an adapter, and where it leaves what it makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castune.artifacts.tune_result import ADAPTER_CONFIG
from castune.errors import CastuneError
from castune.steps.arm import Arm
from castune.steps.directory import RunDirectory
from castune.steps.subject import Subject


@dataclass(frozen=True)
class RepairPlace:
    """Where a repair leaves what it makes.

    Attributes:
        out: directory of its candidates, evaluations and record.
        adapter: directory of the repaired adapter.
        arm: the arm of the run that it becomes; None without a run.
    """

    out: Path
    adapter: Path
    arm: Arm | None = None


def place_of(
    source: Path,
    *,
    arm: str | None,
    base: str | None,
    of_model: Mapping[str, Any],
    beside: str | None,
    out: Path | None,
) -> tuple[Subject, RepairPlace]:
    """What is repaired, and where the result goes, as the command line says; checked before anything is loaded.

    Args:
        source: a run, or an adapter.
        arm: an arm of the run; the main one when absent.
        base: the base model; the run's, or the one that the adapter names, when absent.
        of_model: how the model is computed with.
        beside: name of the new arm of the run.
        out: directory for what is made of an adapter without a run.

    Raises:
        CastuneError: options that do not fit each other, no such arm or one without an adapter, or a
            name that is taken.
    """
    if (source / ADAPTER_CONFIG).is_file():
        if arm is not None or beside is not None:
            raise CastuneError(f"{source} is an adapter, which has no arms; give the run with --arm and --as")
        if out is None:
            raise CastuneError(
                f"{source} is an adapter without a run: say where to write the repaired one, with --out DIR"
            )
        subject = Subject.of(source, run=None, arm=None, base=base, of_model=of_model)
        return subject, RepairPlace(out, out / "adapter")
    if out is not None:
        raise CastuneError("the repaired adapter of a run is an arm of it: name it with --as NAME instead of --out")
    folder = RunDirectory(source)
    folder.load_recipe()  # refuses what is no run
    repaired = folder.arm(arm)
    if not repaired.has_adapter:
        raise CastuneError(f"{repaired.adapter}: no adapter there to repair; train it with: castune tune {source}")
    new = folder.new_arm(beside or f"{repaired.name}-repaired")
    subject = Subject.of(repaired.adapter, run=source, arm=repaired.name, base=base, of_model=of_model)
    return subject, RepairPlace(source / "repair" / new.name, new.adapter, new)
