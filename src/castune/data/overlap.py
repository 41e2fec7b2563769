"""Examples of one set that are in another one too, by what the user says in them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from castune.data.example import Example


def shared_examples(examples: Iterable[Example], others: Iterable[Example]) -> list[str]:
    """Ids of `others` whose prompt is that of one of `examples`, but for case, spaces, punctuation and its encoding.

    The turns before a prompt and the choices of a question do not matter: the same question with its choices shuffled
    is the same question. Paraphrases are not found.
    """
    known = {_core(example.prompt) for example in examples}
    return [other.id for other in others if _core(other.prompt) in known]


def _core(prompt: str) -> str:
    text = unicodedata.normalize("NFKC", prompt).casefold()
    letters = "".join(character for character in text if character.isalnum())
    # A formula or a row of symbols is nothing but what would be left out.
    return letters or " ".join(text.split())
