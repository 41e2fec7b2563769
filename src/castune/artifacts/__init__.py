"""What the stages hand to each other: frozen records with save and load. No transformers, no peft here."""

from castune.artifacts.conflict_map import ConflictMap
from castune.artifacts.eval_result import EvalResult, SuiteResult
from castune.artifacts.head_selection import HeadSelection
from castune.artifacts.masked_adapter import MaskedAdapter
from castune.artifacts.projected_adapter import ProjectedAdapter
from castune.artifacts.scaled_adapter import ScaledAdapter
from castune.artifacts.tune_result import Certificate, TuneResult
from castune.artifacts.unit import Unit

__all__ = [
    "Certificate",
    "ConflictMap",
    "EvalResult",
    "HeadSelection",
    "MaskedAdapter",
    "ProjectedAdapter",
    "ScaledAdapter",
    "SuiteResult",
    "TuneResult",
    "Unit",
]
