"""The selections of a run: of its main arm, and of the arms to compare it with."""

from __future__ import annotations

from castune.artifacts import ConflictMap, HeadSelection
from castune.config import SelectConfig
from castune.names import ArmName
from castune.selection import select
from castune.steps.arm import Arm, arm_name
from castune.steps.directory import RunDirectory


def select_step(folder: RunDirectory, config: SelectConfig, cmap: ConflictMap) -> list[tuple[Arm, ArmName]]:
    """Write the selections of the main arm and of the arms to compare it with; returns them with what they change."""
    main = choose(cmap, config)
    main.save(folder.path)
    names = [ArmName.parse(text) for text in config.compare]
    return [
        (folder.main_arm(main), ArmName()),
        *((select_arm(folder, name, config, cmap), name) for name in names),
    ]


def select_arm(folder: RunDirectory, name: ArmName, config: SelectConfig, cmap: ConflictMap) -> Arm:
    """Write the selection of the arm of that name; of the main one's size unless the name says another."""
    main = folder.main_selection()
    size = config.fraction
    if main is not None:
        size = len(main.units) / main.n_total
        if not main.only_heads:  # the same share of each kind, which rounds apart for each
            size = main.fraction or (1 / main.buckets if main.buckets else size)
    selection = select(
        cmap,
        zone=name.zone or "safe",
        fraction=size if name.fraction is None else name.fraction,
        buckets=name.buckets,
        bucket=name.bucket,
        score=name.score or config.score,
        seed=config.seed,
    )
    arm = folder.side_arm(arm_name(selection) + name.suffix)
    selection.save(arm.folder)
    return arm


def choose(cmap: ConflictMap, config: SelectConfig) -> HeadSelection:
    """The selection a `SelectConfig` describes."""
    return select(
        cmap,
        zone=config.zone,
        fraction=config.fraction,
        buckets=config.buckets,
        bucket=config.bucket,
        score=config.score,
        seed=config.seed,
    )
