"""What single heads of an adapter do to three losses: to first order (`castune inspect`) and exactly.

    python benchmarks/first_order.py ADAPTER [--model default] [--heads 20] [--n 32] [--strengths 0.25,1]

Heads are taken evenly over the ranks of the size of their update. Exactly: the mean loss with a head's share of the
update alone, minus the base model's, in float32 (differences of single heads are below what bfloat16 resolves).
Prints a row a loss and strength: Spearman and Pearson correlation over the heads, and how large both are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from scipy import stats

import castune as ct
from castune.artifacts import Unit
from castune.core.units import UnitLayout
from castune.core.updates import Floats, Update, spans_of, unit_size, with_error
from castune.data.chat import ChatFormat
from castune.data.rows import Row
from castune.diagnosis.update_effects import example_losses, measure_effects
from castune.tuning.adapter_update import read_update

BATCH_TOKENS = 2048


def spread_over_sizes(layout: UnitLayout, units: list[Unit], updates: Mapping[str, Update], count: int) -> list[Unit]:
    """So many units, evenly over the ranks of the size of their update."""
    ordered = sorted(units, key=lambda one: unit_size(layout, one, updates).norm)
    places = np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int)
    return [ordered[place] for place in places]


@torch.no_grad()
def add(model: torch.nn.Module, layout: UnitLayout, one: Unit, updates: Mapping[str, Update], strength: float) -> None:
    """Add a unit's share of the update to the weights."""
    for part in layout.parts(one):
        if part.path in updates:
            share = updates[part.path].sliced(*spans_of(part))
            dense = share.matrix_MN if hasattr(share, "matrix_MN") else share.scaling * share.left_MR @ share.right_RN
            weight = model.get_submodule(part.path).weight
            assert isinstance(weight, torch.Tensor)
            weight[spans_of(part)] += strength * dense.to(weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--model", default="default")
    parser.add_argument("--heads", type=int, default=20)
    parser.add_argument("--n", type=int, default=32, help="examples a set")
    parser.add_argument("--strengths", default="0.25,1")
    options = parser.parse_args()
    began = time.perf_counter()
    model, tokenizer = ct.load(options.model, dtype="float32")
    updates = read_update(model, options.adapter).updates
    layout = UnitLayout.of(model, ct.HeadLayout.of(model), ("q_head",))
    heads = spread_over_sizes(layout, list(layout.units), updates, options.heads)
    chat = ChatFormat(tokenizer)
    sources = {"refusals": "starter-safety", "answers": "starter-utility", "replies": "starter-borderline"}
    rows: dict[str, list[Row]] = {
        name: [chat.loss_row(one) for one in ct.examples(source, limit=options.n)] for name, source in sources.items()
    }
    effects = measure_effects(
        model, layout, heads, updates, rows, n_chunks=4, batch_tokens=BATCH_TOKENS, gradient_memory=2.0
    )
    before = {name: example_losses(model, of_set, batch_tokens=BATCH_TOKENS) for name, of_set in rows.items()}
    print("| loss | strength | Spearman | Pearson | median first order | median exact | heads, examples |")
    print("|---|---|---|---|---|---|---|")
    for strength in map(float, options.strengths.split(",")):
        exact: dict[str, list[float]] = {name: [] for name in rows}
        for one in heads:
            kept = {part.path: model.get_submodule(part.path).weight.detach().clone() for part in layout.parts(one)}
            add(model, layout, one, updates, strength)
            for name, of_set in rows.items():
                losses = example_losses(model, of_set, batch_tokens=BATCH_TOKENS)
                exact[name].append(float((losses - before[name]).mean()))
            with torch.no_grad():
                for path, weight in kept.items():
                    model.get_submodule(path).weight.copy_(weight)
        for name, found in exact.items():
            first_H: Floats = np.array([strength * with_error(effect_C)[0] for effect_C in effects[name].units_HC])
            exact_H = np.array(found)
            spearman, pearson = stats.spearmanr(first_H, exact_H)[0], stats.pearsonr(first_H, exact_H)[0]
            sizes = " | ".join(f"{np.median(np.abs(values)):.5f}" for values in (first_H, exact_H))
            print(f"| {name} | {strength:g} | {spearman:.3f} | {pearson:.3f} | {sizes} | {len(heads)}, {options.n} |")
    print(f"\n{time.perf_counter() - began:.0f} s, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
