"""Where conflicts lie, how sure the map is, and what each arm trains of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from castune.artifacts import ConflictMap, HeadSelection
from castune.artifacts.records import DataRecord, Settings
from castune.core.numbers import duration, number
from castune.report.attribution import fidelity_words, named_undecided, standing_words
from castune.report.explorer import explorer
from castune.report.markup import Markup, table, tag
from castune.report.sections import NOT_RECORDED, cut_words, figure, known, recorded_rate, section
from castune.report.summary import percent

# Undecided units that are named outside the table, which has them all.
_MOST_NAMED = 20


def conflict_map(cmap: ConflictMap, selections: Mapping[str, HeadSelection], drawn: Collection[str]) -> Markup:
    """Where conflicts lie, how sure the map is, and what each arm trains of it."""
    settings, ties = cmap.metadata.get("settings", {}), cmap.metadata.get("ties", {})
    baseline, data = cmap.metadata.get("baseline", {}), cmap.metadata.get("data", {})
    seconds = cmap.metadata.get("seconds")
    # What is told of a whole map is told of its first kind of unit.
    heads = _capitalised(cmap.kind_words[cmap.kinds[0]])
    over_domains = ", mean over domains" if cmap.domains else ""
    facts = [
        ("Measured by", f"{_measure(settings)}, {known(settings.get('ablation'))} ablation"),
        ("Safety prompts", _source(data.get("safety"))),
        (f"Utility {cmap.utility_examples}", _source(data.get("utility"))),
        (f"Utility {cmap.utility_rate} before ablation{over_domains}", _baseline(baseline.get("utility_accuracy"))),
        ("Refusal rate before ablation", _baseline(baseline.get("refusal_rate"))),
        (f"{heads} tied with another in utility shift", _share(ties.get("utility_shift"))),
        (f"{heads} tied with another in safety shift", _share(ties.get("safety_shift"))),
        ("Judge", f"{known(settings.get('judge'))}, {known(settings.get('max_new_tokens'))} new tokens"),
        *_trust(cmap),
        ("Time", NOT_RECORDED if seconds is None else duration(seconds)),
    ]
    zones = (
        figure("zones", "Heads that each arm trains, in colour.")
        if "zones" in drawn
        else tag("p", "No heads have been selected in this run.")
    )
    return section(
        "Conflict map",
        "map",
        tag(
            "p",
            "The conflict score is C(h) = O(h) · S(h): how far the gradients of safety and utility point "
            "apart on a head, times how much more utility than safety depends on it. The highest scores make "
            "the risky zone.",
        ),
        *_explorers(cmap, selections),
        tag("h3", "How it was measured"),
        tag(
            "div",
            figure(
                "score_distribution",
                "All heads by score. Buckets hold equal numbers of heads; 1 is the riskiest.",
            ),
            table([], facts, label="How the map was measured", class_="facts"),
            class_="figures",
        ),
        _domains(cmap),
        tag("h3", "What each arm trains"),
        zones,
        _selection_table(selections),
    )


def _explorers(cmap: ConflictMap, selections: Mapping[str, HeadSelection]) -> list[Markup]:
    """The map to explore; of several kinds of unit each by itself, for their scores do not compare."""
    if len(cmap.kinds) == 1:
        return [explorer(cmap, selections)]
    return [
        tag("div", tag("h3", _capitalised(words)), explorer(cmap.only(kind), selections))
        for kind, words in cmap.kind_words.items()
    ]


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


_COMBINED = {
    "mean": "Every score of the combined map is the mean over the utility domains below; its C(h) is therefore the "
    "mean of theirs, not O(h) · S(h).",
    "worst": "A head has in the combined map the scores of the utility domain in which its conflict score is highest.",
}


def _domains(cmap: ConflictMap) -> Markup | str:
    """The utility domains, and how far each agrees with the combined map; nothing where there is one."""
    metadata = cmap.metadata
    if "domains" not in metadata:
        return ""
    rows = [
        [
            name,
            f"{cmap.domains[name].utility_examples}: {_source(record['data'])}",
            f"{cmap.domains[name].utility_rate} {_baseline(record['utility_accuracy'])}",
            number(record["reliability"]),
            number(record["spearman"]),
        ]
        for name, record in metadata["domains"].items()
    ]
    columns = [
        "Domain",
        "Examples",
        "Before ablation",
        "Reliability of C",
        "Spearman of C with the combined C",
    ]
    return tag(
        "div",
        tag("h3", "Utility domains"),
        tag("p", _COMBINED.get(metadata["combined"], metadata["combined"])),
        table(columns, rows, label="Utility domains", class_="numbers"),
    )


def _trust(cmap: ConflictMap) -> list[tuple[str, str]]:
    """How far the map can be trusted, as facts: by other examples, and by exact ablation."""
    words = cmap.kind_words
    return [
        *_reliability(cmap.metadata.get("reliability", {}), words[cmap.kinds[0]]),
        *(
            (f"Reliability of C over {words[kind]} alone", number(found["reliability"]["reliability"]))
            for kind, found in cmap.metadata.get("kinds", {}).items()
        ),
        *(
            (f"Attribution against exact ablation, {len(found['units'])} {words[kind]}", fidelity_words(found))
            for kind, found in cmap.fidelity.items()
        ),
        *(
            (f"Inside or outside the safe quarter, {words[kind]}", standing_words(found, len(cmap.rows_of(kind))))
            for kind, found in cmap.standing.items()
        ),
        *(
            (f"Left open by the estimate, {words[kind]}", undecided)
            for kind, found in cmap.standing.items()
            if (undecided := named_undecided(found, _MOST_NAMED))
        ),
        *(("Warning", warning) for warning in cmap.warnings),
    ]


def _reliability(found: Mapping[str, Any], heads: str) -> list[tuple[str, str]]:
    """What halves of the examples agree on, as facts."""
    halves = found.get("split_half", {})
    columns, zones = halves.get("columns", {}), halves.get("zones", {})
    symbols = (
        ("O", "optimization_conflict"),
        ("H_gen", "utility_shift"),
        ("H_safe", "safety_shift"),
        ("C", "conflict_score"),
    )
    parts = [f"{symbol} {number(columns[name]['full'])}" for symbol, name in symbols if name in columns]
    facts = [(f"Reliability over {heads} (split halves, Spearman-Brown)", ", ".join(parts) or known(None))]
    for zone in ("safe", "risky"):
        shown = f"{number(zones.get(zone))}; {number(zones.get(f'{zone}_by_chance'))} by chance"
        facts.append((f"Overlap of the {zone} zones of two halves of the examples", shown))
    return facts


def _measure(settings: Settings) -> str:
    measure = known(settings.get("measure"))
    if measure in ("margin", "attribution") and "margin_tokens" in settings:
        return f"{measure} (replies by their first {settings['margin_tokens']} tokens)"
    return measure


def _selection_table(selections: Mapping[str, HeadSelection]) -> Markup | str:
    if not selections:
        return ""
    rows = []
    for arm, selection in selections.items():
        zone = selection.zone
        if selection.bucket is not None:
            zone += f" {selection.bucket} of {selection.buckets}"
        seed = "–" if selection.seed is None else str(selection.seed)
        share = f"{len(selection.units):,} of {selection.n_total:,}"
        share += "" if selection.only_heads else f" ({selection.counted})"
        score = "–" if zone in ("random", "all") else selection.score
        rows.append([arm, zone, score, share, f"{len(selection.layers):,}", seed])
    head = ["Arm", "Zone", "Sorted by", "Heads", "Layers", "Seed"]
    return table(head, rows, label="Selections", class_="numbers")


def _source(record: DataRecord | None) -> str:
    if not record:
        return NOT_RECORDED
    cut = cut_words(record)
    return f"{known(record.get('source'))}, n = {known(record.get('n'))}" + (f", {cut}" if cut else "")


def _baseline(record: Mapping[str, Any] | None) -> str:
    if not record:
        return NOT_RECORDED
    unscored = f", {record['unscored']:,} unscored" if "unscored" in record else ""
    return f"{recorded_rate(record)}, n = {known(record.get('n'))}{unscored}"


def _share(value: float | None) -> str:
    return NOT_RECORDED if value is None else percent(value)
