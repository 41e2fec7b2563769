"""castune: find the attention heads your fine-tuning would break, before you train; then train only the others.

The public names below are loaded at first use, so that `import castune` and `castune --help` stay fast.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

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
    from castune.diagnose.run import diagnose as diagnose
    from castune.errors import CastuneError as CastuneError
    from castune.errors import UnsupportedArchitecture as UnsupportedArchitecture
    from castune.evaluate.judges import judge as judge
    from castune.evaluate.run import evaluate as evaluate
    from castune.export import export as export
    from castune.pipeline import run as run
    from castune.select import select as select
    from castune.stats.estimates import correlation as correlation
    from castune.stats.estimates import utility_cost_ratio as utility_cost_ratio
    from castune.tune.mask import mask_adapter as mask_adapter
    from castune.tune.row_lora import sparse_lora as sparse_lora
    from castune.tune.train import tune as tune
    from castune.tune.verify import certify as certify

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
    "judge": "castune.evaluate.judges",
    "load": "castune.core.loading",
    "Example": "castune.data.example",
    "examples": "castune.data.sources",
    "diagnose": "castune.diagnose.run",
    "CastuneError": "castune.errors",
    "UnsupportedArchitecture": "castune.errors",
    "evaluate": "castune.evaluate.run",
    "correlation": "castune.stats.estimates",
    "utility_cost_ratio": "castune.stats.estimates",
    "export": "castune.export",
    "run": "castune.pipeline",
    "select": "castune.select",
    "mask_adapter": "castune.tune.mask",
    "sparse_lora": "castune.tune.row_lora",
    "tune": "castune.tune.train",
    "certify": "castune.tune.verify",
}

__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'castune' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__


class _Package(types.ModuleType):
    """`castune.diagnose` is a function and also the package it lives in; the function wins as an attribute.

    The import system binds a subpackage on its parent when it is first imported. For names that are public
    functions that binding is dropped; `from castune.diagnose import score` works as ever, through sys.modules.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, types.ModuleType) and name in _PUBLIC:
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
