"""From examples to rows of tokens, through the model's own chat template.

Labels are known by place, never by the padding token, which many models share with the end of a turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from castune.data.example import LETTERS, Example
from castune.data.rows import Row
from castune.data.template import Template
from castune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ChatFormat:
    """Token ids of prompts and replies for one tokenizer.

    What does not fit into `max_length` is cut, and rows say so: of a prompt the left (`cut`), but never below half of
    the limit; of a reply that is trained on, the end with its end of turn (`reply_cut`).

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        max_length: limit of prompt + reply in tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 1024) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.template = Template(tokenizer)
        self.end_token = self.template.end_token
        self.opens_thought = self.template.opens_thought
        self.letter_token = lru_cache(self._letter_token)

    def end_tokens(self, model: PreTrainedModel) -> list[int]:
        """Tokens that end a reply: the template's end of turn first, then the model's own list."""
        configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        others = configured if isinstance(configured, list) else [configured]
        return [self.end_token, *(t for t in others if t is not None and t != self.end_token)]

    def prompt_ids(self, example: Example, *, reserve: int = 0) -> tuple[list[int], bool]:
        """Ids of the conversation up to the generation prompt, and whether its left was cut.

        Args:
            example: the example.
            reserve: tokens to leave free for the reply.
        """
        ids = self.template.prompt_ids(example.messages(), example.id)
        room = self._room(example, reserve)
        return self._right_of(ids, room), len(ids) > room

    def continuations(
        self, example: Example, replies: Sequence[str], *, end_of_turn: bool = True, after_header: bool = False
    ) -> tuple[list[int], list[list[int]]]:
        """Ids before replies to the example's prompt, and those of each reply, of whatever length.

        See `Template.continuations`.
        """
        return self.template.continuations(
            example.messages(), replies, example.id, end_of_turn=end_of_turn, after_header=after_header
        )

    def choices(self, example: Example) -> tuple[list[int], list[list[int]]]:
        """Ids before the choices of a multiple-choice question, and those of each choice as the reply."""
        if example.scoring == "letter":
            prompt, _ = self.continuations(example, LETTERS[:1], end_of_turn=False, after_header=True)
            return prompt, [[self.letter_token(index)] for index in range(len(example.choices))]
        return self.continuations(example, example.choices, end_of_turn=False, after_header=True)

    def row(self, example: Example, prompt: Sequence[int], replies: Sequence[Sequence[int]]) -> Row:
        """The row that scores all tokens of one or more replies after a prompt of the example's.

        Raises:
            DataError: a reply is empty, or does not fit.
        """
        for tokens in replies:
            if not tokens:
                raise DataError(f"example {example.id!r}: one of its replies has no tokens")
        room = self._room(example, max(map(len, replies)))
        return Row.of_replies(self._right_of(prompt, room), replies, cut=len(prompt) > room)

    def loss_row(self, example: Example) -> Row:
        """The row whose NLL is the example's loss.

        Of a question with lettered choices it is the letter alone, the next token that the paper predicts: the end of
        the turn would be half of the loss, and most of its gradient. Anything else ends with the end of the turn.
        """
        if example.is_question and example.scoring == "letter":
            assert example.answer is not None
            prompt, letters = self.choices(example)
            return self.row(example, prompt, [letters[example.answer]])
        reply = example.right_reply
        if reply is None:
            raise DataError(f"example {example.id!r} has no reply to compute a loss on")
        prompt, replies = self.continuations(example, [reply])
        kept, [tokens] = self.fit(prompt, replies)
        is_cut, reply_is_cut = len(kept) < len(prompt), len(tokens) < len(replies[0])
        return Row.of_replies(kept, [tokens], cut=is_cut, reply_cut=reply_is_cut)

    def fit(self, prompt: Sequence[int], replies: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
        """As much of a prompt and its replies as fits into `max_length`.

        The prompt keeps what the longest reply leaves, but never less than half of the limit; then replies lose their
        ends, as in TRL.
        """
        longest = max(map(len, replies))
        n_prompt = min(len(prompt), max(self.max_length - longest, self.max_length // 2))
        return self._right_of(prompt, n_prompt), [list(reply[: self.max_length - n_prompt]) for reply in replies]

    def _room(self, example: Example, reserve: int) -> int:
        if reserve >= self.max_length:
            raise DataError(
                f"example {example.id!r}: its reply has {reserve} tokens, the limit for prompt and reply together is "
                f"{self.max_length}; raise max_length or shorten the reply"
            )
        return self.max_length - reserve

    def _right_of(self, ids: Sequence[int], n: int) -> list[int]:
        """The last `n` ids; the token that begins every sequence stays where it is."""
        if len(ids) <= n:
            return list(ids)
        begins = ids[:1] if n > 1 and self.template.begins else ids[:0]
        return [*begins, *ids[len(ids) - n + len(begins) :]]

    def _letter_token(self, index: int) -> int:
        """The token that the model would write for an option letter, at the start of a reply."""
        example = Example(id="letters", prompt="castune-prompt")
        _, [ids] = self.continuations(example, [LETTERS[index]], end_of_turn=False, after_header=True)
        if len(ids) != 1:
            raise DataError(
                f"option letter {LETTERS[index]} is {len(ids)} tokens for this tokenizer; "
                'use scoring "likelihood" for these questions'
            )
        return ids[0]
