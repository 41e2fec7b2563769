"""Trackers that follow a training: transformers' own integrations, told to write beside the adapter."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from castune.core.shards import Shard
from castune.errors import CastuneError

# Where and as what project a training is kept unless the environment says so; trackio has one database for all, which
# its dashboard reads.
PROJECT = "castune"
_PLACES = {"tensorboard": "TENSORBOARD_LOGGING_DIR", "wandb": "WANDB_DIR"}


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that cannot be imported: before a model is loaded, not after.

    Raises:
        CastuneError: the message says what to install.
    """
    for name in names:
        # transformers writes TensorBoard's files by either package.
        packages = (name, "tensorboardX") if name == "tensorboard" else (name,)
        reasons = list(map(_why_not, packages))
        if all(reasons):
            raise CastuneError(
                f'report_to = "{name}" needs the package {name}, which cannot be imported ({reasons[0]}): '
                f"python -m pip install {name}"
            )


def _why_not(package: str) -> str:
    """Why a package cannot be imported; nothing where it can."""
    spec = importlib.util.find_spec(package)
    # A folder of that name where Python looks, as trackers leave them, has no origin.
    if spec is None or spec.origin is None:
        return "it is not installed"
    try:
        importlib.import_module(package)
    except ImportError as error:
        return str(error)
    return ""


def log_folder(adapter: Path, *, goes_on: bool) -> Path:
    """Where trackers write: `ADAPTER-logs/1`, of another training of the same adapter `2`, ...

    Args:
        adapter: the adapter directory.
        goes_on: whether the training continues one that was stopped, in the folder of which it goes on.
    """
    parent = adapter.with_name(f"{adapter.name}-logs")
    last = max((int(path.name) for path in parent.glob("*") if path.name.isdecimal()), default=0)
    return parent / str(max(1, last if goes_on else last + 1))


@contextmanager
def trackers_in(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Let trackers of trainings inside the `with` block write into a folder, and end what they leave open.

    What the environment says of their places and projects holds.
    """
    wanted = {_PLACES[name]: folder / name for name in names if name in _PLACES}
    added = {key: str(place) for key, place in wanted.items() if key not in os.environ}
    if Shard.is_main_process():
        for place in added.values():
            Path(place).mkdir(parents=True, exist_ok=True)
    if "wandb" in names and "WANDB_PROJECT" not in os.environ:
        added["WANDB_PROJECT"] = PROJECT
    os.environ.update(added)
    run_before = getattr(sys.modules.get("wandb"), "run", None)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]
        wandb = sys.modules.get("wandb")
        if "wandb" in names and wandb is not None and run_before is None:
            # transformers leaves the run open, and the next arm would be logged into it.
            wandb.finish()
            # W&B reads its environment once a process, and the next arm has another folder.
            wandb.teardown()
