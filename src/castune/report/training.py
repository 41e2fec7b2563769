"""What was trained or made of other adapters, and the proof of what was not touched."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from castune.artifacts import HeadSelection, MaskedAdapter, ProjectedAdapter, TuneResult
from castune.artifacts.records import NullSpaceRecord
from castune.core import numbers
from castune.report.markup import Markup, table, tag
from castune.report.sections import NOT_RECORDED, cut_words, figure, known, section
from castune.report.summary import number

_BUDGET = ("Heads", "Layers", "Query rows", "A matrices", "Trainable parameters", "Effective parameters")
_WORK = ("Examples", "Steps", "Tokens", "Time")
_PROOF = (
    "Arm",
    "Query rows outside the selection",
    "Tensors, outside selected rows",
    "Selected rows changed",
    "Largest change of a weight",
    "Adapter",
)


def training(
    tunings: Mapping[str, TuneResult],
    masked: Mapping[str, MaskedAdapter],
    projected: Mapping[str, ProjectedAdapter],
    selections: Mapping[str, HeadSelection],
    drawn: Collection[str],
) -> Markup:
    """Budget, certificate and loss of every arm."""
    made: dict[str, TuneResult | MaskedAdapter | ProjectedAdapter] = {**tunings, **masked, **projected}
    if not made:
        return section("Training", "training", tag("p", "Nothing has been trained in this run."))
    proofs = [_proof(arm, result) for arm, result in made.items()]
    only_heads = all(result.certificate.only_heads for result in made.values())
    certificate = (
        "Every adapter was merged and compared with the base model bit by bit: nothing but "
        f"{'query rows of the selected heads' if only_heads else 'rows and columns of the selected units'} differs."
    )
    return section(
        "Training",
        "training",
        _budgets(tunings, selections),
        _surgery(tunings),
        *_null_spaces(tunings),
        _sources(masked),
        _projections(projected),
        tag("h3", "Certificate"),
        tag("p", certificate),
        table(_PROOF, proofs, label="Certificate by arm", class_="numbers"),
        figure("training_loss", "Training loss as logged.") if "training_loss" in drawn else "",
    )


def _budgets(tunings: Mapping[str, TuneResult], selections: Mapping[str, HeadSelection]) -> Markup | str:
    if not tunings:
        return ""
    rows = []
    for arm, result in tunings.items():
        keys = ("heads", "query_rows", "a_matrices", "trainable_parameters", "effective_parameters")
        heads, *rest = (known(result.budget.get(key)) for key in keys)
        if not result.certificate.only_heads:
            heads = f"{heads} and {sum(not one.is_head for one in result.certificate.units):,} other units"
        layers = known(len(selections[arm].layers)) if arm in selections else NOT_RECORDED
        cut = cut_words(result.data)
        examples = known(result.data.get("n")) + (f" ({cut})" if cut else "")
        work = [examples, known(result.steps), known(result.tokens), numbers.duration(result.seconds)]
        rows.append([arm, _objective(result), heads, layers, *rest, *work])
    explanation = (
        "Trainable parameters include LoRA's A, which all heads of a layer share; effective parameters "
        "leave out rows that the mask keeps at zero."
    )
    head = ("Arm", "Objective", *_BUDGET, *_WORK)
    return tag(
        "div",
        table(head, rows, label="Training budget by arm", class_="numbers"),
        tag("p", explanation, class_="small"),
    )


def _objective(result: TuneResult) -> str:
    settings = result.settings
    parts = [str(settings["method"]).upper()]
    if settings["replay"]:
        replayed = None if result.utility is None else result.utility.get("replayed")
        parts.append(f"{100 * settings['replay']:g} % replayed ({known(replayed)} examples)")
    if result.surgery is not None:
        parts.append(str(settings["surgery"]))
    if result.null_space is not None:
        parts.append(f"null space of {100 * result.null_space['share']:g} % of the utility activations")
    if settings["quantization"] != "none":
        parts.append(f"base in {settings['quantization']}")
    if settings["freeze_a"]:
        parts.append("A frozen")
    if len(result.selections) > 1:
        parts.append(f"heads chosen {len(result.selections)} times (budget: of the last)")
    return ", ".join(parts)


def _surgery(tunings: Mapping[str, TuneResult]) -> Markup | str:
    rows = []
    for arm, result in tunings.items():
        if (found := result.surgery) is None:
            continue
        settings, utility = result.settings, result.utility
        cosine = found.get("mean_cosine")
        rows.append(
            [
                arm,
                f"{known(settings.get('surgery'))}, {known(settings.get('surgery_granularity'))}",
                known(None) if utility is None else f"{known(utility['source'] or None)}, n = {known(utility['n'])}",
                f"{known(found.get('conflicting_steps'))} of {known(found.get('steps'))}",
                numbers.number(cosine, ".3f"),
            ]
        )
    if not rows:
        return ""
    head = ["Arm", "Gradient surgery", "Utility data", "Steps with a conflict", "Mean cosine of the two gradients"]
    return table(head, rows, label="Gradient surgery by arm", class_="numbers")


def _null_spaces(tunings: Mapping[str, TuneResult]) -> list[Markup]:
    return [
        tag("p", f"{arm}: {null_space_words(result.null_space)}.")
        for arm, result in tunings.items()
        if result.null_space is not None
    ]


def null_space_words(record: NullSpaceRecord) -> str:
    """What a training in a null space left alone, in words."""
    taken, widths = zip(*record["directions"].values(), strict=True)
    return (
        f"A is free of the leading {_from_to(taken)} of {_from_to(widths)} directions of its inputs, which hold "
        f"{100 * record['share']:g} % of the second moment of the utility activations ({record['tokens']:,} tokens, "
        f"{numbers.counted(len(taken), 'projection')})"
    )


def _from_to(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _sources(masked: Mapping[str, MaskedAdapter]) -> Markup | str:
    if not masked:
        return ""
    rows = []
    for arm, made in masked.items():
        weights = made.weights or (None,) * len(made.sources)
        sources = [
            f"{source['name']}{'' if weight is None else f' × {weight:g}'}"
            for source, weight in zip(made.sources, weights, strict=True)
        ]
        how = known(made.combination) if made.combination else "–"
        density = "" if made.density is None else f", density {made.density:g}"
        dropped = ", ".join(f"{n:,} {name}" for name, n in made.dropped.items()) or "none"
        rows.append([arm, ", ".join(sources), how + density, f"{len(made.certificate.units):,}", dropped])
    head = ["Arm", "Adapters", "Combined by", "Heads kept", "Modules left out"]
    return tag(
        "div",
        tag("h3", "Made of other adapters, without training"),
        table(head, rows, label="Masked adapters by arm", class_="numbers"),
    )


def _projections(projected: Mapping[str, ProjectedAdapter]) -> Markup | str:
    if not projected:
        return ""
    rows = []
    for arm, made in projected.items():
        cosines = made.cosines
        models = f"{known(made.aligned.get('name'))} − {known(made.unaligned.get('name'))}"
        rows.append(
            [
                arm,
                made.source["name"],
                models + (", exact" if made.exact else ""),
                f"{len(made.projected):,} of {len(made.updates):,} ({made.rule})",
                numbers.span(cosines[0], cosines[-1], ".3f") if cosines else "–",
                "–" if made.kept_norm is None else numbers.number(made.kept_norm, ".3f"),
            ]
        )
    head = ["Arm", "Adapter", "Alignment", "Updates projected", "Cosines", "Share of norm kept"]
    explanation = (
        "A projection mixes the rows of a layer: a projected adapter may change every head of its layers, whatever was "
        "selected for the one it was made from."
    )
    return tag(
        "div",
        tag("h3", "Projected by Safe LoRA, without training"),
        table(head, rows, label="Projected adapters by arm", class_="numbers"),
        tag("p", explanation, class_="small"),
    )


def _proof(arm: str, result: TuneResult | MaskedAdapter | ProjectedAdapter) -> list[object]:
    proof = result.certificate
    return [
        arm,
        f"{proof.checked_rows:,}"
        + (f" and {proof.checked_columns:,} columns" if proof.selected_columns else "")
        + ", all identical",
        f"{proof.checked_tensors:,}, all identical",
        f"{proof.changed_rows:,} of {proof.selected_rows:,}"
        + (f"; {proof.changed_columns:,} of {proof.selected_columns:,} columns" if proof.selected_columns else ""),
        number(proof.largest_change),
        tag("code", proof.adapter_hash) if proof.adapter_hash else NOT_RECORDED,
    ]
