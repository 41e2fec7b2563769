"""Names of lm-eval's tasks to its task objects: known, harmless and with their data sets, or one clear error."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from castune.errors import CastuneError

logger = logging.getLogger(__name__)

# What a task's configuration may not ask for: it would run code that came with the data or out of the model.
_REFUSED = {
    "unsafe_code": "it executes code that the model writes",
    "trust_remote_code": "it executes code of its data set",
    "hf_evaluate": "its metric is code from the hub",
}


def load_tasks(tasks: Sequence[str], include_path: str | Path | None) -> dict[str, Any]:
    """lm-eval's own objects for tasks and groups, with their data sets.

    Args:
        tasks: names of tasks, groups or tags.
        include_path: directory with further task files.

    Returns:
        `tasks` and `groups`, each by name, as lm-eval's `evaluate` takes them.

    Raises:
        CastuneError: a name is unknown, a task is refused, cannot be set up, or its data set not be reached.
    """
    import datasets
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise CastuneError(f"include_path: {include_path} is no directory")
    manager = TaskManager(include_path=include_path)
    index = manager.task_index
    _check_known(tasks, index, include_path)
    for task in tasks:
        for member, config in _configurations(task, index):
            _check_safe(member, config)
    datasets.disable_progress_bars()
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
    for task in tasks:
        found = _load_one(manager, task)
        twice = found["tasks"].keys() & loaded["tasks"].keys()
        if twice:
            raise CastuneError(f"tasks: {task} holds {', '.join(sorted(twice))}, which another one asked for holds too")
        loaded["tasks"] |= found["tasks"]
        loaded["groups"] |= found["groups"]
    for member, task_object in loaded["tasks"].items():
        _check_runnable(member, task_object)
    return loaded


def set_examples(tasks: Mapping[str, Any], num_fewshot: int | None, seed: int) -> None:
    """Set how many examples are shown and the seed they are drawn with, by the rules of lm-eval's `simple_evaluate`.

    Args:
        tasks: lm-eval's task objects by name; they are changed.
        num_fewshot: examples before each question; each task's own number when None.
        seed: of the examples that are drawn.

    Raises:
        CastuneError: a task has fewer examples than that.
    """
    fixed = []
    for task, task_object in tasks.items():
        is_fixed = task_object.get_config("num_fewshot") == 0
        if num_fewshot is not None and not is_fixed:
            task_object.set_config("num_fewshot", num_fewshot)
        elif num_fewshot:
            fixed.append(task)
        task_object.set_fewshot_seed(seed)
        wanted, sampler = task_object.get_config("num_fewshot") or 0, getattr(task_object, "sampler", None)
        if sampler is not None and len(sampler.df) < wanted:
            raise CastuneError(f"task {task}: num_fewshot is {wanted}, it has {len(sampler.df)} examples to show")
    if fixed:
        logger.warning("num_fewshot %d is not for %s, fixed at 0 by lm-eval", num_fewshot, ", ".join(fixed))


def _check_known(tasks: Sequence[str], index: Mapping[str, Any], include_path: str | Path | None) -> None:
    for task in tasks:
        if task in index:
            continue
        close = difflib.get_close_matches(task, list(index), n=5)
        hint = f"close: {', '.join(close)}" if close else "`lm-eval ls tasks` lists them"
        if include_path is not None:
            own = [name for name, entry in index.items() if _is_below(entry.yaml_path, include_path)]
            hint += f"; readable in {include_path}: {', '.join(sorted(own)) or 'none'}"
        raise CastuneError(f"lm-eval has no task {task!r}; {hint}")


def _is_below(path: Path | None, folder: str | Path) -> bool:
    return path is not None and Path(path).resolve().is_relative_to(Path(folder).resolve())


def _configurations(member: str | dict[str, Any], index: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and configuration of a task, group or tag and of all below it, before any of them is loaded.

    Args:
        member: a name, or what a group's file holds in the place of one: a name with changes, or a group of its own.
        index: lm-eval's index of all names.
    """
    if isinstance(member, dict):
        below = member.get("group", member.get("task"))
        yield str(below), member
        known = [below] if isinstance(below, str) and below in index else []
        listed = member["task"] if isinstance(member.get("task"), list) else []
        for part in (*known, *listed):
            yield from _configurations(part, index)
    elif member in index:
        entry = index[member]
        config = entry.cfg or {}
        yield member, config
        listed = config["task"] if isinstance(config.get("task"), list) else []
        # A tag has no file of its own, and stands for the tasks that carry it.
        for part in sorted(entry.tags) if entry.cfg is None else listed:
            yield from _configurations(part, index)


def _check_safe(task: str, config: Mapping[str, Any]) -> None:
    metrics = [metric for metric in config.get("metric_list") or () if isinstance(metric, dict)]
    parts = (config, config.get("dataset_kwargs") or {}, *metrics)
    for key, reason in _REFUSED.items():
        if any(part.get(key) for part in parts):
            raise CastuneError(f"task {task}: {reason} ({key}), which castune does not do")


def _load_one(manager: Any, task: str) -> dict[str, Any]:
    try:
        return dict(manager.load([task]))
    except OSError as error:  # network, gating, missing files: all of them are
        raise CastuneError(
            f"task {task}: its data set cannot be reached ({_one_line(error)}); lm-eval takes it from the hub, or from "
            "the cache where it was loaded before"
        ) from error
    except Exception as error:  # a task file may be wrong in any way, and may need packages of its own
        raise CastuneError(f"task {task}: cannot be set up: {type(error).__name__}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _check_runnable(task: str, task_object: object) -> None:
    """Tasks that are Python classes say in attributes what others say in their files."""
    if getattr(task_object, "UNSAFE_CODE", False):
        raise CastuneError(f"task {task}: {_REFUSED['unsafe_code']}, which castune does not do")
    if getattr(task_object, "MULTIMODAL", False):
        raise CastuneError(f"task {task}: it needs a multimodal model")
