"""Evaluations of a run: the base model and every arm with an adapter, on the same examples."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from castune.artifacts import EvalResult
from castune.artifacts.lm_eval_result import LmEvalResult
from castune.config import EvaluateConfig, Recipe
from castune.core.loading import load_config, load_model, model_source
from castune.core.provenance import model_record
from castune.data.example import content_hash
from castune.errors import ArtifactError
from castune.evaluate.backend import Host, TransformersHost
from castune.evaluate.judges import judge
from castune.evaluate.judging import judge_again
from castune.evaluate.lm_eval import lm_eval_results, require_lm_eval
from castune.evaluate.run import evaluate_on
from castune.evaluate.server import ServerHost
from castune.evaluate.stats import CostRatio, PairedDifference, Pairs, bootstrap_cost_ratio, paired_difference
from castune.evaluate.suites import Suite
from castune.evaluate.vllm_engine import VllmEngine
from castune.run_directory import BASE, RunDirectory

logger = logging.getLogger(__name__)


def evaluate_step(
    folder: RunDirectory, recipe: Recipe, suites: Sequence[Suite], loaded: tuple[Any, Any] | None = None
) -> dict[str, EvalResult]:
    """Evaluations of the base model and every arm with an adapter, made where missing or older than the adapter.

    Where only the judge is another one, the replies that are stored are judged again.

    Args:
        folder: the run.
        recipe: its recipe, with the settings of the evaluation.
        suites: what is measured.
        loaded: the recipe's model and tokenizer, if they are loaded already.
    """
    config = recipe.evaluate
    by = judge(config.judge)
    if config.backend == "hf":
        loaded = loaded or load_model(recipe)
        identity = model_record(loaded[0])
    else:
        # The model's weights are elsewhere: it is the one of the map by its name.
        identity = {**folder.load_map().metadata["model"], "dtype": recipe.dtype, "device": config.backend}
    adapters, records = _models(folder, identity)
    host = None
    for name, adapter in adapters.items():
        stored = _stored_evaluation(folder.evaluation(name), records[name], config, suites)
        if stored is not None:
            if stored.settings["judge"] != config.judge:
                logger.info("evaluation of %s: judged again by %s", name, config.judge)
                judge_again(stored, by).save(folder.evaluation(name))
            else:
                logger.info("evaluation of %s: already there", name)
            continue
        logger.info("evaluation of %s: %d examples", name, sum(len(suite.examples) for suite in suites))
        host = host or _host(recipe, loaded, [path for path in adapters.values() if path is not None])
        with host.backend(name, adapter) as backend:
            result = evaluate_on(
                backend,
                suites=suites,
                config=config,
                by=by,
                name=name,
                out=folder.evaluation(name),
                model_info=records[name],
            )
        folder.record_step(f"evaluate {name}", result.provenance)
    return folder.load_evaluations()


def judge_step(folder: RunDirectory, name: str) -> dict[str, EvalResult]:
    """All evaluations of the run with the outcomes of another judge, from the replies that are stored."""
    evaluations = folder.load_evaluations()
    if not evaluations:
        raise ArtifactError(f"{folder.path}: nothing has been evaluated; run: castune evaluate {folder.path}")
    by = judge(name)
    for arm, result in evaluations.items():
        evaluations[arm] = judge_again(result, by)
        evaluations[arm].save(folder.evaluation(arm))
    return evaluations


def lm_eval_step(folder: RunDirectory, recipe: Recipe, tasks: Sequence[str], **options: Any) -> dict[str, LmEvalResult]:
    """lm-eval's tasks on the base model and every arm with an adapter; what is there and up to date stays.

    Args:
        folder: the run.
        recipe: its recipe.
        tasks: names of lm-eval's tasks.
        options: further arguments of `lm_eval_results`.
    """
    require_lm_eval()
    model, tokenizer = load_model(recipe)
    adapters, records = _models(folder, model_record(model))
    host = TransformersHost(model, tokenizer)
    stored = folder.load_lm_eval()
    for name, adapter in adapters.items():
        found = stored.get(name)
        asked = {"tasks": list(tasks), **options}
        if found is not None and _same_model(found.model, records[name]) and asked.items() <= found.settings.items():
            logger.info("lm-eval of %s: already there", name)
            continue
        logger.info("lm-eval of %s: %s", name, ", ".join(tasks))
        with host.backend(name, adapter) as backend:
            result = lm_eval_results(
                backend.model, tokenizer, tasks=tasks, name=name, model_info=records[name], **options
            )
        result.save(folder.evaluation(name))
        folder.record_step(f"lm-eval {name}", result.provenance)
    return folder.load_lm_eval()


def _models(folder: RunDirectory, identity: dict[str, Any]) -> tuple[dict[str, Path | None], dict[str, dict[str, Any]]]:
    """Adapter directories and identities of the base model and every arm that has an adapter, by name.

    Every adapter is checked against its certificate here, before anything is measured or replaced.
    """
    cmap = folder.load_map(identity["fingerprint"])
    adapters: dict[str, Path | None] = {BASE: None}
    records = {BASE: {**identity, "adapter": None}}
    for arm in folder.arms():
        made = folder.load_adapter(arm, folder.load_selection(arm, cmap))
        if made is not None:
            adapters[arm.name] = arm.adapter
            records[arm.name] = {**identity, "adapter": made.certificate.adapter_hash}
    return adapters, records


def _host(recipe: Recipe, loaded: tuple[Any, Any] | None, adapters: Sequence[Path]) -> Host:
    """Where the recipe's model and its adapters run."""
    if loaded is not None:
        return TransformersHost(*loaded)
    if recipe.evaluate.backend == "openai":
        return ServerHost(recipe.evaluate.served_model or recipe.model)
    _, tokenizer = load_config(recipe.model, revision=recipe.revision)
    return VllmEngine(
        model_source(recipe.model), tokenizer, revision=recipe.revision, dtype=recipe.dtype, adapters=adapters
    )


def cost_ratios(evaluations: dict[str, EvalResult], utility: str | None = None) -> dict[str, CostRatio]:
    """The utility cost ratio of every tuned arm against the base model, with intervals over the examples.

    Args:
        evaluations: by arm.
        utility: the one suite whose accuracy is the utility (`mmlu`: MMLU-CR, Eq. 8); all utility suites when absent.
    """
    base = evaluations.get(BASE)
    ratios: dict[str, CostRatio] = {}
    for name, result in evaluations.items():
        if base is None or name == BASE:
            continue
        groups: dict[str, list[Pairs]] = {"utility": [], "safety": []}
        for suite in result.suites:
            if suite.purpose in groups and (utility in (None, suite.suite) or suite.purpose != "utility"):
                groups[suite.purpose].append(_pairs(base, result, suite.suite))
        measured = all(groups.values()) and all(any(side) for group in groups.values() for side in group)
        ratios[name] = bootstrap_cost_ratio(groups["utility"], groups["safety"]) if measured else CostRatio(None)
    return ratios


def differences(evaluations: dict[str, EvalResult]) -> dict[str, dict[str, PairedDifference]]:
    """Change of every suite against the base model, paired by example: `{arm: {suite: difference}}`."""
    base = evaluations.get(BASE)
    return {
        name: {suite.suite: paired_difference(*_pairs(base, result, suite.suite)) for suite in result.suites}
        for name, result in evaluations.items()
        if base is not None and name != BASE
    }


def _pairs(base: EvalResult, result: EvalResult, suite: str) -> Pairs:
    """Outcomes of the examples of a suite that both evaluations have, before and after."""
    before = {sample["id"]: sample["outcome"] for sample in base.samples_of(suite)}
    after = {sample["id"]: sample["outcome"] for sample in result.samples_of(suite) if sample["id"] in before}
    return [before[identifier] for identifier in after], list(after.values())


def _stored_evaluation(
    folder: Path, model: dict[str, Any], config: EvaluateConfig, suites: Sequence[Suite]
) -> EvalResult | None:
    """The evaluation in `folder` if it was made so, whoever judged it."""
    if not (folder / "metrics.json").is_file():
        return None
    found = EvalResult.load(folder)
    # A record that knows nothing of a setting was made before there was a choice, with what is the default now.
    settings = EvaluateConfig(**found.settings)
    is_so = (
        _same_model(found.model, model)
        and settings.model_copy(update={"judge": config.judge}) == config
        and [result.data_hash for result in found.suites] == [content_hash(suite.examples) for suite in suites]
        and not any(sample.get("missing") for sample in found.samples)
    )
    return found if is_so else None


def _same_model(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one.get(key) == other[key] for key in ("fingerprint", "adapter", "dtype"))
