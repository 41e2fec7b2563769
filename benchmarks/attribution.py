"""The map by attribution beside the exact map by margins: how far they agree, and what each costs.

    python benchmarks/attribution.py [--model default] [--n 64] [--dtype float32] [--layers 4,12,20] [--out DIR]

Both maps are of the same examples, in one process, one after the other. `--skip-exact` makes the attribution alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau, spearmanr

import castune as ct
from castune.config.diagnosis import Measure
from castune.diagnosis.zones import zone_stability
from castune.stats.ranking import bucket_numbers

COLUMNS = ("utility_shift", "safety_shift", "functional_sensitivity", "conflict_score")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--n", type=int, default=64, help="examples a side")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", default="", help="these layers only")
    parser.add_argument("--utility", default="starter-utility")
    parser.add_argument("--safety", default="starter-safety")
    parser.add_argument("--skip-exact", action="store_true")
    parser.add_argument("--out", type=Path, help="keep the maps in this directory")
    options = parser.parse_args()
    model, tokenizer = ct.load(options.model, dtype=options.dtype)
    safety, utility = (ct.examples(name, limit=options.n) for name in (options.safety, options.utility))
    layers = tuple(map(int, options.layers.split(","))) if options.layers else None
    measures: tuple[Measure, ...] = ("attribution",) if options.skip_exact else ("attribution", "margin")
    maps, seconds = {}, {}
    for measure in measures:
        config = ct.DiagnoseConfig(measure=measure, layers=layers)
        began = time.perf_counter()
        maps[measure] = ct.diagnose(model, tokenizer, safety=safety, utility=utility, config=config)
        seconds[measure] = time.perf_counter() - began
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            maps[measure].save(options.out / f"{measure}-{options.n}-{options.dtype}.parquet")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        halves = maps[measure].metadata["reliability"]["split_half"]
        print(
            f"{measure}: {len(maps[measure])} heads, {len(utility)} + {len(safety)} examples, {options.dtype}: "
            f"{seconds[measure]:.1f} s, {peak:.2f} GB at its peak; reliability of C "
            f"{halves['columns']['conflict_score']['full']:.2f}, safe zones of halves {halves['zones']['safe']:.2f}"
        )
    print(json.dumps(maps["attribution"].metadata["fidelity"]["columns"]["conflict_score"]))
    if options.skip_exact:
        return
    one, other = maps["attribution"], maps["margin"]
    print("\n| | Spearman | Kendall tau | slope |\n|---|---|---|---|")
    for name in COLUMNS:
        x, y = one.column(name), other.column(name)
        print(f"| {name} | {spearmanr(x, y)[0]:.3f} | {kendalltau(x, y)[0]:.3f} | {x @ y / (x @ x):.2f} |")
    x, y = one.column("conflict_score"), other.column("conflict_score")
    zones = zone_stability(x[None], y[None])
    print(f"\nsafe zone in common {zones.safe:.2f}, risky {zones.risky:.2f} ({zones.safe_by_chance:.2f} by chance)")
    ours, exact = bucket_numbers(x, 4), bucket_numbers(y, 4)
    for name, bucket in (("lowest", 4), ("highest", 1)):
        missed = int(((exact == bucket) & (ours != bucket)).sum())
        print(f"heads of the {name} quarter of C that are missed: {missed} of {int((exact == bucket).sum())}")
    depth = np.array([layer for layer, _ in one.heads])
    by_layer = {
        layer: spearmanr(one.column("safety_shift")[depth == layer], other.column("safety_shift")[depth == layer])[0]
        for layer in sorted(set(depth.tolist()))
    }
    print("Spearman of H_safe within a layer: " + ", ".join(f"{layer}: {rho:.2f}" for layer, rho in by_layer.items()))
    print(f"time: {seconds['margin'] / seconds['attribution']:.1f} times less")


if __name__ == "__main__":
    main()
