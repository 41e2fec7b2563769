"""Examples of typical lengths in place of data that is not to be had here: to count work, never to measure a model.

Numbers of examples are the paper's (Appendix A) or `NAMED_SOURCES`'. Lengths are deciles in tokens of the default
model's tokenizer (SmolLM2), without template and instruction, from the shortest example on; the last is not the
longest but what makes the mean right, as between deciles lengths are taken to lie evenly. Tokenizers of larger
vocabularies make somewhat fewer tokens of the same text; SmolLM2's also splits numbers into digits.

Measured, on the public files: csqa (all 1,221), gsm8k (all 1,319), math (all 500), advbench (520), harmbench (its 200
standard behaviours), jailbreakbench (100), xstest (250 and 200); mmlu on 1,500 of the 14,042, dan on 352 of the 1,405.
Assumed, because the data are gated: everything of wildjailbreak and wildguard (vanilla prompts as those of public
instruction sets, adversarial ones about ten times as long, refusals shorter than answers), and strongreject and
or-bench.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from castune.data.example import Example
from castune.data.named import NAMED_SOURCES
from castune.data.sources import examples, source_name
from castune.errors import DataError, SourceUnreachable

# Common words, each one token of every usual tokenizer when a space is before it.
_WORDS = tuple("the of and to in is that for it as was with on by at from this be are not".split())  # noqa: SIM905
_OPTION_TOKENS = 4  # of a lettered option of one word: newline, letter, full stop, word

Deciles = tuple[int, int, int, int, int, int, int, int, int, int, int]


@dataclass(frozen=True)
class TypicalSource:
    """Lengths of a named source.

    Attributes:
        size: examples of the whole source.
        prompt: deciles of a prompt's tokens, lettered choices included.
        reply: deciles of a reply's tokens; None where examples have none.
        n_choices: of a multiple-choice question.
        scoring: of questions and problems.
        is_measured: whether the lengths are; else assumed.
    """

    size: int
    prompt: Deciles
    reply: Deciles | None = None
    n_choices: int = 0
    scoring: str | None = None
    is_measured: bool = True


_VANILLA: Deciles = (3, 8, 10, 11, 12, 13, 15, 17, 20, 26, 60)
_ADVERSARIAL: Deciles = (20, 60, 85, 105, 120, 135, 150, 170, 195, 240, 600)
_MIXED: Deciles = (3, 10, 13, 16, 22, 50, 100, 125, 150, 190, 600)
_REFUSALS: Deciles = (15, 45, 60, 70, 80, 90, 100, 115, 135, 175, 450)
_ANSWERS: Deciles = (15, 60, 80, 100, 130, 170, 230, 300, 370, 460, 800)

TYPICAL_SOURCES: dict[str, TypicalSource] = {
    "mmlu": TypicalSource(14042, (21, 37, 44, 52, 61, 72, 88, 107, 137, 241, 439), n_choices=4, scoring="letter"),
    "csqa": TypicalSource(1221, (24, 31, 33, 35, 36, 37, 39, 41, 43, 47, 66), n_choices=5, scoring="letter"),
    "gsm8k": TypicalSource(
        1319,
        (24, 37, 42, 48, 53, 58, 64, 70, 78, 92, 132),
        (25, 60, 75, 86, 99, 112, 127, 143, 165, 194, 289),
        scoring="number",
    ),
    "math": TypicalSource(
        500,
        (9, 23, 30, 36, 43, 52, 62, 74, 91, 150, 393),
        (19, 64, 87, 109, 137, 173, 209, 266, 342, 494, 862),
        scoring="boxed",
    ),
    "advbench": TypicalSource(520, (6, 9, 11, 11, 12, 13, 13, 14, 15, 17, 29)),
    "harmbench": TypicalSource(200, (5, 10, 12, 13, 14, 15, 17, 18, 20, 24, 32)),
    "strongreject": TypicalSource(313, _VANILLA, is_measured=False),
    "or-bench": TypicalSource(1319, _VANILLA, is_measured=False),
    "jailbreakbench": TypicalSource(100, (5, 10, 11, 13, 14, 15, 15, 17, 18, 21, 30)),
    "jailbreakbench-benign": TypicalSource(100, (5, 10, 11, 13, 14, 15, 15, 17, 18, 21, 30), is_measured=False),
    "xstest": TypicalSource(250, (4, 7, 8, 9, 10, 10, 11, 12, 13, 14, 18)),
    "xstest-unsafe": TypicalSource(200, (6, 7, 8, 9, 9, 10, 10, 11, 13, 14, 19)),
    "dan": TypicalSource(1405, (11, 81, 131, 235, 308, 406, 495, 645, 823, 1139, 2835)),
    # Of the 261,559 training examples the paper takes 10,000, and 500 of the vanilla harmful fifth to diagnose.
    "wildjailbreak-train": TypicalSource(261_559, _MIXED, _ANSWERS, is_measured=False),
    "wildjailbreak-vanilla-harmful": TypicalSource(50_050, _VANILLA, _REFUSALS, is_measured=False),
    "wildjailbreak": TypicalSource(2000, _ADVERSARIAL, is_measured=False),
    "wildguard": TypicalSource(754, _MIXED, is_measured=False),
}


def stand_ins(name: str, *, limit: int | None = None, seed: int = 0) -> list[Example]:
    """Examples of a named source's usual lengths, made of common words.

    Args:
        name: of the source.
        limit: how many; the whole source when absent. The lengths are those of the whole, whatever the limit.
        seed: of the words, and of which reply goes with which prompt.

    Raises:
        DataError: no lengths are known of it, or the limit is below 1.
    """
    if name not in TYPICAL_SOURCES:
        raise DataError(f"{name}: no typical lengths are known; known: {', '.join(TYPICAL_SOURCES)}")
    if limit is not None and limit < 1:
        raise DataError(f"{name}: limit is {limit}, accepted: at least 1")
    source = TYPICAL_SOURCES[name]
    n = min(source.size, limit or source.size)
    generator = random.Random(seed)
    prompts = lengths_of(source.prompt, n)
    replies = lengths_of(source.reply, n) if source.reply else []
    generator.shuffle(prompts)
    generator.shuffle(replies)
    found = []
    for index, prompt, reply in zip(range(n), prompts, replies or count(), strict=False):
        question = source.n_choices > 0
        found.append(
            Example(
                id=f"{name}-{index:05d}",
                prompt=_text(generator, prompt - source.n_choices * _OPTION_TOKENS),
                reply=_text(generator, reply) if replies else None,
                choices=tuple(generator.sample(_WORDS, source.n_choices)),
                answer=index % source.n_choices if question else None,
                target="7" if source.scoring in ("number", "boxed") else None,
                scoring=source.scoring,
            )
        )
    return found


def _text(generator: random.Random, n_tokens: int) -> str:
    return " ".join(generator.choices(_WORDS, k=max(1, n_tokens)))


def lengths_of(deciles: Sequence[int], n: int) -> list[int]:
    """`n` lengths with these deciles, in ascending order: the middles of `n` equal parts of the distribution."""
    found = []
    for index in range(n):
        place, share = divmod((index + 0.5) / n * (len(deciles) - 1), 1)
        low, high = deciles[int(place)], deciles[int(place) + 1]
        found.append(max(1, round(low + share * (high - low))))
    return found


class DataOrStandIns:
    """Reads data as `examples` does; in place of a named source that cannot be loaded it gives stand-ins.

    Attributes:
        notes: what the user should know about each source that was replaced.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._missing: set[str] = set()  # a hub that cannot be reached is asked once

    def __call__(
        self,
        source: str,
        *,
        limit: int | None = None,
        seed: int = 0,
        balance: str | None = None,
        shares: Mapping[str, float] | None = None,
    ) -> list[Example]:
        """The examples of a source, see `examples`; stand-ins are of one kind, neither balanced nor by shares.

        Raises:
            DataError: it is no named source, a local copy that was asked for is not there, or the hub refuses it.
        """
        name = source_name(source)
        if source not in self._missing:
            try:
                return examples(source, limit=limit, seed=seed, balance=balance, shares=shares)
            except SourceUnreachable:
                # What the hub refuses now it will refuse then; that it cannot be reached from here says nothing.
                if name not in NAMED_SOURCES:
                    raise
                self._missing.add(source)
        found = stand_ins(name, limit=limit, seed=seed)
        kind = "measured on the public data" if TYPICAL_SOURCES[name].is_measured else "assumed"
        note = f"{name}: not available here; counted on {len(found):,} stand-ins of typical lengths ({kind})"
        if note not in self.notes:
            self.notes.append(note)
        return found
