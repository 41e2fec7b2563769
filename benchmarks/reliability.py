"""Reliability of the map by decisions and by margins at several numbers of examples; prints one table.

    python benchmarks/reliability.py OUT --examples 128

Everything is measured once, at the largest number; smaller numbers are random subsets of it. OUT keeps a journal, so
the same command continues. Seconds are processor time of all threads: with OMP_NUM_THREADS=1 other work on the machine
hardly moves them.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import castune as ct
from castune.core.ablation import can_resume
from castune.core.heads import HeadLayout
from castune.core.journal import Journal
from castune.core.modes import evaluation_mode
from castune.core.shards import Shard
from castune.core.units import UnitLayout
from castune.data.chat import ChatFormat
from castune.diagnosis.ablator import Ablator
from castune.diagnosis.gradients import gram_matrices, partial_gradients
from castune.diagnosis.measurements import Domain, Measurements
from castune.diagnosis.objectives import Objectives
from castune.diagnosis.reliability import split_half
from castune.diagnosis.sweep import Outcomes, sweep

# Examples of a gradient chunk: a subset takes whole chunks, so that gradients and outcomes are of the same examples.
CHUNK = 2
COLUMNS = {"O": "optimization_conflict", "H_gen": "utility_shift", "H_safe": "safety_shift", "C": "conflict_score"}


@contextmanager
def noted(seconds: dict[str, float], name: str, file: Path) -> Any:
    """Add the seconds of a block to those of earlier calls."""
    started = time.process_time()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.process_time() - started
        file.write_text(json.dumps(seconds))


def measured(
    out: Path, n: int, seed: int, safety_measures: Sequence[str]
) -> tuple[np.ndarray, dict[str, Outcomes], dict[str, float]]:
    """Gram matrices of the gradient chunks, outcomes of every sweep, and what each took.

    Args:
        out: directory of what is kept.
        n: examples of each set.
        seed: of their choice.
        safety_measures: `decision`, `margin-N` for margins over N tokens.
    """
    model, tokenizer = ct.load("default")
    chat, layout = ChatFormat(tokenizer), HeadLayout.of(model)
    safety = ct.examples("starter-safety", limit=n, seed=seed)
    utility = ct.examples("starter-utility", limit=n, seed=seed)
    config = ct.DiagnoseConfig(measure="margin", max_new_tokens=24, batch_tokens=2048)
    journal = Journal.of(out, [n, seed, ct.__version__])
    out.mkdir(parents=True, exist_ok=True)
    seconds_file, gram_file = out / "seconds.json", out / "gram.npy"
    seconds = json.loads(seconds_file.read_text()) if seconds_file.is_file() else {}
    units = UnitLayout(layout)
    with evaluation_mode(model):
        if not gram_file.is_file():
            with noted(seconds, "gradients", seconds_file):
                chunks = [
                    chunk
                    for examples in (safety, utility)
                    for chunk in partial_gradients(
                        model,
                        [layout.at(layer).query_path for layer in layout.layers_with_heads],
                        [chat.loss_row(example) for example in examples],
                        n_chunks=n // CHUNK,
                        batch_tokens=2048,
                    )
                ]
            np.save(gram_file, gram_matrices(units, units.units, chunks))
        objectives = Objectives(Ablator(model, units, units.units, can_resume(model, layout)), tokenizer, chat, config)
        replies = objectives.replies(safety)

        def measure(name: str) -> Any:
            if name == "utility":
                return objectives.utility_measure(utility)
            if name == "decision":
                return objectives.refusal_measure(safety, replies)
            short = config.model_copy(update={"margin_tokens": int(name.removeprefix("margin-"))})
            return replace(objectives, config=short).margin_measure(safety, replies)

        outcomes = {}
        for name in ("utility", *safety_measures):
            with noted(seconds, name, seconds_file):
                found = sweep(name, objectives.ablator, measure(name), journal=journal, shard=Shard())
            assert found is not None
            outcomes[name] = found
    return np.load(gram_file), outcomes, seconds


def subset(
    gram_HCC: np.ndarray, outcomes: dict[str, Outcomes], name: str, safety: np.ndarray, utility: np.ndarray
) -> Measurements:
    """The measurements of some chunks of both sets."""
    n_chunks = gram_HCC.shape[1] // 2
    kept = np.concatenate([safety, n_chunks + utility])

    def of(found: Outcomes, chunks: np.ndarray, *, sign: bool) -> Outcomes:
        examples = (chunks[:, None] * CHUNK + np.arange(CHUNK)).ravel()
        baseline_N, ablated_HN = found.baseline_N[examples], found.ablated_HN[:, examples]
        # A question is answered right exactly where its margin is positive.
        return (
            Outcomes((baseline_N > 0).astype(np.float64), (ablated_HN > 0).astype(np.float64))
            if sign
            else Outcomes(baseline_N, ablated_HN)
        )

    by_decision = name == "decision"
    of_utility = of(outcomes["utility"], utility, sign=by_decision)
    return Measurements(
        domains=[Domain(gram_HCC[:, kept][:, :, kept], of_utility)],
        n_safety=len(safety),
        safety=of(outcomes[name], safety, sign=False),
        measure="decision" if by_decision else "margin",
        sensitivity_rank="difference",
        combination="mean",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--draws", type=int, default=8, help="random subsets of each number")
    parser.add_argument("--measures", default="margin-8,decision", help="decision, margin-8, margin-24, ...")
    parser.add_argument("--seed", type=int, default=21)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    measures = options.measures.split(",")
    gram_HCC, outcomes, seconds = measured(options.out, options.examples, options.seed, measures)
    print(json.dumps({name: round(value) for name, value in seconds.items()}))
    print("reliability of the whole map (Spearman-Brown from split halves); overlap of the halves' safe zones")
    print(f"{'measure':10}{'n':>5}" + "".join(f"{sign:>8}" for sign in COLUMNS) + f"{'safe zone':>11}{'seconds':>9}")
    for measure in measures:
        parts = ("gradients", "utility", measure)
        n = 16
        while n <= options.examples:
            rng = np.random.default_rng(options.seed)
            found = []
            for draw in range(options.draws if n < options.examples else 1):
                halves = (rng.permutation(options.examples // CHUNK)[: n // CHUNK] for _ in range(2))
                found.append(split_half(subset(gram_HCC, outcomes, measure, *halves), n_splits=20, seed=draw))
            columns = {
                sign: [full for f in found if (full := f.columns[name].full) is not None]
                for sign, name in COLUMNS.items()
            }
            shown = [f"{np.mean(values):8.2f}" if values else f"{'-':>8}" for values in columns.values()]
            safe = np.mean([share for f in found if (share := f.zones.safe) is not None])
            took = sum(seconds[part] for part in parts) * n / options.examples
            print(f"{measure:10}{n:5}" + "".join(shown) + f"{safe:11.2f}{took:9.0f}", flush=True)
            n *= 2


if __name__ == "__main__":
    main()
