"""Studies of two arms whose cost ratio is known: how often it is seen, refuted or left open, and intervals hold it.

    python benchmarks/planted_truth.py [--tries 500] [--seeds 8] [--seed-spread 0.15]

Nothing is trained: outcomes are drawn from populations (`tests/planted_costs.py`), and the statistics of a study are
asked about them. At a true ratio of 1 whatever is seen is false; more than 5 % of it ends the command with status 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from planted_costs import risky_and_safe, tried

RATIOS = (1.0, 1.5, 2.1)
MOST_FALSE = 0.05
COLUMNS = {
    "true ratio": lambda ratio, _: f"{ratio:.1f}",
    "seen > 1": lambda _, found: f"{found.seen:.1%}",
    "refuted 1.5": lambda _, found: f"{found.refuted:.1%}",
    "undecided": lambda _, found: f"{found.undecided:.1%}",
    "no interval": lambda _, found: f"{found.undefined:.1%}",
    "intervals that hold it": lambda _, found: f"{found.held:.1%}",
    "median width": lambda _, found: f"{found.width:.2f}",
    "mean ratio": lambda _, found: f"{found.ratio:.2f}",
    "difference seen": lambda _, found: f"{found.difference_seen:.1%}",
    "power foretold": lambda _, found: f"{found.power:.1%}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=8, help="trainings of each arm")
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--items", type=int, default=50, help="of the cost suite")
    parser.add_argument("--strengths", default="0.35,0.65,1")
    parser.add_argument("--seed-spread", type=float, default=0.15, help="sd of a training's cost, relative to the cost")
    parser.add_argument("--unlike", action="store_true", help="the risky arm is also safer, at less strength")
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be 2 or more: power is about other trainings")
    strengths = [0.0, *map(float, options.strengths.split(","))]
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    started, false = time.process_time(), 0.0
    for place, ratio in enumerate(RATIOS):
        found = tried(
            risky_and_safe(ratio, unlike=options.unlike),
            tries=options.tries,
            n_seeds=options.seeds,
            n=options.prompts,
            m=options.items,
            strengths=strengths,
            seed_spread=options.seed_spread,
            draws=options.draws,
            seed=options.seed + place,
        )
        print("| " + " | ".join(cell(ratio, found) for cell in COLUMNS.values()) + " |", flush=True)
        false = found.seen if ratio == 1 else false
    print(f"{options.tries} studies a ratio, {time.process_time() - started:.0f} s of processor time")
    if false > MOST_FALSE:
        sys.exit(f"{false:.1%} false sightings at a ratio of 1, accepted: at most {MOST_FALSE:.0%}")


if __name__ == "__main__":
    main()
