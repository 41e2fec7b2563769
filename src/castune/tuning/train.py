"""Training the selected heads: HF Trainer, castune's one loss, the paper's Table 3 as defaults."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments, set_seed

from castune.artifacts import Certificate, HeadSelection, TuneResult
from castune.artifacts.files import new_directory
from castune.artifacts.rules import RULES
from castune.artifacts.tune_result import RESELECTIONS, SNAPSHOTS
from castune.config import TuneConfig
from castune.core.checksum import unchanged
from castune.core.heads import HeadLayout
from castune.core.progress import progress
from castune.core.provenance import model_record, provenance
from castune.core.quantisation import dense_weight, require_bitsandbytes
from castune.core.shards import Shard
from castune.core.units import UnitLayout
from castune.data.chat import ChatFormat
from castune.data.example import Example, require_replies
from castune.data.record import data_record
from castune.data.rows import Row
from castune.errors import CastuneError, DataError, TrainingError
from castune.tuning.adapter_files import adapter_weights, save_adapter
from castune.tuning.phases import Phases, Reselect, require_reselection
from castune.tuning.preferences import Pair, preference_pairs, preference_trainer, require_trl
from castune.tuning.row_lora import budget, sparse_lora
from castune.tuning.snapshots import Snapshots, snapshot_steps
from castune.tuning.stacking import frozen_updates
from castune.tuning.surgery import Operation, parameter_groups, require_method
from castune.tuning.targets import targets, units_for
from castune.tuning.trainer import ReplyTrainer, trainer_settings
from castune.tuning.verify import certificate_of
from castune.tuning.workspace import Workspace

logger = logging.getLogger(__name__)


def tune(
    model: Any,
    tokenizer: Any,
    selection: HeadSelection,
    *,
    data: Sequence[Example],
    out: str | Path,
    config: TuneConfig | None = None,
    source: str | None = None,
    balance: str | None = None,
    left_out: Sequence[str] = (),
    utility: Sequence[Example] | None = None,
    utility_source: str | None = None,
    reselect: Reselect | None = None,
) -> TuneResult:
    """Train the selected heads and write adapter, certificate and record.

    A training that was interrupted continues from its last checkpoint, and comes to the adapter it would have come to
    without. Under torchrun all processes call this with the same arguments; the first one writes. Under FSDP the model
    is sharded when this returns: load it again.

    Args:
        model: the base model, or it quantised; it is wrapped for the training and left as it was.
        tokenizer: its tokenizer, with a chat template.
        selection: the heads to train.
        data: D_align, prompts with replies.
        out: the adapter directory. It is complete or absent, never half-written.
        config: settings; the paper's Table 3 by default.
        source: name of the data source, for the record.
        balance: the column by which they were drawn in equal shares, for the record.
        left_out: ids of what was taken out of the source before, for the record.
        utility: D_util, the reference of gradient surgery and what data replay mixes in: questions, or prompts with
            replies. Not used without.
        utility_source: name of its source, for the record.
        reselect: how heads are chosen again, with `config.reselect_steps`.

    Raises:
        CastuneError: gradient surgery without utility data, or a method of it that is not installed; or heads are to be
            selected again where that is not possible.
        DataError: an example has no reply, or a reply that does not fit.
        TrainingError: a loss is not finite, or surgery cannot reach the gradients.
        CheckpointError: a checkpoint or the adapter cannot be written.
        CertificateError: the trained adapter touches anything outside the selection.
        WeightsChanged: weights of the base model are not what they were when the training began.
    """
    config = config or TuneConfig()
    out = Path(out)
    work = _Work.of(config, ChatFormat(tokenizer, max_length=config.max_length), data, utility)
    record = data_record("training", source, data, work.rows)
    record |= {"balance": balance} if balance else {}
    record |= {"left_out": list(left_out)} if left_out else {}
    utility_record = None
    if utility and config.needs_utility:
        utility_record = data_record("utility", utility_source, utility, work.utility_rows)
        utility_record["replayed"] = len(work.replayed)
    require_reselection(config, selection, reselect)
    identity = model_record(model, tokenizer)
    workspace = Workspace.beside(out)
    settings = trainer_settings(config, workspace, next(model.parameters()).device)
    processes = TrainingArguments(**settings)
    with processes.main_process_first(local=False):
        if Shard.is_main_process():
            workspace.open(
                {
                    "model": identity["fingerprint"],
                    "chat_template": identity["chat_template"],
                    "units": [*map(str, selection.units)],
                    "mlp_groups": selection.mlp_groups,
                    # Later selections depend on the settings and the data of the map.
                    **({"map": selection.conflict_map_hash} if config.reselect_steps else {}),
                    "settings": config.model_dump(mode="json"),
                    "data": record,
                    "utility": utility_record,
                    "processes": processes.world_size,
                    "rules": RULES,
                }
            )
    try:
        phases = Phases(workspace, config.reselect_steps, (selection,))
        run = _trained(model, tokenizer, phases, work, config, settings, reselect)
        if Shard.is_main_process():
            with new_directory(out, replace=True) as folder:
                shutil.copytree(workspace.adapter, folder, dirs_exist_ok=True)
                for step in snapshot_steps(config, run.steps):
                    snapshot = folder / SNAPSHOTS / str(step)
                    snapshot.mkdir(parents=True)
                    run.phases.write(workspace.snapshot(step), snapshot, step=step)
                    run.base.certificate(snapshot, run.phases.union).save(snapshot)
                for step, found in run.phases.maps().items():
                    if found.is_dir():
                        shutil.copytree(found, folder / RESELECTIONS / str(step))
                TuneResult(
                    adapter=out.name,
                    certificate=run.base.certificate(folder, run.phases.union),
                    budget=run.budget,
                    settings=config.model_dump(mode="json"),
                    data=record,
                    losses=run.losses,
                    steps=run.steps,
                    tokens=run.tokens,
                    seconds=round(run.seconds, 2),
                    model=identity,
                    provenance=provenance(config.seed),
                    surgery=run.surgery,
                    utility=utility_record,
                    selections=run.phases.record(),
                ).save(folder)
            workspace.remove()
    except TrainingError:
        workspace.remove()  # its checkpoints would lead to the same error
        raise
    except BaseException:
        workspace.leave()
        raise
    run.wait()
    result = TuneResult.load(out)
    if not (result.certificate.changed_rows or result.certificate.changed_columns) and Shard.is_main_process():
        logger.warning(
            "the training changed no weight of the base in its dtype, %s: its updates are below the rounding; train "
            "for more steps, or with a learning_rate above %g",
            identity["dtype"],
            config.learning_rate,
        )
    return result


def require_extras(config: TuneConfig) -> None:
    """Refuse a training that cannot run here: before a model is loaded, not hours later.

    Raises:
        CastuneError: the message says what to install or to leave out.
    """
    if config.reselect_steps is not None and Shard.n_processes() > 1:
        raise CastuneError(
            f"reselect_steps = {config.reselect_steps} works in one process, and there are {Shard.n_processes()}: "
            "leave out torchrun, or reselect_steps"
        )
    require_method(config.surgery)
    if config.method == "dpo":
        require_trl()
    if config.quantization != "none":
        require_bitsandbytes()


def require_utility(config: TuneConfig, utility: Sequence[Any] | None) -> None:
    """Refuse a training that compares with utility data, or mixes it in, and has none.

    Raises:
        CastuneError: the message names the setting that needs it.
    """
    if utility or not config.needs_utility:
        return
    what = f'surgery = "{config.surgery}"' if config.surgery != "none" else f"replay = {config.replay:g}"
    why = "whose gradient it compares with" if config.surgery != "none" else "which it mixes in"
    raise CastuneError(f"{what} needs utility data, {why}; give utility examples (castune tune: --utility SOURCE)")


@dataclass(frozen=True)
class _Work:
    """What is trained on, as tokens.

    Attributes:
        rows: the alignment examples; of pairs the chosen replies.
        pairs: the alignment examples of DPO.
        utility_rows: the utility examples, where they take part.
        replayed: those of them that are mixed into the training.
    """

    rows: list[Row]
    pairs: list[Pair]
    utility_rows: list[Row]
    replayed: list[Row]

    @classmethod
    def of(
        cls, config: TuneConfig, chat: ChatFormat, data: Sequence[Example], utility: Sequence[Example] | None
    ) -> _Work:
        """Tokens of the examples, checked for what the training needs."""
        if not data:
            raise DataError("no training examples")
        require_extras(config)
        pairs = preference_pairs(chat, data) if config.method == "dpo" else []
        require_replies(data, "training data", "prompt, completion")
        rows = [chat.loss_row(example) for example in data]
        if not config.needs_utility:
            return cls(rows, pairs, [], [])
        require_utility(config, utility)
        utility_rows = [chat.loss_row(example) for example in utility or ()]
        return cls(rows, pairs, utility_rows, replayed_rows(utility_rows, len(rows), config.replay, config.seed))


@dataclass(frozen=True)
class _Run:
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
    wait: Callable[[], None]


def _trained(
    model: Any,
    tokenizer: Any,
    phases: Phases,
    work: _Work,
    config: TuneConfig,
    settings: dict[str, Any],
    reselect: Reselect | None,
) -> _Run:
    """Train phase after phase, and leave the adapter in the workspace and the model as it was."""
    while True:
        if not phases.are_over():
            run = _phase(model, tokenizer, phases, work, config, settings)
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
    model: Any, tokenizer: Any, phases: Phases, work: _Work, config: TuneConfig, settings: dict[str, Any]
) -> _Run:
    """Train the current phase to its end, or from where it was stopped."""
    selection, workspace = phases.selection, phases.workspace
    seed = config.seed + len(phases.selections) - 1
    set_seed(seed)
    layout = units_for(model, HeadLayout.of(model), selection)
    base = _Base.of(model, layout, selection)
    with unchanged(model, "training"), _left_as_it_was(model):
        peft_model = sparse_lora(
            model, selection, r=config.rank, alpha=config.alpha, freeze_a=config.freeze_a, seed=seed
        )
        try:
            ledger = budget(peft_model, layout, selection)
            operation = None
            if config.surgery != "none":
                groups = parameter_groups(peft_model, layout, selection, config.surgery_granularity)
                operation = Operation(work.utility_rows, config, groups)
            trainer: Any
            if config.method == "dpo":
                trainer = preference_trainer(peft_model, tokenizer, settings, work.pairs, config, workspace, operation)
            else:
                rows = [*work.rows, *work.replayed]
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
            weights = adapter_weights(peft_model)
            _check_finite(weights.values(), config)
            found = _Run(
                base=base,
                phases=phases,
                budget=ledger,
                losses=tuple((log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log),
                steps=trainer.state.global_step,
                max_steps=trainer.state.max_steps,
                tokens=trainer.all_tokens(),
                seconds=trainer.seconds,
                surgery=None if operation is None else operation.record,
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
    def of(cls, model: Any, layout: UnitLayout, selection: HeadSelection) -> _Base:
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
def _left_as_it_was(model: Any) -> Iterator[None]:
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


def _keeps_no_activations(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def replayed_rows(utility_rows: Sequence[Row], n_aligned: int, share: float, seed: int) -> list[Row]:
    """Utility rows to mix with `n_aligned` others, so that they are `share` of all; none twice before all came once."""
    n = round(share / (1 - share) * n_aligned)
    generator = random.Random(seed)
    rows: list[Row] = []
    while len(rows) < n:
        rows += generator.sample(utility_rows, min(len(utility_rows), n - len(rows)))
    return rows


def _check_finite(weights: Iterable[Tensor], config: TuneConfig) -> None:
    # The loss of the last step was finite, its update need not be.
    if not all(torch.isfinite(tensor).all() for tensor in weights):
        raise TrainingError(
            f"the last update made weights that are not finite; try a learning_rate below {config.learning_rate:g}. "
            "No adapter was written"
        )
