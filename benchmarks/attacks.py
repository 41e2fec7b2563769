"""Attacks on runs of several seeds: what arms lose of their refusals, with intervals over seeds and prompts.

    castune attack RUN --arm all --arm safe     # for the run of every seed
    python benchmarks/attacks.py RUN RUN ...

The arms and attacks of all runs must be the same; the first arm is the reference. *Kept* is the share of the prompts
refused before that are refused after, over all seeds. Its difference between two arms has the interval of a difference
of means over seeds and prompts, of the linearised ratio (delta method): of every prompt k + before (after - k) / mean
before.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from castune.artifacts import EvalResult
from castune.stats.comparisons import Comparison, Outcomes, compare, holm
from castune.steps.directory import RunDirectory

# Of every prompt 1 where it is refused and 0 where not; None where that is not known.
Refused = dict[str, float | None]


def refused(run: Path, folder: str, suites: tuple[str, ...]) -> Refused:
    """Outcomes of the harmful prompts of one evaluation."""
    result = EvalResult.load(run / folder)
    found: Refused = {}
    for suite in suites:
        for sample in result.samples_of(suite):
            found[f"{suite}/{sample['id']}"] = None if sample["outcome"] is None else float(sample["outcome"])
    return found


def linearised(before: list[Refused], after: list[Refused]) -> tuple[float, Outcomes]:
    """The share of refusals that is kept, over all seeds, and outcomes of prompts whose mean it is.

    Raises:
        ZeroDivisionError: nothing was refused before.
    """
    # What is unscored after is not kept (`stats.kept_refusals`).
    pairs = [
        {name: (was, now[name] or 0.0) for name, was in of_seed.items()}
        for of_seed, now in zip(before, after, strict=True)
    ]
    scored = [(was, now) for of_seed in pairs for was, now in of_seed.values() if was is not None]
    n_before = sum(was for was, _ in scored)
    kept, share = sum(was * now for was, now in scored) / n_before, n_before / len(scored)
    values = {
        seed: {
            "refused": {
                name: None if was is None else kept + was * (now - kept) / share for name, (was, now) in of_seed.items()
            }
        }
        for seed, of_seed in enumerate(pairs)
    }
    return kept, values


def rate(outcomes: list[Refused]) -> float:
    """Share of all scored prompts that is refused."""
    scored = [value for of_seed in outcomes for value in of_seed.values() if value is not None]
    return sum(scored) / len(scored)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    runs = parser.parse_args().runs
    results = [RunDirectory(run).load_attacks() for run in runs]
    found = [result for result in results if result is not None and not result.gone]
    if len(found) < len(runs):
        parser.error("every run needs attacks of the adapters that it holds")
    arms = [arm.name for arm in found[0].arms]
    attacks = list(dict.fromkeys(row.attack for row in found[0].rows))
    print("| seed | " + " | ".join(f"{arm}: strength" for arm in arms) + " | equally safe at |")
    print("|---|" + "---|" * (len(arms) + 1))
    for run, result in zip(runs, found, strict=True):
        strengths = " | ".join(f"{arm.strength:.3g}" for arm in result.arms)
        print(f"| {run.name} | {strengths} | {'-' if result.target is None else f'{result.target:.1%}'} |")
    rows: list[tuple[str, str, float, float, float, Comparison | None]] = []
    for attack in attacks:
        reference: Outcomes = {}
        for arm in arms:
            sides: tuple[list[Refused], list[Refused]] = ([], [])
            for run, result in zip(runs, found, strict=True):
                row = next(one for one in result.rows if (one.arm, one.attack) == (arm, attack))
                for side, one in zip(sides, (row.before, row.after), strict=True):
                    side.append(refused(run, one.folder, result.suites))
            kept, outcomes = linearised(*sides)
            of_arm = None if arm == arms[0] else compare(outcomes, reference)
            reference = reference or outcomes
            rows.append((attack.name, arm, rate(sides[0]), rate(sides[1]), kept, of_arm))
    adjusted = holm([one.p for *_, one in rows if one is not None])
    n_tests = len(adjusted)
    print(f"\n| attack | arm | refused before | after | kept | minus {arms[0]}, points (95 %) | p (Holm) |")
    print("|---|---|---|---|---|---|---|")
    for name, arm, was, now, kept, comparison in rows:
        cells = "reference | "
        if comparison is not None:
            tested = replace(comparison, p_adjusted=adjusted.pop(0), n_comparisons=n_tests)
            ends = (
                "no interval"
                if tested.interval is None
                else f"{100 * tested.interval.low:+.1f} to {100 * tested.interval.high:+.1f}"
            )
            value = "-" if tested.value is None else f"{100 * tested.value:+.1f}"
            cells = f"{value} ({ends}) | {'-' if tested.p_adjusted is None else f'{tested.p_adjusted:.3f}'}"
        print(f"| {name} | {arm} | {was:.1%} | {now:.1%} | {kept:.1%} | {cells} |")
    n_prompts = len(refused(runs[0], found[0].rows[0].before.folder, found[0].suites))
    print(f"\n{len(runs)} seeds, {n_prompts} prompts, judge {found[0].judge}, {n_tests} comparisons")


if __name__ == "__main__":
    main()
