"""Evaluations of a run: the base model and every arm with an adapter, on the same examples."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from castune.artifacts import EvalResult
from castune.artifacts.eval_result import METRICS_FILE
from castune.artifacts.fingerprints import at_strength, same_model_identity
from castune.artifacts.records import ModelRecord
from castune.artifacts.samples import is_reply, references_of
from castune.config import EvaluateConfig, Recipe
from castune.core.journal import Journal
from castune.core.loading import LoadedModel, load_config, load_model, model_source
from castune.core.provenance import model_record
from castune.data.example import content_hash
from castune.errors import ArtifactError, NothingScored
from castune.evaluation.address import require_openai, server_address
from castune.evaluation.backend import Host, TransformersHost, require_log_probs
from castune.evaluation.encoder import require_encoder
from castune.evaluation.endpoint import Endpoint
from castune.evaluation.judges import NotJudged, judge
from castune.evaluation.judging import judge_again
from castune.evaluation.run import evaluate_on
from castune.evaluation.server import ServerHost, require_replies_only
from castune.evaluation.suites import Suite
from castune.evaluation.vllm_engine import VllmEngine, require_vllm
from castune.names import JudgeName
from castune.steps.directory import BASE, RunDirectory
from castune.steps.readiness import require_ready, suite_tokens

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
        elif name.kind == "reading":
            require_encoder()
    if config.backend != "hf":
        require_log_probs(suites, config)
    if config.backend == "vllm":
        require_vllm()
    if config.backend == "openai":
        require_openai()
        require_replies_only(suites, config)


def evaluate_step(
    folder: RunDirectory,
    recipe: Recipe,
    suites: Sequence[Suite],
    loaded: LoadedModel | None = None,
    *,
    only: str | None = None,
    strengths: Sequence[float] | None = None,
) -> dict[str, EvalResult]:
    """Evaluations of the base model and every arm with an adapter, made where missing or older than the adapter.

    Those at other strengths (`evaluate.strengths`) are made beside them (`RunDirectory.load_strengths`).

    What is stored is judged again where its judge is another one, or its rules or its head have changed.

    Args:
        folder: the run.
        recipe: its recipe, with the settings of the evaluation.
        suites: what is measured.
        loaded: the recipe's model and tokenizer, if they are loaded already; for the backend `hf`.
        only: evaluate this arm, and leave its replies to be judged by `judge_step`: other processes evaluate others.
        strengths: at which adapters are measured; `evaluate.strengths` when absent.
    """
    config = recipe.evaluate
    require_evaluation(config, suites)
    if config.backend == "hf":
        loaded = loaded or load_model(recipe)
        identity = model_record(*loaded)
    else:
        identity = identity_by_map(folder, recipe)
    adapters, records = models_of(folder, identity, only)
    asked = [
        _Asked(name, adapters[name], strength, at_strength(records[name], strength))
        for name in adapters
        for strength in ((strengths or config.strengths) if name != BASE else (1.0,))
    ]
    base = stored_evaluation(folder.evaluation(BASE), records[BASE], config, suites)
    # Replies that the base model is to give again may be others.
    references = {} if base is None else references_of(base.samples)
    todo = [
        one
        for one in asked
        if (base if one.arm == BASE else stored_evaluation(one.folder(folder), one.model, config, suites, references))
        is None
    ]
    del base
    for one in asked:
        if one not in todo:
            Journal.remove_all(one.folder(folder))  # of a command that was killed when it had just been saved
    for name in adapters.keys() - {one.arm for one in todo}:
        logger.info("evaluation of %s: already done", name)
    if todo:
        if loaded is not None:
            require_ready(loaded, suite_tokens(loaded.tokenizer, config, suites))
        host = _host(recipe, loaded, [path for path in adapters.values() if path is not None])
        # An adapter without effect is told by the base model beside it.
        names = {BASE, *(one.arm for one in todo)}
        host.check({name: adapter for name, adapter in adapters.items() if name in names}, suites, config)
        for one in todo:
            logger.info("evaluation of %s: %d examples", one.label, sum(len(suite.examples) for suite in suites))
            with host.backend(one.arm, one.adapter, one.strength) as backend:
                result = evaluate_on(
                    backend,
                    suites=suites,
                    config=config,
                    by=NotJudged(),
                    name=one.label,
                    out=one.folder(folder),
                    model_info=one.model,
                    references=_base_replies(folder) if one.arm != BASE else None,
                )
            folder.record_step(f"evaluate {one.label}", result.provenance)
        # There need not be room for a judge's model beside it.
        del host, backend
    del loaded
    if only is not None:  # others may be writing theirs
        return {name: EvalResult.load(folder.evaluation(name)) for name in adapters if name in (BASE, only)}
    return judge_where_needed(folder, config)


def judge_where_needed(folder: RunDirectory, config: EvaluateConfig) -> dict[str, EvalResult]:
    """All evaluations of the run by its judge: asked where another one judged, or its rules may have changed."""
    stored = folder.load_evaluations()
    # Rules cost nothing, and those of another version may have said something else.
    is_rule = all(part.is_rule for part in JudgeName.parse(config.judge))
    every = [*stored.values(), *(one for of_arm in folder.load_strengths().values() for one in of_arm.values())]
    if is_rule or not all(is_judged_by(config.judge, result) for result in every):
        return judge_step(folder, config.judge)
    return stored


def is_judged_by(name: str, result: EvalResult, signature: str | None = None) -> bool:
    """Whether an evaluation has the outcomes of the judge of this name, as it is now; or with this signature."""
    signature = signature or "+".join(part.signature for part in JudgeName.parse(name))
    of_judge = {suite.judge for suite in result.suites if suite.purpose in ("safety", "over-refusal")}
    return result.settings["judge"] == name and of_judge <= {signature}


@dataclass(frozen=True)
class _Asked:
    """An evaluation: of an arm or the base model, at a strength of its adapter."""

    arm: str
    adapter: Path | None
    strength: float
    model: ModelRecord

    @property
    def label(self) -> str:
        return self.arm if self.strength == 1 else f"{self.arm} x {self.strength:g}"

    def folder(self, run: RunDirectory) -> Path:
        return run.at_strength(self.arm, self.strength)


def _base_replies(folder: RunDirectory) -> dict[str, list[list[int]]] | None:
    """What the base model replied where suites are measured on it; None where it is not evaluated yet."""
    return references_of(EvalResult.load(folder.evaluation(BASE)).samples) if folder.is_evaluated(BASE) else None


def identity_by_map(folder: RunDirectory, recipe: Recipe) -> ModelRecord:
    """Identity of a run's model where its weights are not loaded: it is the one of the map, by its name."""
    identity = folder.load_map().model.copy()
    if recipe.evaluate.backend != "hf":
        identity |= {"dtype": recipe.dtype, "device": recipe.evaluate.backend}
    if recipe.evaluate.backend == "openai":
        identity["server"] = server_address()
    return identity


def _host(recipe: Recipe, loaded: LoadedModel | None, adapters: Sequence[Path]) -> Host:
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
        raise ArtifactError(f"{folder.path}: nothing has been evaluated yet; run: castune evaluate {folder.path}")
    by = judge(name)
    places = {folder.evaluation(arm): result for arm, result in evaluations.items()}
    for arm, of_arm in folder.load_strengths().items():
        places |= {folder.at_strength(arm, strength): result for strength, result in of_arm.items()}
    # All of them before the first is replaced: arms that are judged differently cannot be compared.
    judged = {place: judge_again(result, by) for place, result in places.items()}
    for place, result in judged.items():
        if result != places[place]:
            logger.info("evaluation of %s: judged by %s", result.name, by.name)
            result.save(place)
        else:
            EvalResult.settle(place)  # a command may have been killed when it had just been judged
    return {arm: judged[folder.evaluation(arm)] for arm in evaluations}


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
            replies = [sample for sample in samples if is_reply(sample)]
            n_missing = sum(bool(reply.get("missing")) for reply in replies)
            n_cut = sum(not reply.get("missing") and not reply["finished"] for reply in replies)
            reasons = [f"{n_missing} have no reply (see the warnings above)"] if n_missing else []
            reasons += [f"{n_cut} were cut off (raise max_new_tokens)"] if n_cut else []
            raise NothingScored(
                f"{arm}: none of the {len(samples)} examples of suite {suite.suite} could be scored by {suite.judge}"
                + (f": {', '.join(reasons)}" if reasons else "")
                + "; run the same command again to retry what is missing"
            )


def models_of(
    folder: RunDirectory, identity: ModelRecord, only: str | None = None
) -> tuple[dict[str, Path | None], dict[str, ModelRecord]]:
    """Adapter directories and identities of the base model and every arm (or `only` one) that has an adapter, by name.

    Every adapter is checked against its certificate here, before anything is measured or replaced.
    """
    cmap = folder.load_map(identity["fingerprint"])
    adapters: dict[str, Path | None] = {BASE: None}
    records: dict[str, ModelRecord] = {BASE: {**identity, "adapter": None}}
    for arm in folder.arms():
        if only not in (None, arm.name):
            continue
        made = folder.load_adapter(arm, folder.load_selection(arm, cmap))
        if made is not None:
            adapters[arm.name] = arm.adapter
            records[arm.name] = {**identity, "adapter": made.certificate.adapter_hash}
    return adapters, records


def stored_evaluation(
    folder: Path,
    model: ModelRecord,
    config: EvaluateConfig,
    suites: Sequence[Suite],
    references: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> EvalResult | None:
    """The evaluation in `folder` if it was made so, whoever judged it; None where it is to be made.

    Args:
        folder: the evaluation's directory.
        model: identity of the evaluated model, and `adapter`, the hash of its adapter.
        config: settings.
        suites: what is measured.
        references: of an arm, the base model's own replies that it has to be measured on (`references_of`).

    Raises:
        ArtifactError: what is there is damaged.
    """
    if not (folder / METRICS_FILE).is_file():
        return None
    EvalResult.settle(folder)
    found = EvalResult.load(folder)
    # A record that knows nothing of a setting was made before there was a choice, with what is the default now.
    settings = EvaluateConfig(**{**found.settings, "judge": config.judge, "strengths": config.strengths})
    is_so = (
        same_model_identity(found.model, model)
        and settings == config
        and [result.data_hash for result in found.suites] == [content_hash(suite.examples) for suite in suites]
        and not any(is_reply(sample) and sample.get("missing") for sample in found.samples)
        and references in (None, references_of(found.samples))
    )
    return found if is_so else None
