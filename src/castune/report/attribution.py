"""How far a map by attribution can be trusted, in words, for the page and the command line. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from castune.core.numbers import number, span


def fidelity_words(found: Mapping[str, Any]) -> str:
    """How far attribution agrees with exact ablation (`castune.diagnosis.fidelity`)."""
    columns = found["columns"]
    score = columns["conflict_score"]
    ends = "" if score["low"] is None else f" (95 %: {span(score['low'], score['high'])})"
    shifts = ", ".join(
        f"{symbol} {number(columns[name]['spearman'])}"
        for symbol, name in (("H_gen", "utility_shift"), ("H_safe", "safety_shift"))
    )
    return f"rank correlation of C {number(score['spearman'])}{ends}, {shifts}"


def standing_words(found: Mapping[str, Any], n: int) -> str:
    """How many of n units are on which side of the safe zone's border, and how sure that is."""
    n_undecided, n_probable, n_exact = (len(found[name]) for name in ("undecided", "probable", "exact"))
    measured = f"; {n_exact} were measured exactly" if n_exact else ""
    return (
        f"{n - n_undecided - n_probable} certain, {n_probable} may change with other examples, {n_undecided} left open "
        f"by the estimate{measured}"
    )
