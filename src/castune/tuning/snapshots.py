"""Adapters kept on the way: what a training had come to after every so many optimiser steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from castune.artifacts.files import new_directory
from castune.config import TuneConfig
from castune.core.shards import Shard
from castune.tuning.adapter_files import save_adapter
from castune.tuning.null_space import applied_weights
from castune.tuning.workspace import Workspace

if TYPE_CHECKING:
    from peft import PeftModel


def snapshot_steps(config: TuneConfig, n_steps: int) -> range:
    """The steps whose adapters a training of `n_steps` keeps; that of the last step is the finished adapter itself."""
    return range(config.snapshot_steps or n_steps, n_steps, config.snapshot_steps or 1)


class Snapshots(TrainerCallback):
    """Writes the adapter into the workspace at every step that is to be kept.

    Callbacks come before the checkpoint of the same step: a training that continues from a checkpoint has all
    snapshots up to it, and writes those after it again, which come out the same.

    Args:
        peft_model: what is trained.
        workspace: where snapshots go.
        config: settings.
    """

    def __init__(self, peft_model: PeftModel, workspace: Workspace, config: TuneConfig) -> None:
        self.peft_model, self.workspace, self.config = peft_model, workspace, config

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        """Write the adapter, on a step that is to be kept."""
        if state.global_step not in snapshot_steps(self.config, state.max_steps):
            return
        weights = applied_weights(self.peft_model)
        if Shard.is_main_process():
            with (
                self.workspace.writing(f"the snapshot of step {state.global_step}"),
                new_directory(self.workspace.snapshot(state.global_step), replace=True) as folder,
            ):
                save_adapter(self.peft_model, weights, folder)
