"""Which heads are cheapest to train? Ways to choose a quarter of them, trained alike and compared at equal safety.

    python benchmarks/head_selectors.py --out DIR [--model default] [--seeds 101,102] [--only safe,price] [--steps 120]

An exploration: what looks best here is chosen by these very numbers, and needs fresh seeds (`castune study`) before it
is believed. Everything lies in one run directory; the same command goes on where it was stopped.

Of every head, with g_s the gradient of the refusals' NLL on its rows and g_c that of a set where something may be lost:

    safe, risky, gradient, sensitivity   lowest C, highest C, lowest O, lowest S
    magnitude         lowest O |g_s| |g_c|
    price             lowest -g_s·g_c / |g_s|^2, g_c of right answers: first-order cost per unit of safety
    price-borderline  the same, g_c of answers to harmless prompts that only sound harmful
    curvature         lowest mean (g_s·g_n)^2 / |g_s|^4 over parts n of the model's own replies to harmless prompts:
                      to second order the KL that a step along g_s costs, per squared unit of safety
    leverage          highest |g_s|
    update            highest (g_s·D)^2 / mean (g_n·D)^2 with D the head's own update in a short training of all heads
    random, all       the same number of heads drawn with the seed; every head

Append +nullspace-95, +pcgrad and the like, as in the names of arms: the same heads, trained otherwise.
"""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import castune as ct
from castune.artifacts import ConflictMap, HeadSelection, Unit
from castune.config import Recipe
from castune.core.generation import generate_replies
from castune.core.loading import LoadedModel, load_model
from castune.core.provenance import fingerprint
from castune.core.units import UnitLayout
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.diagnosis.domains import utility_sets
from castune.diagnosis.gradients import partial_gradients
from castune.diagnosis.stored import stored_measurements
from castune.evaluation.suites import load_suites
from castune.names import ArmName
from castune.purposes import PURPOSES
from castune.report.equal_safety import sentences
from castune.selection import SCORE_COLUMNS
from castune.steps.directory import BASE, RunDirectory
from castune.steps.equal_safety import safety_costs
from castune.steps.evaluate import evaluate_step, judge_step
from castune.steps.inputs import load_calibration, load_training
from castune.steps.tune import tune_step
from castune.tuning.adapter_files import lora_pairs

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
SUITES = (
    "starter-safety-eval",
    "kl:starter-helpful-eval#60",
    "nll:starter-solutions-eval#40",
    "margin:starter-overrefusal-eval#40",
)
N_PARTS = 16
SCOUT_STEPS = 40


def own_replies(loaded: LoadedModel, prompts: Sequence[Example], *, max_new_tokens: int = 32) -> list[Example]:
    """What the model itself replies to prompts."""
    model, tokenizer = loaded
    chat = ChatFormat(tokenizer)
    replies = generate_replies(
        model,
        tokenizer,
        [chat.prompt_ids(example)[0] for example in prompts],
        max_new_tokens=max_new_tokens,
        end_tokens=chat.end_tokens(model),
        batch_tokens=2048,
    )
    pairs = zip(prompts, replies, strict=True)
    return [Example(id=one.id, prompt=one.prompt, reply=reply.text) for one, reply in pairs if reply.text.strip()]


class Selectors:
    """Scores of all heads, lowest chosen first, from one diagnosis and from short trainings of all heads."""

    def __init__(self, folder: RunDirectory, loaded: LoadedModel, n: int) -> None:
        self.folder, self.loaded = folder, loaded
        self.safety = ct.examples("starter-safety", limit=n)
        benign = ct.examples("starter-align", balance=None)
        harmless = [one for one in benign if one.group == "benign"][:n]
        self.own = own_replies(loaded, harmless)
        utility = {
            "answers": ct.examples("starter-utility", limit=n),
            "borderline": ct.examples("starter-borderline", limit=n),
            "own": self.own,
        }
        config = ct.DiagnoseConfig(
            measure="attribution",
            max_new_tokens=16,
            reply_domains=("borderline", "own"),
            gradient_chunks=N_PARTS,
        )
        if not folder.map_file.is_file():
            ct.diagnose(*loaded, safety=self.safety, utility=utility, config=config, out=folder.path)
        whole = folder.load_map()
        self.cmap: ConflictMap = whole.domains["answers"]
        self.units: list[Unit] = whole.units
        measured = stored_measurements(folder.path, whole, "this script")
        names = [one.name for one in utility_sets(utility)]
        self.grams = {name: domain.gram_HCC for name, domain in zip(names, measured.domains, strict=True)}
        self.n_safety = measured.n_safety

    def products(self, domain: str) -> tuple[np.ndarray, np.ndarray]:
        """|g_s|^2 of every head, and g_s·g_n of the parts n of a domain's gradient [H, n]."""
        gram_HCC, n = self.grams[domain], self.n_safety
        return gram_HCC[:, :n, :n].sum((1, 2)), gram_HCC[:, :n, n:].sum(1)

    def scores(self, name: str, scout: Path | None) -> np.ndarray:
        """The score of every head, the lowest is chosen first."""
        if name == "safe":
            return self.cmap.column("conflict_score")
        if name == "risky":
            return -self.cmap.column("conflict_score")
        if name in SCORE_COLUMNS:
            return self.cmap.column(SCORE_COLUMNS[name])
        if name.startswith("price"):
            squares_H, parts_HC = self.products(name.partition("-")[2] or "answers")
            return np.asarray(-parts_HC.sum(1) / squares_H)
        squares_H, parts_HC = self.products("own")
        if name == "leverage":
            return -squares_H
        if name == "curvature":
            return np.asarray((parts_HC**2).mean(1) / squares_H**2)
        assert name == "update"
        assert scout is not None
        return self._of_updates(scout)

    def _of_updates(self, scout: Path) -> np.ndarray:
        model, tokenizer = self.loaded
        layout = UnitLayout.of(model, ct.HeadLayout.of(model), ("q_head",))
        updates = {path: (b @ a).float() for path, a, b in lora_pairs(scout / "adapter_model.safetensors")}
        chat = ChatFormat(tokenizer)
        rows = {name: [chat.loss_row(one) for one in of] for name, of in (("s", self.safety), ("own", self.own))}
        gained = partial_gradients(model, list(updates), rows["s"], n_chunks=1, batch_tokens=2048)
        lost = partial_gradients(model, list(updates), rows["own"], n_chunks=N_PARTS, batch_tokens=2048)

        def along(gradient: dict[str, torch.Tensor], unit: Unit) -> float:
            return sum(
                float((part.of(gradient[part.path]) * part.of(updates[part.path])).sum()) for part in layout.parts(unit)
            )

        gained_H = np.array([-along(gained[0], unit) for unit in self.units])
        lost_HC = np.array([[along(part, unit) for part in lost] for unit in self.units])
        # What raises the refusals' NLL buys nothing.
        return np.asarray(-np.sign(gained_H) * gained_H**2 / np.maximum((lost_HC**2).mean(1), 1e-30))

    def chosen(self, name: str, seed: int, scout: Path | None) -> list[Unit]:
        """The heads."""
        if name in ("all", "scout"):
            return self.units
        count = round(len(self.units) / 4)
        if name == "random":
            return random.Random(seed).sample(self.units, count)
        order = np.argsort(self.scores(name, scout), kind="stable")
        return [self.units[row] for row in order[:count]]


NAMES = (
    "all", "safe", "risky", "gradient", "sensitivity", "magnitude", "price", "price-borderline", "curvature",
    "leverage", "update", "random",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seeds", default="101,102")
    parser.add_argument("--only", default=",".join(NAMES))
    parser.add_argument("--n", type=int, default=64, help="calibration examples a set")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    folder = RunDirectory(options.out)
    recipe = Recipe.load(QUICKSTART)
    evaluate = recipe.evaluate.model_copy(update={"suites": SUITES, "strengths": (0.35, 0.65, 1.0)})
    recipe = recipe.model_copy(
        update={"model": options.model, "dtype": options.dtype, "out": str(options.out), "evaluate": evaluate}
    )
    loaded, suites = load_model(recipe), load_suites(SUITES, limit=None, seed=0)
    selectors = Selectors(folder, loaded, options.n)
    plain, with_utility = load_training(recipe, []), load_training(recipe, [], load_calibration(recipe))
    names = options.only.split(",")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for seed in seeds:
        for name in (*(["scout"] if "update" in names else []), *names):
            arm = folder.side_arm(f"{name}-{seed}")
            steps = SCOUT_STEPS if name == "scout" else options.steps
            heads, *changes = name.split("+")
            changed = dict(ArmName.parse("+".join(["all", *changes])).changes)
            config = recipe.tune.changed(seed=seed, max_steps=steps, **changed)
            data = with_utility if config.needs_utility else plain
            began = time.perf_counter()
            if not arm.selection_file.is_file():
                chosen = selectors.chosen(heads, seed, folder.side_arm(f"scout-{seed}").adapter)
                HeadSelection.custom(
                    [(unit.layer, unit.index) for unit in chosen],
                    n_total=len(selectors.units),
                    model_fingerprint=fingerprint(loaded.model),
                ).save(arm.folder)
            tune_step(folder, arm, loaded, data, config)
            trained = time.perf_counter() - began
            if name != "scout":
                evaluate_step(folder, recipe, suites, loaded, only=arm.name)
            logging.info("%s: trained in %.0f s, evaluated by %.0f s", arm.name, trained, time.perf_counter() - began)
    judge_step(folder, recipe.evaluate.judge)
    report(folder, names, seeds)


def report(folder: RunDirectory, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Gains at full strength, and costs at the safety that all arms reach."""
    evaluations, strengths = folder.load_evaluations(), folder.load_strengths()
    arms = {
        name: [{**strengths[f"{name}-{seed}"], 1.0: evaluations[f"{name}-{seed}"]} for seed in seeds] for name in names
    }
    found = safety_costs(evaluations[BASE], arms)
    if found is None or found.target is None:
        raise SystemExit("nothing to compare: an arm is nowhere safer than the base model")
    print(f"\n{len(seeds)} seeds; refusals compared at {found.target:.3f}")
    costs = list(found.costs)
    print("| arm | refusals gained | strength | " + " | ".join(PURPOSES[cost].label for cost in costs) + " |")
    print("|---" * (3 + len(costs)) + "|")
    for name in names:
        cells = []
        for cost in costs:
            price = found.costs[cost].arms[name]
            ends = "" if price.interval is None else f" ({price.interval[0]:.3f} to {price.interval[1]:.3f})"
            cells.append(f"not reached{ends}" if price.value is None else f"{price.value:.3f}{ends}")
        strength = found.costs[costs[0]].arms[name].strength
        gain = found.gains[name].value
        shown = "–" if strength is None else f"{strength:.2f}"
        print(f"| {name} | {gain:+.3f} | {shown} | " + " | ".join(cells) + " |")
    for sentence in sentences(found):
        print(f"- {sentence}")


if __name__ == "__main__":
    main()
