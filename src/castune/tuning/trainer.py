"""HF Trainer on castune's loss, and what castune adds to a Trainer of any kind."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from castune.config import TuneConfig
from castune.core.losses import RowBatch, reply_nll
from castune.core.progress import Progress
from castune.data.rows import Row
from castune.errors import TrainingError
from castune.tuning.adapter_files import save_adapter
from castune.tuning.surgery import Operation
from castune.tuning.trackers import PROJECT
from castune.tuning.workspace import Workspace

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def trainer_settings(
    config: TuneConfig, workspace: Workspace, device: torch.device, *, run_name: str | None = None
) -> dict[str, Any]:
    """The arguments of a Trainer, of whatever kind. Making them lets processes under torchrun find each other."""
    return {
        "output_dir": str(workspace.folder),
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "learning_rate": config.learning_rate,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "warmup_steps": config.warmup_ratio,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "lr_scheduler_type": config.scheduler,
        "optim": "adamw_torch",
        "seed": config.seed,
        "use_cpu": device.type == "cpu",
        "bf16": False,
        "activation_checkpointing": config.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": config.checkpoint_steps,
        "save_total_limit": 2,
        "report_to": list(config.report_to),
        "project": PROJECT,
        "run_name": run_name,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
    }


class SparseTraining(Trainer):
    """What castune adds to a Trainer of any kind; of TRL's, it stands before them among the base classes.

    Steps of examples of similar lengths, gradient surgery, checkpoints that are whole or absent, and one clear error
    for a loss that is not finite.
    """

    def prepare(
        self, config: TuneConfig, workspace: Workspace, lengths: Sequence[int], operation: Operation | None
    ) -> None:
        """Tell the trainer what it needs beside a Trainer's arguments; after `__init__`.

        Args:
            config: settings.
            workspace: where checkpoints go; a whole one that is there is continued from.
            lengths: tokens of the training examples.
            operation: gradient surgery.
        """
        self.remove_callback(PrinterCallback)
        self.add_callback(_NoInputGradients())
        self.config, self.workspace, self.lengths, self.operation = config, workspace, list(lengths), operation
        self.tokens_seen, self._seconds_before = 0, 0.0
        self._phase_start, self._begins_phase = 0, False
        self._started = time.perf_counter()
        if operation is not None:
            operation.check(self.accelerator)

    @property
    def seconds(self) -> float:
        """Wall time of the training, that before an interruption included."""
        return self._seconds_before + time.perf_counter() - self._started

    def within(self, start: int, end: int | None) -> None:
        """Train one phase only, from after step `start`, whose checkpoint is there, to step `end`; None: to the end.

        A phase that begins takes nothing from its checkpoint that belongs to the adapter of the one before.
        """
        self._phase_start = start
        if end is not None:
            self.add_callback(_PhaseEnd(end))

    def run(self, advance: Progress) -> None:
        """Train, from the last whole checkpoint if there is one.

        Raises:
            TrainingError: a loss is not finite.
            CheckpointError: a checkpoint cannot be written.
        """
        self.add_callback(_Progress(advance))
        found = self.workspace.last_checkpoint()
        self._started = time.perf_counter()
        if found is None:
            self.train()
            return
        checkpoint, state = found
        logger.info("training continues from %s", checkpoint.name)
        self._seconds_before = state["seconds"]
        self.tokens_seen = state["tokens"][self.args.process_index]
        self._begins_phase = checkpoint.name == f"checkpoint-{self._phase_start}"
        if self.operation is not None:
            self.operation.restore(state["surgery"], memories=not self._begins_phase)
        self.train(resume_from_checkpoint=str(checkpoint))

    def all_tokens(self) -> int:
        """Tokens that passed through the model, on all processes."""
        return sum(self._tokens_by_process())

    def training_step(self, model: PreTrainedModel, *args: object, **kwargs: object) -> Tensor:
        """A micro-batch forward and backward, and gradient surgery after the last one of an optimiser step."""
        loss: Tensor = super().training_step(model, *args, **kwargs)
        # Here gradients are accumulated and averaged over processes. A callback would see them clipped.
        if self.operation is not None and self.accelerator.sync_gradients:
            bare = self.accelerator.unwrap_model(model)
            self.operation(bare, self.accelerator, self.compute_loss_context_manager)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """What a Trainer logs, and with a loss how the gradients of the step went together before surgery."""
        if self.operation is not None and "loss" in logs:
            logs |= self.operation.logs()
        super().log(logs, start_time)

    def finite(self, loss: Tensor) -> Tensor:
        """The loss of a micro-batch, if it is a number.

        Raises:
            TrainingError: it is not.
        """
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; "
                f"try a learning_rate below {self.args.learning_rate:g}, or dtype float32. No adapter was written"
            )
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.config.group_by_length:
            return super()._get_train_sampler(train_dataset)
        # All examples of an optimiser step, over all processes, are of similar lengths.
        n = self.config.batch_size * self.config.accumulation * self.args.world_size
        return ByLength(n, self.lengths, self.config.seed)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel = None) -> None:
        if not self._begins_phase:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self._begins_phase:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # A new optimiser, in the place of the schedule where the old one was.
        schedule: Any = self.lr_scheduler
        step = self._phase_start
        rates = [base * at(step) for base, at in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        schedule.load_state_dict(
            {**schedule.state_dict(), "last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
        )
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _save_checkpoint(self, model: PreTrainedModel, trial: object) -> None:
        step = self.state.global_step
        tokens = self._tokens_by_process()
        with self.workspace.writing(f"the checkpoint of step {step}"):
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                surgery = None if self.operation is None else self.operation.state()
                max_steps = self.state.max_steps
                self.workspace.mark(
                    step, {"seconds": self.seconds, "tokens": tokens, "surgery": surgery, "max_steps": max_steps}
                )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The adapter of a checkpoint, and nothing else: no arguments in a pickle, no embeddings."""
        if self.args.should_save:
            save_adapter(self.accelerator.unwrap_model(self.model), state_dict, output_dir or self.args.output_dir)

    def _tokens_by_process(self) -> list[int]:
        mine = torch.tensor([self.tokens_seen], device=self.accelerator.device)
        return [int(n) for n in self.accelerator.gather(mine).tolist()]


class ReplyTrainer(SparseTraining):
    """Supervised fine-tuning: HF Trainer on castune's one loss.

    Args:
        peft_model: what is trained.
        settings: see `trainer_settings`.
        rows: the training examples.
        config: settings.
        workspace: where checkpoints go; a whole one that is there is continued from.
        operation: gradient surgery.
    """

    # The loss is a mean over examples: the Trainer itself averages over micro-batches.
    model_accepts_loss_kwargs = False

    def __init__(
        self,
        peft_model: PeftModel,
        settings: dict[str, Any],
        rows: Sequence[Row],
        config: TuneConfig,
        workspace: Workspace,
        operation: Operation | None = None,
    ) -> None:
        arguments = TrainingArguments(**settings)
        super().__init__(model=peft_model, args=arguments, train_dataset=_RowDataset(rows), data_collator=_collate)
        # Trainer's own __init__ infers it from the model's forward signature.
        self.model_accepts_loss_kwargs = False
        self.prepare(config, workspace, [len(row.ids) for row in rows], operation)

    def compute_loss(self, model: PreTrainedModel, inputs: dict[str, Any], *args: object, **kwargs: object) -> Tensor:
        """Mean over the examples of the batch of the NLL of their replies."""
        batch = RowBatch(**inputs)
        self.tokens_seen += int(batch.real_BS.sum())
        return self.finite(reply_nll(model, batch, fused=True).mean())


class ByLength(LengthGroupedSampler):
    """Random steps of examples of similar lengths; the same on all processes, others every epoch."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate, also when a training continues in a later epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        order = list(super().__iter__())
        steps = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        # The library's order goes from long to short several times an epoch. The longest step stays the first, so that
        # memory that does not suffice shows at once; one that is not full stays the last.
        first, last = steps[:1], steps[1:][-1:]
        between = steps[1:-1]
        shuffled = [between[i] for i in torch.randperm(len(between), generator=self.generator).tolist()]
        return iter([i for step in (*first, *shuffled, *last) for i in step])


def _collate(rows: list[Row]) -> dict[str, Any]:
    return dict(vars(RowBatch.of(rows)))


class _RowDataset(torch.utils.data.Dataset[Row]):
    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


class _NoInputGradients(TrainerCallback):
    """Undo what gradient checkpointing switches on, for which only its reentrant kind has a use.

    With gradients at the embeddings the backward pass would go through all layers, not only down to the lowest adapter.
    """

    def on_train_begin(
        self, _args: object, _state: object, _control: object, *, model: PreTrainedModel, **_kwargs: object
    ) -> None:
        base = model.get_base_model()
        base.disable_input_require_grads()
        vars(base).pop("_require_grads_hooks", None)


class _PhaseEnd(TrainerCallback):
    """Stops with a checkpoint after a step, unless the training ends there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        if state.global_step == self.step < state.max_steps:
            control.should_save = control.should_training_stop = True


class _Progress(TrainerCallback):
    def __init__(self, advance: Progress) -> None:
        self.advance = advance

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        if state.global_step:
            self.advance(state.global_step / max(1, state.max_steps))

    def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.advance.note = f"step {state.global_step} of {state.max_steps}, loss {logs['loss']:.4g}"

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        self.advance(1 / max(1, state.max_steps))
