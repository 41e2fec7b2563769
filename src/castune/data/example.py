"""The one record every data source is turned into."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from castune.errors import DataError

# The paper's instruction for multiple-choice questions (Table 4).
LETTER_INSTRUCTION = (
    "Read the multiple-choice question carefully and output only the capital letter (A, B, C, D, or E) that "
    "corresponds to the correct choice. Do not include any explanation or extra text."
)
# The paper's instruction for mathematical problems (Table 4).
REASONING_INSTRUCTION = (
    r"Solve the math problem step by step. Write the final answer inside a LaTeX \boxed{} expression."
)
LETTERS = "ABCDEFGHIJ"
# How the answer to a question, or the final answer of a problem, is compared with the right one.
QUESTION_SCORINGS = ("letter", "likelihood")
PROBLEM_SCORINGS = ("boxed", "number")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One prompt with what is known about its right reply.

    A multiple-choice question has `choices`, `answer` and `scoring`; a problem, which is worked out in free text, has
    a `target` and `scoring`; anything else has a `reply` (the safe reply of a harmful prompt, the completion of
    alignment data, the chosen one of two replies) or nothing but the prompt.
    """

    id: str
    prompt: str
    reply: str | None = None
    rejected: str | None = None  # the reply that `reply` is preferred to
    choices: tuple[str, ...] = ()
    answer: int | None = None
    target: str | None = None  # the final answer of a problem
    scoring: str | None = None  # letter | likelihood; of a problem boxed | number
    group: str | None = None  # subject, category or kind
    history: tuple[Message, ...] = ()  # turns before the prompt

    @property
    def is_question(self) -> bool:
        """Whether this is a multiple-choice question."""
        return bool(self.choices)

    @property
    def is_problem(self) -> bool:
        """Whether this is a problem with one final answer, to be worked out in free text."""
        return self.target is not None

    @property
    def user_text(self) -> str:
        """What the user says: with the paper's instruction, and the lettered choices of a `letter` question."""
        if self.is_problem:
            return f"{REASONING_INSTRUCTION}\n{self.prompt}"
        if self.scoring != "letter":
            return self.prompt
        options = "\n".join(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(self.choices))
        return f"{LETTER_INSTRUCTION}\n{self.prompt}\n{options}"

    @property
    def right_reply(self) -> str | None:
        """The reply whose NLL is this example's loss: answer letter, answer text, or the given reply."""
        if not self.is_question:
            return self.reply
        assert self.answer is not None
        return LETTERS[self.answer] if self.scoring == "letter" else self.choices[self.answer]

    def messages(self) -> list[dict[str, str]]:
        """The conversation up to and including the prompt, as chat templates take it."""
        turns = [{"role": turn.role, "content": turn.content} for turn in self.history]
        return [*turns, {"role": "user", "content": self.user_text}]


def require_replies(examples: Sequence[Example], name: str, columns: str) -> None:
    """Refuse data in which an example has no reply (or is a question), naming it and the columns needed."""
    for example in examples:
        if example.reply is None or example.is_question:
            raise DataError(f"{name}: example {example.id!r} has no reply; columns needed: {columns}")


def require_questions(examples: Sequence[Example], name: str, domain: str) -> None:
    """Refuse data in which an example is no multiple-choice question; `domain` is what settings call the set."""
    for example in examples:
        if not example.is_question:
            # Most likely D_safe, in the wrong place.
            is_reply = example.reply is not None and not example.is_problem
            others = f"; for harmless prompts, with the reply to give: diagnose.reply_domains = [{json.dumps(domain)}]"
            raise DataError(
                f"{name}: example {example.id!r} is no multiple-choice question; "
                f"columns needed: prompt, choices, answer{others if is_reply else ''}"
            )


def require_helpful_replies(examples: Sequence[Example], name: str) -> None:
    """Refuse data in which an example is anything but a prompt with the reply that it should get."""
    for example in examples:
        kind = "multiple-choice question" if example.is_question else "problem" if example.is_problem else None
        if kind is not None or example.reply is None:
            raise DataError(
                f"{name}: example {example.id!r} {'has no reply' if kind is None else f'is a {kind}'}, and "
                "diagnose.reply_domains names prompts with the reply that the model should give; columns needed: "
                "prompt, completion"
            )


def require_solutions(examples: Sequence[Example], name: str) -> None:
    """Refuse data in which an example is no problem with a worked solution."""
    for example in examples:
        if not example.is_problem or example.reply is None:
            raise DataError(
                f"{name}: example {example.id!r} is no problem with a worked solution, as the first one is; the "
                "columns needed are prompt, completion and answer (text), and the sources gsm8k and math have them"
            )


def content_hash(examples: Sequence[Example]) -> str:
    """SHA-256 (first 16 digits) over the content of examples, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(asdict(example), sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()[:16]
