"""Tasks of lm-evaluation-harness on a model in memory: its protocol, to stand beside castune's own.

The two differ on purpose. lm-eval completes plain text unless a chat template is asked for, shows examples before the
question, ranks choices by the log-likelihood of their text, in the model's own precision (in 16 bits choices tie often,
and the first of them wins), and generates with the generation config that the model ships. Everything below leaves that
as it is: the numbers are those that `lm_eval` itself would print.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import importlib.util
import io
import logging
import math
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from castune.artifacts.lm_eval_result import LmEvalResult, LmEvalScore
from castune.artifacts.records import ModelRecord, Settings
from castune.core.modes import evaluation_mode
from castune.core.progress import Advance, progress
from castune.core.provenance import model_record, provenance
from castune.errors import CastuneError
from castune.evaluation.lm_eval_tasks import load_tasks, set_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def lm_eval_results(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str],
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
    include_path: str | Path | None = None,
    seed: int = 1234,
    name: str = "base",
    model_info: ModelRecord | None = None,
) -> LmEvalResult:
    """Evaluate a model on tasks of lm-evaluation-harness, by its protocol.

    The model, its generation config, the tokenizer and the random generators are left as they were. Code of a model,
    of a data set, or written by the model is never run: tasks that need it are refused.

    Args:
        model: a transformers or PEFT model.
        tokenizer: its tokenizer.
        tasks: names of lm-eval's tasks, groups or tags: `mmlu`, `gsm8k`, ...
        limit: documents a task; for a group, of each of its tasks.
        num_fewshot: examples shown before each question; the task's own number when absent. As in lm-eval, a task that
            fixes its number at 0 keeps it.
        batch_size: rows of a forward.
        apply_chat_template: put prompts into the tokenizer's chat template, examples as turns of their own.
        include_path: directory with task files (YAML) of one's own, which go before lm-eval's of the same name.
        seed: of the examples that are drawn, and of sampling where a task samples; 1234 is lm-eval's own for examples.
        name: name of this arm, for the record.
        model_info: identity of the model, for the record; computed when absent.

    Returns:
        Every metric of every task and the aggregates of groups, with standard error, n, version and settings.

    Raises:
        CastuneError: lm_eval is not installed; a setting or task is unknown, refused, or its data set not reachable.
            All of them before anything is computed.
    """
    tasks = [tasks] if isinstance(tasks, str) else list(dict.fromkeys(tasks))
    settings: Settings = {"tasks": tasks, "limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size}
    settings |= {"apply_chat_template": apply_chat_template, "fewshot_as_multiturn": apply_chat_template}
    settings |= {"include_path": None if include_path is None else str(include_path), "seed": seed}
    require_lm_eval()
    _check_settings(tasks, limit, num_fewshot, batch_size)
    if apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise CastuneError("apply_chat_template: the tokenizer has no chat template")
    with _seeded(seed), _quiet():
        loaded = load_tasks(tasks, include_path)
        set_examples(loaded["tasks"], num_fewshot, seed)
        info, record = model_info or model_record(model, tokenizer), provenance(seed)
        record["versions"]["lm_eval"] = importlib.metadata.version("lm_eval")
        started = time.perf_counter()
        with evaluation_mode(model), _own_generation_config(model):
            found = _run(model, tokenizer, loaded, limit, batch_size, apply_chat_template, name)
    return LmEvalResult(
        name=name,
        tasks=tuple(_scores(found, loaded["tasks"])),
        groups=tuple(_scores(found, found.get("groups", {}))),
        members={group: list(members) for group, members in found["group_subtasks"].items()},
        settings=settings,
        model=info,
        provenance=record,
        seconds=round(time.perf_counter() - started, 2),
    )


def require_lm_eval() -> None:
    """Refuse lm-eval's tasks where the library is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise CastuneError("tasks of lm-eval need the package lm_eval: python -m pip install 'castune[lm-eval]'")


def _check_settings(tasks: Sequence[str], limit: int | None, num_fewshot: int | None, batch_size: int) -> None:
    if not tasks:
        raise CastuneError("tasks: none given; for example mmlu, gsm8k")
    for setting, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
        # lm-eval takes a limit below 1 for a share of the documents, and 0 for all or none of them.
        if value is not None and (not isinstance(value, int) or value < least):
            raise CastuneError(f"{setting}: {value!r}; accepted: a whole number from {least}")


# -- the run


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: dict[str, Any],
    limit: int | None,
    batch_size: int,
    apply_chat_template: bool,
    name: str,
) -> dict[str, Any]:
    """lm-eval's own record of results.

    Not `simple_evaluate`, which collects facts about the machine with a dozen commands and looks the model up at the
    hub; all it would do beyond that is in `set_examples` and `_seeded`.
    """
    from lm_eval.evaluator import evaluate

    found = evaluate(
        # lm-eval gives the tokenizer a padding token and side; the caller's keeps its own.
        lm=_language_model(model, copy.deepcopy(tokenizer), batch_size, f"lm-eval {name}"),
        task_dict=loaded,
        limit=limit,
        log_samples=False,
        apply_chat_template=apply_chat_template,
        # The default of lm-eval's command line and of `simple_evaluate`, but not of `evaluate`.
        fewshot_as_multiturn=apply_chat_template,
        confirm_run_unsafe_code=False,
    )
    return dict(found)


def _language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, label: str) -> Any:
    """The model as lm-eval takes it, with castune's progress in the place of lm-eval's bars."""
    from lm_eval.models.huggingface import HFLM

    class LanguageModel(HFLM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with self._progress(requests):
                return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with self._progress(requests):
                return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with self._progress(requests):
                return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        @contextlib.contextmanager
        def _progress(self, requests: Any) -> Iterator[None]:
            with progress(label, len(requests)) as advance:
                self.set_cache_hook(_Answered(advance))
                yield

    return LanguageModel(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


class _Answered:
    """In the place of lm-eval's cache of answers, which is told of each one as soon as it is known."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def add_partial(self, attr: str, req: object, res: object) -> None:
        self.advance()


# -- what comes out


def _scores(found: Mapping[str, Any], names: Iterable[str]) -> Iterator[LmEvalScore]:
    """The metrics of these tasks or groups, which lm-eval keeps among other facts as `metric,filter`."""
    for name in names:
        facts = found["results"][name]
        for key, value in facts.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            in_group = facts.get("sample_count", {}).get(key, facts.get("sample_len"))
            count = found["n-samples"][name]["effective"] if name in found["n-samples"] else in_group
            better = found["higher_is_better"].get(name, {}).get(metric)
            yield LmEvalScore(
                task=name,
                metric=key,
                value=_finite(value),
                standard_error=_finite(facts.get(f"{metric}_stderr,{filtered}")),
                n=int(count),
                higher_is_better=None if better is None else bool(better),
                version=str(found["versions"].get(name)),
                num_fewshot=found["n-shot"].get(name),
            )


def _finite(value: Any) -> float | None:
    """A number as it can be stored; None for `N/A` and for what is no finite number."""
    is_number = isinstance(value, int | float | np.number) and math.isfinite(value)
    return float(value) if is_number else None


# -- leaving things as they were


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """All generators seeded, as lm-eval does it; those of the caller go on afterwards where they were."""
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


@contextlib.contextmanager
def _own_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """A copy in the place of the generation config, for generation to change."""
    # A PEFT model shows the config of the model it wraps, unless it was given one of its own.
    wrapped = [model.get_base_model()] if hasattr(model, "get_base_model") else []
    owners = [owner for owner in (model, *wrapped) if "generation_config" in vars(owner)]
    shipped = [owner.generation_config for owner in owners]
    try:
        for owner, config in zip(owners, shipped, strict=True):
            owner.generation_config = copy.deepcopy(config)
        yield
    finally:
        for owner, config in zip(owners, shipped, strict=True):
            owner.generation_config = config


class _CutPrompts(logging.Handler):
    """Takes what lm-eval logs, which may hold whole questions, and keeps of it whether prompts were cut."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = False

    def emit(self, record: logging.LogRecord) -> None:
        """Look at one message and drop it."""
        self.cut = self.cut or "runcati" in record.getMessage()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither log nor bars nor prints of lm-eval; that prompts were cut is said once."""
    import lm_eval.api.task

    log, handler, bar = logging.getLogger("lm_eval"), _CutPrompts(), lm_eval.api.task.tqdm
    handlers, propagate = log.handlers, log.propagate
    log.handlers, log.propagate = [handler], False
    # One bar a task while prompts are built, and no switch for it.
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        log.handlers, log.propagate = handlers, propagate
        lm_eval.api.task.tqdm = bar
    if handler.cut:
        logger.warning("prompts longer than the model takes were cut on the left by lm-eval")
