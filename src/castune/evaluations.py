"""Evaluations of a run: the base model and every arm with an adapter, on the same examples."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from castune.artifacts import EvalResult
from castune.artifacts.files import locked
from castune.artifacts.lm_eval_result import LmEvalResult
from castune.config import EvaluateConfig, Recipe
from castune.core.loading import load_config, load_model, model_source
from castune.core.provenance import model_record
from castune.data.example import Example, content_hash
from castune.data.overlap import shared_examples
from castune.errors import ArtifactError, DataError, NothingScored
from castune.evaluate.backend import Host, TransformersHost
from castune.evaluate.endpoint import Endpoint, require_openai, server_address
from castune.evaluate.judges import NotJudged, judge
from castune.evaluate.judging import judge_again
from castune.evaluate.lm_eval import lm_eval_results, require_lm_eval
from castune.evaluate.run import evaluate_on
from castune.evaluate.server import ServerHost, require_replies_only
from castune.evaluate.suites import Suite
from castune.evaluate.vllm_engine import VllmEngine, require_vllm
from castune.judge_name import JudgeName
from castune.readiness import require_ready, suite_tokens
from castune.run_directory import BASE, RunDirectory
from castune.stats.estimates import CostRatio, PairedDifference, Pairs, bootstrap_cost_ratio, paired_difference

logger = logging.getLogger(__name__)


def require_evaluation(config: EvaluateConfig, suites: Sequence[Suite]) -> None:
    """Refuse settings whose judge or backend cannot be had, before hours are spent on what is evaluated.

    Raises:
        CastuneError: a package, a model, a key or a server is missing, or a suite cannot be measured there.
    """
    for name in JudgeName.parse(config.judge):
        if name.kind == "openai":
            Endpoint(name.model).check()
        elif name.kind == "wildguard":
            load_config(name.model)
    if config.backend == "vllm":
        require_vllm()
    if config.backend == "openai":
        require_openai()
        require_replies_only(suites, config)


def require_held_out(
    config: EvaluateConfig,
    suites: Sequence[Suite],
    *,
    trained_on: Mapping[str, Sequence[Example]],
    calibration: Mapping[str, Sequence[Example]],
) -> None:
    """Refuse suites that hold prompts of the training data; tell of those that hold prompts of the calibration data.

    Calibration decides which heads are trained and fits no weight, so what it shares with a suite is told, not refused.

    Args:
        config: settings of the evaluation.
        suites: what is measured.
        trained_on: D_align and whatever else weights follow; by what it is called.
        calibration: D_safe, and D_util by its domains; by what they are called.

    Raises:
        DataError: a suite holds training prompts, and `config.overlap` does not allow it.
    """
    for suite in suites:
        for name, examples in trained_on.items():
            if not (shared := shared_examples(examples, suite.examples)):
                continue
            words = (
                f"{suite.name}: {len(shared)} of {len(suite.examples)} prompts are in the {name} data too, the first "
                f"is {shared[0]!r}: what is measured there is memory"
            )
            if config.overlap != "allow":
                raise DataError(
                    f'{words}. Train without them (evaluate.overlap = "drop", or castune tune --held-out '
                    f'{suite.name}), or measure them all the same (evaluate.overlap = "allow")'
                )
            logger.warning("%s", words)
        for name, examples in calibration.items():
            if shared := shared_examples(examples, suite.examples):
                logger.warning(
                    "%s: %d of %d prompts are in the %s data too, by which heads are chosen",
                    suite.name,
                    len(shared),
                    len(suite.examples),
                    name,
                )


def without_held_out(
    what: str, examples: Sequence[Example], suites: Sequence[Suite]
) -> tuple[list[Example], list[str]]:
    """Training examples without those whose prompt is in a suite, and the ids of these; a warning counts them.

    Raises:
        DataError: nothing would be left.
    """
    shared = {identifier for suite in suites for identifier in shared_examples(suite.examples, examples)}
    kept = [example for example in examples if example.id not in shared]
    if not kept:
        raise DataError(f"{what}: all of its {len(examples)} prompts are in the suites; nothing is left to train on")
    if shared:
        logger.warning("%s: %d of %d examples are left out, for the suites hold them", what, len(shared), len(examples))
    return kept, [example.id for example in examples if example.id in shared]


def evaluate_step(
    folder: RunDirectory,
    recipe: Recipe,
    suites: Sequence[Suite],
    loaded: tuple[Any, Any] | None = None,
    *,
    only: str | None = None,
) -> dict[str, EvalResult]:
    """Evaluations of the base model and every arm with an adapter, made where missing or older than the adapter.

    What is stored is judged again where its judge is another one, or its rules have changed.

    Args:
        folder: the run.
        recipe: its recipe, with the settings of the evaluation.
        suites: what is measured.
        loaded: the recipe's model and tokenizer, if they are loaded already; for the backend `hf`.
        only: evaluate this arm, and leave its replies to be judged by `judge_step`: other processes evaluate others.
    """
    config = recipe.evaluate
    require_evaluation(config, suites)
    if config.backend == "hf":
        loaded = loaded or load_model(recipe)
        identity = model_record(*loaded)
    else:
        identity = identity_by_map(folder, recipe)
    adapters, records = _models(folder, identity, only)
    names = [n for n in adapters if stored_evaluation(folder.evaluation(n), records[n], config, suites) is None]
    for name in adapters.keys() - set(names):
        logger.info("evaluation of %s: already there", name)
    if names:
        if loaded is not None:
            require_ready(*loaded, suite_tokens(loaded[1], config, suites))
        host = _host(recipe, loaded, [path for path in adapters.values() if path is not None])
        # An adapter without effect is told by the base model beside it.
        host.check({name: adapter for name, adapter in adapters.items() if name in (*names, BASE)}, suites, config)
        for name in names:
            logger.info("evaluation of %s: %d examples", name, sum(len(suite.examples) for suite in suites))
            with host.backend(name, adapters[name]) as backend:
                result = evaluate_on(
                    backend,
                    suites=suites,
                    config=config,
                    by=NotJudged(),
                    name=name,
                    out=folder.evaluation(name),
                    model_info=records[name],
                )
            folder.record_step(f"evaluate {name}", result.provenance)
        # There need not be room for a judge's model beside it.
        del host, backend
    del loaded
    if only is not None:  # others may be writing theirs
        return {name: EvalResult.load(folder.evaluation(name)) for name in adapters if name in (BASE, only)}
    stored = folder.load_evaluations()
    # Rules cost nothing, and those of another version may have said something else.
    is_rule = all(part.is_rule for part in JudgeName.parse(config.judge))
    if is_rule or any(result.settings["judge"] != config.judge for result in stored.values()):
        return judge_step(folder, config.judge)
    return stored


def identity_by_map(folder: RunDirectory, recipe: Recipe) -> dict[str, Any]:
    """Identity of a run's model where its weights are not loaded: it is the one of the map, by its name."""
    identity = dict(folder.load_map().metadata["model"])
    if recipe.evaluate.backend != "hf":
        identity |= {"dtype": recipe.dtype, "device": recipe.evaluate.backend}
    if recipe.evaluate.backend == "openai":
        identity["server"] = server_address()
    return identity


def _host(recipe: Recipe, loaded: tuple[Any, Any] | None, adapters: Sequence[Path]) -> Host:
    """Where the recipe's model and its adapters run."""
    if recipe.evaluate.backend == "openai":
        return ServerHost(recipe.evaluate.served_model or recipe.model)
    if recipe.evaluate.backend == "hf":
        assert loaded is not None
        return TransformersHost(*loaded)
    _, tokenizer = load_config(
        recipe.model,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
        template_date=recipe.template_date,
    )
    return VllmEngine(
        model_source(recipe.model), tokenizer, revision=recipe.revision, dtype=recipe.dtype, adapters=adapters
    )


def judge_step(folder: RunDirectory, name: str) -> dict[str, EvalResult]:
    """All evaluations of the run with the outcomes of a judge, from the replies that are stored.

    What the same judge could not tell before is asked again.
    """
    evaluations = folder.load_evaluations()
    if not evaluations:
        raise ArtifactError(f"{folder.path}: nothing has been evaluated; run: castune evaluate {folder.path}")
    by = judge(name)
    # All of them before the first is replaced: arms that are judged differently cannot be compared.
    judged = {arm: judge_again(result, by) for arm, result in evaluations.items()}
    for arm, result in judged.items():
        if result != evaluations[arm]:
            logger.info("evaluation of %s: judged by %s", arm, by.name)
            result.save(folder.evaluation(arm))
    return judged


def require_scored(evaluations: Mapping[str, EvalResult]) -> None:
    """Refuse to end as if all were well where not one example of a suite could be scored.

    Raises:
        NothingScored: the message names the suite, the arm and what became of its replies.
    """
    for arm, result in evaluations.items():
        for suite in result.suites:
            if suite.n:
                continue
            samples = result.samples_of(suite.suite)
            n_missing = sum(bool(sample.get("missing")) for sample in samples)
            n_cut = sum("reply" in s and not s.get("missing") and not s["finished"] for s in samples)
            reasons = [f"{n_missing} have no reply (see the warnings above)"] if n_missing else []
            reasons += [f"{n_cut} were cut off (raise max_new_tokens)"] if n_cut else []
            raise NothingScored(
                f"{arm}: none of the {len(samples)} examples of suite {suite.suite} could be scored by {suite.judge}"
                + (f": {', '.join(reasons)}" if reasons else "")
                + "; the same command asks again for what is missing"
            )


def lm_eval_step(
    folder: RunDirectory, recipe: Recipe, tasks: Sequence[str], *, overwrite: bool = False, **options: Any
) -> dict[str, LmEvalResult]:
    """lm-eval's tasks on the base model and every arm with an adapter; tasks that are there and up to date stay.

    Args:
        folder: the run.
        recipe: its recipe.
        tasks: names of lm-eval's tasks.
        overwrite: forget what was measured with other options.
        options: further arguments of `lm_eval_results`.

    Raises:
        ArtifactError: what is there was measured with other options; the message names one.
    """
    require_lm_eval()
    model, tokenizer = load_model(recipe)
    adapters, records = _models(folder, model_record(model, tokenizer))
    stored = {n: r for n, r in folder.load_lm_eval().items() if n in records and _same_model(r.model, records[n])}
    for name, result in {} if overwrite else stored.items():
        key = next((key for key, value in options.items() if result.settings.get(key) != value), None)
        if key is not None:
            raise ArtifactError(
                f"lm-eval of {name} in {folder.path} was made with {key} = {result.settings.get(key)!r}, asked for is "
                f"{options[key]!r}: the same, or --overwrite"
            )
    host = TransformersHost(model, tokenizer)
    for name, adapter in adapters.items():
        known = None if overwrite else stored.get(name)
        missing = [task for task in tasks if known is None or task not in known.settings["tasks"]]
        if not missing:
            logger.info("lm-eval of %s: already there", name)
            continue
        logger.info("lm-eval of %s: %s", name, ", ".join(missing))
        with host.backend(name, adapter) as backend:
            result = lm_eval_results(
                backend.model, tokenizer, tasks=missing, name=name, model_info=records[name], **options
            )
        folder.evaluation(name).mkdir(parents=True, exist_ok=True)
        with locked(folder.evaluation(name)):
            # Another command may have measured other tasks meanwhile.
            known = None if overwrite else folder.load_lm_eval().get(name)
            alike = known is not None and all(known.settings.get(key) == value for key, value in options.items())
            if known is not None and alike and _same_model(known.model, records[name]):
                result = known.joined(result)
            result.save(folder.evaluation(name))
        folder.record_step(f"lm-eval {name}", result.provenance)
    return {name: result for name, result in folder.load_lm_eval().items() if name in records}


def _models(
    folder: RunDirectory, identity: dict[str, Any], only: str | None = None
) -> tuple[dict[str, Path | None], dict[str, dict[str, Any]]]:
    """Adapter directories and identities of the base model and every arm (or `only` one) that has an adapter, by name.

    Every adapter is checked against its certificate here, before anything is measured or replaced.
    """
    cmap = folder.load_map(identity["fingerprint"])
    adapters: dict[str, Path | None] = {BASE: None}
    records = {BASE: {**identity, "adapter": None}}
    for arm in folder.arms():
        if only not in (None, arm.name):
            continue
        made = folder.load_adapter(arm, folder.load_selection(arm, cmap))
        if made is not None:
            adapters[arm.name] = arm.adapter
            records[arm.name] = {**identity, "adapter": made.certificate.adapter_hash}
    return adapters, records


def cost_ratios(evaluations: dict[str, EvalResult], utility: str | None = None) -> dict[str, CostRatio]:
    """The utility cost ratio of every tuned arm against the base model, with intervals over the examples.

    Arms that cannot be compared are left out: a suite is missing on one side, was measured otherwise, or has nothing
    scored.

    Args:
        evaluations: by arm.
        utility: the one suite whose accuracy is the utility (`mmlu`: MMLU-CR, Eq. 8); all utility suites when absent.
    """
    base = evaluations.get(BASE)
    ratios: dict[str, CostRatio] = {}
    for name, result in evaluations.items():
        if base is None or name == BASE:
            continue
        groups: dict[str, list[Pairs | None]] = {"utility": [], "safety": []}
        for suite in result.suites:
            if suite.purpose in groups and (utility in (None, suite.suite) or suite.purpose != "utility"):
                groups[suite.purpose].append(_pairs(base, result, suite.suite))
        utility_pairs, safety_pairs = ([pairs for pairs in group if pairs is not None] for group in groups.values())
        if not all(groups.values()) or None in (*groups["utility"], *groups["safety"]):
            continue
        ratio = bootstrap_cost_ratio(utility_pairs, safety_pairs)
        if ratio is not None:
            ratios[name] = ratio
    return ratios


def differences(evaluations: dict[str, EvalResult]) -> dict[str, dict[str, PairedDifference]]:
    """Change of every suite against the base model, paired by example: `{arm: {suite: difference}}`.

    Suites that were measured or judged otherwise than the base model's are left out.
    """
    base = evaluations.get(BASE)
    found: dict[str, dict[str, PairedDifference]] = {}
    for name, result in evaluations.items():
        if base is None or name == BASE:
            continue
        pairs = {suite.suite: _pairs(base, result, suite.suite) for suite in result.suites}
        found[name] = {suite: paired_difference(*both) for suite, both in pairs.items() if both is not None}
    return found


def _pairs(base: EvalResult, result: EvalResult, suite: str) -> Pairs | None:
    """Outcomes of the examples of a suite that both evaluations have; None where the two cannot be compared."""
    mine = next(found for found in result.suites if found.suite == suite)
    other = next((found for found in base.suites if found.suite == suite), None)
    alike = other is not None and (mine.judge, mine.max_new_tokens) == (other.judge, other.max_new_tokens)
    where = [evaluation.settings.get("backend", "hf") for evaluation in (base, result)]
    if not alike or where[0] != where[1]:
        return None
    before = {sample["id"]: sample["outcome"] for sample in base.samples_of(suite)}
    after = {sample["id"]: sample["outcome"] for sample in result.samples_of(suite) if sample["id"] in before}
    return ([before[identifier] for identifier in after], list(after.values())) if after else None


def stored_evaluation(
    folder: Path, model: Mapping[str, Any], config: EvaluateConfig, suites: Sequence[Suite]
) -> EvalResult | None:
    """The evaluation in `folder` if it was made so, whoever judged it; None where it is to be made.

    Args:
        folder: the evaluation's directory.
        model: identity of the evaluated model, and `adapter`, the hash of its adapter.
        config: settings.
        suites: what is measured.

    Raises:
        ArtifactError: what is there is damaged.
    """
    if not (folder / "metrics.json").is_file():
        return None
    found = EvalResult.load(folder)
    # A record that knows nothing of a setting was made before there was a choice, with what is the default now.
    settings = EvaluateConfig(**{**found.settings, "judge": config.judge})
    is_so = (
        _same_model(found.model, model)
        and settings == config
        and [result.data_hash for result in found.suites] == [content_hash(suite.examples) for suite in suites]
        and not any(sample.get("missing") for sample in found.samples)
    )
    return found if is_so else None


def _same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in ("fingerprint", "chat_template", "adapter", "dtype", "server"))
