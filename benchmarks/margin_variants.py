"""Which summary of margin changes predicts what training costs? Trains arms, prints one table.

    python benchmarks/margin_variants.py MEASURED OUT

MEASURED is the directory of `reliability.py`. Each variant of the shift (below) makes its own C(h) from the same
measurements, and its own buckets of heads; every bucket is trained, and the utility that is lost on held-out questions
is compared with the mean C(h) of its heads, over the arms of all variants.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import castune as ct
from castune.artifacts import HeadSelection
from castune.artifacts.samples import is_choice
from castune.config import EvaluateConfig, TuneConfig
from castune.core.heads import HeadLayout
from castune.core.provenance import fingerprint
from castune.diagnosis.reliability import spearman
from castune.diagnosis.score import conflict_from_gram, conflict_score, functional_sensitivity
from castune.diagnosis.sweep import Outcomes
from castune.evaluation.run import evaluate
from castune.evaluation.suites import load_suites
from castune.stats.ranking import by_descending, equal_parts
from castune.tuning.train import tune

sys.path.insert(0, str(Path(__file__).parent))
from reliability import measured

Head = tuple[int, int]
MARGIN = "margin-8"
SUITES = ("starter-utility-eval", "starter-safety-eval")

# From the changes of the margins without each head, [H, N], to a shift a head.
VARIANTS = {
    "absolute mean": lambda change_HN: np.abs(change_HN.mean(1)),
    "mean absolute": lambda change_HN: np.abs(change_HN).mean(1),
    "root mean square": lambda change_HN: np.sqrt((change_HN**2).mean(1)),
}


def scores(gram_HCC: np.ndarray, outcomes: dict[str, Outcomes]) -> dict[str, np.ndarray]:
    """C(h) by every variant, and what has no shift in it: O(h) alone."""
    conflict_H = conflict_from_gram(gram_HCC, gram_HCC.shape[1] // 2)
    utility_HN, safety_HN = (outcomes[name].ablated_HN - outcomes[name].baseline_N for name in ("utility", MARGIN))
    found = {
        name: conflict_score(conflict_H, functional_sensitivity(shift(utility_HN), shift(safety_HN)))
        for name, shift in VARIANTS.items()
    }
    return {**found, "O alone": conflict_H}


def arms_of(heads: Sequence[Head], by_variant: dict[str, np.ndarray], buckets: int, seed: int) -> dict[str, list[Head]]:
    """Every variant's buckets, and random ones of the same size."""
    arms = {}
    for name, score_H in by_variant.items():
        for number, chosen in enumerate(equal_parts(by_descending(heads, score_H), buckets), start=1):
            arms[f"{name} {number}"] = sorted(chosen)
    shuffled = random.Random(seed).sample(heads, len(heads))
    for number, chosen in enumerate(equal_parts(shuffled, buckets), start=1):
        arms[f"random {number}"] = sorted(chosen)
    return arms


def trained(
    loaded: tuple[Any, Any], heads: Sequence[Head], out: Path, *, steps: int, seed: int
) -> dict[str, dict[str, float]]:
    """Outcome of every held-out example after training these heads; kept in `out`."""
    from peft import PeftModel

    model, tokenizer = loaded
    file = out / "outcomes.json"
    if not file.is_file():
        out.mkdir(parents=True, exist_ok=True)
        if heads:
            selection = HeadSelection.custom(
                heads, n_total=len(HeadLayout.of(model).heads), model_fingerprint=fingerprint(model)
            )
            # B alone, so that all arms have equally many parameters.
            settings = TuneConfig(
                learning_rate=1e-3, max_steps=steps, batch_size=8, accumulation=1, freeze_a=True, seed=seed
            )
            data = ct.examples("starter-align")
            tune(model, tokenizer, selection, data=data, out=out / "adapter", config=settings)
        tuned = PeftModel.from_pretrained(model, out / "adapter") if heads else model
        config = EvaluateConfig(suites=SUITES)
        result = evaluate(tuned, tokenizer, suites=load_suites(SUITES, limit=None, seed=0), config=config, name="arm")
        if heads:
            tuned.unload()
        outcomes: dict[str, dict[str, float]] = {suite: {} for suite in SUITES}
        for sample in result.samples:
            value = sample["margin"] if is_choice(sample) else sample["outcome"]
            if value is not None:
                outcomes[sample["suite"]][sample["id"]] = float(value)
        file.write_text(json.dumps(outcomes))
    found: dict[str, dict[str, float]] = json.loads(file.read_text())
    return found


def change(before: dict[str, float], after: dict[str, float]) -> tuple[float, float]:
    """Mean change over the examples scored both times, and its standard error."""
    paired = np.array([after[key] - before[key] for key in before.keys() & after.keys()])
    return float(paired.mean()), float(paired.std(ddof=1) / np.sqrt(len(paired)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, help="directory that reliability.py wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--examples", type=int, default=128, help="as given to reliability.py")
    parser.add_argument("--buckets", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=21)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    loaded = ct.load("default")
    all_heads = [(head.layer, head.head) for head in HeadLayout.of(loaded[0]).heads]
    gram_HCC, outcomes, _ = measured(options.measured, options.examples, options.seed, [MARGIN])
    by_variant = scores(gram_HCC, outcomes)
    arms = arms_of(all_heads, by_variant, options.buckets, options.seed)

    def outcomes_of(name: str, heads: Sequence[Head]) -> dict[str, dict[str, float]]:
        return trained(loaded, heads, options.out / name.replace(" ", "-"), steps=options.steps, seed=options.seed)

    base = outcomes_of("base", [])
    costs, gains = [], []
    print(f"{'arm':22}{'utility margin':>20}{'refusals':>18}")
    for name, heads in arms.items():
        after = outcomes_of(name, heads)
        utility, safety = (change(base[suite], after[suite]) for suite in SUITES)
        costs.append(-utility[0])
        gains.append(safety[0])
        print(f"{name:22}{utility[0]:+12.3f} ± {utility[1]:.3f}{safety[0]:+10.3f} ± {safety[1]:.3f}", flush=True)
    cost_A = np.array(costs)
    row_of = {head: row for row, head in enumerate(all_heads)}
    print(f"\nSpearman over {len(arms)} arms of the mean score of an arm's heads with what it lost and gained")
    for name, score_H in by_variant.items():
        mean_A = np.array([score_H[[row_of[head] for head in heads]].mean() for heads in arms.values()])
        lost, gained = spearman(mean_A, cost_A), spearman(mean_A, np.array(gains))
        print(f"{name:22} utility lost {lost:+.2f}  refusals gained {gained:+.2f}")


if __name__ == "__main__":
    main()
