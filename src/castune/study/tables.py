"""The paper's tables from the trials of a study, as rows of plain values. Pure.

Rates are in per cent, means of continuous suites in nats. `NAME_se` is the standard error of the mean over seeds (none
with one seed), `seeds` how many the arm has. What could not be measured or is undefined is empty, never 0: where a
suite has nothing scored with some of the seeds (`unscored_seeds`), its means are over the others.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from castune.config import StudyConfig, method_suffix
from castune.purposes import COSTS, PURPOSES, RATIOS
from castune.stats.correlations import correlation
from castune.stats.estimates import estimate
from castune.study.findings import BudgetCheck, Findings
from castune.study.realised_costs import cost_alone, costs_of, measured_costs
from castune.study.trials import Measured, Results, Trial, common_seeds

Cell = str | float | bool | None
Row = dict[str, Cell]

# The paper's table of the arms that are trained so.
_PAPER_TABLES = {"sft": 1, "pcgrad": 2}
# Cost ratios that have a column whatever was measured.
_PAPER_RATIOS = ("ucr", "mmlu_cr")


@dataclass(frozen=True)
class Table:
    """A table: what it is called, what it shows, and its rows, all with the same keys.

    Attributes:
        nats: the columns that are in nats.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    nats: frozenset[str] = frozenset()

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.rows[0]) if self.rows else []

    def to_csv(self) -> str:
        """The table as CSV; the same rows give the same bytes."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in self.rows)
        return text.getvalue()


def tables(results: Results, study: StudyConfig) -> list[Table]:
    """All tables that these results allow: 1 and 2, 7 to 11 of the paper, every trial, and how the maps agree."""
    found = [
        Table("trials", "Every arm with every seed", tuple(_trial_row(trial, results.base) for trial in results.trials))
    ]
    for method in study.methods:
        number = _PAPER_TABLES.get(method)
        title = f"Arms trained by {method}" + (f" (Table {number} of the paper)" if number else "")
        arms = [f"{arm}{method_suffix(method)}" for arm in study.arms]
        found.append(Table(method_table(method), title, tuple(_arm_rows(results, arms))))
    found.append(Table("table_7_buckets", "Buckets (Table 7)", tuple(_bucket_rows(results, study))))
    found.append(Table("table_8_validity", "Scores against realised costs (Table 8)", tuple(_validity(results, study))))
    shares = ["all", *(arm for zone in ("risky", "safe") for arm in (zone, *(f"{zone}-{s:g}" for s in study.shares)))]
    budgets = tuple(_arm_rows(results, shares))
    found.append(Table("table_9_budget", "Budgets from both ends of the map (Table 9)", budgets))
    others = [
        row
        for name, calibration in study.calibrations.items()
        for row in _arm_rows(results, calibration.arms, calibration=name, base=False)
    ]
    found.append(Table("table_10_11_calibrations", "Other calibration data (Tables 10 and 11)", tuple(others)))
    nats = frozenset() if results.base is None else _columns_in_nats(results.base)
    return [replace(table, rows=_with_unscored_seeds(table.rows), nats=nats) for table in found if table.rows]


def _with_unscored_seeds(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows, without the column of seeds that lack a score where no arm has one."""
    if any(row.get("unscored_seeds") for row in rows):
        return rows
    return tuple({column: value for column, value in row.items() if column != "unscored_seeds"} for row in rows)


def average_column(purpose: str) -> str:
    """Name of the column of the mean over the suites of a purpose."""
    return "general_average" if purpose == "utility" else f"{purpose.replace('-', '_')}_average"


def _columns_in_nats(measured: Measured) -> frozenset[str]:
    continuous = [purpose for purpose in measured.purposes if PURPOSES[purpose].is_continuous]
    suites = [suite for purpose in continuous for suite in measured.suites_of(purpose)]
    return frozenset([*suites, *map(average_column, continuous)])


def method_table(method: str) -> str:
    """Name of the table of all arms that are trained by a method."""
    number = _PAPER_TABLES.get(method)
    return f"table_{number}_{method}" if number else f"table_{method}"


def finding_tables(found: Findings) -> list[Table]:
    """What the trials show, as tables: comparisons with the safe zone, costs at equal safety, depth, nulls, maps, and
    predicted budgets."""
    comparisons = [
        {"method": c.method, "arm": c.arm, "purpose": c.purpose, "minus_safe": _shown(c.found.value, c.purpose),
         **_ends("interval", c.found.interval, c.purpose), **_ends("over_seeds", c.found.over_seeds, c.purpose),
         **_ends("over_examples", c.found.over_examples, c.purpose), "p": c.found.p, "p_holm": c.found.p_adjusted,
         "seeds": c.found.n_seeds, "examples": c.found.n_examples, "unscored": c.found.n_unscored, "words": c.words}
        for c in found.comparisons
    ]  # fmt: skip
    validity = [
        {"score": v.score, "buckets": v.buckets, "cost": v.cost, "pearson": v.found.of_means.pearson,
         **_ends("retrained", v.found.retrained), **_ends("other_arms", v.found.other_arms),
         "counts_examples": v.found.counts_examples,
         "p": v.found.of_means.pearson_p, "spearman": v.found.of_means.spearman, "order_p": v.order_p,
         "arms": v.found.n_arms, "seeds": v.found.n_seeds, "trials": v.found.n_trials,
         "undefined": v.found.n_undefined, "words": v.words}
        for v in found.validities
    ]  # fmt: skip
    controls = [
        {"score": d.score, "cost": d.cost, "held": d.held, "partial_pearson": d.found.pearson,
         **_ends("interval", d.found.pearson_interval), "p": d.found.pearson_p, "partial_spearman": d.found.spearman,
         "arms": d.found.n, "why_not": d.found.reason}
        for d in found.controls
    ]  # fmt: skip
    nulls = [
        {"zone": n.zone, "cost": n.cost, "lower": n.found.lower, "higher": n.found.higher, "n": n.found.n,
         "gainless": n.found.n_gainless, "undefined": n.found.n_undefined, "seeds": n.found.n_seeds,
         "seeds_gainless": n.found.n_seeds_gainless, "seeds_left_out": n.found.n_seeds_left_out, "p": n.found.p,
         "p_least": n.found.p_least, "p_unusual": n.found.p_unusual, "words": n.words}
        for n in found.nulls
    ]  # fmt: skip
    maps = [
        {"one": a.one, "other": a.other, "spearman": a.found.spearman, **_ends("interval", a.found.interval),
         "heads": a.found.n}
        for a in found.agreements
    ]  # fmt: skip
    made = {
        "comparisons": ("Arms against the safe zone", comparisons),
        "primary": ("The primary contrast", _primary_rows(found)),
        "equal_safety": ("Costs at equal safety", _equal_safety_rows(found)),
        "validity": ("Scores against costs, with intervals", validity),
        "controls": ("Scores against costs, with something else held constant", controls),
        "nulls": ("Zones among random heads", nulls),
        "maps": ("How scores agree", maps),
        "budget": ("Predicted and measured cost of arms", _budget_rows(found.budget)),
    }
    return [Table(name, title, tuple(rows)) for name, (title, rows) in made.items() if rows]


def _budget_rows(found: BudgetCheck | None) -> list[Row]:
    if found is None:
        return []
    columns = zip(
        found.arms, found.heads, found.n_scored, found.predicted, found.lost, found.check.residuals, strict=True
    )
    return [
        {"arm": arm, "heads": heads, "seeds": n_scored or found.n_seeds, "predicted": predicted, "utility_lost": lost,
         "residual": residual}
        for arm, heads, n_scored, predicted, lost, residual in columns
    ]  # fmt: skip


def _primary_rows(found: Findings) -> list[Row]:
    primary = found.primary
    if primary is None:
        return []
    ratio, difference, design = primary.found, primary.found.difference, primary.design
    cost = primary.contrast.cost
    first, second = primary.contrast.arms
    return [
        {"first": first, "second": second, "cost": cost, "safety_of": primary.safety,
         "safety": _shown(ratio.target, primary.safety), "ratio": ratio.value, **_ends("ratio", ratio.interval),
         "why_not": ratio.reason, "difference": _shown(difference.value, cost),
         **_ends("difference", difference.interval, cost), "p": difference.p,
         "is_seen": primary.verdict.is_seen, "is_refuted": primary.verdict.is_refuted,
         "is_equivalent": None if primary.equivalence is None else primary.equivalence.is_equivalent,
         "seeds_sd": _shown(ratio.seeds_sd, cost), "items_se": _shown(ratio.items_se, cost),
         "smallest_visible": None if design is None else _shown(design.smallest, cost),
         "seeds_to_decide": primary.seeds_to_decide, "seeds": ratio.n_seeds, "prompts": ratio.n_prompts,
         "items": sum(ratio.n_items), "words": " ".join(primary.words)}
    ]  # fmt: skip


def _equal_safety_rows(found: Findings) -> list[Row]:
    """A row a method, cost and arm: its price where arms are equally safe, and the first arm's less its own."""
    rows: list[Row] = []
    for method, costs in found.equal_safety.items():
        first = costs.arms[0]
        for purpose, of_cost in costs.costs.items():
            for arm, price in of_cost.arms.items():
                beside = of_cost.differences.get((first, arm))
                rows.append(
                    {"method": method, "safety_of": costs.safety, "safety": _shown(of_cost.target, costs.safety),
                     "cost": purpose, "arm": arm, "strength": price.strength, "value": _shown(price.value, purpose),
                     **_ends("interval", price.interval, purpose), "first": first,
                     "first_minus_arm": None if beside is None else _shown(beside.value, purpose),
                     **_ends("difference", None if beside is None else beside.interval, purpose),
                     "p_holm": None if beside is None else beside.p_adjusted,
                     "reached_share": price.reached_share, "seeds": of_cost.n_seeds, "prompts": of_cost.n_prompts,
                     "items": sum(of_cost.n_items)}
                )  # fmt: skip
    return rows


def _ends(name: str, interval: tuple[float, float] | None, purpose: str | None = None) -> Row:
    scale = 1.0 if purpose is None else PURPOSES[purpose].shown.scale
    low, high = (None, None) if interval is None else (scale * interval[0], scale * interval[1])
    return {f"{name}_low": low, f"{name}_high": high}


def summary_row(trials: Sequence[Trial], base: Measured | None) -> Row:
    """Rates of an arm over its seeds: every suite, the averages by purpose, and the cost ratios.

    The cost ratio of the mean rates is `ucr`, with the standard error that its seeds give it; `ucr_seeds` counts the
    seeds in which it is defined on their own, `unscored_seeds` those in which a suite has nothing scored.
    """
    row: Row = {"seeds": len(trials)}
    measured = trials[0].measured
    for suite in measured.suites:
        values = [_shown(trial.measured.rate(suite.suite), suite.purpose) for trial in trials]
        row |= over_seeds(suite.suite, values)
    for purpose in measured.purposes:
        means = [_shown(trial.measured.mean(purpose), purpose) for trial in trials]
        row |= over_seeds(average_column(purpose), means)
    row["unscored"] = sum(suite.unscored for trial in trials for suite in trial.measured.suites)
    row["unscored_seeds"] = sum(any(suite.value is None for suite in trial.measured.suites) for trial in trials)
    for cost in _ratios(base):
        row |= _mean_ratio(trials, base, cost)
        row[f"{cost}_seeds"] = sum(cost_alone(trial, base, cost) is not None for trial in trials)
    return row


def _ratios(base: Measured | None) -> list[str]:
    """The cost ratios that have a column."""
    return [cost for cost in RATIOS if cost in (*_PAPER_RATIOS, *measured_costs(base))]


def _mean_ratio(trials: Sequence[Trial], base: Measured | None, cost: str) -> dict[str, float | None]:
    found = over_seeds(cost, [value for value, _ in costs_of(trials, base, cost)])
    value = found[cost]
    return {**found, cost: None if value is None else max(0.0, value)}  # it is at least 0, but for rounding


def over_seeds(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean over the seeds that have a value; None without any, its standard error where there is only one."""
    found = estimate(values)
    return {name: found.value, f"{name}_se": found.standard_error}


def _arm_rows(results: Results, arms: Iterable[str], *, calibration: str = "main", base: bool = True) -> list[Row]:
    """A row an arm, the base model above them."""
    rows: list[Row] = []
    for arm in arms:
        trials = results.of(arm, calibration)
        if trials:
            head: Row = {"calibration": calibration, "arm": arm, "heads": len(trials[0].selection.units)}
            head["mean_conflict"] = _mean(trial.scores["conflict"] for trial in trials)
            rows.append({**head, **summary_row(trials, results.base)})
    if rows and base and results.base is not None:
        rows.insert(0, _base_row(results.base, list(rows[0])))
    return rows


def _base_row(base: Measured, columns: Sequence[str]) -> Row:
    row: Row = dict.fromkeys(columns)
    row |= {"calibration": "main", "arm": "base"}
    row |= {suite.suite: _shown(suite.value, suite.purpose) for suite in base.suites}
    row |= {average_column(purpose): _shown(base.mean(purpose), purpose) for purpose in base.purposes}
    row["unscored"] = sum(suite.unscored for suite in base.suites)
    return {column: row.get(column) for column in columns}


def _bucket_rows(results: Results, study: StudyConfig) -> list[Row]:
    rows = []
    for score in study.scores:
        for buckets in study.buckets:
            for number in range(1, buckets + 1):
                trials = results.of(study.bucket(number, buckets, score))
                if trials:
                    mean = _mean(trial.scores[score] for trial in trials)
                    head = {"score": score, "buckets": buckets, "bucket": number, "mean_score": mean}
                    rows.append({**head, **summary_row(trials, results.base)})
    return rows


def _validity(results: Results, study: StudyConfig) -> list[Row]:
    """Correlation of the buckets' mean scores with their cost ratios, of the mean rates and of every seed that all of
    them have."""
    rows = []
    for buckets in study.buckets:
        for score in study.scores:
            of_bucket = [results.of(study.bucket(n, buckets, score)) for n in range(1, buckets + 1)]
            seeds = common_seeds(of_bucket)
            of_bucket = [[t for t in trials if t.seed in seeds] for trials in of_bucket if trials and seeds]
            for cost in [cost for cost in measured_costs(results.base) if COSTS[cost].is_ratio]:
                points = [
                    (_mean(t.scores[score] for t in trials), _mean_ratio(trials, results.base, cost)[cost])
                    for trials in of_bucket
                ]
                rows.append(_correlation_row(score, buckets, cost, "mean", points))
                for seed in (seed for seed in study.main_seeds if seed in seeds):
                    points = [
                        (trial.scores[score], cost_alone(trial, results.base, cost))
                        for trials in of_bucket
                        for trial in trials
                        if trial.seed == seed
                    ]
                    rows.append(_correlation_row(score, buckets, cost, str(seed), points))
    return [row for row in rows if row["n"] or row["undefined"]]


def _correlation_row(
    score: str, buckets: int, cost: str, seed: str, points: Sequence[tuple[float, float | None]]
) -> Row:
    defined = [(x, y) for x, y in points if y is not None]
    found = correlation([x for x, _ in defined], [y for _, y in defined])
    return {
        "score": score, "buckets": buckets, "cost": cost, "seed": seed, "n": found.n,
        "undefined": len(points) - len(defined), "pearson": found.pearson, "pearson_p": found.pearson_p,
        "spearman": found.spearman, "spearman_p": found.spearman_p,
    }  # fmt: skip


def _trial_row(trial: Trial, base: Measured | None) -> Row:
    row: Row = {
        "calibration": trial.calibration, "arm": trial.arm, "trained": trial.trained, "seed": trial.seed,
        "selection_seed": trial.selection.seed, "heads": len(trial.selection.units),
        "layers": len(trial.selection.layers), "mean_conflict": trial.scores["conflict"],
        "mean_gradient": trial.scores["gradient"], "mean_sensitivity": trial.scores["sensitivity"],
        "mean_layer": trial.depth,
    }  # fmt: skip
    for suite in trial.measured.suites:
        row[suite.suite] = _shown(suite.value, suite.purpose)
        row[f"{suite.suite}_se"] = _shown(suite.standard_error, suite.purpose)
        row[f"{suite.suite}_n"], row[f"{suite.suite}_unscored"] = suite.n, suite.unscored
    for name in _ratios(base):
        ratio = trial.cost_ratios.get(name)
        row[name] = None if ratio is None else ratio.value
        row[f"{name}_low"] = None if ratio is None else ratio.low
        row[f"{name}_high"] = None if ratio is None else ratio.high
    return row


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)


def _shown(value: float | None, purpose: str) -> float | None:
    """A rate in per cent, a mean in nats."""
    return None if value is None else PURPOSES[purpose].shown.scale * value


def _cell(value: Cell) -> Cell:
    # Ten digits: what differs beyond is rounding.
    return f"{value:.10g}" if isinstance(value, float) else value
