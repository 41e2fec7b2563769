"""From examples to tokens, through the model's own chat template.

Prompt and reply are tokenised apart, as they are at generation time: no token straddles the border. Labels are
known by length, never by the padding token, which many models share with the end of a turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from castune.data.example import LETTERS, Example
from castune.data.rows import Row
from castune.data.said import opens_thought
from castune.errors import DataError

# Used, with a visible note at load, for models that bring no chat template.
PLAIN_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'] | capitalize }}:\n{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)


class ChatFormat:
    """Token ids of prompts and replies for one tokenizer.

    Sequences longer than `max_length` are cut from the prompt's left, never from the reply; rows say so in `cut`.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        max_length: limit of prompt + reply in tokens.
    """

    def __init__(self, tokenizer: Any, *, max_length: int = 1024) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.end_token = _end_of_turn(tokenizer)
        self.opens_thought = template_opens_thought(tokenizer)

    def end_tokens(self, model: Any) -> list[int]:
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
        text = self.tokenizer.apply_chat_template(example.messages(), tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        room = self.max_length - reserve
        if room < 1:
            raise DataError(
                f"example {example.id!r}: its reply has {reserve} tokens, the limit for prompt and reply together is "
                f"{self.max_length}; raise max_length or shorten the reply"
            )
        return ids[-room:], len(ids) > room

    def reply_ids(self, reply: str, *, end_of_turn: bool = True) -> list[int]:
        """Ids of a reply, with the end-of-turn token unless told otherwise."""
        ids = self.tokenizer(reply, add_special_tokens=False)["input_ids"]
        return [*ids, self.end_token] if end_of_turn else ids

    def reply_row(self, example: Example, reply: str, *, end_of_turn: bool = True) -> Row:
        """The row that scores `reply` after the example's prompt."""
        return self.token_row(example, [self.reply_ids(reply, end_of_turn=end_of_turn)])

    def token_row(self, example: Example, replies: Sequence[Sequence[int]]) -> Row:
        """The row that scores the tokens of one or more replies after the example's prompt."""
        for tokens in replies:
            if not tokens:
                raise DataError(f"example {example.id!r}: one of its replies has no tokens")
        prompt, cut = self.prompt_ids(example, reserve=max(map(len, replies)))
        return Row.of_replies(prompt, replies, cut=cut)

    def loss_row(self, example: Example) -> Row:
        """The row whose NLL is the example's loss: its right reply and the end of the turn."""
        reply = example.right_reply
        if reply is None:
            raise DataError(f"example {example.id!r} has no reply to compute a loss on")
        return self.reply_row(example, reply)

    def letter_token(self, index: int) -> int:
        """The token of an option letter at the start of a reply."""
        ids = self.tokenizer(LETTERS[index], add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise DataError(
                f"option letter {LETTERS[index]} is {len(ids)} tokens for this tokenizer; "
                'use scoring "likelihood" for these questions'
            )
        return int(ids[0])


def text_behind_a_turn(tokenizer: Any) -> tuple[str, int | None]:
    """What the chat template puts behind an assistant's turn, and the first special token in it, if any."""
    mark = "castune-reply"
    turns = [{"role": "user", "content": "castune-prompt"}, {"role": "assistant", "content": mark}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    if mark not in text:
        raise DataError("the chat template leaves out what the assistant says: nothing could be trained on replies")
    behind = text[text.rindex(mark) + len(mark) :]
    tail = tokenizer(behind, add_special_tokens=False)["input_ids"]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return behind, next((token for token in tail if token in special), None)


def template_opens_thought(tokenizer: Any) -> bool:
    """Whether the chat template begins the reasoning before a reply, which then is reasoning until its end."""
    mark = "castune-prompt"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
    )
    return opens_thought(text.rpartition(mark)[2])


def _end_of_turn(tokenizer: Any) -> int:
    """The special token the chat template puts behind an assistant's turn, else the end-of-sequence token."""
    _, found = text_behind_a_turn(tokenizer)
    found = tokenizer.eos_token_id if found is None else found
    if found is None:
        raise DataError("the tokenizer has neither an end-of-turn token in its chat template nor an eos token")
    return int(found)
