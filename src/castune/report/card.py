"""The model card of an exported adapter or model. Pure: artifacts in, Markdown out.

What a run does not have is left out: no number of the card stands for one that was not measured. Names of files, suites
and models come from outside and are escaped. Prompts and replies are not in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from castune.artifacts import (
    Certificate,
    ConflictMap,
    EvalResult,
    MaskedAdapter,
    ProjectedAdapter,
    ScaledAdapter,
    SuiteResult,
    TuneResult,
)
from castune.artifacts.records import DataRecord, ModelRecord
from castune.core import numbers
from castune.names import kind_words
from castune.report.sections import cut_words
from castune.report.summary import BASE, interval
from castune.stats.estimates import CostRatio, PairedDifference

# A hub id, the only form of `base_model` and `datasets` the hub's metadata knows.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SAFE_LORA = "[Safe LoRA](https://arxiv.org/abs/2405.16833)"
_PAPER = "[CAST, Conflict-Aware Sparse Tuning](https://arxiv.org/abs/2601.04262)"


@dataclass(frozen=True)
class Merging:
    """What was compared after a merged model was written; counts of what is bit-identical to the base."""

    dtype: str
    identical_tensors: int
    identical_rows: int
    identical_columns: int = 0

    @property
    def identical(self) -> str:
        """The rows and columns, in words."""
        text = f"{self.identical_rows:,} unselected rows"
        return f"{text} and {self.identical_columns:,} columns" if self.identical_columns else text


@dataclass(frozen=True)
class CardFacts:
    """What a card is made from; everything but the base model's record and the certificate may be absent.

    Attributes:
        model: identity of the base model (`model_record`).
        certificate: the proof of what the adapter changes.
        zone: zone of the selection.
        n_total: number of heads it was selected from.
        cmap: the conflict map.
        tuning: how the adapter was trained.
        masked: what it was made from instead, without training.
        projected: which adapter it is, projected by Safe LoRA.
        scaled: which adapter it is at another strength.
        evaluations: by name, of the base model and of this adapter alone.
        arm: name of this adapter among the evaluations.
        differences: paired differences against the base model, by suite.
        cost_ratio: utility cost ratio against the base model.
        merging: of a merged model; None for an adapter.
    """

    model: ModelRecord
    certificate: Certificate
    zone: str | None = None
    n_total: int | None = None
    cmap: ConflictMap | None = None
    tuning: TuneResult | None = None
    masked: MaskedAdapter | None = None
    projected: ProjectedAdapter | None = None
    scaled: ScaledAdapter | None = None
    evaluations: Mapping[str, EvalResult] | None = None
    arm: str | None = None
    differences: Mapping[str, PairedDifference] | None = None
    cost_ratio: CostRatio | None = None
    merging: Merging | None = None


def model_card(facts: CardFacts) -> str:
    """README.md of an exported directory."""
    name = str(facts.model["name"])
    kind = "merged model" if facts.merging else "LoRA adapter"
    layers = len(facts.certificate.layers)
    heads = f"{len(facts.certificate.units):,}"
    heads += f" of {facts.n_total:,}" if facts.n_total else ""
    owned = f"the query rows of {heads} attention heads"
    if not facts.certificate.only_heads:
        owned = f"the rows and columns of {heads} units (query heads or other parts of a layer)"
    how = "cut down from existing adapters" if facts.masked else "trained"
    if facts.scaled is not None:
        how = f"set to {facts.scaled.strength:g} times the update of another adapter"
    made = f"They were chosen and {how}"
    if facts.projected is not None:
        made = f"Updates of another adapter were projected by {_SAFE_LORA}, which reaches all of these,"
    parts = [
        _front_matter(facts),
        f"# {_text(name)}, {'' if facts.projected else 'head-sparse '}{kind}",
        f"A {kind} of {_text(name)} in which only {owned}, in {layers} layers, "
        f"differ from the base model. {made} with castune ({_PAPER}).",
        _section("Heads", _heads(facts)),
        _section("Conflict map", _diagnosis(facts.cmap)),
        _section("Training", _training(facts.tuning)),
        _section("Adapters it was made from", _sources(facts.masked)),
        _section("Projection", _projection(facts.projected)),
        _section("Strength", _strength(facts.scaled)),
        _section("Evaluation", _evaluation(facts)),
        _section("Certificate", _certificate(facts)),
        _section("Use", _use(facts)),
        _section("Made with", _versions(facts)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(facts: CardFacts) -> str:
    name = str(facts.model["name"])
    lines = ["---", f"library_name: {'transformers' if facts.merging else 'peft'}", "pipeline_tag: text-generation"]
    if _HUB_ID.fullmatch(name):
        lines += [f"base_model: {json.dumps(name)}", *([] if facts.merging else ["base_model_relation: adapter"])]
    return "\n".join([*lines, "tags:", "- castune", *([] if facts.merging else ["- lora"]), "---"])


def _heads(facts: CardFacts) -> str:
    rows: list[tuple[str, object]] = [
        ("Base model", _text(facts.model["name"])),
        ("Revision", facts.model.get("commit")),
        ("Fingerprint of the base model", facts.certificate.model_fingerprint),
        ("Zone", facts.zone),
    ]
    if facts.tuning is not None:
        budget = facts.tuning.budget
        rows += [
            ("Query rows", budget.get("query_rows")),
            ("A matrices trained", budget.get("a_matrices")),
            ("Trainable parameters", budget.get("trainable_parameters")),
            ("of which effective (rows of B that are not masked)", budget.get("effective_parameters")),
        ]
    chosen = [
        (
            f"layer {layer}",
            f"{kind_words(kind, alone=facts.certificate.only_heads)} {', '.join(str(one.index) for one in found)}",
        )
        for (kind, layer), found in groupby(facts.certificate.units, key=lambda one: one.place)
    ]
    listed = _pairs(chosen, ("Layer", "Heads (counted from 0)"))
    return f"{_pairs(rows)}\n\n<details><summary>The chosen heads</summary>\n\n{listed}\n\n</details>"


def _diagnosis(cmap: ConflictMap | None) -> str:
    if cmap is None:
        return ""
    metadata = cmap.metadata
    settings = metadata["settings"]
    rows: list[tuple[str, object]] = [("Map", cmap.content_hash), ("Heads measured", len(cmap))]
    examples = cmap.utility_examples.capitalize()
    for key, label in (("safety", "Harmful prompts (D_safe)"), ("utility", f"{examples} (D_util)")):
        rows.append((label, _data(cmap.data[key])))
    for domain, record in metadata.get("domains", {}).items():
        examples = cmap.domains[domain].utility_examples.capitalize()
        rows.append((f"{examples} of domain {domain}", _data(record.get("data", {}))))
    rows += [(key, settings.get(key)) for key in ("measure", "ablation", "judge", "max_new_tokens", "margin_tokens")]
    reliability = metadata.get("reliability", {})
    rows.append(("Reliability of C(h)", reliability.get("reliability")))
    warnings = [f"- {_text(warning)}" for warning in reliability.get("warnings", [])]
    return _pairs(rows) + ("\n\n" + "\n".join(warnings) if warnings else "")


def _training(tuning: TuneResult | None) -> str:
    if tuning is None:
        return ""
    rows: list[tuple[str, object]] = [
        ("Data (D_align)", _data(tuning.data)),
        ("Cut to the length limit", cut_words(tuning.data) or "none"),
        ("Steps", tuning.steps),
        ("Tokens", tuning.tokens),
        ("Wall time", numbers.duration(tuning.seconds)),
    ]
    if tuning.losses:
        (first, loss), (last, end) = tuning.losses[0], tuning.losses[-1]
        rows.append(("Loss", f"{loss:.4g} (step {first}) to {end:.4g} (step {last})"))
    rows += list(tuning.settings.items())
    return _pairs(rows)


def _sources(masked: MaskedAdapter | None) -> str:
    if masked is None:
        return ""
    weights: Sequence[float | None] = masked.weights or [None] * len(masked.sources)
    head = ["Adapter", "Hash", "Rank", "Alpha", *(["Weight"] if masked.weights else [])]
    rows = []
    for source, weight in zip(masked.sources, weights, strict=True):
        row = [_text(source["name"]), source["hash"], _value(source["r"]), _value(source["alpha"])]
        rows.append([*row, *([] if weight is None else [_value(weight)])])
    facts = _pairs(
        [
            ("Combination", masked.combination),
            ("Density", masked.density),
            ("Modules of the sources left out", ", ".join(f"{n} {name}" for name, n in masked.dropped.items()) or None),
            ("Layers no source adapts", list(masked.unadapted_layers) or None),
        ]
    )
    return _table(head, rows) + (f"\n\n{facts}" if facts else "")


def _projection(projected: ProjectedAdapter | None) -> str:
    if projected is None:
        return ""
    cosines = projected.cosines
    return _pairs(
        [
            ("Adapter it was made from", projected.source["name"]),
            ("with the hash", projected.source["hash"]),
            ("Aligned model", projected.aligned["name"]),
            ("Model before its alignment", projected.unaligned["name"]),
            ("Projector", "exact" if projected.exact else "the paper's fast one"),
            ("Updates projected", f"{len(projected.projected):,} of {len(projected.updates):,} ({projected.rule})"),
            ("Cosines", f"{cosines[0]:.3f} to {cosines[-1]:.3f}" if cosines else None),
            ("Norm of the update, of what it was", projected.kept_norm),
        ]
    )


def _strength(scaled: ScaledAdapter | None) -> str:
    if scaled is None:
        return ""
    target = scaled.target
    return _pairs(
        [
            ("Source adapter", scaled.source["name"]),
            ("Source hash", scaled.source["hash"]),
            ("Strength", scaled.strength),
            ("Chosen for", None if target is None else f"{target['purpose']} = {target['value']:g}"),
        ]
    )


def _evaluation(facts: CardFacts) -> str:
    evaluations = facts.evaluations or {}
    tuned = evaluations.get(facts.arm or "")
    if tuned is None:
        return ""
    base = evaluations.get(BASE)
    before = {suite.suite: suite for suite in base.suites} if base else {}
    head = ["Suite", "Purpose", "Metric", "Base model", "This model", "Change, paired", "Judge", "max_new_tokens"]
    rows = []
    for suite in tuned.suites:
        change = (facts.differences or {}).get(suite.suite)
        changed = "" if change is None or change.value is None else _mean(change.value, change.standard_error, change.n)
        rows.append(
            [
                _text(_source(suite.suite)),
                suite.purpose,
                suite.metric.replace("_", " "),
                _rate(before[suite.suite]) if suite.suite in before else "",
                _rate(suite),
                changed,
                _text(suite.judge),
                "" if suite.max_new_tokens is None else str(suite.max_new_tokens),
            ]
        )
    text = _table(head, rows) + "\n\nRates are means ± standard errors over n scored examples, measured on the base "
    text += f"model with the adapter in {_text(tuned.model.get('dtype', 'its own dtype'))}."
    if facts.cost_ratio is not None and facts.cost_ratio.value is not None:
        ratio = f"{numbers.number(facts.cost_ratio.value)}{interval(facts.cost_ratio)}"
        text += f" Utility cost ratio (utility lost for safety gained): {ratio}."
    return text


def _certificate(facts: CardFacts) -> str:
    proof = facts.certificate
    what, whose = ("query rows", "heads") if proof.only_heads else ("rows and columns", "units")
    columns: list[tuple[str, object]] = []
    if proof.selected_columns:
        columns = [
            ("Selected columns that changed", f"{proof.changed_columns:,} of {proof.selected_columns:,}"),
            ("Other columns of the adapted projections, all identical", proof.checked_columns),
        ]
    rows: list[tuple[str, object]] = [
        ("Adapter", proof.adapter_hash),
        (
            f"Selected {'query ' if proof.only_heads else ''}rows that changed",
            f"{proof.changed_rows:,} of {proof.selected_rows:,}",
        ),
        ("Other rows of the adapted projections, all identical", proof.checked_rows),
        *columns,
        ("Largest change of a weight", proof.largest_change),
    ]
    text = "The adapter, merged, was compared with the base model bit by bit: nothing but "
    text += f"{what} of the chosen {whose} differs.\n\n{_pairs(rows)}"
    if facts.merging is not None:
        text += (
            f"\n\nThis merged model ({facts.merging.dtype}) was read back after writing: "
            f"{facts.merging.identical_tensors:,} other tensors and {facts.merging.identical} "
            "of the adapted projections are bit-identical to the base model, the sign of zero included."
        )
    return text


def _use(facts: CardFacts) -> str:
    if facts.merging is None:
        name = str(facts.model["name"])
        base = json.dumps(name if _HUB_ID.fullmatch(name) else "BASE_MODEL")
        lines = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({base})",
            'model = PeftModel.from_pretrained(base, "THIS_DIRECTORY")',
        ]
    else:
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")',
        ]
    return "\n".join(["```python", *lines, "```"])


def _versions(facts: CardFacts) -> str:
    source = facts.tuning or facts.masked or facts.projected or facts.scaled
    if source is None:
        return ""
    record = source.provenance
    rows: list[tuple[str, object]] = [("Date", record.get("date")), *record.get("versions", {}).items()]
    return _pairs(rows, ("", "Version"))


def _section(title: str, content: str) -> str:
    return f"## {title}\n\n{content}" if content else ""


def _pairs(rows: Sequence[tuple[str, object]], head: tuple[str, str] = ("", "")) -> str:
    """A table of two columns; rows without a value are left out."""
    present = [[_text(label), _value(value)] for label, value in rows if value is not None and value != ""]
    return _table(list(head), present) if present else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return _text(value)


def _data(record: DataRecord) -> str | None:
    """Name and size of a data set, `name (n = 64)`."""
    source, n = record.get("source"), record.get("n")
    sizes = None if n is None else f"n = {n:,}"
    if source is None:
        return sizes
    return f"{_source(source)} ({sizes})" if sizes else _source(source)


def _source(source: str) -> str:
    """A data source without the place of its file, which means nothing elsewhere: a named source, or a file's name."""
    name, given, _ = source.partition("=")
    return name if given else Path(source).name if Path(source).is_absolute() else source


def _rate(suite: SuiteResult) -> str:
    if suite.value is None:
        return f"unscored ({suite.unscored:,})"
    return _mean(suite.value, suite.standard_error, suite.n, suite.unscored)


def _mean(value: float, standard_error: float | None, n: int, unscored: int = 0) -> str:
    return f"{numbers.with_error(value, standard_error)} (n = {n:,}{f', {unscored:,} unscored' if unscored else ''})"


def _text(value: object) -> str:
    """Text that stays in its cell and shows as it is: no Markdown, no HTML, no line breaks."""
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*|\[\]~])|(?<!\w)_|_(?!\w)", lambda found: "\\" + found[0], text)
