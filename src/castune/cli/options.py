"""What several commands take, and which settings each leaves out, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from castune.cli.settings import all_of, data_of, drawn_of, only
from castune.config import DiagnoseConfig, EvaluateConfig, Recipe, RepairConfig, SelectConfig, TuneConfig

_OTHER_COMMAND = "another command's"

NOT_OF_A_MODEL = {
    "model": "an argument",
    "out": "an option without a default",
    "safety": "its source and how much of it are options",
    "utility": "its sources and how much of them are options",
    "align": _OTHER_COMMAND,
    "diagnose": "its settings are options",
    "select": _OTHER_COMMAND,
    "tune": _OTHER_COMMAND,
    "evaluate": _OTHER_COMMAND,
    "study": _OTHER_COMMAND,
}
NOT_OF_A_PLANNED_MODEL = {
    **NOT_OF_A_MODEL,
    "out": "nothing is written",
    "trust_remote_code": "layers are built from transformers' own code",
}
NOT_PLANNED = {
    "measure": "a plan tells of all",
    "verify": "how many units an attribution leaves open is known afterwards",
    "verify_units": "how many units an attribution leaves open is known afterwards",
    "ablation": "costs the same",
    "judge": "rules cost nothing",
    "sensitivity_rank": "made of the same measurements",
    "layers": "a plan is of all layers",
    "domains": "made of the same measurements",
}
NOT_SELECTED = {"compare": "one selection a command: others are made with --beside, or by castune tune --arm"}
NOT_EVALUATED = {"overlap": "--allow-overlap; to drop prompts is for a training: castune tune --held-out"}

MODEL = all_of(Recipe, but=NOT_OF_A_MODEL)
PLANNED_MODEL = all_of(Recipe, but=NOT_OF_A_PLANNED_MODEL)
PLACE = only(Recipe, "dtype", "device")
SAFETY = data_of("safety", "safety")
UTILITY = data_of("utility", "utility")
ALIGN = (data_of("align", "data")[0], *drawn_of(""))
UTILITY_DRAWN = drawn_of("utility_")
DIAGNOSIS = all_of(DiagnoseConfig, but={})
PLANNED_DIAGNOSIS = all_of(DiagnoseConfig, but=NOT_PLANNED)
SELECTION = all_of(SelectConfig, but=NOT_SELECTED)
TUNING = all_of(TuneConfig, but={})
EVALUATION = all_of(EvaluateConfig, but=NOT_EVALUATED)
JUDGE = only(EvaluateConfig, "judge")
REPAIR = all_of(RepairConfig, but={})

Model = Annotated[str, typer.Argument(help=only(Recipe, "model")[0].help)]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Arm = Annotated[str | None, typer.Option(help="An arm of the run; the main one when absent.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. tune.learning_rate=2e-4. Repeatable."),
]
