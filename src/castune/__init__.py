"""castune: score attention heads by safety-utility conflict before training; fine-tune only the low-conflict ones.

The public names below are loaded at first use, so that `import castune` and `castune --help` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from castune.artifacts import Certificate as Certificate
    from castune.artifacts import ConflictMap as ConflictMap
    from castune.artifacts import EvalResult as EvalResult
    from castune.artifacts import HeadSelection as HeadSelection
    from castune.artifacts import TuneResult as TuneResult
    from castune.config import DiagnoseConfig as DiagnoseConfig
    from castune.config import EvaluateConfig as EvaluateConfig
    from castune.config import Recipe as Recipe
    from castune.config import TuneConfig as TuneConfig
    from castune.core.heads import HeadId as HeadId
    from castune.core.heads import HeadLayout as HeadLayout
    from castune.core.loading import load as load
    from castune.data.example import Example as Example
    from castune.data.sources import examples as examples
    from castune.diagnosis.run import diagnose as diagnose
    from castune.errors import CastuneError as CastuneError
    from castune.errors import UnsupportedArchitecture as UnsupportedArchitecture
    from castune.evaluation.judges import judge as judge
    from castune.evaluation.run import evaluate as evaluate
    from castune.pipeline import run as run
    from castune.selection import select as select
    from castune.stats.correlations import correlation as correlation
    from castune.stats.estimates import utility_cost_ratio as utility_cost_ratio
    from castune.steps.conflict_callback import ConflictCallback as ConflictCallback
    from castune.steps.export import export as export
    from castune.tuning.mask import mask_adapter as mask_adapter
    from castune.tuning.row_lora import sparse_lora as sparse_lora
    from castune.tuning.safe_lora import project_adapter as project_adapter
    from castune.tuning.scaling import scale_adapter as scale_adapter
    from castune.tuning.train import tune as tune
    from castune.tuning.verify import certify as certify

_PUBLIC = {
    "Certificate": "castune.artifacts",
    "ConflictMap": "castune.artifacts",
    "EvalResult": "castune.artifacts",
    "HeadSelection": "castune.artifacts",
    "TuneResult": "castune.artifacts",
    "DiagnoseConfig": "castune.config",
    "EvaluateConfig": "castune.config",
    "Recipe": "castune.config",
    "TuneConfig": "castune.config",
    "HeadId": "castune.core.heads",
    "HeadLayout": "castune.core.heads",
    "judge": "castune.evaluation.judges",
    "load": "castune.core.loading",
    "Example": "castune.data.example",
    "examples": "castune.data.sources",
    "diagnose": "castune.diagnosis.run",
    "CastuneError": "castune.errors",
    "UnsupportedArchitecture": "castune.errors",
    "evaluate": "castune.evaluation.run",
    "correlation": "castune.stats.correlations",
    "utility_cost_ratio": "castune.stats.estimates",
    "ConflictCallback": "castune.steps.conflict_callback",
    "export": "castune.steps.export",
    "run": "castune.pipeline",
    "select": "castune.selection",
    "mask_adapter": "castune.tuning.mask",
    "sparse_lora": "castune.tuning.row_lora",
    "project_adapter": "castune.tuning.safe_lora",
    "scale_adapter": "castune.tuning.scaling",
    "tune": "castune.tuning.train",
    "certify": "castune.tuning.verify",
}

__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'castune' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
