"""What an adapter does to its base, and an adapter cut down by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from castune.cli.help import READS, WRITES
from castune.cli.options import PLACE, REPAIR
from castune.cli.settings import Values
from castune.cli.values import names
from castune.config import RepairConfig
from castune.console import say

AdapterPath = Annotated[Path, typer.Argument(metavar="ADAPTER", help="Directory of a PEFT LoRA adapter of any kind.")]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", rich_help_panel=READS, help="Base model. By default the run's, or the one the adapter names."
    ),
]
Safety = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", rich_help_panel=READS, help="Harmful prompts with refusals. By default the run's."),
]
Utility = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", rich_help_panel=READS, help="Questions or solved problems. By default the run's."),
]
OverRefusal = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        rich_help_panel=READS,
        help="Harmless prompts with helpful replies. By default the run's, if any.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(min=2, metavar="N", rich_help_panel=READS, help="Examples per set. By default the run's, or 64."),
]


def inspect(
    adapter: AdapterPath,
    *,
    base: Base = None,
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", rich_help_panel=READS, help="Run whose model, data and conflict map to use."),
    ] = None,
    arm: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", rich_help_panel=READS, help="Arm of the run whose heads were meant to be trained."
        ),
    ] = None,
    safety: Safety = None,
    utility: Utility = None,
    over_refusal: OverRefusal = None,
    limit: Limit = None,
    of_model: Annotated[Values, PLACE],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=WRITES,
            help="Directory to write. By default RUN/inspection/NAME, or inspection-NAME.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", rich_help_panel=WRITES, help="Print everything as JSON instead of a summary.")
    ] = False,
) -> None:
    """Show what a LoRA adapter does to each head, KV group and MLP.

    Reads adapters from any trainer. Reports size, spectrum, first-order effects on safety and utility, and anomalies.

    Examples:
        castune inspect my-adapter --base default
        castune inspect runs/first/arms/all/adapter --run runs/first
    """
    from castune.report.inspection_summary import summary
    from castune.steps.inspect import inspect_step
    from castune.steps.inspection_data import InspectionData
    from castune.steps.subject import Subject

    subject = Subject.of(adapter, run=run, arm=arm, base=base, of_model=of_model)
    sources = {"safety": safety, "utility": utility, "over-refusal": over_refusal}
    found = inspect_step(subject, InspectionData.of(subject.recipe, sources, limit), out)
    if as_json:
        say(json.dumps(found.to_json(), indent=1, allow_nan=False))
        return
    for line in summary(found):
        say(line)
    say(f"table and page: {out or subject.inspection}")


def repair(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run, or a plain LoRA adapter.")],
    *,
    arm: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=READS, help="Arm of the run to repair. The main arm by default."),
    ] = None,
    base: Base = None,
    settings: Annotated[Values, REPAIR],
    suites: Annotated[
        str | None,
        typer.Option(
            metavar="SUITES", rich_help_panel=READS, help="Suites to choose by, comma-separated. By default the run's."
        ),
    ] = None,
    confirm: Annotated[
        str | None,
        typer.Option(
            metavar="SUITES",
            rich_help_panel=READS,
            help="Suites to measure the result on. By default those of the run not in --suites.",
        ),
    ] = None,
    safety: Safety = None,
    utility: Utility = None,
    over_refusal: OverRefusal = None,
    limit: Limit = None,
    of_model: Annotated[Values, PLACE],
    beside: Annotated[
        str | None,
        typer.Option(
            "--as", metavar="NAME", rich_help_panel=WRITES, help="Arm to add to the run. By default ARM-repaired."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", rich_help_panel=WRITES, help="Directory to write, for an adapter without a run."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", rich_help_panel=WRITES, help="Print everything as JSON instead of a summary.")
    ] = False,
) -> None:
    """Drop the units of an adapter that cost most per refusal gained.

    Evaluates a few candidates and keeps the cheapest one that keeps the gain in refusals. Selects none if none does.

    Examples:
        castune repair runs/first --arm all --keep-safety 0.95
        castune repair my-adapter --base default --out repaired
    """
    from castune.report.repair_summary import summary
    from castune.steps.inspection_data import InspectionData
    from castune.steps.repair import repair_step
    from castune.steps.repair_place import place_of

    config = RepairConfig(**settings)
    subject, place = place_of(source, arm=arm, base=base, of_model=of_model, beside=beside, out=out)
    sources = {"safety": safety, "utility": utility, "over-refusal": over_refusal}
    data = InspectionData.of(subject.recipe, sources, limit)
    found = repair_step(subject, data, config, place, suites=names(suites or ""), confirm=names(confirm or ""))
    if as_json:
        say(json.dumps(found.to_json(), indent=1, allow_nan=False))
        return
    for line in summary(found):
        say(line)
    if found.chosen:
        say(f"adapter: {place.adapter}")
    elif place.adapter.is_dir():
        say(f"note: {place.adapter} was selected by an earlier repair, and is still there")
    say(f"what was tried: {place.out}")
