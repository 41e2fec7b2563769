"""One training, phase after phase: the model is wrapped, trained by HF's Trainer, and left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import set_seed

from castune.artifacts import Certificate, HeadSelection
from castune.artifacts.files import new_directory
from castune.artifacts.records import NullSpaceRecord
from castune.config import TuneConfig
from castune.core.checksum import unchanged
from castune.core.heads import HeadLayout
from castune.core.progress import progress
from castune.core.quantisation import dense_weight
from castune.core.shards import Shard
from castune.core.units import UnitLayout
from castune.errors import CastuneError, TrainingError
from castune.tuning.adapter_files import save_adapter
from castune.tuning.null_space import NullSpace, applied_weights
from castune.tuning.phases import Phases, Reselect
from castune.tuning.preferences import preference_trainer
from castune.tuning.row_lora import budget, sparse_lora
from castune.tuning.rows import TrainingRows
from castune.tuning.snapshots import Snapshots
from castune.tuning.stacking import frozen_updates
from castune.tuning.surgery import Operation, parameter_groups
from castune.tuning.targets import targets, units_for
from castune.tuning.trainer import ReplyTrainer
from castune.tuning.verify import certificate_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Training:
    """A training that came to its end; `wait` waits for the other processes of it."""

    base: _Base
    phases: Phases
    budget: dict[str, int]
    losses: tuple[tuple[int, float], ...]
    steps: int
    max_steps: int
    tokens: int
    seconds: float
    surgery: dict[str, Any] | None
    null_space: NullSpaceRecord | None
    wait: Callable[[], None]


def trained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    phases: Phases,
    data: TrainingRows,
    config: TuneConfig,
    settings: dict[str, Any],
    reselect: Reselect | None,
) -> Training:
    """Train phase after phase, and leave the adapter in the workspace and the model as it was."""
    while True:
        if not phases.are_over():
            run = _phase(model, tokenizer, phases, data, config, settings)
            if run.steps == run.max_steps:
                break
        assert reselect is not None
        phases = phases.next(reselect)
    if len(phases.selections) == 1:
        return run
    workspace = phases.workspace
    with workspace.writing("the adapter"), new_directory(workspace.adapter, replace=True) as folder:
        phases.write(workspace.last_phase, folder)
    layout = units_for(model, HeadLayout.of(model), phases.union)
    return replace(run, base=_Base.of(model, layout, phases.union))


def _phase(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    phases: Phases,
    data: TrainingRows,
    config: TuneConfig,
    settings: dict[str, Any],
) -> Training:
    """Train the current phase to its end, or from where it was stopped."""
    selection, workspace = phases.selection, phases.workspace
    seed = config.seed + len(phases.selections) - 1
    set_seed(seed)
    layout = units_for(model, HeadLayout.of(model), selection)
    base = _Base.of(model, layout, selection)
    with unchanged(model, "training"), _left_as_it_was(model):
        null_space = None
        if config.null_space is not None:
            wanted, rows = targets(layout, selection), data.utility_rows
            null_space = NullSpace.of(model, wanted, rows, config.null_space, batch_size=config.batch_size)
        peft_model = sparse_lora(
            model, selection, r=config.rank, alpha=config.alpha, freeze_a=config.freeze_a, seed=seed
        )
        try:
            if null_space is not None:
                null_space.keep(peft_model)
            ledger = budget(peft_model, layout, selection)
            operation = None
            if config.surgery != "none":
                groups = parameter_groups(peft_model, layout, selection, config.surgery_granularity)
                operation = Operation(data.utility_rows, config, groups)
            trainer: Any
            if config.method == "dpo":
                trainer = preference_trainer(peft_model, tokenizer, settings, data.pairs, config, workspace, operation)
            else:
                rows = [*data.rows, *data.replayed]
                trainer = ReplyTrainer(peft_model, settings, rows, config, workspace, operation)
            if trainer.is_fsdp_enabled and config.reselect_steps is not None:
                raise CastuneError("reselect_steps does not work with FSDP; leave out one of them")
            if trainer.is_fsdp_enabled:
                base = base.on_cpu()  # nobody has the whole of the base soon
            if config.snapshot_steps is not None:
                trainer.add_callback(Snapshots(peft_model, workspace, config))
            trainer.within(phases.start, phases.end)
            with frozen_updates(model, phases.frozen), progress("training", 1.0) as advance:
                trainer.run(advance)
            weights = applied_weights(peft_model)
            _check_finite(weights.values(), config)
            found = Training(
                base=base,
                phases=phases,
                budget=ledger,
                losses=tuple((log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log),
                steps=trainer.state.global_step,
                max_steps=trainer.state.max_steps,
                tokens=trainer.all_tokens(),
                seconds=trainer.seconds,
                surgery=None if operation is None else operation.record,
                null_space=None if null_space is None else null_space.record,
                wait=trainer.accelerator.wait_for_everyone,
            )
            if Shard.is_main_process() and found.steps == found.max_steps:
                with workspace.writing("the adapter"):
                    save_adapter(peft_model, weights, workspace.last_phase if phases.start else workspace.adapter)
            return found
        finally:
            peft_model.unload()


@dataclass(frozen=True)
class _Base:
    """What a certificate needs of the base model, taken before the training: FSDP shards it for good."""

    layout: UnitLayout
    projections: dict[str, Tensor]
    n_tensors: int
    modules: list[str]

    @classmethod
    def of(cls, model: PreTrainedModel, layout: UnitLayout, selection: HeadSelection) -> _Base:
        projections = {path: dense_weight(model.get_submodule(path)) for path in targets(layout, selection)}
        modules = [name for name, _ in model.named_modules()]
        return cls(layout, projections, sum(1 for _ in model.named_parameters()), modules)

    def on_cpu(self) -> _Base:
        return replace(self, projections={path: weight.cpu() for path, weight in self.projections.items()})

    def certificate(self, adapter: Path, selection: HeadSelection) -> Certificate:
        return certificate_of(
            self.projections, self.layout, adapter, selection, n_tensors=self.n_tensors, modules=self.modules
        )


@contextmanager
def _left_as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Undo what a Trainer changes in a model beside its weights."""
    modes = [(module, module.training) for module in model.modules()]
    required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    attributes = set(vars(model))
    configs = [model.config, model.config.get_text_config(decoder=True), model.generation_config]
    settings = [
        (config, name, getattr(config, name))
        for config in configs
        for name in ("use_cache", "pad_token_id")
        if hasattr(config, name)
    ]
    checkpointing = _keeps_no_activations(model)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required_grad[name])
        for config, name, value in settings:
            setattr(config, name, value)
        for name in set(vars(model)) - attributes:
            delattr(model, name)  # TRL puts a forward of its own there
        if _keeps_no_activations(model) and not checkpointing:
            model.activation_checkpointing_disable()


def _keeps_no_activations(model: PreTrainedModel) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _check_finite(weights: Iterable[Tensor], config: TuneConfig) -> None:
    # The loss of the last step was finite, its update need not be.
    if not all(torch.isfinite(tensor).all() for tensor in weights):
        raise TrainingError(
            f"the last update made weights that are not finite; try a learning_rate below {config.learning_rate:g}. "
            "No adapter was written"
        )
