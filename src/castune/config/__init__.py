"""Settings: a small model per stage, and the recipe that holds them.

Unknown keys are refused. Values are checked where they are built, so a recipe fails before a model is loaded.
"""

from castune.config.attack import AttackConfig, AttackKind
from castune.config.data import DataConfig, check_domain_names
from castune.config.diagnosis import DiagnoseConfig, Measure, SensitivityRank
from castune.config.evaluation import EvaluateConfig
from castune.config.recipe import TEMPLATE_DATE, Recipe
from castune.config.repair import RepairConfig
from castune.config.selection import SelectConfig
from castune.config.study import CalibrationConfig, PrimaryContrast, StudyConfig, method_suffix
from castune.config.toml import to_toml
from castune.config.tuning import SurgeryGranularity, TuneConfig

__all__ = [
    "TEMPLATE_DATE",
    "AttackConfig",
    "AttackKind",
    "CalibrationConfig",
    "DataConfig",
    "DiagnoseConfig",
    "EvaluateConfig",
    "Measure",
    "PrimaryContrast",
    "Recipe",
    "RepairConfig",
    "SelectConfig",
    "SensitivityRank",
    "StudyConfig",
    "SurgeryGranularity",
    "TuneConfig",
    "check_domain_names",
    "method_suffix",
    "to_toml",
]
