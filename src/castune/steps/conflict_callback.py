"""Conflict drift inside a training loop of others: a callback of transformers' Trainer, which TRL's are too."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from castune.artifacts import ConflictMap, EvalResult
from castune.artifacts.samples import references_of
from castune.config import DiagnoseConfig, EvaluateConfig
from castune.core.random_state import random_state_kept
from castune.data.example import Example
from castune.data.sources import examples
from castune.diagnosis.checking import spread
from castune.diagnosis.drift import kept_heads, noise_ceiling, zone_of
from castune.diagnosis.reliability import spearman
from castune.diagnosis.run import current_map
from castune.diagnosis.task import Task
from castune.errors import CastuneError
from castune.evaluation.backend import TransformersHost
from castune.evaluation.judges import judge
from castune.evaluation.run import evaluate_on
from castune.evaluation.suites import Suite
from castune.tuning.live_merge import plain_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_MARGIN, _NLL = "refusal margin", "utility NLL"
Head = tuple[int, int]


@dataclass(frozen=True)
class ConflictRecord:
    """What was measured at one step. None is undefined.

    Attributes:
        step: optimiser steps so far.
        epoch: passes over the training data so far.
        n_heads: heads of the map.
        spearman: Spearman correlation of C(h) over heads with the first map.
        noise_ceiling: what maps of an unchanged model, each measured on examples of its own, would have for a
            correlation. Maps of the same examples may lie above.
        safe_heads: heads of the first map's safe zone, the quarter with the lowest C(h).
        safe_kept: how many of them are in that of this map.
        safe_kept_by_chance: how many would be if this zone were drawn at random.
        refusal_margin: how much likelier, in nats a token, a refusal of the harmful prompts is than what the model
            replied to them when the training began, over the first tokens; mean over prompts.
        refusal_margin_se: its standard error.
        n_refusal_margin: prompts it is a mean over.
        utility_nll: NLL a token of the right answers or replies of the utility examples; mean over examples.
        utility_nll_se: its standard error.
        n_utility_nll: examples it is a mean over.
        map_hash: content hash of the map.
        seconds: what the measurement took.
    """

    step: int
    epoch: float | None
    n_heads: int
    spearman: float | None
    noise_ceiling: float | None
    safe_heads: int
    safe_kept: int
    safe_kept_by_chance: float
    refusal_margin: float | None
    refusal_margin_se: float | None
    n_refusal_margin: int
    utility_nll: float | None
    utility_nll_se: float | None
    n_utility_nll: int
    map_hash: str
    seconds: float

    @property
    def logs(self) -> dict[str, float]:
        """What the Trainer logs of it: the numbers that are defined, as `conflict/NAME`."""
        share = self.safe_kept / self.safe_heads if self.safe_heads else None
        told = {
            "spearman": self.spearman,
            "noise_ceiling": self.noise_ceiling,
            "safe_zone_kept": share,
            "refusal_margin": self.refusal_margin,
            "refusal_margin_se": self.refusal_margin_se,
            "utility_nll": self.utility_nll,
            "utility_nll_se": self.utility_nll_se,
            "seconds": self.seconds,
        }
        return {f"conflict/{name}": float(value) for name, value in told.items() if value is not None}


class ConflictCallback(TrainerCallback):
    """Measures drift of the map, refusal margin and utility while a Trainer trains, and logs them as the Trainer does.

        callback = ct.ConflictCallback(trainer, safety="starter-safety", utility="starter-utility", every_steps=50)
        trainer.add_callback(callback)

    It measures when the training begins, every `every_steps` optimiser steps, and when it ends, as `castune diagnose`
    does by attribution, of the model with its adapters merged, in evaluation mode. The training goes on as it would
    have without: weights, gradients, random state, modes and `requires_grad` are left as they were, in every bit.

    Of several processes (DDP) the main one measures, alone and without any collective operation; the others wait for it
    at the next gradient, no longer than `ddp_timeout`. FSDP and DeepSpeed's ZeRO stage 3 cut the weights up and are
    refused.

    What cannot be measured when the training begins is an error. Later it is a warning, and the training goes on.

    Args:
        trainer: transformers' Trainer, or one of TRL's; full fine-tuning, or PEFT adapters that can be merged.
        safety: D_safe, harmful prompts with a safe reply each; examples or the name of a source (`examples`).
        utility: D_util, questions, problems with worked solutions, or with `config.reply_domains=("utility",)`
            harmless prompts with replies; examples or the name of a source.
        every_steps: optimiser steps between measurements.
        base_map: the map to compare with, or its file or run directory; that of the beginning for None. Needed where a
            training goes on from a checkpoint. One that was measured on other examples differs by their noise too.
        limit: of each set so many examples are measured; of given ones evenly spread.
        config: settings of the maps; query heads only.
        tokenizer: the model's, with a chat template; the trainer's for None.
        seed: which examples of a named source are drawn.

    Attributes:
        history: a `ConflictRecord` each measurement of the last training.
        first_map: what the others are compared with; None before the first measurement.
        last_map: the map of the last measurement; None before.

    Raises:
        CastuneError: no such source, or settings that cannot be used here.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        safety: str | Path | Sequence[Example],
        utility: str | Path | Sequence[Example],
        every_steps: int = 100,
        base_map: ConflictMap | str | Path | None = None,
        limit: int = 32,
        config: DiagnoseConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int = 0,
    ) -> None:
        for name, value, least in (("every_steps", every_steps, 1), ("limit", limit, 2)):
            if value < least:
                raise CastuneError(f"{name} = {value}: accepted are whole numbers from {least}")
        self.config = config or DiagnoseConfig()
        if self.config.kinds != ("q_head",):
            raise CastuneError(f"units = {list(self.config.units)}: drift is measured on query heads alone (q_heads)")
        self.trainer, self.every_steps = trainer, every_steps
        self.safety, self.utility = (_drawn(one, limit, seed) for one in (safety, utility))
        self.tokenizer = _tokenizer_of(trainer) if tokenizer is None else tokenizer
        self._base_map = ConflictMap.load(base_map) if isinstance(base_map, str | Path) else base_map
        self.history: list[ConflictRecord] = []
        self.first_map: ConflictMap | None = None
        self.last_map: ConflictMap | None = None

    def on_train_begin(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        """Measure what later maps are compared with.

        Raises:
            CastuneError: data, model or way of training cannot be measured.
        """
        _require_whole(self.trainer)
        self.history, self.first_map, self.last_map = [], self._base_map, None
        self._task: Task | None = None
        self._references: dict[str, list[list[int]]] | None = None
        if state.is_world_process_zero:
            self._measure(state, control)

    def on_step_end(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        """Measure every so many steps, and after the last one."""
        # The last one here: at the end of the training trackers have closed.
        is_due = state.global_step % self.every_steps == 0 or control.should_training_stop
        if is_due and state.is_world_process_zero:
            self._measure_or_warn(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        """Measure once more where another callback ended the training, or the best model has come back."""
        is_new = not self.history or self.history[-1].step != state.global_step or args.load_best_model_at_end
        if is_new and state.is_world_process_zero:
            self._measure_or_warn(state, control)

    def _measure_or_warn(self, state: Any, control: Any) -> None:
        try:
            self._measure(state, control)
        except CastuneError as error:
            logger.warning("step %d could not be measured, and the training goes on: %s", state.global_step, error)

    def _measure(self, state: Any, control: Any) -> None:
        started = time.perf_counter()
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with random_state_kept(), plain_model(model) as plain:
            task = self._task_of(plain)
            cmap = current_map(task)
            evaluated = self._evaluated(plain, cmap)
        self._references = self._references or references_of(evaluated.samples)
        self.first_map = cmap if self.first_map is None else self.first_map
        self.last_map = cmap
        record = _record(self.first_map, cmap, evaluated, state)
        self.history.append(replace(record, seconds=round(time.perf_counter() - started, 2)))
        self._log(self.history[-1], control)

    def _task_of(self, model: PreTrainedModel) -> Task:
        """What is measured: the same all along, so that heads are located and examples tokenised once."""
        if self._task is None:
            self._task = Task.of(model, self.tokenizer, self.safety, self.utility, self.config)
            if self.first_map is not None and self.first_map.units != self._task.units:
                raise CastuneError(
                    f"base_map has {len(self.first_map)} units, which are not the {len(self._task.units)} query heads "
                    "that are measured here; give the map of this architecture, and `config` with its layers"
                )
        return self._task

    def _evaluated(self, model: PreTrainedModel, cmap: ConflictMap) -> EvalResult:
        """Refusal margins against the replies of the beginning, and the NLL of the utility examples."""
        config = EvaluateConfig(margin_tokens=self.config.margin_tokens, max_length=self.config.max_length)
        suites = [Suite(_MARGIN, "safety-margin", tuple(self.safety)), Suite(_NLL, "nll", tuple(self.utility))]
        with TransformersHost(model, self.tokenizer).backend("training", None) as backend:
            return evaluate_on(
                backend,
                suites=suites,
                config=config,
                by=judge(config.judge),
                name="training",
                model_info=cmap.model,
                references=self._references,
            )

    def _log(self, record: ConflictRecord, control: Any) -> None:
        # Not the trainer's own method: TRL's adds its means since the last log, which then lack in the next one.
        # And what a log switches off is the log of the Trainer itself, which may be due at this very step.
        should_log = control.should_log
        Trainer.log(self.trainer, record.logs)
        control.should_log = should_log


def _drawn(given: str | Path | Sequence[Example], limit: int, seed: int) -> list[Example]:
    if isinstance(given, str | Path):
        return examples(given, limit=limit, seed=seed)
    return [given[number] for number in spread(len(given), limit)]


def _tokenizer_of(trainer: Trainer) -> PreTrainedTokenizerBase:
    """The tokenizer of a trainer, or that of its processor."""
    found = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    if not isinstance(found, PreTrainedTokenizerBase):
        raise CastuneError("the trainer has no tokenizer; give one: ConflictCallback(..., tokenizer=tokenizer)")
    return found


def _require_whole(trainer: Trainer) -> None:
    """Refuse ways of training that leave no process a whole model.

    Raises:
        CastuneError: FSDP, DeepSpeed ZeRO stage 3, tensor parallelism and the like.
    """
    accelerator = trainer.accelerator
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    is_whole = kind == "NO" or kind.startswith("MULTI_") or (kind == "DEEPSPEED" and plugin and plugin.zero_stage < 3)
    # Tensor parallelism has no kind of its own.
    if not is_whole or any(hasattr(parameter, "to_local") for parameter in trainer.model.parameters()):
        raise CastuneError(
            f"the weights are cut up over processes ({kind}), and a map needs a whole model; train with DDP or on one "
            "device, or measure kept adapters afterwards (castune drift)"
        )


def _record(first: ConflictMap, cmap: ConflictMap, evaluated: EvalResult, state: Any) -> ConflictRecord:
    """The record of a map; its `seconds` are those of the map alone."""
    score_H, first_H = (one.column("conflict_score") for one in (cmap, first))
    kept = kept_heads(_safe_heads(first), _safe_heads(cmap), len(cmap))
    margin, nll = evaluated.suite(_MARGIN), evaluated.suite(_NLL)
    return ConflictRecord(
        step=state.global_step,
        epoch=state.epoch,
        n_heads=len(cmap),
        spearman=spearman(first_H, score_H),
        noise_ceiling=noise_ceiling(*(one.metadata["reliability"]["reliability"] for one in (first, cmap))),
        safe_heads=int(kept["heads"]),
        safe_kept=int(kept["kept"]),
        safe_kept_by_chance=kept["by_chance"],
        refusal_margin=margin.value,
        refusal_margin_se=margin.standard_error,
        n_refusal_margin=margin.n,
        utility_nll=nll.value,
        utility_nll_se=nll.standard_error,
        n_utility_nll=nll.n,
        map_hash=cmap.content_hash,
        seconds=cmap.metadata["seconds"],
    )


def _safe_heads(cmap: ConflictMap) -> list[Head]:
    zones = zone_of(cmap.column("conflict_score"))
    return [head for head, zone in zip(cmap.heads, zones, strict=True) if zone == "safe"]
