"""The whole of castune in one file: data -> diagnose -> select -> tune -> evaluate -> report.

Read this first. Each step is one call of a stage's public function, skipped when its artifact is already there;
nothing is computed twice, and the same command continues an interrupted run.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from castune.arms import ArmName
from castune.artifacts import ConflictMap, EvalResult, HeadSelection, TuneResult
from castune.artifacts.files import alone_at, replacing, write_json
from castune.config import DataConfig, DiagnoseConfig, Recipe, SelectConfig, TuneConfig
from castune.core.journal import Journal
from castune.core.loading import find_default_gguf, load_config, load_model
from castune.core.provenance import chat_template_digest, fingerprint, provenance
from castune.core.shards import Shard
from castune.core.units import unit
from castune.data.example import Example, content_hash, require_replies
from castune.data.sources import examples
from castune.diagnose.domains import Utility, utility_hash, utility_sets
from castune.diagnose.groups import ablate_groups
from castune.diagnose.run import diagnose
from castune.diagnose.stored import GRADIENTS_FILE, OUTCOMES_FILE, reranked
from castune.errors import ArtifactError, CastuneError, DataError
from castune.evaluate.suites import Suite, load_suites
from castune.evaluations import (
    cost_ratios,
    differences,
    evaluate_step,
    require_evaluation,
    require_held_out,
    without_held_out,
)
from castune.readiness import calibration_tokens, require_ready, suite_tokens, training_tokens
from castune.remeasure import Remeasure, require_query_heads
from castune.report.page import write_figures, write_report
from castune.run_directory import Arm, RunDirectory, arm_name
from castune.select import require_rule, select
from castune.tune.phases import Reselect
from castune.tune.train import require_extras, require_utility, tune
from castune.tune.workspace import Workspace

logger = logging.getLogger(__name__)


def run(recipe: Recipe) -> RunDirectory:
    """Diagnose, select, tune, evaluate and report as the recipe says; continue where an earlier call stopped.

    Raises:
        CastuneError: bad data, model, settings, or a directory that holds another run. Data and settings are
            checked before the model is loaded.
    """
    folder = RunDirectory(Path(recipe.out))
    safety, utility = load_calibration(recipe)
    suites = load_suites(recipe.evaluate.suites, limit=recipe.evaluate.limit, seed=recipe.evaluate.seed)
    align, left_out = load_align(recipe, suites)
    trained_utility = load_trained_utility(recipe, utility, suites)
    main = ArmName(None if recipe.select.buckets else recipe.select.zone)
    require_trainable(recipe, [main, *map(ArmName.parse, recipe.select.compare)])
    require_evaluation(recipe.evaluate, suites)
    trained_on = _trained_on(recipe, recipe.select.compare, align, trained_utility)
    calibration = named_calibration(safety, utility)
    require_held_out(recipe.evaluate, suites, trained_on=trained_on, calibration=calibration)
    folder.check(recipe)
    model, tokenizer = load_model(recipe)
    configs = [recipe.tune, *(recipe.tune.changed(**dict(ArmName.parse(n).changes)) for n in recipe.select.compare)]
    require_ready(
        model,
        tokenizer,
        training_tokens(tokenizer, configs, align),
        suite_tokens(tokenizer, recipe.evaluate, suites),
    )

    cmap = diagnose_step(folder, recipe, model, tokenizer, safety, utility)
    folder.save_recipe(recipe)
    quantised = recipe.tune.quantization != "none"
    if quantised:
        del model  # there need not be room for both
        model, _ = load_model(recipe, recipe.tune.quantization)
    for arm, name in select_step(folder, recipe.select, cmap):
        tune_step(
            folder,
            arm,
            model,
            tokenizer,
            align,
            recipe.tune.changed(**dict(name.changes)),
            recipe.align,
            left_out=left_out,
            utility=trained_utility,
            utility_source=utility_source(recipe),
        )
    if quantised:
        del model
        model, _ = load_model(recipe)
    evaluate_step(folder, recipe, suites, (model, tokenizer) if recipe.evaluate.backend == "hf" else None)
    report_step(folder)
    return folder


def require_trainable(recipe: Recipe, names: Iterable[ArmName]) -> None:
    """Refuse arms that need what is not there, or are to be selected again and cannot: before anything is loaded.

    Raises:
        CastuneError: the message says what to install or to leave out.
    """
    for name in names:
        config = recipe.tune.changed(**dict(name.changes))
        require_extras(config)
        if config.reselect_steps is not None:
            require_rule(name.zone or "bucket")
    if recipe.tune.reselect_steps is not None and recipe.diagnose.units != ("q_heads",):
        raise CastuneError(
            f"tune.reselect_steps is for query heads; diagnose.units has {', '.join(recipe.diagnose.units)}"
        )


def load_data(config: DataConfig, seed: int, read: Callable[..., list[Example]] = examples) -> list[Example]:
    """The examples of a recipe's data entry; `read` is called as `examples` is."""
    return read(config.source, limit=config.limit, seed=seed, balance=config.balance)


def load_align(recipe: Recipe, suites: Sequence[Suite]) -> tuple[list[Example], list[str]]:
    """D_align of a recipe, checked, and the ids of what `evaluate.overlap` leaves out of it."""
    align = load_data(recipe.align, recipe.seed)
    require_replies(align, "align", "prompt, completion")
    return without_held_out("align", align, suites) if recipe.evaluate.overlap == "drop" else (align, [])


def load_trained_utility(recipe: Recipe, utility: Utility, suites: Sequence[Suite]) -> list[Example]:
    """The utility examples that trainings compare with or mix in, without what `evaluate.overlap` leaves out."""
    examples = all_examples(utility)
    return without_held_out("utility", examples, suites)[0] if recipe.evaluate.overlap == "drop" else examples


def all_examples(utility: Utility) -> list[Example]:
    """The examples of all utility domains together, in the order of the domains' names."""
    return [example for one in utility_sets(utility) for example in one.examples]


def utility_source(recipe: Recipe) -> str:
    """The sources of a recipe's utility data, in the order of `all_examples`."""
    if isinstance(recipe.utility, DataConfig):
        return recipe.utility.source
    return ", ".join(recipe.utility[name].source for name in sorted(recipe.utility))


def load_calibration(recipe: Recipe, read: Callable[..., list[Example]] = examples) -> tuple[list[Example], Utility]:
    """D_safe and D_util of a recipe, checked for what a diagnosis needs; D_util by domain where it has domains."""
    safety, utility = load_data(recipe.safety, recipe.seed, read), _load_utility(recipe, read)
    require_replies(safety, "safety", "prompt, target")
    utility_sets(utility)
    return safety, utility


def named_calibration(safety: Sequence[Example], utility: Utility) -> dict[str, Sequence[Example]]:
    """D_safe, and D_util by its domains, by what messages call them."""
    return {"safety": safety, **{one.objective: one.examples for one in utility_sets(utility)}}


def check_held_out(
    recipe: Recipe, suites: Sequence[Suite], *, arms: Sequence[str] = (), folder: RunDirectory | None = None
) -> None:
    """`require_held_out` with the data of a recipe, its arms, and every adapter in `folder`, as they are now.

    Data that cannot be read any more are named in a warning.
    """
    try:
        (align, _), (safety, utility) = load_align(recipe, suites), load_calibration(recipe)
    except DataError as error:
        logger.warning("suites are not compared with the training data, which are not there: %s", error)
        return
    trained_on = _trained_on(recipe, arms, align, load_trained_utility(recipe, utility, suites))
    known = {content_hash(examples) for examples in trained_on.values()}
    for arm in folder.arms() if folder is not None else ():
        for record in _records_of(TuneResult.load(arm.adapter)) if arm.is_trained else ():
            if record["hash"] in known:
                continue
            name = f"training (arm {arm.name}, {record['source']})"
            try:
                trained_on[name] = recorded_data(record, recipe.seed)
            except CastuneError as error:
                logger.warning("suites are not compared with what %s was trained on: %s", arm.name, error)
    require_held_out(recipe.evaluate, suites, trained_on=trained_on, calibration=named_calibration(safety, utility))


def _trained_on(
    recipe: Recipe, arms: Sequence[str], align: Sequence[Example], utility: Sequence[Example]
) -> dict[str, Sequence[Example]]:
    """What weights follow in these trainings: D_align, and D_util with data replay or most kinds of surgery."""
    configs = [recipe.tune, *(recipe.tune.changed(**dict(ArmName.parse(name).changes)) for name in arms)]
    found: dict[str, Sequence[Example]] = {"training": align}
    if any(config.trains_on_utility for config in configs):
        found["utility (which is trained on)"] = utility
    return found


def _records_of(result: TuneResult) -> list[dict[str, Any]]:
    """Records of the data that the weights of a finished training followed."""
    follows_utility = result.utility is not None and TuneConfig(**result.settings).trains_on_utility
    return [result.data, *([result.utility] if result.utility is not None and follows_utility else [])]


def recorded_data(record: Mapping[str, Any], seed: int) -> list[Example]:
    """The examples of a data record: all of the source, or as many as were drawn then, by the same seed; without what
    was left out.

    Raises:
        CastuneError: the source is not known, or not there any more.
    """
    if record["source"] is None:
        raise ArtifactError("data that were given as examples, not by their source, cannot be loaded again")
    left_out = set(record.get("left_out", ()))
    found = load_data(DataConfig(source=record["source"]), seed)
    n = record["n"] + len(left_out)
    if len(found) > n:
        found = load_data(DataConfig(source=record["source"], limit=n, balance=record.get("balance")), seed)
    return [example for example in found if example.id not in left_out]


def config_and_tokenizer(recipe: Recipe) -> tuple[Any, Any, list[str]]:
    """The config of a recipe's model, a tokenizer to count tokens with, and what the user should know about it.

    Raises:
        CastuneError: no config, or no tokenizer at all.
    """
    config, tokenizer = load_config(
        recipe.model,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
        template_date=recipe.template_date,
    )
    if tokenizer is not None:
        return config, tokenizer, []
    if find_default_gguf() is None:
        raise CastuneError(f"{recipe.model} has no tokenizer, which a plan needs to count tokens")
    note = "no tokenizer there: tokens are counted with the default model's, which makes more of them"
    return config, load_config("default")[1], [note]


def _load_utility(recipe: Recipe, read: Callable[..., list[Example]]) -> Utility:
    if isinstance(recipe.utility, DataConfig):
        return load_data(recipe.utility, recipe.seed, read)
    domains = {}
    for name, config in recipe.utility.items():
        try:
            domains[name] = load_data(config, recipe.seed, read)
        except DataError as error:
            raise DataError(f"utility: domain {name!r}: {error}") from error
    return domains


def diagnose_step(
    folder: RunDirectory,
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    safety: Sequence[Example],
    utility: Utility,
    *,
    shard: str | None = None,
) -> ConflictMap:
    """The conflict map of the run, measured unless it is there; `shard` is this process's share of the measuring."""
    sets = utility_sets(utility)
    if folder.map_file.is_file():
        cmap = folder.load_map(fingerprint(model))
        # A map that knows nothing of a setting was made before there was a choice, with what is the default now.
        found = DiagnoseConfig(**cmap.metadata["settings"]).model_dump(mode="json")
        _check_same("the conflict map", found, recipe.diagnose.model_dump(mode="json"), folder)
        for name, digest in (("safety", content_hash(safety)), ("utility", utility_hash(sets))):
            _check_same(f"the conflict map's {name} data", cmap.metadata["data"][name]["hash"], digest, folder)
        _check_template("the conflict map", cmap.metadata["model"], tokenizer, folder)
        logger.info("diagnosis: already there")
        Journal.remove_all(folder.path)  # of a command that was killed when the map was just made
        return cmap
    require_ready(model, tokenizer, calibration_tokens(tokenizer, recipe.diagnose, safety, utility))
    n_questions = sum(len(one.examples) for one in sets)
    logger.info("diagnosis: %d harmful prompts, %d questions", len(safety), n_questions)
    configs = {"utility": recipe.utility} if isinstance(recipe.utility, DataConfig) else recipe.utility
    cmap = diagnose(
        model,
        tokenizer,
        safety=safety,
        utility=utility,
        config=recipe.diagnose,
        out=folder.path,
        shard=shard,
        sources={"safety": recipe.safety.source, **{one.objective: configs[one.name].source for one in sets}},
        seed=recipe.seed,
    )
    if Shard.of(shard).writes:
        folder.record_step("diagnose", cmap.metadata["provenance"])
    return cmap


def rerank_step(folder: RunDirectory, recipe: Recipe, source: RunDirectory) -> ConflictMap:
    """The conflict map of the run from what another run's map was made from: S(h) and C(h) are ranked otherwise."""
    if not folder.map_file.is_file():
        cmap = source.load_map()
        again = f"castune diagnose {recipe.model} --out {source.path}"
        found = reranked(source.path, cmap, recipe.diagnose.sensitivity_rank, again)
        for name in (OUTCOMES_FILE, GRADIENTS_FILE):
            with replacing(folder.path / name) as temporary:
                shutil.copyfile(source.path / name, temporary)
        found.save(folder.path)
    return folder.load_map()


def group_step(
    folder: RunDirectory,
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    safety: Sequence[Example],
    utility: Utility,
    *,
    buckets: int,
) -> list[dict[str, Any]]:
    """Joint shifts of every bucket beside the sums of its heads' own; written to `group_ablation.json`.

    With several utility domains, utility shifts are means over the domains, of buckets and of single heads.

    Returns:
        A record a bucket, the riskiest first: `bucket`, `heads`, and for both sets the joint shift with its standard
        error and the sum over its heads ablated one at a time.
    """
    cmap = folder.load_map(fingerprint(model))
    groups = [select(cmap, buckets=buckets, bucket=number).all_units for number in range(1, buckets + 1)]
    of_groups = [[unit(*one) for one in group] for group in groups]
    shifts = ablate_groups(model, tokenizer, groups=of_groups, safety=safety, utility=utility, config=recipe.diagnose)
    row_of = {one: row for row, one in enumerate(cmap.units)}
    # The combined map may hold of each head the shift on its worst domain only.
    maps = list(cmap.domains.values()) or [cmap]
    records = []
    for number, group in enumerate(groups):
        rows = [row_of[one] for one in group]
        record: dict[str, Any] = {"bucket": number + 1, "heads": len(group)}
        for name in ("utility_shift", "safety_shift"):
            error = float(getattr(shifts, f"{name}_se")[number])
            record[name] = float(getattr(shifts, name)[number])
            record[f"{name}_se"] = error if isfinite(error) else None
            record[f"{name}_sum"] = sum(float(one.column(name)[rows].sum()) for one in maps) / len(maps)
        records.append(record)
    content = {
        "conflict_map_hash": cmap.content_hash,
        "buckets": records,
        "settings": recipe.diagnose.model_dump(mode="json"),
        "provenance": provenance(recipe.seed),
    }
    write_json(folder.path / "group_ablation.json", "group ablation", content)
    return records


def select_step(folder: RunDirectory, config: SelectConfig, cmap: ConflictMap) -> list[tuple[Arm, ArmName]]:
    """Write the selections of the main arm and of the arms to compare it with; returns them with what they change."""
    main = choose(cmap, config)
    main.save(folder.path)
    names = [ArmName.parse(text) for text in config.compare]
    return [
        (folder.main_arm(main), ArmName()),
        *((select_arm(folder, name, config, cmap), name) for name in names),
    ]


def select_arm(folder: RunDirectory, name: ArmName, config: SelectConfig, cmap: ConflictMap) -> Arm:
    """Write the selection of the arm of that name; of the main one's size unless the name says another."""
    main = folder.main_selection()
    size = config.fraction
    if main is not None:
        size = len(main.heads) / main.n_total
        if main.units:  # the same share of each kind, which rounds apart for each
            size = main.fraction or (1 / main.buckets if main.buckets else len(main.all_units) / main.n_total)
    selection = select(
        cmap,
        zone=name.zone or "safe",
        fraction=size if name.fraction is None else name.fraction,
        buckets=name.buckets,
        bucket=name.bucket,
        score=name.score or config.score,
        seed=config.seed,
    )
    arm = folder.side_arm(arm_name(selection) + name.suffix)
    selection.save(arm.folder)
    return arm


def choose(cmap: ConflictMap, config: SelectConfig) -> HeadSelection:
    """The selection a `SelectConfig` describes."""
    return select(
        cmap,
        zone=config.zone,
        fraction=config.fraction,
        buckets=config.buckets,
        bucket=config.bucket,
        score=config.score,
        seed=config.seed,
    )


def tune_step(
    folder: RunDirectory,
    arm: Arm,
    model: Any,
    tokenizer: Any,
    data: Sequence[Example],
    config: TuneConfig,
    align: DataConfig,
    *,
    left_out: Sequence[str] = (),
    utility: Sequence[Example] | None = None,
    utility_source: str | None = None,
    overwrite: bool = False,
) -> TuneResult:
    """The adapter of an arm, trained unless it is there; `utility` is for gradient surgery and data replay.

    `align` and `left_out` tell where `data` came from and what of it is not in it, for the record.
    """
    # The first of several processes speaks for them. It cannot wait: they would begin without it.
    lock = alone_at(arm.folder / ".adapter.lock", wait=Shard.n_processes() == 1)
    with lock if Shard.is_main_process() else nullcontext():
        selection = folder.load_selection(arm, folder.load_map(fingerprint(model)))
        if arm.is_masked:
            raise ArtifactError(
                f"{arm.adapter} was made of other adapters by castune mask; train an arm of another name"
            )
        if arm.is_trained and not overwrite:
            result = folder.load_tuning(arm, selection)
            # A record that knows nothing of a setting was made before there was a choice, with what is the default now.
            found = TuneConfig(**result.settings).model_dump(mode="json")
            _check_same(f"{arm.adapter}", found, config.model_dump(mode="json"), folder)
            _check_same(f"{arm.adapter}'s data", result.data["hash"], content_hash(data), folder)
            if result.utility is not None and utility is not None:
                _check_same(f"{arm.adapter}'s utility data", result.utility["hash"], content_hash(utility), folder)
            _check_template(f"{arm.adapter}", result.model, tokenizer, folder)
            logger.info("tuning %s: already there", arm.name)
            if Shard.is_main_process():  # it was killed when its adapter was in place
                Workspace.beside(arm.adapter).remove_of(result.settings, result.data)
            return result
        reselect = None
        if config.reselect_steps is not None:
            require_rule(selection.zone)
            reselect = _reselection(folder, arm, selection, model, tokenizer)
        logger.info("tuning %s: %s, %d examples", arm.name, selection.counted, len(data))
        result = tune(
            model,
            tokenizer,
            selection,
            data=data,
            out=arm.adapter,
            config=config,
            source=align.source,
            balance=align.balance,
            left_out=left_out,
            utility=utility,
            utility_source=utility_source,
            reselect=reselect,
        )
        if Shard.is_main_process():
            folder.record_step(f"tune {arm.name}", result.provenance)
        return result


def _reselection(folder: RunDirectory, arm: Arm, selection: HeadSelection, model: Any, tokenizer: Any) -> Reselect:
    """How the heads of an arm are chosen again: from the run's map, measured again on the model as it is then."""
    recipe = folder.load_recipe()
    require_query_heads(folder.load_map(), f"{folder.path}: reselect_steps works")
    safety, utility = load_calibration(recipe)
    # It is there: this compares model, data and settings with it.
    first = diagnose_step(folder, recipe, model, tokenizer, safety, utility)
    remeasure = Remeasure(model, tokenizer, safety, utility, recipe, first, arm.name)
    return partial(remeasure.select, selection)


def tune_arm(
    folder: RunDirectory,
    arm: str | None,
    config: TuneConfig,
    *,
    align: DataConfig,
    utility: Sequence[DataConfig] = (),
    held_out: Sequence[str] = (),
    overwrite: bool = False,
) -> tuple[Arm, TuneResult]:
    """Train an arm of a run by its name, the main one for None; its selection is made where there is none.

    What the name changes is applied to `config`. The run's recipe notes how its main arm was trained. Examples whose
    prompts are in the suites `held_out`, or in the recipe's where it drops what overlaps, are not trained on.

    Raises:
        CastuneError: name and settings contradict each other, utility data is missing or not used. Nothing has been
            loaded or written then.
    """
    recipe = folder.load_recipe()
    is_there = arm is not None and folder.has_arm(arm)
    # A selection made by other means may have any name.
    name = ArmName.parse(arm) if arm is not None and (ArmName.is_name(arm) or not is_there) else None
    for key, value in () if name is None else name.changes:
        if getattr(config, key) not in (value, TuneConfig.model_fields[key].default):
            raise CastuneError(
                f"--arm {arm} and --{key} {getattr(config, key)} contradict each other: give one of them"
            )
        config = config.changed(**{key: value})
    if utility and not config.needs_utility:
        raise CastuneError(
            "--utility is for gradient surgery and data replay: add --surgery, for example pcgrad, or --replay"
        )
    require_utility(config, utility)
    require_extras(config)
    if config.reselect_steps is not None:
        chosen = None if name is not None and not is_there else HeadSelection.load(folder.arm(arm).folder)
        require_rule(chosen.zone if chosen else (name and name.zone) or "bucket")
        require_query_heads(folder.load_map(), f"{folder.path}: reselect_steps works")
    examples = load_data(align, recipe.seed)
    utility_examples = [example for one in utility for example in load_data(one, recipe.seed)]
    left_out: list[str] = []
    if not held_out and recipe.evaluate.overlap == "drop":
        held_out = recipe.evaluate.suites
    if held_out:
        suites = load_suites(held_out, limit=recipe.evaluate.limit, seed=recipe.evaluate.seed)
        examples, left_out = without_held_out("training data", examples, suites)
        if utility_examples:
            utility_examples, _ = without_held_out("utility", utility_examples, suites)
    if name is None or is_there:
        target = folder.arm(arm)
    else:
        seed = config.seed if recipe.select.seed is None else recipe.select.seed
        target = select_arm(folder, name, recipe.select.model_copy(update={"seed": seed}), folder.load_map())
    model, tokenizer = load_model(recipe, config.quantization)
    require_ready(model, tokenizer, training_tokens(tokenizer, [config], examples))
    result = tune_step(
        folder,
        target,
        model,
        tokenizer,
        examples,
        config,
        align,
        left_out=left_out,
        utility=utility_examples,
        utility_source=", ".join(one.source for one in utility),
        overwrite=overwrite,
    )
    if target.folder == folder.path and Shard.is_main_process():
        folder.save_recipe(Recipe(**{**dict(recipe), "align": align, "tune": config}))
    return target, result


def report_step(folder: RunDirectory) -> Path:
    """Write figures and `report.html` from what the run directory holds."""
    cmap = folder.load_map()
    selections, tunings, masked = {}, {}, {}
    for arm in folder.arms():
        selections[arm.name] = folder.load_selection(arm, cmap)
        made = folder.load_adapter(arm, selections[arm.name])
        if isinstance(made, TuneResult):
            tunings[arm.name] = made
        elif made is not None:
            masked[arm.name] = made
    evaluations = folder.load_evaluations()
    drifts = folder.load_drifts(cmap)
    write_figures(
        folder.path / "figures",
        cmap=cmap,
        selections=selections,
        tunings=tunings,
        evaluations=evaluations,
        drifts=drifts,
    )
    return write_report(
        folder.report_file,
        cmap=cmap,
        selections=selections,
        tunings=tunings,
        masked=masked,
        evaluations=evaluations,
        lm_eval=folder.load_lm_eval(),
        cost_ratios=cost_ratios(evaluations),
        mmlu_cost_ratios=cost_ratios(evaluations, "mmlu") if _has_suite(evaluations, "mmlu") else None,
        differences=differences(evaluations),
        drifts=drifts,
        recipe_text=folder.recipe_file.read_text(encoding="utf-8") if folder.recipe_file.is_file() else "",
    )


def _has_suite(evaluations: Mapping[str, EvalResult], name: str) -> bool:
    return any(suite.suite == name for result in evaluations.values() for suite in result.suites)


def _check_template(what: str, model: Mapping[str, Any], tokenizer: Any, folder: RunDirectory) -> None:
    """Refuse what was made with another chat template; records from before it was noted know of none."""
    digest = chat_template_digest(tokenizer)
    if model.get("chat_template", digest) != digest:
        _check_same(what, f"chat template {model['chat_template']}", f"chat template {digest}", folder)


def _check_same(what: str, found: Any, wanted: Any, folder: RunDirectory) -> None:
    if found == wanted:
        return
    if isinstance(found, dict) and isinstance(wanted, dict):
        key = next(key for key in [*found, *wanted] if found.get(key) != wanted.get(key))
        found, wanted = f"{key} = {found.get(key)!r}", f"{key} = {wanted.get(key)!r}"
    raise ArtifactError(
        f"{what} in {folder.path} was made with {found}, asked for is {wanted}; "
        "give another directory with --out, or --overwrite where the command has it"
    )
