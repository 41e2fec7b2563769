"""Split public data sets into the sets of one run on real data, and write its recipe.

    python benchmarks/real_data.py DATA OUT && castune run OUT/recipe.toml

DATA holds local copies with the hub's columns: `sft_safety_tuned_llamas_safety_only.jsonl` and
`sft_alpaca_en_demo.jsonl` (instruction, input, output), `mmlu_test_sample.jsonl`, `advbench_harmful_behaviors.jsonl`,
`xstest_prompts.jsonl`.
No row is in two of the sets.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RECIPE = """\
model = "default"
out = "{out}/run"
seed = 21
safety = "{out}/safety.jsonl"
utility = "mmlu={out}/utility.jsonl"
align = "{out}/align.jsonl"

[diagnose]
measure = "margin"
max_new_tokens = 16

[select]
zone = "safe"
fraction = 0.25
compare = ["risky"]

[tune]
learning_rate = 1e-3
max_steps = 50

[evaluate]
suites = [
  "mmlu={out}/mmlu-eval.jsonl",
  "advbench={data}/advbench_harmful_behaviors.jsonl",
  "xstest={data}/xstest_prompts.jsonl",
]
limit = 200
"""


def read(path: Path, seed: int) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    random.Random(seed).shuffle(rows)
    return rows


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--examples", type=int, default=100, help="of D_safe and of D_util")
    parser.add_argument("--seed", type=int, default=21)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    harmful = read(options.data / "sft_safety_tuned_llamas_safety_only.jsonl", options.seed)
    benign = read(options.data / "sft_alpaca_en_demo.jsonl", options.seed)
    mmlu = read(options.data / "mmlu_test_sample.jsonl", options.seed)
    n = options.examples
    write(options.out / "safety.jsonl", harmful[:n])
    write(options.out / "align.jsonl", [*harmful[n : n + 200], *benign[:200]])
    write(options.out / "utility.jsonl", mmlu[:n])
    write(options.out / "mmlu-eval.jsonl", mmlu[n:])
    (options.out / "recipe.toml").write_text(RECIPE.format(out=options.out, data=options.data), encoding="utf-8")


if __name__ == "__main__":
    main()
