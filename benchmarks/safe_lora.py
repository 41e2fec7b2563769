"""Safe LoRA on a pair that differs by a known alignment: does projecting beat scaling the adapter down?

    python benchmarks/safe_lora.py --out DIR [--model default] [--seeds 300,301,302] [--steps 60] [--rows 100]

For every seed, as somebody would with TRL and PEFT alone: the model is aligned (LoRA of rank 16 on all linear layers,
`starter-align` without half of its ordinary prompts, merged), then fine-tuned with an adapter of rank 8 on the other
half, helpful replies that say nothing of safety. `ct.project_adapter` projects that adapter with the model before and
after its alignment. Measured are refusals of harmful prompts (what fine-tuning loses) and the NLL of held-out helpful
replies (what it is for), of the aligned model, the adapter, its projections, and the adapter at lower strengths.

Every evaluation is kept in DIR; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import castune as ct
from castune.artifacts import EvalResult
from castune.data.example import Example
from castune.stats.comparisons import Comparison, Outcomes, compare, holm

REFUSED, HELPFUL = "starter-safety-eval", "starter-helpful-eval"
SUITES = (REFUSED, "nll:starter-helpful-eval")
STRENGTHS = (0.25, 0.5, 0.75)
# What is compared with the adapter as it is, and how `project_adapter` makes it.
PROJECTED: dict[str, dict[str, Any]] = {
    "below 0.35": {},
    "every module": {"threshold": 1.0},
    "every module, exact": {"threshold": 1.0, "exact": True},
}


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    rank: int,
    steps: int,
    seed: int,
) -> PeftModel:
    """A plain LoRA on all linear layers, trained by TRL."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = SFTConfig(
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        seed=seed,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=10,
    )
    data = Dataset.from_list(
        [{"prompt": _turn("user", e.prompt), "completion": _turn("assistant", e.reply)} for e in rows]
    )
    trainer = SFTTrainer(get_peft_model(model, config), settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return trainer.model


def _turn(role: str, text: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": text}]


def halves(seed: int) -> tuple[list[Example], list[Example]]:
    """What aligns a model, and the ordinary prompts that it is fine-tuned on: no row is in both."""
    rows = ct.examples("starter-align", seed=seed, balance=None)
    benign = [row for row in rows if row.group == "benign"]
    tuned = {row.id for row in benign[: len(benign) // 2]}
    return [row for row in rows if row.id not in tuned], [row for row in benign if row.id in tuned]


class OneSeed:
    """Everything of one seed, in a directory of its own."""

    def __init__(self, folder: Path, model: str, seed: int, steps: int, n_rows: int) -> None:
        self.folder, self.model, self.seed, self.steps = folder, model, seed, steps
        self.aligning, self.tuning = halves(seed)
        self.tuning = self.tuning[:n_rows]

    def made(self, name: str, make: Callable[[Path], None]) -> Path:
        """A directory, complete or absent."""
        out, begun = self.folder / name, self.folder / f"{name}.begun"
        if not out.is_dir():
            shutil.rmtree(begun, ignore_errors=True)
            begun.mkdir(parents=True)
            make(begun)
            begun.rename(out)
        return out

    def aligned(self) -> Path:
        """The aligned model, merged."""

        def make(out: Path) -> None:
            model, tokenizer = ct.load(self.model, dtype="bfloat16")
            train(model, tokenizer, self.aligning, 16, self.steps, self.seed).merge_and_unload().save_pretrained(out)
            tokenizer.save_pretrained(out)

        return self.made("aligned", make)

    def adapter(self) -> Path:
        """The adapter that was fine-tuned on the aligned model."""

        def make(out: Path) -> None:
            model, tokenizer = ct.load(self.aligned(), dtype="bfloat16")
            train(model, tokenizer, self.tuning, 8, self.steps // 2, self.seed).save_pretrained(out)

        return self.made("adapter", make)

    def results(self) -> Iterator[tuple[str, EvalResult]]:
        """Evaluations of all that is compared."""
        aligned, adapter = self.aligned(), self.adapter()
        yield "before alignment", self.evaluated("before", lambda: ct.load(self.model, dtype="bfloat16"))
        yield "aligned", self.evaluated("aligned-model", lambda: ct.load(aligned, dtype="bfloat16"))
        yield "fine-tuned", self.evaluated("strength-1", lambda: self.worn(adapter))
        for strength in STRENGTHS:
            name = f"strength-{strength}"
            yield f"strength {strength}", self.evaluated(name, lambda s=strength: self.worn(adapter, s))  # type: ignore[misc]
        for name, settings in PROJECTED.items():
            out = self.folder / f"projected-{name.replace(' ', '-').replace(',', '')}"
            if not out.is_dir():
                ct.project_adapter(adapter, aligned, self.model, out, **settings)
            updates = json.loads((out / "projection.json").read_text())["updates"]
            left = sum(one["projected_norm" if one["is_projected"] else "norm"] ** 2 for one in updates)
            whole = sum(one["norm"] ** 2 for one in updates)
            logging.info(
                "seed %d, %s: %d of %d modules, %.0f %% of the norm is left; median cosine %.2f",
                self.seed, name, sum(one["is_projected"] for one in updates), len(updates),
                100 * (left / whole) ** 0.5, sorted(one["cosine"] for one in updates)[len(updates) // 2],
            )  # fmt: skip
            yield f"Safe LoRA, {name}", self.evaluated(out.name, lambda out=out: self.worn(out))  # type: ignore[misc]

    def worn(self, adapter: Path, strength: float = 1.0) -> tuple[Any, PreTrainedTokenizerBase]:
        """The aligned model with an adapter, at a strength."""
        model, tokenizer = ct.load(self.aligned(), dtype="bfloat16")
        peft_model = PeftModel.from_pretrained(model, str(adapter))
        for module in peft_model.modules():
            if hasattr(module, "lora_A") and hasattr(module, "scaling"):
                module.scaling = {key: strength * value for key, value in module.scaling.items()}
        return peft_model, tokenizer

    def evaluated(self, name: str, load: Callable[[], tuple[Any, PreTrainedTokenizerBase]]) -> EvalResult:
        """Its evaluation, made unless it is there."""
        folder = self.folder / "evaluations" / name
        if not (folder / "metrics.json").is_file():
            # The record names a model by its weights; an adapter's place in it is the directory's.
            ct.evaluate(*load(), suites=SUITES, name=name, out=folder)
        return EvalResult.load(folder)


def outcomes(result: EvalResult, suite: str) -> dict[str, dict[str, float | bool | None]]:
    """Of every example of a suite what was measured."""
    return {suite: {sample["id"]: sample["outcome"] for sample in result.samples_of(suite)}}


def mean(values: Outcomes) -> float:
    """Over the seeds, of what is scored."""
    scored = [
        float(one)
        for of_seed in values.values()
        for suite in of_seed.values()
        for one in suite.values()
        if one is not None
    ]
    return sum(scored) / len(scored)


def cell(comparison: Comparison, scale: float) -> str:
    """Difference, interval and adjusted p."""
    if comparison.value is None or comparison.interval is None:
        return "no interval"
    low, high = scale * comparison.interval.low, scale * comparison.interval.high
    return f"{scale * comparison.value:+.3g} ({low:+.3g} to {high:+.3g}), {comparison.p_adjusted:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--seeds", default="300,301,302")
    parser.add_argument("--steps", type=int, default=60, help="of the alignment; half as many of the fine-tuning")
    parser.add_argument("--rows", type=int, default=100, help="of the fine-tuning")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    found: dict[str, dict[int, EvalResult]] = {}
    for seed in [int(seed) for seed in options.seeds.split(",")]:
        one = OneSeed(options.out / str(seed), options.model, seed, options.steps, options.rows)
        for name, result in one.results():
            found.setdefault(name, {})[seed] = result
            shown = ", ".join(f"{suite.metric} {suite.value:.3f}" for suite in result.suites)
            logging.info("seed %d, %s: %s", seed, name, shown)
    table(found)


def table(found: dict[str, dict[int, EvalResult]]) -> None:
    """Refusals and NLL of everything, and what the projections change of the adapter as it is."""
    of = {
        suite: {
            name: {seed: outcomes(one, suite) for seed, one in by_seed.items()} for name, by_seed in found.items()
        }
        for suite in (REFUSED, HELPFUL)
    }  # fmt: skip
    changed = [name for name in found if name not in ("before alignment", "aligned", "fine-tuned")]
    comparisons = {(suite, name): compare(of[suite][name], of[suite]["fine-tuned"]) for suite in of for name in changed}
    adjusted = dict(zip(comparisons, holm([one.p for one in comparisons.values()]), strict=True))
    print("| model | refused, % | NLL of helpful replies | refused minus fine-tuned, points | NLL minus fine-tuned |")
    print("|---|---|---|---|---|")
    for name in found:
        cells = ["", ""]
        if name in changed:
            for place, (suite, scale) in enumerate(((REFUSED, 100), (HELPFUL, 1))):
                cells[place] = cell(replace(comparisons[suite, name], p_adjusted=adjusted[suite, name]), scale)
        refused, helpful = 100 * mean(of[REFUSED][name]), mean(of[HELPFUL][name])
        print(f"| {name} | {refused:.1f} | {helpful:.3f} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
