"""Steps of similar lengths against shuffled ones: what is in a step, how much is padding, and what a training comes to.

    python benchmarks/length_grouping.py [--data SOURCE] [--train] [--steps 40]

On the starter training data, or a source whose column `kind` says `harmful` of some rows, with the default model's
tokenizer; `--train` also trains a quarter of the heads in each order and prints seconds and losses.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import castune as ct
from castune.core.loading import load_config
from castune.data.chat import ChatFormat
from castune.tuning.trainer import ByLength

SIZE = 8
SEEDS = range(20)


def steps_of(lengths: list[int], seed: int, *, grouped: bool) -> list[list[int]]:
    if grouped:
        order = list(ByLength(SIZE, lengths, seed))
    else:
        order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    return [order[i : i + SIZE] for i in range(0, len(order) // SIZE * SIZE, SIZE)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="starter-align")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--train", action="store_true")
    options = parser.parse_args()
    _, tokenizer = load_config("default")
    data = ct.examples(options.data)
    chat = ChatFormat(tokenizer)
    lengths = [len(chat.loss_row(example).ids) for example in data]
    harmful = np.array([example.group == "harmful" or example.id.startswith("align-harmful") for example in data])
    print(f"{len(data)} rows, {harmful.mean():.0%} harmful; {len(SEEDS)} orders of steps of {SIZE}")
    print("| order | one-sided steps | variance of harmful rows a step | tokens with padding |")
    print("|---|---|---|---|")
    for name, grouped in (("by length", True), ("shuffled", False)):
        counts, padded = [], 0
        for seed in SEEDS:
            for step in steps_of(lengths, seed, grouped=grouped):
                counts.append(int(harmful[step].sum()))
                # Two micro-batches of four, each padded to its longest.
                padded += sum(4 * max(lengths[i] for i in step[k : k + 4]) for k in (0, 4))
        of = np.array(counts)
        one_sided = np.mean((of <= 1) | (of >= SIZE - 1))
        real = len(SEEDS) * sum(lengths)
        print(f"| {name} | {one_sided:.1%} | {of.var():.2f} | {padded / real:.2f} x |")
    if not options.train:
        return
    model, tokenizer = ct.load("default")
    cmap_like = ct.HeadLayout.of(model).heads[::4]
    from castune.artifacts import HeadSelection
    from castune.core.provenance import fingerprint

    selection = HeadSelection.custom(
        [(head.layer, head.head) for head in cmap_like], n_total=270, model_fingerprint=fingerprint(model)
    )
    import tempfile
    from pathlib import Path

    print("| order | seconds | tokens/s | mean loss of the last 10 steps |")
    print("|---|---|---|---|")
    for name, grouped in (("by length", True), ("shuffled", False)):
        config = ct.TuneConfig(max_steps=options.steps, learning_rate=1e-3, group_by_length=grouped)
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            result = ct.tune(model, tokenizer, selection, data=data, out=Path(folder) / "a", config=config)
            seconds = time.perf_counter() - started
        last = np.mean([loss for _, loss in result.losses[-10:]])
        print(f"| {name} | {seconds:.0f} | {result.tokens / result.seconds:.0f} | {last:.3f} |")


if __name__ == "__main__":
    main()
