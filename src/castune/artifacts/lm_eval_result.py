"""What lm-evaluation-harness measured on one model, by its own protocol."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from castune.artifacts.formats import read_json, typed, write_json
from castune.artifacts.records import ModelRecord, Provenance, Settings

_KIND = "lm-eval result"
LM_EVAL_FILE = "lm_eval.json"


@dataclass(frozen=True)
class LmEvalScore:
    """One metric of one task, or of one group of tasks, as lm-eval reports it.

    Attributes:
        task: the task, or the group.
        metric: metric and filter as lm-eval names them: `acc,none`, `exact_match,strict-match`.
        value: the value; None where lm-eval's is no finite number.
        standard_error: of `value`, as lm-eval computes it; None where it has none.
        n: documents evaluated; of a group, those of all its tasks that have the metric.
        higher_is_better: None where the task does not say, or tasks of a group disagree.
        version: the task's or group's version; `N/A` where a group has none.
        num_fewshot: examples shown before each question; None for a group whose tasks differ.
    """

    task: str
    metric: str
    value: float | None
    standard_error: float | None
    n: int
    higher_is_better: bool | None
    version: str
    num_fewshot: int | None

    def __post_init__(self) -> None:
        for name in ("value", "standard_error"):
            number = getattr(self, name)
            if number is not None and not (isinstance(number, float) and math.isfinite(number)):
                raise ValueError(f"{name} of {self.task} {self.metric} is {number!r}, not a finite number")


@dataclass(frozen=True)
class LmEvalResult:
    """One model (base or tuned) on tasks of lm-evaluation-harness.

    Attributes:
        name: which arm this is: `base`, `safe`, `risky`, ...
        tasks: every metric of every task that was run, the members of groups included.
        groups: every aggregate of the groups that define one.
        members: for each group, its direct members: tasks or groups.
        settings: tasks asked for, limit, num_fewshot, batch_size, apply_chat_template, fewshot_as_multiturn,
            include_path, seed.
        model: identity of the evaluated model.
        provenance: versions (with `lm_eval`), machine, command, time.
        seconds: wall time from the first prompt to the last score; loading the data sets is not in it.
    """

    name: str
    tasks: tuple[LmEvalScore, ...]
    groups: tuple[LmEvalScore, ...]
    members: dict[str, list[str]]
    settings: Settings
    model: ModelRecord
    provenance: Provenance
    seconds: float

    def score(self, task: str, metric: str | None = None) -> LmEvalScore:
        """The score of a task or group.

        Args:
            task: task or group.
            metric: metric and filter, `acc,none`; may be left out where there is one only.

        Raises:
            KeyError: there is no such score, or there are several.
        """
        found = [
            score for score in (*self.groups, *self.tasks) if score.task == task and metric in (None, score.metric)
        ]
        if len(found) != 1:
            known = ", ".join(f"{score.task} {score.metric}" for score in (*self.groups, *self.tasks))
            raise KeyError(f"{len(found)} scores of {task!r} with metric {metric!r}; scores: {known}")
        return found[0]

    def save(self, path: str | Path) -> Path:
        """Write `lm_eval.json` into a directory (or to the given file), atomically. Returns the file."""
        path = _file(path)
        write_json(path, _KIND, asdict(self))
        return path

    def joined(self, other: LmEvalResult) -> LmEvalResult:
        """These tasks and those of another result with the same model and options; of a task in both, the other's."""
        mine = {score.task for score in (*other.tasks, *other.groups)}
        return replace(
            other,
            tasks=(*(score for score in self.tasks if score.task not in mine), *other.tasks),
            groups=(*(score for score in self.groups if score.task not in mine), *other.groups),
            members={**self.members, **other.members},
            settings={
                **other.settings,
                "tasks": [
                    *(t for t in self.settings["tasks"] if t not in other.settings["tasks"]),
                    *other.settings["tasks"],
                ],
            },
            seconds=round(self.seconds + other.seconds, 2),
        )

    @classmethod
    def load(cls, path: str | Path) -> LmEvalResult:
        """Read a result from its file or its directory.

        Raises:
            ArtifactError: missing, damaged, of another kind or schema version.
        """
        path = _file(path)
        record = read_json(path, _KIND, "castune lm-eval RUN --tasks TASKS")
        return typed(path, _KIND, cls, record)


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / LM_EVAL_FILE


def headline_scores(results: Mapping[str, LmEvalResult]) -> dict[tuple[str, str], dict[str, LmEvalScore]]:
    """By task and metric, the scores of every arm: of groups, and of tasks that are in none."""
    found: dict[tuple[str, str], dict[str, LmEvalScore]] = {}
    for arm, result in results.items():
        within = {member for members in result.members.values() for member in members}
        for score in (*result.groups, *result.tasks):
            if score.task not in within:
                found.setdefault((score.task, score.metric), {})[arm] = score
    return found
