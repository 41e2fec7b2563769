"""What the command line shows of plans, maps and evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from castune.console_table import TextTable, stdout_console
from castune.core.numbers import duration, gigabytes, number, percent, span, with_error
from castune.names import KINDS, units_counted

if TYPE_CHECKING:
    from castune.artifacts import Certificate, ConflictMap, EvalResult, MaskedAdapter, ProjectedAdapter, TuneResult
    from castune.artifacts.attack_result import AttackResult
    from castune.artifacts.drift_result import DriftResult
    from castune.artifacts.lm_eval_result import LmEvalResult, LmEvalScore
    from castune.config import Measure
    from castune.plan.planner import DiagnosisCost, Planner
    from castune.plan.power import VisibleDifference
    from castune.stats.estimates import CostRatio
    from castune.stats.safety_costs import SafetyCosts
    from castune.steps.reproduce import Difference, Reproduction

# Undecided units of a kind that are named; the report has them all.
_MOST_NAMED = 10


def say(text: str) -> None:
    """A line on standard output."""
    typer.echo(text)


def show_diagnosis(cmap: ConflictMap) -> None:
    """What a diagnosis found, and how far it can be trusted."""
    from castune.report.attribution import fidelity_words, named_undecided, standing_words

    metadata = cmap.metadata
    baseline, ties, conflict = metadata["baseline"], metadata["ties"], cmap.column("optimization_conflict")
    domains = metadata.get("domains", {})
    of_domains = f" of {len(domains)} domains ({metadata['combined']})" if domains else ""
    kinds = metadata.get("kinds", {})
    words, counted = cmap.kind_words, units_counted({kind: len(cmap.rows_of(kind)) for kind in cmap.kinds})
    say(
        f"{counted}, measure {metadata['settings']['measure']}, "
        f"n = {metadata['data']['utility']['n']} {cmap.utility_examples}{of_domains} and "
        f"{metadata['data']['safety']['n']} harmful prompts, {duration(metadata['seconds'])}"
    )
    rate = f"mean {cmap.utility_rate} of the domains" if domains else cmap.utility_rate
    say(f"  base model: {rate} {_rate(baseline['utility_accuracy'])}, refusals {_rate(baseline['refusal_rate'])}")
    say(f"  O(h): {span(conflict.min(), conflict.max())}, mean {number(conflict.mean())}")
    tied = (f"{percent(ties[f'{objective}_shift'], 0)} by {objective} shift" for objective in ("utility", "safety"))
    # What is told of a whole map is told of its first kind of unit.
    say(f"  tied {words[cmap.kinds[0]]}: {', '.join(tied)}")
    found = metadata["reliability"]
    columns = found["split_half"]["columns"]
    shown = {"O": "optimization_conflict", "H_gen": "utility_shift", "H_safe": "safety_shift", "C": "conflict_score"}
    say("  reliability: " + ", ".join(f"{sign} {number(columns[name]['full'])}" for sign, name in shown.items()))
    zones = found["split_half"]["zones"]
    say(
        f"  safe zones of two halves of the examples overlap by {number(zones['safe'])} "
        f"({number(zones['safe_by_chance'])} by chance)"
    )
    for kind, found in cmap.fidelity.items():
        say(f"  attribution against exact ablation: {fidelity_words(found)}, over {len(found['units'])} {words[kind]}")
        placed = cmap.standing[kind]
        told = standing_words(placed, len(cmap.rows_of(kind)))
        say(f"  {words[kind]} in or out of the safe quarter: {told}")
        if 0 < len(placed["undecided"]) <= _MOST_NAMED:
            say(f"    undecided {words[kind]}: {named_undecided(placed, _MOST_NAMED)}")
    for kind, found in kinds.items():
        say(f"  {words[kind]}: reliability of C {number(found['reliability']['reliability'])}, within the kind")
    for name, record in domains.items():
        say(
            f"  domain {name} (n = {record['data']['n']}): {cmap.domains[name].utility_rate} "
            f"{_rate(record['utility_accuracy'])}, reliability of C {number(record['reliability'])}, Spearman of C "
            f"with the combined C {number(record['spearman'])}"
        )


def show_surgery(name: str, result: TuneResult) -> None:
    """How often the gradients of alignment and utility conflicted in a training with surgery; nothing without."""
    found = result.surgery
    if found is None:
        return
    say(
        f"{name}: surgery {result.settings['surgery']} ({result.settings['surgery_granularity']}), alignment and "
        f"utility gradients conflicted in {found['conflicting_steps']} of {found['steps']} steps, "
        f"mean cosine {number(found['mean_cosine'], '.3f')}"
    )


def show_null_space(name: str, result: TuneResult) -> None:
    """How much of its inputs a training in a null space left alone; nothing without."""
    from castune.report.training import null_space_words

    if result.null_space is not None:
        say(f"{name}: {null_space_words(result.null_space)}")


def show_selections(name: str, result: TuneResult) -> None:
    """How far the heads changed in a training that selected again; nothing without."""
    for before, now in zip(result.selections, result.selections[1:], strict=False):
        stayed = sum(one in before["units"] for one in now["units"])
        say(f"{name}: reselected after step {now['step']}, {stayed} of {len(now['units'])} heads stayed")


def show_drift(result: DriftResult) -> None:
    """How far the map of every step goes with that before training, beside measurement noise."""
    from castune.report.drift import drift_verdict

    say(f"{result.arm}: the map before training against the map at each step, {result.n['heads']} heads")
    for step in result.steps:
        score, safe = step.columns["conflict_score"], step.zones["safe"]
        say(
            f"  step {step.step}: Spearman of C {number(score.spearman)} on the same examples, noise ceiling "
            f"{number(score.ceiling)}; the safe zone keeps {safe.kept} of {safe.size} heads ({safe.by_chance:.1f} by "
            "chance)"
        )
        say(f"    {drift_verdict(step, result.n)}")


def show_conditions(differences: Sequence[Difference]) -> None:
    """Conditions of a run that are not what they were, the gravest first."""
    if not differences:
        say("conditions: unchanged since the run was made")
        return
    rows = [{"changed": one.what, "then": one.then, "now": one.now, "effect": one.severity} for one in differences]
    show_rows("Conditions", rows)


def show_reproduction(found: Reproduction) -> None:
    """Conditions that differ, and every result beside itself made again."""
    show_conditions(found.differences)
    rows = [{"result": one.what, "outcome": one.outcome, "detail": one.detail} for one in found.comparisons]
    show_rows(f"{found.run}, repeated", rows)
    say("reproduced" if found.is_reproduced else "not reproduced: see the results marked different")


_BY: dict[Measure, str] = {"attribution": "attribution", "margin": "margins", "decision": "decisions"}
_PARTS = {
    "gradients": "gradients",
    "attribution": "attribution, utility and safety",
    "checked": "exact checks, own replies",
    "utility": "utility sweep",
    "margins": "safety sweep, margins",
    "decisions": "safety sweep, decisions",
    "solutions": "utility sweep, worked answers",
    "reply_margins": "sweep of reply domains, margins",
    "reply_decisions": "sweep of reply domains, decisions",
}


def show_plan(planner: Planner, found: DiagnosisCost, accelerator: str | None) -> None:
    """Work, time and memory of a diagnosis to come, and the memory of a training."""
    from castune.artifacts.unit import only_heads

    shape, where = planner.shape, f"on one {accelerator}" if accelerator else "here"
    what = "heads" if only_heads(planner.units.units) else "units"
    say(
        f"{shape.model_type}: {shape.n_layers} layers, {shape.n_units} {what}, "
        f"{shape.n_parameters / 1e6:,.1f} M parameters, {gigabytes(shape.weight_bytes)} of weights in "
        f"{str(shape.dtype).removeprefix('torch.')}"
    )
    rows = []
    for name, label in _PARTS.items():
        if name in found.costs:
            cost = found.costs[name]
            counts = [f"{n:,}" for n in (cost.work.forwards, cost.work.tokens, cost.work.step_tokens)]
            flops = f"{shape.all_flops(cost.work) / 1e15:,.3f}"
            rows.append([label, *counts, flops, duration(cost.seconds)])
    _show(TextTable(["part", "forwards", "tokens", "decoded", "PFLOP", f"time {where}"], rows))
    for measure, by in _BY.items():
        total = found.total(measure)
        flops = f"{shape.all_flops(total.work) / 1e15:,.2f}"
        say(f"map by {by}: {duration(total.seconds)} {where}, {flops} PFLOP")
    if "solutions" in found.costs and not found.solves:
        seconds = found.costs["solutions"].seconds
        say(f"with diagnose.problems = decision the utility sweep takes {duration(seconds)} {where} instead")
    _show_plan_memory(planner, found)
    _show_plan_notes(planner, found)


def show_power(found: Sequence[VisibleDifference]) -> None:
    """What differences the suites of a recipe can show."""
    from castune.plan.power import CHANGED, GIVEN

    if not found:
        return
    heads = ["suite", "n", *(f"if {percent(share, 0)} change" for share in CHANGED), f"n for {100 * GIVEN:.0f} points"]
    rows = [
        [
            one.suite,
            f"{one.n:,}",
            *(f"{100 * smallest:.1f} points" for smallest in one.smallest),
            " or ".join(f"{needed:,}" for needed in one.needed),
        ]
        for one in found
    ]
    caption = (
        "The smallest change from base that a suite detects with a power of 80 %, if training changes this share of "
        "its outcomes. Suites in nats detect smaller changes; the report says how small."
    )
    _show(TextTable(heads, rows, title="Smallest visible differences", caption=caption))


def _show_plan_memory(planner: Planner, found: DiagnosisCost) -> None:
    from castune.config import TuneConfig

    if found.peak_memory:
        by_measure = (f"{gigabytes(n_bytes)} by {_BY[measure]}" for measure, n_bytes in found.peak_memory.items())
        say(f"peak memory: about {', '.join(by_measure)}")
    say(f"partial gradients: {gigabytes(found.gradient_bytes)} of CPU memory (diagnose.gradient_chunks)")
    config = TuneConfig()
    usual, less = (
        gigabytes(planner.most_training_memory(config.changed(gradient_checkpointing=checkpointing)))
        for checkpointing in (False, True)
    )
    has = "" if planner.accelerator is None else f" (of {gigabytes(planner.accelerator.memory)})"
    say(
        f"peak memory of training: at most about {usual} (micro-batches of {config.batch_size} x "
        f"{config.max_length:,} tokens), {less} with gradient checkpointing{has}"
    )


def _show_plan_notes(planner: Planner, found: DiagnosisCost) -> None:
    notes = list(planner.notes)
    if planner.accelerator is not None:
        notes.append(
            "time: a roofline at 40 % of the data sheet's FLOP/s and 80 % of its bandwidth, not measured; "
            "a decoding step adds 0.5 ms of host time per layer"
        )
    else:
        notes.append(f"time and memory: measured on {found.slice_layers} layers with random weights")
    if not found.resumable:
        notes.append("this architecture cannot resume from a layer, so every ablation runs all layers")
    notes.append("memory of training: an estimate, without the framework's own memory and allocator overhead")
    for note in notes:
        say(f"note: {note}")


def selected_in(budget: dict[str, int]) -> str:
    """How many units of each kind are trained."""
    others = {single: budget[many] for many, single in KINDS.items() if many in budget}
    heads = {"q_head": budget["heads"]} if budget["heads"] or not others else {}
    return units_counted({**heads, **others})


def show_certificate(certificate: Certificate) -> None:
    """What an adapter changes, and what it was proven not to change."""
    others = f"{certificate.checked_rows:,} other rows"
    if certificate.selected_columns:
        others += f" and {certificate.checked_columns:,} columns"
    say(f"certificate: {certificate.changed}, {others} of the adapted layers and all other tensors bit-identical")


def show_masked(masked: MaskedAdapter) -> None:
    """What was made of existing adapters, what was left out, and the proof."""
    kept = masked.certificate
    made = "" if masked.combination is None else f"{len(masked.sources)} adapters, {masked.combination}; "
    what = "head" if kept.only_heads else "unit"
    say(f"{made}{masked.zone}: {len(kept.units)} of {masked.n_total} {what}s kept, in {len(kept.layers)} layers")
    if masked.dropped:
        counts = ", ".join(f"{count} {name}" for name, count in masked.dropped.items())
        say(f"dropped: {counts} (modules of the source adapters that hold no selected {what})")
    if masked.unadapted_layers:
        missing = ", ".join(map(str, masked.unadapted_layers))
        of_what = "the queries" if kept.only_heads else "anything selected"
        say(f"note: no source adapts {of_what} of layer {missing}, which stay unchanged")
    show_certificate(masked.certificate)
    if not (kept.changed_rows or kept.changed_columns):
        say(f"note: no source changes a selected {what}, so with this adapter the model is the base model")


def show_projected(projected: ProjectedAdapter) -> None:
    """Which updates were projected, what is left of the adapter, what it may change now, and the proof."""
    cosines, kept = projected.cosines, projected.certificate
    found = f", cosines {cosines[0]:.3f} to {cosines[-1]:.3f}" if cosines else ""
    say(f"{len(projected.projected)} of {len(projected.updates)} updates projected ({projected.rule}){found}")
    if projected.kept_norm is not None:
        say(f"norm of the whole update: {projected.kept_norm:.3f} of what it was")
    what = "head" if kept.only_heads else "unit"
    if projected.projected:
        reach = f"all {len(kept.units)} {what}s of the adapted layers, of {projected.n_total},"
        say(f"note: a projection mixes rows, so {reach} may change now")
    else:
        say("note: nothing was projected, so the adapter is unchanged")
    show_certificate(kept)


def show_evaluations(
    evaluations: dict[str, EvalResult],
    ratios: dict[str, dict[str, CostRatio]],
    at_equal_safety: SafetyCosts | None = None,
) -> None:
    """A row a suite, a column an arm; the cost ratios against the base model; what safety costs."""
    if not evaluations:
        return
    from castune.purposes import COSTS
    from castune.report.equal_safety import sentences
    from castune.report.summary import cost_ratio

    suites = list(dict.fromkeys(result.suite for e in evaluations.values() for result in e.suites))
    caption = "rate or nats per token ± standard error (n, unscored); UCR against base (95 % interval)"
    rows = []
    for suite in suites:
        found = [next((r for r in result.suites if r.suite == suite), None) for result in evaluations.values()]
        rows.append([suite, *("not measured" if one is None else _rate(vars(one)) for one in found)])
    for ratio, of_arms in ratios.items():
        cells = ("" if name not in of_arms else cost_ratio(name, of_arms) for name in evaluations)
        rows.append([COSTS[ratio].label, *cells])
    _show(TextTable(["suite", *evaluations], rows, caption=caption))
    for sentence in sentences(at_equal_safety) if at_equal_safety is not None else ():
        say(sentence)


def show_lm_eval(results: dict[str, LmEvalResult]) -> None:
    """What lm-eval measured: groups, then tasks that are in none."""
    if not results:
        return
    from castune.artifacts.lm_eval_result import headline_scores

    rows = []
    for (task, metric), scores in headline_scores(results).items():
        first = next(iter(scores.values()))
        cells = [_value(scores.get(name)) for name in results]
        rows.append([task, metric, "" if first.num_fewshot is None else first.num_fewshot, f"{first.n:,}", *cells])
    caption = "value ± standard error, as lm-eval reports them"
    _show(TextTable(["task", "metric", "shots", "n", *results], rows, caption=caption))


def show_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of plain values, numbers to two places; what is missing is a dash."""
    if not rows:
        return
    cells = [[f"{value:.2f}" if isinstance(value, float) else value for value in row.values()] for row in rows]
    _show(TextTable(rows[0], cells, title=title))


def _value(score: LmEvalScore | None) -> str:
    if score is None or score.value is None:
        return "not measured"
    return with_error(score.value, score.standard_error, ".4f")


def _rate(record: dict[str, Any]) -> str:
    if record["value"] is None:
        return f"unscored ({record['unscored']})"
    unscored = f", {record['unscored']} unscored" if record["unscored"] else ""
    return f"{with_error(record['value'], record['standard_error'])} ({record['n']}{unscored})"


def show_attacks(result: AttackResult) -> None:
    """What attacks left of the refusals of every arm, and what that says."""
    from castune.report.attacks import HEADS, basis, cells, headline, sentences

    _show(TextTable(HEADS, cells(result), title="Attacks"))
    for sentence in (basis(result), *sentences(result), headline(result)):
        say(f"\n{sentence}")
    for kind, why in result.left_out.items():
        say(f"\nleft out: {kind}, because {why}")
    say("")


def _show(table: TextTable) -> None:
    # Into a file or a pipe: wide enough that hardly a table becomes a list.
    stdout_console(200).print(table)
