"""What every contestant of `benchmarks/peers.py` shares: the work, how a score is computed, timing, the result file.

A contestant is a script. It gets the work as token ids made by one tokenizer, so nobody's prompts can differ, and it
writes its seconds and its outcomes as JSON. Only the sweep is timed: imports, loading and one warm-up are not.

Shape letters: C choice, S sequence position, T scored position, V vocabulary, H head, K channel of a head.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import castune as ct

Outcome = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A multiple-choice question as token ids; `answer` is the index of the right choice."""

    prompt: list[int]
    choices: list[list[int]]
    answer: int


@dataclass(frozen=True)
class Work:
    """The sweeps to run. `example_seed`, `n_questions` and `n_prompts` let castune draw the same examples by itself."""

    dtype: str
    heads: list[tuple[int, int]]
    questions: list[Question]
    prompts: list[list[int]]
    prompt_texts: list[str]
    pairs: list[Question]
    """The refusal and the model's own reply to each prompt, their first tokens, as two choices: refusing is right."""
    end_tokens: list[int]
    max_new_tokens: int
    n_questions: int
    n_prompts: int
    example_seed: int

    @property
    def layers(self) -> list[int]:
        """Layers of the heads. A backward pass attributes all heads of theirs, so attribution covers them all."""
        return sorted({layer for layer, _ in self.heads})

    def text(self) -> str:
        """The work as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, path: Path) -> Work:
        """Read a file that holds `text`."""
        fields = json.loads(path.read_text())
        fields["heads"] = [(layer, head) for layer, head in fields["heads"]]
        for name in ("questions", "pairs"):
            fields[name] = [Question(**question) for question in fields[name]]
        return cls(**fields)

    @property
    def warm_up(self) -> Work:
        """One head, question and prompt of it: first calls allocate, trace and pick kernels."""
        return replace(
            self,
            heads=self.heads[:1],
            questions=self.questions[:1],
            prompts=self.prompts[:1],
            prompt_texts=self.prompt_texts[:1],
            pairs=self.pairs[:1],
            max_new_tokens=2,
        )


def choice_batch(question: Question) -> tuple[Tensor, int]:
    """Ids `[C, S]` of prompt + each choice, padded on the right, and how many last positions hold all that is scored.

    With causal attention the padding comes after everything that is scored, so no mask is needed. The choices share
    their prompt, so the positions that predict them are the same block at the end of every row. The last token of the
    longest choice is predicted, never an input.
    """
    longest = max(map(len, question.choices))
    rows = [[*question.prompt, *choice, *[0] * (longest - len(choice))][:-1] for choice in question.choices]
    return torch.tensor(rows), longest


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask `[B, S]` of prompts to generate from."""
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def mean_log_probs(logits_CTV: Tensor, choices: Sequence[Sequence[int]]) -> Tensor:
    """Mean log-probability a token of each choice, `[C]`; the first position given predicts its first token."""
    logits_CTV = logits_CTV.float()
    longest = max(map(len, choices))
    tokens_CT = torch.tensor([[*choice, *[0] * (longest - len(choice))] for choice in choices])
    logits_CTV = logits_CTV[:, :longest]
    values_CT = logits_CTV.gather(-1, tokens_CT[..., None])[..., 0] - logits_CTV.logsumexp(-1)
    return torch.stack([values_CT[c, : len(choice)].mean() for c, choice in enumerate(choices)])


def margin(score_C: Tensor, answer: int) -> Tensor:
    """Score of the right choice minus that of the best wrong one; the decision is right where it is above 0."""
    wrong = [c for c in range(len(score_C)) if c != answer]
    return score_C[answer] - score_C[wrong].max(0).values


def head_changes(z_CSW: Tensor, gradient_CSW: Tensor, n_heads: int) -> Tensor:
    """What zeroing each head changes to first order, `[H]`: (0 - z) x gradient over its channels, positions and rows.

    Args:
        z_CSW: what enters the output projection, the heads' channels one after the other.
        gradient_CSW: of the margin, by `z_CSW`.
        n_heads: of the layer.
    """
    change_HK: Tensor = -(z_CSW.float() * gradient_CSW.float()).sum((0, 1)).unflatten(0, (n_heads, -1))
    return change_HK.sum(1)


def refusals(work: Work, tokenizer: Any, replies: Sequence[Sequence[int]]) -> tuple[list[bool | None], list[str]]:
    """What castune's prefix judge says of replies given as token ids, and their text; end tokens cut them."""
    texts = []
    for tokens in replies:
        end = next((t for t, token in enumerate(tokens) if token in work.end_tokens), len(tokens))
        texts.append(tokenizer.decode(tokens[:end], skip_special_tokens=True))
    return ct.judge("prefix")(work.prompt_texts, texts), texts


def main(load: Callable[[Work], Any], sweeps: Mapping[str, Callable[[Any, Work], Outcome]]) -> None:
    """Run one of a contestant's sweeps and write its result; the command line is `work.json result.json sweep`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("sweep", choices=list(sweeps))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    work = Work.load(options.work)
    model = load(work)
    sweep = sweeps[options.sweep]
    with torch.no_grad():
        sweep(model, work.warm_up)
        started = time.perf_counter()
        outcome = sweep(model, work)
        seconds = time.perf_counter() - started
    options.result.write_text(json.dumps({"seconds": seconds, "versions": _versions(), **outcome}))


def _versions() -> dict[str, str]:
    found = {}
    for name in ("castune", "torch", "transformers", "nnsight", "transformer-lens"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return {**found, "threads": str(torch.get_num_threads())}
