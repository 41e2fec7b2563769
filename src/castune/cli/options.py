"""What several commands take, and which settings each leaves out, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from castune.cli.help import ADAPTER, ATTRIBUTION, MEASURES, READS, RUNS, TRAINS, UNITS, USES_UTILITY, WRITES
from castune.cli.settings import all_of, data_of, drawn_of, in_panel, only
from castune.config import AttackConfig, DiagnoseConfig, EvaluateConfig, Recipe, RepairConfig, SelectConfig, TuneConfig

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
    "measure": "a plan covers all measures",
    "verify": "how many units an attribution leaves open is known afterwards",
    "verify_units": "how many units an attribution leaves open is known afterwards",
    "ablation": "costs the same",
    "judge": "rules cost nothing",
    "sensitivity_rank": "made of the same measurements",
    "layers": "a plan is of all layers",
    "domains": "made of the same measurements",
}
NOT_SELECTED = {"compare": "one selection a command: others are made with --beside, or by castune tune --arm"}
NOT_ATTACKED = {"kinds": "--kind, one at a time"}
NOT_EVALUATED = {"overlap": "--allow-overlap; to drop prompts is for a training: castune tune --held-out"}

# Which settings are not in the usual group of options of their config.
_OF_A_MODEL = {"dtype": RUNS, "device": RUNS, "seed": RUNS}
_OF_A_DIAGNOSIS = {
    **dict.fromkeys(("check_units", "check_examples", "verify", "verify_units"), ATTRIBUTION),
    **dict.fromkeys(("units", "mlp_groups", "layers"), UNITS),
    **dict.fromkeys(("batch_tokens", "max_length", "gradient_memory"), RUNS),
}
_OF_A_TRAINING = {
    **dict.fromkeys(("rank", "alpha", "freeze_a", "reselect_steps"), ADAPTER),
    **dict.fromkeys(("replay", "surgery", "surgery_granularity", "surgery_batch_size", "null_space"), USES_UTILITY),
    **dict.fromkeys(("quantization", "gradient_checkpointing", "seed"), RUNS),
    **dict.fromkeys(("checkpoint_steps", "snapshot_steps", "report_to"), WRITES),
}
_OF_AN_EVALUATION = {
    **dict.fromkeys(("suites", "limit", "seed"), READS),
    **dict.fromkeys(("backend", "served_model", "batch_tokens", "max_length"), RUNS),
}
_OF_AN_ATTACK = {"limit": READS, "strengths": MEASURES, "seed": RUNS}

MODEL = in_panel(READS, all_of(Recipe, but=NOT_OF_A_MODEL), _OF_A_MODEL)
PLANNED_MODEL = in_panel(READS, all_of(Recipe, but=NOT_OF_A_PLANNED_MODEL), _OF_A_MODEL)
PLACE = in_panel(RUNS, only(Recipe, "dtype", "device"))
SAFETY = in_panel(READS, data_of("safety", "safety"))
UTILITY = in_panel(READS, data_of("utility", "utility"))
ALIGN = in_panel(READS, (data_of("align", "data")[0], *drawn_of("")))
UTILITY_DRAWN = in_panel(USES_UTILITY, drawn_of("utility_"))
DIAGNOSIS = in_panel(MEASURES, all_of(DiagnoseConfig, but={}), _OF_A_DIAGNOSIS)
PLANNED_DIAGNOSIS = in_panel(MEASURES, all_of(DiagnoseConfig, but=NOT_PLANNED), _OF_A_DIAGNOSIS)
SELECTION = all_of(SelectConfig, but=NOT_SELECTED)
TUNING = in_panel(TRAINS, all_of(TuneConfig, but={}), _OF_A_TRAINING)
EVALUATION = in_panel(MEASURES, all_of(EvaluateConfig, but=NOT_EVALUATED), _OF_AN_EVALUATION)
JUDGE = only(EvaluateConfig, "judge")
ATTACK = in_panel(TRAINS, all_of(AttackConfig, but=NOT_ATTACKED), _OF_AN_ATTACK)
REPAIR = in_panel(MEASURES, all_of(RepairConfig, but={}))

Model = Annotated[str, typer.Argument(metavar="MODEL", help=only(Recipe, "model")[0].help())]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Arm = Annotated[str | None, typer.Option(metavar="NAME", help="Arm of the run. The main arm by default.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. tune.learning_rate=2e-4. Repeatable."),
]

# Where an adapter made of others goes.
AdapterOut = Annotated[
    Path | None, typer.Option(metavar="DIR", rich_help_panel=WRITES, help="Adapter directory to write.")
]
BesideArm = Annotated[
    str | None,
    typer.Option(
        "--as",
        metavar="NAME",
        rich_help_panel=WRITES,
        help="Add the adapter to the run as an arm with this name, to be evaluated and reported.",
    ),
]
OverwriteOwn = Annotated[
    bool,
    typer.Option("--overwrite", rich_help_panel=WRITES, help="Replace an adapter that this command wrote."),
]
