"""How far a map by attribution can be trusted, in words, for the page and the command line. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from castune.artifacts import ConflictMap, Unit
from castune.core.numbers import number, span

# How sure it is on which side of the safe zone's border a unit is, the least sure first.
STANDINGS = ("undecided", "probable", "probable, exact", "certain", "certain, exact")


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


def named_undecided(found: Mapping[str, Any], most: int) -> str:
    """The units that the estimate leaves open, layer by layer, at most so many of them; empty where there is none."""
    units = [Unit(*one) for one in found["undecided"]]
    layers = groupby(units[:most], key=lambda one: one.layer)
    parts = [f"layer {layer}: {', '.join(str(one.index) for one in of_layer)}" for layer, of_layer in layers]
    if len(units) > most:
        parts.append(f"and {len(units) - most:,} more")
    return "; ".join(parts)


def standings(cmap: ConflictMap) -> list[str]:
    """Which of `STANDINGS` every row has; empty for a map that has none."""
    told = cmap.standing
    if not told:
        return []
    undecided, probable, exact = (
        {Unit(*one) for found in told.values() for one in found[name]} for name in ("undecided", "probable", "exact")
    )

    def of(one: Unit) -> str:
        if one in undecided:
            return "undecided"
        return ("probable" if one in probable else "certain") + (", exact" if one in exact else "")

    return [of(one) for one in cmap.units]
