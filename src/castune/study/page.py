"""The report of a study: one page that needs nothing else, and the figures as files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from castune.artifacts import ConflictMap, EvalResult, HeadSelection
from castune.artifacts.drift_result import DriftResult
from castune.artifacts.files import write_text
from castune.config import StudyConfig, method_suffix
from castune.core.numbers import counted, duration, number, p_value, percent, span, with_error
from castune.names import ArmName
from castune.purposes import COSTS, PURPOSES, RATIOS
from castune.report.document import document, write_charts
from castune.report.drift import drift_charts, drift_section
from castune.report.equal_safety import chart_names, costs_of, costs_table, sentences
from castune.report.explorer import explorer
from castune.report.markup import Markup, table, tag
from castune.report.outcomes import losses
from castune.report.samples import samples
from castune.report.sections import figure, known, section
from castune.report.summary import NOT_MEASURED
from castune.stats.distributions import Interval
from castune.steps.directory import BASE, RunDirectory
from castune.study.figures import COST_FIGURES, charts, equal_safety_figure, method_figures
from castune.study.findings import Findings
from castune.study.graph import Graph
from castune.study.schedule import State
from castune.study.score_costs import CONTROLS, SYMBOLS
from castune.study.tables import Row, Table, average_column, method_table
from castune.study.trials import Results

# Numbers of a table's row that belong to another one, and how it is shown with them.
_HIDDEN = {"calibration", *(f"{ratio}_seeds" for ratio in RATIOS if ratio != "ucr")}
_AVERAGES = ("general_average", *(average_column(purpose) for purpose in PURPOSES if purpose != "utility"), *RATIOS)
_HEADS = {
    **{average_column(purpose): f"{about.label}, mean" for purpose, about in PURPOSES.items()},
    **{name: cost.label for name, cost in COSTS.items()},
    "arm": "Arm", "heads": "Heads", "mean_conflict": "Mean C", "mean_score": "Mean score", "seeds": "Seeds",
    "general_average": "Utility, mean", "safety_average": "Safety, mean", "over_refusal_average": "Over-refusal, mean",
    "unscored": "Unscored", "unscored_seeds": "Unscored seeds", "score": "Score", "buckets": "M", "bucket": "Bucket",
    "pearson": "Pearson r", "spearman": "Spearman ρ", "pearson_p": "p of r", "spearman_p": "p of ρ", "cost": "Cost",
    "seed": "Seed", "n": "n", "undefined": "Undefined", "ucr_seeds": "Seeds with a UCR",
}  # fmt: skip
_RULE = (
    "Rates in per cent, log-likelihoods, divergences and margins in nats per token, ± one standard error over seeds; "
    "means over suites without weights, as the paper averages. UCR and MMLU-CR (Eqs. 7 and 8) are those of the mean "
    "rates, UCR in nats is the NLL of right answers that was added, for a refusal rate that rises from 0 to 1; they "
    "are undefined, and shown as –, where safety did not rise. A row is over its arm's own seeds; figures, comparisons "
    "and correlations are over those that the compared arms have in common. What examples add to the error is in the "
    "intervals of the comparisons."
)
_UNSCORED_RULE = (
    "Unscored seeds: those in which a suite has nothing scored. The means of that suite, and what follows from it, are "
    "over the other seeds, or – without any."
)


def write_study_report(
    graph: Graph,
    results: Results,
    found: Findings,
    made: Sequence[Table],
    states: Mapping[str, State],
) -> Path:
    """Write `report.html` and the figures of a study from what is there so far. Returns the page."""
    drifts = _drifts(graph, results)
    drawn = {**charts(results, found, graph.recipe.study), **drift_charts(drifts)}
    write_charts(graph.folder.figures, drawn, ("svg", "pdf", "png"))
    tables = {one.name: one for one in made}
    # On the page the explorer stands for the maps.
    shown = {name: chart for name, chart in drawn.items() if not name.startswith("figure_7")}
    body = tag(
        "main",
        _opening(graph, results, found),
        tag("noscript", tag("p", "Charts need JavaScript; the same charts are in the directory figures.")),
        _arms(graph.recipe.study, tables, shown, found),
        _equal_safety(graph, found),
        _validity(tables, shown, found),
        _budget(tables, shown, found),
        _maps(graph, results, found),
        drift_section(drifts, shown),
        *_replies(graph),
        _provenance(graph, results, states),
    )
    cmap = results.maps.get("main")
    name = graph.recipe.model if cmap is None else known(cmap.metadata.get("model", {}).get("name"))
    path = graph.folder.report_file
    write_text(path, document(f"castune study: {name}", body, shown), private=True)
    return path


def _opening(graph: Graph, results: Results, found: Findings) -> Markup:
    cmap = results.maps.get("main")
    model = {} if cmap is None else cmap.metadata.get("model", {})
    seeds = dict.fromkeys(run.seed for run in graph.runs)
    kind = "query heads" if graph.recipe.diagnose.units == ("q_heads",) else "units"
    size = f"{known(model.get('parameters'))} parameters, {graph.n_heads:,} {kind}"
    n_trainings = len({(t.calibration, t.seed, t.trained, t.selection.seed) for t in results.trials})
    what = f"{n_trainings} trainings evaluated, seeds {', '.join(map(str, seeds))}"
    judge = f"judge {results.settings.get('judge')}, {results.settings.get('max_new_tokens')} new tokens"
    headline = found.headline or ["Nothing can be compared yet."]
    others = [one for one in found.verdict if one not in headline]
    picture = next(iter(_curves(graph, found).values()), "")
    return tag(
        "header",
        tag("p", "castune study", class_="kicker"),
        tag("h1", known(model.get("name")) if model else graph.recipe.model),
        tag("p", f"{known(model.get('type'))}, {size}; {what}; {judge}", class_="quiet"),
        tag("div", tag("div", *(tag("p", one, class_="verdict") for one in headline)), picture, class_="opening"),
        tag(
            "details",
            tag("summary", f"{counted(len(others), 'further finding')}"),
            tag("ul", *(tag("li", one) for one in others), class_="changes"),
        )
        if others
        else "",
        tag(
            "p",
            "Sentences follow from 95 % intervals, and from p-values after Holm where several comparisons are made "
            "together; “no difference seen” never means that there is none.",
            class_="small",
        ),
        tag("p", f"Still missing: {', '.join(results.missing)}.", class_="small warning") if results.missing else "",
    )


def _arms(study: StudyConfig, tables: Mapping[str, Table], drawn: Collection[str], found: Findings) -> Markup:
    parts: list[object] = []
    figures = []
    for method in study.methods:
        if method_table(method) in tables:
            shown = tables[method_table(method)]
            parts += [tag("h3", shown.title), _table(shown)]
        figures += [
            figure(name, f"Trained by {method}. Large: means over seeds, ± one standard error. Small: the seeds.")
            for name in method_figures(method)
            if name in drawn
        ]
    comparisons = [
        [c.method, c.arm, c.purpose, _change(c.found.value, c.purpose), _span_of(c.found.interval, c.purpose),
         _span_of(c.found.over_seeds, c.purpose), PURPOSES[c.purpose].shown.change,
         _p(c.found.p), _p(c.found.p_adjusted), f"{c.found.n_examples:,}"]
        for c in found.comparisons
    ]  # fmt: skip
    head = [
        "Trained by", "Arm", "Suites", "Minus safe", "95 %", "95 % over seeds", "Unit", "p", "p (Holm)", "Examples",
    ]  # fmt: skip
    against = table(head, comparisons, label="Arms against the safe zone", class_="numbers")
    return section(
        "Arms",
        "arms",
        *parts,
        tag("p", _RULE, class_="small"),
        tag("p", _UNSCORED_RULE, class_="small") if any("unscored_seeds" in t.columns for t in tables.values()) else "",
        tag("div", *figures, class_="figures"),
        tag("h3", "Against the safe zone") if comparisons else "",
        against if comparisons else "",
    )


def _curves(graph: Graph, found: Findings) -> dict[tuple[str, str], Markup]:
    """Charts of costs over safety by method and cost; first the one that stands in the opening."""
    figures = {
        (method, cost): figure(
            equal_safety_figure(name, method),
            f"{PURPOSES[cost].label} over safety, adapters from off to full strength, with 95 % bands. Down and to the "
            "right is better.",
        )
        for method, costs in found.equal_safety.items()
        for name, cost in zip(chart_names(costs), costs_of(costs), strict=True)
    }
    primary = graph.recipe.study.primary
    if primary is None:
        return figures
    changes = ArmName.parse(primary.arms[0]).suffix
    first = next((key for key in figures if (method_suffix(key[0]), key[1]) == (changes, primary.cost)), None)
    return figures if first is None else {first: figures[first], **figures}


def _equal_safety(graph: Graph, found: Findings) -> Markup:
    parts: list[object] = []
    curves = dict(list(_curves(graph, found).items())[1:])
    for method, costs in found.equal_safety.items():
        figures = [curves[key] for key in curves if key[0] == method]
        parts += [
            tag("h3", f"Trained by {method}"),
            *(tag("p", sentence) for sentence in sentences(costs)),
            costs_table(costs),
            tag("div", *figures, class_="figures") if figures else "",
        ]
    return section("Cost at equal safety", "equal-safety", *parts) if parts else Markup("")


def _validity(tables: Mapping[str, Table], drawn: Collection[str], found: Findings) -> Markup:
    figures = [
        figure(
            name,
            "Buckets by their mean score. Large: the cost of the mean rates, ± one standard error; small: the seeds.",
        )
        for name in COST_FIGURES.values()
        if name in drawn
    ]
    rows = [
        [SYMBOLS[v.score], v.buckets, COSTS[v.cost].phrase, number(v.found.of_means.pearson), _span(v.found.retrained),
         _span(v.found.other_arms), _p(v.found.of_means.pearson_p), number(v.found.of_means.spearman),
         _p(v.order_p), f"{v.found.n_undefined} of {v.found.n_trials}"]
        for v in found.validities
    ]  # fmt: skip
    head = [
        "Score", "M", "Cost", "r of means", "95 %, trained again", "95 %, other arms", "p", "ρ", "p of the order",
        "Undefined",
    ]  # fmt: skip
    partial = [
        [SYMBOLS[d.score], COSTS[d.cost].phrase, CONTROLS[d.held], number(d.found.pearson),
         _span(d.found.pearson_interval), _p(d.found.pearson_p), number(d.found.spearman), d.found.n,
         d.found.reason or "–"]
        for d in found.controls
    ]  # fmt: skip
    nulls = [[n.zone, COSTS[n.cost].phrase, n.words] for n in found.nulls]
    parts: list[object] = [tag("div", *figures, class_="figures")]
    for name in ("table_7_buckets", "table_8_validity"):
        if name in tables:
            parts += [tag("h3", tables[name].title), _table(tables[name])]
    if rows:
        parts += [tag("h3", "Does the score predict the cost?"), table(head, rows, label="Validity", class_="numbers")]
    if partial:
        title = tag("h3", "With something else held constant, over the arms of one size")
        heads = ["Score", "Cost", "Held constant", "Partial r", "95 %", "p", "Partial ρ", "Arms", "Why not"]
        parts += [title, table(heads, partial, label="Partial correlations", class_="numbers")]
    if nulls:
        parts += [
            tag("h3", "Among random heads"),
            table(["Zone", "Cost", "In words"], nulls, label="Null distribution"),
        ]
    return section("Scores and costs", "validity", *parts)


def _budget(tables: Mapping[str, Table], drawn: Collection[str], found: Findings) -> Markup:
    parts: list[object] = []
    if found.budget is not None and "figure_budget" in drawn:
        curve, check = found.budget.curve, found.budget.check
        elbow = "no elbow: within its band the curve is straight"
        if curve.elbow is not None:
            elbow = f"elbow at {curve.elbow} of {curve.n_heads} heads ({percent(curve.elbow / curve.n_heads, 0)})"
        reliability = "unknown" if curve.reliability is None else number(curve.reliability)
        order = number(check.correlation.spearman, "+.2f")
        parts += [
            figure("figure_budget", "Predicted cost of training the safest heads, with its 95 % band."),
            tag(
                "p",
                f"{elbow[0].upper()}{elbow[1:]}. Share of the scores' variance that is not noise: {reliability}. "
                f"Predicted against lost over {counted(len(found.budget.arms), 'arm')} and "
                f"{counted(found.budget.n_seeds, 'seed')}: Spearman {order}, "
                f"p: {_p(check.correlation.spearman_p)}. "
                "The curve is castune's own extension of the paper: it adds up C(h).",
            ),
        ]
    if "table_9_budget" in tables:
        parts += [tag("h3", tables["table_9_budget"].title), _table(tables["table_9_budget"])]
    return section("Budget", "budget", *parts) if parts else Markup("")


def _maps(graph: Graph, results: Results, found: Findings) -> Markup:
    parts: list[object] = []
    first = next((run for run in graph.runs if run.calibration == "main"), None)
    for name, cmap in results.maps.items():
        selections = {}
        if first is not None and name == "main":
            selections = _selections(RunDirectory(first.folder), graph.recipe.study.arms, first.same_as, cmap)
        for kind, words in cmap.kind_words.items():
            of_kind = "" if len(cmap.kinds) == 1 else f", {words}"
            title = f"Map {name}: {known(cmap.metadata['settings'].get('measure'))}{of_kind}"
            parts += [tag("h3", title), explorer(cmap.only(kind), selections)]
    rows = [
        [a.one, a.other, number(a.found.spearman), _span(a.found.interval), f"{a.found.n:,}"] for a in found.agreements
    ]
    if rows:
        head = ["Score", "Other score", "Spearman ρ", "95 % over layers", "Heads"]
        parts += [tag("h3", "Do scores agree?"), table(head, rows, label="Agreement of maps", class_="numbers")]
    return section("Conflict maps", "maps", *parts) if parts else Markup("")


def _drifts(graph: Graph, results: Results) -> dict[str, DriftResult]:
    """What was measured of the arms that are asked for."""
    run, cmap = next(iter(graph.runs), None), results.maps.get("main")
    if run is None or cmap is None:
        return {}
    wanted = graph.drifting(run)
    return {arm: found for arm, found in RunDirectory(run.folder).load_drifts(cmap).items() if arm in wanted}


def _selections(
    folder: RunDirectory, arms: Sequence[str], same_as: Mapping[str, str], cmap: ConflictMap
) -> dict[str, HeadSelection]:
    chosen = {arm: folder.side_arm(same_as[arm]) for arm in arms if arm in same_as}
    return {arm: folder.load_selection(one, cmap) for arm, one in chosen.items() if one.selection_file.is_file()}


def _replies(graph: Graph) -> list[object]:
    """Why answers were wrong and sample replies, of the arms of the first seed."""
    run = next((run for run in graph.runs if run.calibration == "main"), None)
    if run is None:
        return []
    folder = RunDirectory(run.folder)
    names = [BASE, *(run.same_as[arm] for arm in graph.recipe.study.arms if arm in run.same_as)]
    evaluations = {name: EvalResult.load(folder.evaluation(name)) for name in names if folder.is_evaluated(name)}
    if not evaluations:
        return []
    note = tag("p", f"Replies are those of the arms with seed {run.seed}, trained as the recipe says.", class_="small")
    return [losses(evaluations), samples(evaluations), note]


def _provenance(graph: Graph, results: Results, states: Mapping[str, State]) -> Markup:
    counts: dict[str, list[float]] = {}
    for state in states.values():
        if state.seconds is not None:
            counts.setdefault(state.stage, []).append(state.seconds)
    work = [
        [stage, len(seconds), duration(sum(seconds)), duration(sum(seconds) / len(seconds))]
        for stage, seconds in counts.items()
    ]
    failed = [
        [name, state.state, state.error or "–"]
        for name, state in states.items()
        if state.state in ("failed", "blocked")
    ]
    first = next(iter(results.maps.values()), None)
    versions = {} if first is None else first.metadata.get("provenance", {}).get("versions", {})
    facts = [(name, version) for name, version in versions.items() if version]
    parts: list[object] = []
    if work:
        parts.append(
            table(
                ["Stage", "Units done by the last command", "Time, all", "Time, each"],
                work,
                label="Work",
                class_="numbers",
            )
        )
    if failed:
        parts += [tag("h3", "Not done"), table(["Unit", "State", "Why"], failed, label="Units not done")]
    runs = [[run.label, run.folder.name, ", ".join(run.trained)] for run in graph.runs]
    return section(
        "Provenance",
        "provenance",
        *parts,
        table(["Run", "Directory", "Arms"], runs, label="Runs"),
        table([], facts, label="Versions", class_="facts"),
        tag("details", tag("summary", "Recipe"), tag("pre", graph.recipe.to_toml())),
    )


def _table(shown: Table) -> Markup:
    """A table of rows: a value with its `_se` beside it; what is missing is a dash."""
    columns = [c for c in shown.columns if not c.endswith("_se") and c not in _HIDDEN]
    # What arms are compared by stands where it is seen, suites behind it.
    averages = [c for c in _AVERAGES if c in columns]
    if averages:
        place = columns.index("seeds") + 1
        columns = [*columns[:place], *averages, *(c for c in columns[place:] if c not in averages)]
    rows = [[_cell(row, column, in_nats=column in shown.nats) for column in columns] for row in shown.rows]
    return table([_HEADS.get(c, c) for c in columns], rows, label=shown.title, class_="numbers")


def _cell(row: Row, column: str, *, in_nats: bool) -> str:
    value = row[column]
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    error = row.get(f"{column}_se")
    assert error is None or isinstance(error, float)
    is_rate = f"{column}_se" in row and column not in RATIOS and not in_nats
    digits = 1 if is_rate else 3 if column.endswith("_p") or in_nats or column == "ucr_nll" else 2
    return with_error(value, error, f".{digits}f").replace(" ", "\u00a0")


def _span(interval: Interval | None) -> str:
    return "–" if interval is None else span(*interval)


def _change(value: float | None, purpose: str) -> str:
    shown = PURPOSES[purpose].shown
    return NOT_MEASURED if value is None else number(shown.scale * value, f"+.{shown.digits}f")


def _span_of(interval: Interval | None, purpose: str) -> str:
    shown = PURPOSES[purpose].shown
    if interval is None:
        return "–"
    return span(shown.scale * interval.low, shown.scale * interval.high, f".{shown.digits}f")


def _p(value: float | None) -> str:
    return "–" if value is None else p_value(value).removeprefix("= ")
