"""Training the selected heads: HF Trainer, castune's one loss, the paper's Table 3 as defaults."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from castune.artifacts import HeadSelection, TuneResult
from castune.config import TuneConfig
from castune.core.heads import HeadLayout
from castune.core.losses import RowBatch, reply_nll
from castune.core.progress import Advance, progress
from castune.core.provenance import model_record, provenance
from castune.data.chat import ChatFormat
from castune.data.example import Example, content_hash, require_replies
from castune.data.rows import Row
from castune.errors import CastuneError, DataError, TrainingError
from castune.tune.row_lora import budget, sparse_lora
from castune.tune.surgery import Operation, parameter_groups, require_method
from castune.tune.verify import certify


def tune(
    model: Any,
    tokenizer: Any,
    selection: HeadSelection,
    *,
    data: Sequence[Example],
    out: str | Path,
    config: TuneConfig | None = None,
    source: str | None = None,
    utility: Sequence[Example] | None = None,
    utility_source: str | None = None,
) -> TuneResult:
    """Train the selected heads and write adapter, certificate and record.

    Args:
        model: the base model; it is wrapped for the training and left as it was.
        tokenizer: its tokenizer, with a chat template.
        selection: the heads to train.
        data: D_align, prompts with replies.
        out: the adapter directory. It is complete or absent, never half-written.
        config: settings; the paper's Table 3 by default.
        source: name of the data source, for the record.
        utility: D_util, the reference of gradient surgery: questions, or prompts with replies. Not used without.
        utility_source: name of its source, for the record.

    Raises:
        CastuneError: gradient surgery without utility data, or a method of it that is not installed.
        DataError: an example has no reply, or a reply that does not fit.
        TrainingError: a loss is not finite, or surgery cannot reach the gradients.
        CertificateError: the trained adapter touches anything outside the selection.
    """
    config = config or TuneConfig()
    out = Path(out)
    chat = ChatFormat(tokenizer, max_length=config.max_length)
    if not data:
        raise DataError("no training examples")
    require_replies(data, "training data", "prompt, completion")
    rows = [chat.loss_row(example) for example in data]
    utility_rows = _utility_rows(config, chat, utility)
    # Before the adapter is built: the seed also decides the initial A.
    set_seed(config.seed)
    layout = HeadLayout.of(model)
    modes = [(module, module.training) for module in model.modules()]
    used_cache = getattr(model.config, "use_cache", None)
    required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    peft_model = sparse_lora(model, selection, r=config.rank, alpha=config.alpha, freeze_a=config.freeze_a)
    ledger = budget(peft_model, layout, selection)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        try:
            started = time.perf_counter()
            operation = None
            if config.surgery != "none":
                groups = parameter_groups(peft_model, layout, selection, config.surgery_granularity)
                operation = Operation(utility_rows, config, groups)
            trainer = _train(peft_model, rows, config, aside, operation)
            seconds = time.perf_counter() - started
            _check_finite(peft_model, config)
            peft_model.save_pretrained(aside / "adapter")
        finally:
            peft_model.unload()
            for module, training in modes:
                module.training = training
            if used_cache is not None:
                model.config.use_cache = used_cache  # Trainer turns it off
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(required_grad[name])
        surgery = None
        if operation is not None and utility:
            surgery = {**operation.record, "utility": _data_record(utility, utility_rows, utility_source)}
        result = TuneResult(
            adapter=out.name,
            certificate=certify(model, aside / "adapter", selection),
            budget=ledger,
            settings=config.model_dump(mode="json"),
            data=_data_record(data, rows, source),
            losses=tuple((log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log),
            steps=trainer.state.global_step,
            tokens=trainer.tokens_seen,
            seconds=round(seconds, 2),
            model=model_record(model),
            provenance=provenance(config.seed),
            surgery=surgery,
        )
        result.save(aside / "adapter")
        if out.exists():
            shutil.rmtree(out)
        (aside / "adapter").rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return result


class ReplyTrainer(Trainer):
    """HF Trainer on castune's loss, with gradient surgery if `operation` is set; the rest is the Trainer's own."""

    tokens_seen = 0
    operation: Operation | None = None
    # The loss is a mean over examples: the Trainer itself averages over micro-batches.
    model_accepts_loss_kwargs = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # Trainer's own __init__ infers it from the model's forward signature.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Mean over the examples of the batch of the NLL of their replies."""
        batch = RowBatch(**inputs)
        self.tokens_seen += int(batch.real_BS.sum())
        loss = reply_nll(model, batch).mean()
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; "
                f"try a learning_rate below {self.args.learning_rate:g}, or dtype float32. No adapter was written"
            )
        return loss

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        """A micro-batch forward and backward, and gradient surgery after the last one of an optimiser step."""
        loss: Tensor = super().training_step(model, *args, **kwargs)
        # Here gradients are accumulated and averaged over processes. A callback would see them clipped.
        if self.operation is not None and self.accelerator.sync_gradients:
            bare = self.accelerator.unwrap_model(model)
            self.operation(bare, self.accelerator, self.compute_loss_context_manager)
        return loss


def _utility_rows(config: TuneConfig, chat: ChatFormat, utility: Sequence[Example] | None) -> list[Row]:
    """The rows of D_util that surgery needs; none without surgery."""
    if config.surgery == "none":
        return []
    require_method(config.surgery)
    if not utility:
        raise CastuneError(
            f'surgery = "{config.surgery}" needs utility data, whose gradient it compares with; '
            "give utility examples (castune tune: --utility SOURCE)"
        )
    return [chat.loss_row(example) for example in utility]


def _data_record(data: Sequence[Example], rows: Sequence[Row], source: str | None) -> dict[str, Any]:
    return {"source": source, "n": len(data), "hash": content_hash(data), "cut": sum(row.cut for row in rows)}


def _train(
    peft_model: Any, rows: Sequence[Row], config: TuneConfig, workspace: Path, operation: Operation | None
) -> ReplyTrainer:
    arguments = TrainingArguments(
        output_dir=str(workspace / "trainer"),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type=config.scheduler,
        optim="adamw_torch",
        seed=config.seed,
        use_cpu=next(peft_model.parameters()).device.type == "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )
    trainer = ReplyTrainer(model=peft_model, args=arguments, train_dataset=_RowDataset(rows), data_collator=_collate)
    trainer.remove_callback(PrinterCallback)
    if operation is not None:
        operation.check(trainer.accelerator)
        trainer.operation = operation
    with progress("training", 1.0) as advance:
        trainer.add_callback(_Progress(advance))
        trainer.train()
    return trainer


def _check_finite(peft_model: Any, config: TuneConfig) -> None:
    # The loss of the last step was finite, its update need not be.
    if not all(torch.isfinite(p).all() for p in peft_model.parameters() if p.requires_grad):
        raise TrainingError(
            f"the last update made weights that are not finite; try a learning_rate below {config.learning_rate:g}. "
            "No adapter was written"
        )


def _collate(rows: list[Row]) -> dict[str, Any]:
    return dict(vars(RowBatch.of(rows)))


class _RowDataset(torch.utils.data.Dataset[Row]):
    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


class _Progress(TrainerCallback):
    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        self.advance(1 / max(1, state.max_steps))
