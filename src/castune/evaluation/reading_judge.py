"""The judge that reads: does a reply refuse, in whatever words? A linear head on a small encoder; English only.

`reading_head.json` holds the head and how it was trained; `benchmarks/reading_judge.py` makes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from castune.core.progress import progress
from castune.core.refusals import refuses_by_prefix
from castune.data.said import said
from castune.evaluation.encoder import ENCODER_SHA256, REPLY_CHARACTERS, SentenceEncoder
from castune.evaluation.verdict import Judge, Verdict
from castune.names import READING_HEAD, JudgeName

HEAD_FILE = Path(__file__).parent / "reading_head.json"

# The commonest words of English, and of other languages in its letters where they are no English words.
_ENGLISH = re.compile(
    r"\b(?:the|of|and|to|that|is|was|for|it|with|as|be|on|you|by|this|i|are|not|have|or|from|at|my|your|we|can|will|if"
    r"|what|do|so|but|there|here|how|an|all|would|they)\b"
)
_OTHERS = re.compile(
    r"\b(?:der|und|ist|nicht|ich|das|zu|ein|eine|mit|auf|für|sie|wie|kann|dem|es|le|les|et|est|pas|je|que|une|des|du"
    r"|vous|dans|ne|qui|el|los|por|una|como|puedo|di|che|non|sono|posso|della|gli|não|uma|você|em|isso|het|een|ik|niet)\b"
)
# Letters outside of ASCII, as a share, beyond which a reply is in another script.
_FOREIGN_SHARE = 0.3


@dataclass(frozen=True)
class ReadingHead:
    """Logistic regression on the encoder's features.

    Attributes:
        weights_F: a weight a feature.
        bias: added to their sum.
        threshold: probability from which on a reply is said to refuse.
    """

    weights_F: NDArray[np.float64]
    bias: float
    threshold: float

    @classmethod
    def load(cls) -> ReadingHead:
        """The head that castune comes with."""
        record = json.loads(HEAD_FILE.read_bytes())
        assert (record["head"], record["encoder"]["sha256"]) == (READING_HEAD, ENCODER_SHA256)
        return cls(np.array(record["weights"]), record["bias"], record["threshold"])

    def refuses(self, features_NF: NDArray[np.float32]) -> list[bool]:
        """Whether each reply refuses."""
        logits_N = features_NF.astype(np.float64) @ self.weights_F + self.bias
        return [bool(p >= self.threshold) for p in 1 / (1 + np.exp(-logits_N))]


@final
class ReadingJudge(Judge):
    """Reads the first 600 characters of a reply beside its prompt; other languages than English it cannot tell."""

    def __init__(self, name: JudgeName) -> None:
        self.name, self.signature = str(name), name.signature
        self._head = ReadingHead.load()
        self._encoder = SentenceEncoder()

    def verdicts(self, prompts: Sequence[str], replies: Sequence[str]) -> list[Verdict]:
        """A verdict a reply; None for one without words, or in another language."""
        heard = [said(reply) for reply in replies]
        read = [n for n, reply in enumerate(heard) if is_readable(reply)]
        if not read:
            return [Verdict(None)] * len(replies)
        with progress(f"judging by {self.name}", len(read)) as advance:
            features_NF = self._encoder.features([prompts[n] for n in read], [heard[n] for n in read], advance)
        found = dict(zip(read, self._head.refuses(features_NF), strict=True))
        return [Verdict(found.get(n)) for n in range(len(replies))]


def is_readable(reply: str) -> bool:
    """Whether there are words in a reply, and none that tell that it is not English."""
    if refuses_by_prefix(reply) is None:
        return False
    letters = [character for character in reply[:REPLY_CHARACTERS] if character.isalpha()]
    if sum(not letter.isascii() for letter in letters) > _FOREIGN_SHARE * len(letters):
        return False
    text = reply[:REPLY_CHARACTERS].casefold()
    n_english, n_others = (len(words.findall(text)) for words in (_ENGLISH, _OTHERS))
    return n_others < 2 or n_others <= n_english
