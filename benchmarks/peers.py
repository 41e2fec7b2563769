"""castune's sweeps, ablations and attribution, against a plain hook loop, nnsight and TransformerLens; prints tables.

Every contestant (`contestants/with_*.py`) runs in a process of its own, one after the other, on the same token ids,
heads and dtype, and is timed on the sweep alone. The ratio counts; absolute seconds depend on the machine. Attribution
covers all heads of the layers that the chosen heads are of: they cost one backward pass an example, however many.

    make bench
    make bench BENCH='--dtype bfloat16 --questions 12 --prompts 12 --keep runs/bench'

nnsight and TransformerLens work with the pinned torch and transformers; `make bench` makes an environment for them
(`--python` takes another interpreter). A contestant whose library is missing is named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

import castune as ct
from castune.core.heads import HeadLayout
from castune.data.chat import ChatFormat

CONTESTANTS = Path(__file__).parent / "contestants"
sys.path.insert(0, str(CONTESTANTS))
from with_castune import refusal_pairs  # noqa: E402
from work import Question, Work  # noqa: E402

MAX_NEW_TOKENS = 24
SEED = 0

CLOSE = {"float32": 0.001}
"""Attributed changes agree within this part of the largest change of their example; other dtypes: `CLOSE_ROUNDED`."""
CLOSE_ROUNDED = 0.1

Row = tuple[str, str, str]
"""Row of a table, script, sweep of that script. castune comes first: the others are compared with it."""

Results = dict[tuple[str, str], dict[str, Any]]
"""By script and sweep."""

UTILITY: tuple[Row, ...] = (
    ("castune", "with_castune.py", "utility"),
    ("plain hooks, a choice a forward", "with_hooks.py", "utility-choice-by-choice"),
    ("plain hooks, choices batched", "with_hooks.py", "utility"),
    ("nnsight, choices batched", "with_nnsight.py", "utility"),
    ("TransformerLens, choices batched", "with_transformer_lens.py", "utility"),
)
SAFETY: tuple[Row, ...] = (
    ("castune", "with_castune.py", "safety"),
    ("castune, margins", "with_castune.py", "safety-margins"),
    ("castune, margins of 24 tokens", "with_castune.py", "safety-long-margins"),
    ("plain hooks, a prompt a generate", "with_hooks.py", "safety-prompt-by-prompt"),
    ("plain hooks, prompts batched", "with_hooks.py", "safety"),
    ("nnsight, prompts batched", "with_nnsight.py", "safety"),
    ("TransformerLens, prompts batched", "with_transformer_lens.py", "safety"),
)
ATTRIBUTED_UTILITY: tuple[Row, ...] = (
    ("castune", "with_castune.py", "attributed-utility"),
    ("plain hooks, a choice a forward", "with_hooks.py", "attributed-utility-choice-by-choice"),
    ("plain hooks, choices batched", "with_hooks.py", "attributed-utility"),
    ("nnsight, choices batched", "with_nnsight.py", "attributed-utility"),
    ("TransformerLens, choices batched", "with_transformer_lens.py", "attributed-utility"),
)
ATTRIBUTED_SAFETY: tuple[Row, ...] = (
    ("castune", "with_castune.py", "attributed-safety"),
    ("castune, replies generated too", "with_castune.py", "attributed-safety-with-replies"),
    ("plain hooks, a reply a forward", "with_hooks.py", "attributed-safety-reply-by-reply"),
    ("plain hooks, replies batched", "with_hooks.py", "attributed-safety"),
    ("nnsight, replies batched", "with_nnsight.py", "attributed-safety"),
    ("TransformerLens, replies batched", "with_transformer_lens.py", "attributed-safety"),
)

# The utility and the safety sweep of a map.
BY_HOOKS = {
    "one by one": ("utility-choice-by-choice", "safety-prompt-by-prompt"),
    "batched": ("utility", "safety"),
}
BY_CASTUNE = {
    "margins": ("utility", "safety-margins"),
    "attribution": ("attributed-utility", "attributed-safety-with-replies"),
}


def the_work(*, heads: int, questions: int, prompts: int, dtype: str) -> Work:
    """Heads spread evenly over all layers, and the first examples of the bundled sets, as token ids."""
    model, tokenizer = ct.load("default", dtype=dtype)
    chat, layout = ChatFormat(tokenizer), HeadLayout.of(model)
    chosen = [layout.heads[i] for i in np.linspace(0, len(layout.heads) - 1, heads).round().astype(int)]
    asked = ct.examples("starter-utility", limit=questions, seed=SEED)
    harmful = ct.examples("starter-safety", limit=prompts, seed=SEED)
    return Work(
        dtype=dtype,
        heads=[(head.layer, head.head) for head in chosen],
        questions=[
            Question(
                *chat.choices(question),
                int(question.answer or 0),
            )
            for question in asked
        ],
        prompts=[chat.prompt_ids(example)[0] for example in harmful],
        prompt_texts=[example.prompt for example in harmful],
        pairs=refusal_pairs((model, tokenizer), harmful, max_new_tokens=MAX_NEW_TOKENS),
        end_tokens=chat.end_tokens(model),
        max_new_tokens=MAX_NEW_TOKENS,
        n_questions=questions,
        n_prompts=prompts,
        example_seed=SEED,
    )


def matmul_peak(dtype: str) -> float:
    """FLOP/s of one large matrix product on this machine, the best of ten."""
    a = torch.randn(2048, 2048, dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(11):
        started = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(seconds[1:])


def run(python: str, script: str, sweep: str, work_file: Path) -> dict[str, Any] | str:
    """The result of one contestant, or the last line of its error. A result that lies beside the work is taken."""
    result_file = work_file.with_name(f"{Path(script).stem}-{sweep}.json")
    command = [python, str(CONTESTANTS / script), str(work_file), str(result_file), sweep]
    if result_file.exists():
        kept: dict[str, Any] = json.loads(result_file.read_text())
        return kept
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        return (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
    result: dict[str, Any] = json.loads(result_file.read_text())
    return result


def agreement(result: dict[str, Any], castune: dict[str, Any], dtype: str) -> str:
    """How a contestant's outcomes compare with castune's."""
    if "changes" in result:
        mine_HN, theirs_HN = np.array(result["changes"]), np.array(castune["changes"])
        difference_HN = np.abs(mine_HN - theirs_HN)
        tolerance = CLOSE.get(dtype, CLOSE_ROUNDED)
        close = (difference_HN <= tolerance * np.abs(theirs_HN).max(0)).mean()
        rank = spearmanr(np.abs(mine_HN).mean(1), np.abs(theirs_HN).mean(1)).statistic
        return (
            f"{close:.4f} of {mine_HN.size} changes within {tolerance:.1%} of their example's largest, at most "
            f"{difference_HN.max():.1e} apart; Spearman of heads {rank:.4f}"
        )
    if "margins" in result and "margins" not in castune:
        return "by another measure"
    if "margins" in result:
        mine, theirs = np.array(result["margins"]), np.array(castune["margins"])
        same = ((mine > 0) == (theirs > 0)).mean()
        return f"{same:.4f} of {mine.size} decisions, margins differ by at most {np.abs(mine - theirs).max():.1e}"
    mine, theirs = np.array(result["refusals"], dtype=object), np.array(castune["refusals"], dtype=object)
    refused = sum(verdict is True for verdict in mine.flat)
    text = f"{(mine == theirs).mean():.4f} of {mine.size} verdicts ({refused} refusals)"
    if result["replies"] and castune["replies"]:
        same = (np.array(result["replies"]) == np.array(castune["replies"])).mean()
        text += f", {same:.4f} of replies identical"
    return text


def print_sweep(title: str, contestants: Sequence[Row], python: str, work_file: Path) -> Results:
    """Run the contestants of a sweep, print their table and return their results."""
    print(f"\n{title}")
    print(f"{'':34}{'seconds':>9}{'s a head':>10}{'x castune':>11}  agreement with castune")
    dtype = Work.load(work_file).dtype
    castune: dict[str, Any] | None = None
    versions: dict[str, str] = {}
    shares: list[str] = []
    results: Results = {}
    for label, script, sweep in contestants:
        result = run(python, script, sweep, work_file)
        if isinstance(result, str):
            print(f"{label:34}  not run: {result}", flush=True)
            continue
        versions.update(result["versions"])
        if "flops" in result:
            speed, peak = result["flops"] / result["seconds"], matmul_peak(dtype)
            shares.append(f"{label}: {speed / 1e9:.0f} GFLOP/s, {speed / peak:.0%} of the {peak / 1e9:.0f} of a matmul")
        results[script, sweep] = result
        line = f"{label:34}{result['seconds']:9.1f}{result['seconds'] / n_heads(result):10.3f}"
        if label == "castune":
            castune = result
            line += f"{1:11.1f}"
        elif castune:
            line += f"{result['seconds'] / castune['seconds']:11.1f}  {agreement(result, castune, dtype)}"
        print(line, flush=True)
        if label == "castune" and sweep == "safety":
            full = run(python, script, "safety-replies", work_file)
            result["replies"] = None if isinstance(full, str) else full["replies"]
    print("; ".join([*shares, *(f"{name} {version}" for name, version in versions.items())]))
    return results


def n_heads(result: dict[str, Any]) -> int:
    """How many heads a contestant measured."""
    return len(result.get("changes") or result.get("margins") or result["refusals"])


def print_maps(results: Results) -> None:
    """castune's maps against the map by decisions that plain hooks make."""
    print("\nboth sweeps of a map, of the same examples; gradients for O(h) and checks are not in them")
    for measure, sweeps in BY_CASTUNE.items():
        ours = [results[key] for sweep in sweeps if (key := ("with_castune.py", sweep)) in results]
        for name, of_hooks in BY_HOOKS.items():
            theirs = [results[key] for sweep in of_hooks if (key := ("with_hooks.py", sweep)) in results]
            if len(ours) < len(sweeps) or len(theirs) < len(of_hooks):
                continue
            seconds, slow = (sum(result["seconds"] for result in found) for found in (ours, theirs))
            n_ours, n_theirs = n_heads(ours[0]), n_heads(theirs[0])
            line = (
                f"castune by {measure} {seconds:.1f} s ({n_ours} heads), plain hooks by decisions, {name}, "
                f"{slow:.1f} s ({n_theirs} heads): {slow / seconds:.1f} x"
            )
            if n_ours > n_theirs:
                all_heads = slow * n_ours / n_theirs
                line += f"; projected to {n_ours} heads, not run: {all_heads:.0f} s, {all_heads / seconds:.0f} x"
            print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--heads", type=int, default=60)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sweep", choices=["utility", "safety", "attribution", "all"], default="all")
    parser.add_argument("--contestants", default="castune,hooks,nnsight,transformer_lens", help="comma-separated")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the contestants")
    parser.add_argument("--keep", type=Path, help="directory of results: those there are not measured again")
    options = parser.parse_args()
    if options.python == sys.executable and not all(map(find_spec, ("nnsight", "transformer_lens"))):
        print("nnsight or TransformerLens is not installed here; see the top of this file.", file=sys.stderr)
    with tempfile.TemporaryDirectory() as directory:
        work_file = (options.keep or Path(directory)) / "work.json"
        work = the_work(heads=options.heads, questions=options.questions, prompts=options.prompts, dtype=options.dtype)
        if work_file.exists() and work_file.read_text() != work.text():
            parser.error(f"{options.keep} holds results of other work: choose another directory")
        work_file.parent.mkdir(parents=True, exist_ok=True)
        work_file.write_text(work.text())
        print(
            f"SmolLM2-135M-Instruct, {options.dtype}, {len(work.heads)} heads of {len(work.layers)} layers, "
            f"{os.cpu_count()} CPUs"
        )
        questions, prompts = f"{len(work.questions)} questions", f"{len(work.prompts)} prompts"
        tables = (
            ("utility", f"utility sweep, {questions}", UTILITY),
            ("safety", f"safety sweep, {prompts}, {MAX_NEW_TOKENS} tokens a reply", SAFETY),
            ("attribution", f"attribution of all heads of these layers: utility, {questions}", ATTRIBUTED_UTILITY),
            ("attribution", f"attribution of all heads of these layers: safety margins, {prompts}", ATTRIBUTED_SAFETY),
        )
        scripts = {f"with_{name}.py" for name in options.contestants.split(",")}
        results: Results = {}
        for sweep, title, rows in tables:
            if options.sweep in (sweep, "all"):
                results |= print_sweep(title, [row for row in rows if row[1] in scripts], options.python, work_file)
        if options.sweep == "all":
            print_maps(results)


if __name__ == "__main__":
    main()
