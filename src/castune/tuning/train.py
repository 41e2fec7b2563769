"""Training the selected heads: HF Trainer, castune's one loss, the paper's Table 3 as defaults."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainingArguments

from castune.artifacts import HeadSelection, TuneResult
from castune.artifacts.files import new_directory
from castune.artifacts.records import DataRecord, ModelRecord
from castune.artifacts.rules import RULES
from castune.artifacts.tune_result import RESELECTIONS, SNAPSHOTS
from castune.config import TuneConfig
from castune.core.provenance import model_record, provenance
from castune.core.shards import Shard
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.tuning.phases import Phases, Reselect, require_reselection
from castune.tuning.rows import TrainingRows
from castune.tuning.run import Training, trained
from castune.tuning.snapshots import snapshot_steps
from castune.tuning.trackers import log_folder, trackers_in
from castune.tuning.trainer import trainer_settings
from castune.tuning.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    selection: HeadSelection,
    *,
    data: Sequence[Example],
    out: str | Path,
    config: TuneConfig | None = None,
    source: str | None = None,
    balance: str | None = None,
    shares: Mapping[str, float] | None = None,
    left_out: Sequence[str] = (),
    utility: Sequence[Example] | None = None,
    utility_source: str | None = None,
    reselect: Reselect | None = None,
    run_name: str | None = None,
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
        balance: the column by which they were drawn in equal shares or in `shares`, for the record.
        shares: the shares of its values, for the record.
        left_out: ids of what was taken out of the source before, for the record.
        utility: D_util, for gradient surgery, data replay and null spaces: questions, or prompts with replies.
        utility_source: name of its source, for the record.
        reselect: how heads are chosen again, with `config.reselect_steps`.
        run_name: what the trackers of `config.report_to` call the training; they have names of their own for None.

    Raises:
        CastuneError: surgery, replay or a null space without utility data; surgery by a method not installed; a null
            space that leaves no direction; heads that cannot be selected again.
        DataError: an example has no reply, or a reply that does not fit.
        TrainingError: a loss is not finite, or surgery cannot reach the gradients.
        CheckpointError: a checkpoint or the adapter cannot be written.
        CertificateError: the trained adapter touches anything outside the selection.
        WeightsChanged: weights of the base model are not what they were when the training began.
    """
    config, out = config or TuneConfig(), Path(out)
    rows = TrainingRows.of(config, ChatFormat(tokenizer, max_length=config.max_length), data, utility)
    require_reselection(config, selection, reselect)
    record = rows.data_record(data, source, balance=balance, shares=shares, left_out=left_out)
    records = _Records(model_record(model, tokenizer), record, rows.utility_record(utility, utility_source))
    workspace = Workspace.beside(out)
    settings = trainer_settings(config, workspace, next(model.parameters()).device, run_name=run_name)
    _open(workspace, selection, config, records, TrainingArguments(**settings))
    logs = log_folder(out, goes_on=workspace.last_checkpoint() is not None)
    with workspace.kept_for_later(), trackers_in(logs, config.report_to):
        phases = Phases(workspace, config.reselect_steps, (selection,))
        run = trained(model, tokenizer, phases, rows, config, settings, reselect)
        if Shard.is_main_process():
            _write(out, run, config, records)
    run.wait()
    result = TuneResult.load(out)
    _warn_if_nothing_changed(result)
    return result


@dataclass(frozen=True)
class _Records:
    """What a training is made from, for the record: the model, D_align, and D_util where it takes part."""

    model: ModelRecord
    data: DataRecord
    utility: DataRecord | None


def _open(
    workspace: Workspace,
    selection: HeadSelection,
    config: TuneConfig,
    records: _Records,
    processes: TrainingArguments,
) -> None:
    """Make room for this training, and find what it left when it was stopped."""
    with processes.main_process_first(local=False):
        if not Shard.is_main_process():
            return
        workspace.open(
            {
                "model": records.model["fingerprint"],
                "chat_template": records.model["chat_template"],
                "units": [*map(str, selection.units)],
                "mlp_groups": selection.mlp_groups,
                # Later selections depend on the settings and the data of the map.
                **({"map": selection.conflict_map_hash} if config.reselect_steps else {}),
                "settings": config.record(),
                "data": records.data,
                "utility": records.utility,
                "processes": processes.world_size,
                "rules": RULES,
            }
        )


def _write(out: Path, run: Training, config: TuneConfig, records: _Records) -> None:
    """Put the adapter directory together: adapter, snapshots, maps made on the way, certificates and record."""
    workspace = run.phases.workspace
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
            settings=config.record(),
            data=records.data,
            losses=run.losses,
            steps=run.steps,
            tokens=run.tokens,
            seconds=round(run.seconds, 2),
            model=records.model,
            provenance=provenance(config.seed),
            surgery=run.surgery,
            null_space=run.null_space,
            utility=records.utility,
            selections=run.phases.record(),
        ).save(folder)
    workspace.remove()


def _warn_if_nothing_changed(result: TuneResult) -> None:
    proof = result.certificate
    if not (proof.changed_rows or proof.changed_columns) and Shard.is_main_process():
        logger.warning(
            "the training changed no weight of the base in its dtype, %s: its updates are below the rounding; train "
            "for more steps, or with a learning_rate above %g",
            result.model["dtype"],
            result.settings["learning_rate"],
        )
