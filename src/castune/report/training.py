"""What was trained, and the proof of what was not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from castune.artifacts import HeadSelection, TuneResult
from castune.report.markup import Markup, table, tag
from castune.report.sections import NOT_RECORDED, duration, figure, known, section
from castune.report.summary import number


def training(
    tunings: Mapping[str, TuneResult], selections: Mapping[str, HeadSelection], drawn: Mapping[str, Any]
) -> Markup:
    """Budget, certificate and loss of every arm."""
    if not tunings:
        return section("Training", "training", tag("p", "Nothing has been trained in this run."))
    head = [
        "Arm",
        "Heads",
        "Layers",
        "Query rows",
        "A matrices",
        "Trainable parameters",
        "Effective parameters",
    ]
    head += ["Examples", "Steps", "Tokens", "Time"]
    budgets, proofs = [], []
    for arm, result in tunings.items():
        keys = ("heads", "query_rows", "a_matrices", "trainable_parameters", "effective_parameters")
        heads, *rest = (known(result.budget.get(key)) for key in keys)
        layers = known(len(selections[arm].layers)) if arm in selections else NOT_RECORDED
        examples = known(result.data.get("n")) + (f" ({result.data['cut']:,} cut)" if result.data.get("cut") else "")
        run = [examples, known(result.steps), known(result.tokens), duration(result.seconds)]
        budgets.append([arm, heads, layers, *rest, *run])
        proof = result.certificate
        proofs.append(
            [
                arm,
                f"{proof.checked_rows:,}, all identical",
                f"{proof.checked_tensors:,}, all identical",
                f"{proof.changed_rows:,} of {proof.selected_rows:,}",
                number(proof.largest_change),
                tag("code", proof.adapter_hash) if proof.adapter_hash else NOT_RECORDED,
            ]
        )
    proof_head = [
        "Arm",
        "Query rows outside the selection",
        "Tensors, outside selected rows",
        "Selected rows changed",
    ]
    proof_head += ["Largest change of a weight", "Adapter"]
    certificate = (
        "Every adapter was merged and compared with the base model bit by bit: nothing but query rows of the "
        "selected heads differs."
    )
    return section(
        "Training",
        "training",
        table(head, budgets, label="Training budget by arm", class_="numbers"),
        tag(
            "p",
            "Trainable parameters include LoRA's A, which all heads of a layer share; effective parameters "
            "leave out rows that the mask keeps at zero.",
            class_="small",
        ),
        tag("h3", "Certificate"),
        tag("p", certificate),
        table(proof_head, proofs, label="Certificate by arm", class_="numbers"),
        figure("training_loss", "Training loss as logged.") if "training_loss" in drawn else "",
    )
