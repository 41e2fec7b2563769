"""A model's chat template: conversations as the text it writes, and as the tokens of that text.

What is trained and scored is what the template itself writes: prompt and reply are tokenised as one text, and split
where the text that asks for a reply ends. Text of users stays text, whatever special tokens it spells.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError

from castune.config import TEMPLATE_DATE
from castune.data.said import is_reasoning_mark, opens_thought
from castune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Used, with a visible note at load, for models that bring no chat template.
PLAIN_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'] | capitalize }}:\n{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)

Turns = Sequence[Mapping[str, str]]

_REPLY = "castune-reply"
_SAMPLE = ({"role": "user", "content": "castune-prompt"},)
# Blocks of private characters that stand for what must stay text while the template is rendered.
_BLOCK = 0x8000
_STAND_INS = (0x100000, 0x108000, 0xF0000, 0xF8000)
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
_DIRECTIVES = "aAbBcdeDfFgGhHIjklmMnprRSsTuUVwWxXyYzZ"
# Tokens of the text that asks for a reply by which a conversation may differ from it, beyond what a template always
# does: a reply may begin with a character that joins the one before it.
_JOINED = 2


@dataclass(frozen=True)
class Text:
    """A text in which stand-ins hold the places of spelled tokens; `first` is that of the first of them."""

    text: str
    first: int


class SpelledTokens:
    """Keeps text that spells a special token from becoming that token, wherever it is put into a format.

    Args:
        tokenizer: a transformers tokenizer.
        tokens: the texts of the tokens that must not be forged.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> None:
        self.tokenizer = tokenizer
        # Longer ones first: one may begin as another does.
        self.tokens = sorted({token for token in tokens if token.strip()}, key=lambda token: (-len(token), token))
        self._openings = {token[:2] for token in self.tokens}

    @classmethod
    def special(cls, tokenizer: PreTrainedTokenizerBase) -> SpelledTokens:
        """All special tokens of a tokenizer."""
        return cls(
            tokenizer, (str(added.content) for added in tokenizer.added_tokens_decoder.values() if added.special)
        )

    def first_for(self, texts: Sequence[str]) -> int:
        """The first of a block of private characters that none of the texts has."""
        private = {ord(character) for text in texts for character in _PRIVATE.findall(text)}
        first = next((one for one in _STAND_INS if not any(one <= c < one + _BLOCK for c in private)), None)
        if first is None:
            raise DataError("a text has characters of all private blocks of Unicode, one of which is needed")
        return first

    def held(self, text: str, first: int, *, all_but: Callable[[str], bool] = lambda _: False) -> str:
        """The text with a stand-in for every token that it spells, but for some."""
        if any(opening in text for opening in self._openings):
            for number, token in enumerate(self.tokens):
                if not all_but(token):
                    text = text.replace(token, chr(first + number))
        return text

    def ids(self, found: Text) -> list[int]:
        """Token ids: what a stand-in holds the place of is tokenised as text."""
        if not self.tokens:
            return self.plain(found.text)
        stand_in = re.compile(f"([{chr(found.first)}-{chr(found.first + len(self.tokens) - 1)}])")
        ids: list[int] = []
        for number, piece in enumerate(stand_in.split(found.text)):
            if number % 2:
                # Its first character for itself: the rest is no special token.
                token = self.tokens[ord(piece) - found.first]
                ids += self.plain(token[0]) + self.plain(token[1:])
            else:
                ids += self.plain(piece)
        return ids

    def plain(self, text: str) -> list[int]:
        """Token ids of a text in which special tokens are what they spell."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


class Template:
    """The chat template of one tokenizer.

    Attributes:
        end_token: the token that ends a reply: the special one the template puts behind an assistant's turn, else the
            end-of-sequence token.
        behind: what the template puts behind an assistant's turn.
        ends_turns: whether there is a special token in it.
        asked: what it puts behind a prompt where it asks for a reply.
        header: what the template writes itself between the text that asks for a reply and the reply: an empty thought,
            the name of a channel.
        opens_thought: whether the text that asks for a reply ends inside reasoning.
        dropped: how many tokens of the text that asks for a reply are missing where there is one, as of a template that
            opens the thought when it asks, and leaves it out of what was said.
        begins: whether every conversation begins with the token that begins sequences.

    Raises:
        DataError: the template leaves out what the assistant says, or there is no token that could end a turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._options = {"chat_template": _dated(tokenizer, template_date(tokenizer))} if prints_date(tokenizer) else {}
        self._leading = _leading_tokens(tokenizer) if tokenizer.chat_template == PLAIN_TEMPLATE else []
        # The sample spells none.
        self._spelled = SpelledTokens(tokenizer, ())
        asked = self._rendered(_SAMPLE, add_generation_prompt=True).text
        whole = self._rendered([*_SAMPLE, _assistant(_REPLY)]).text
        place = whole.rindex(_REPLY)
        self.behind = whole[place + len(_REPLY) :]
        self.header = whole[len(asked) : place] if whole.startswith(asked) else ""
        self.asked = asked.rpartition(_SAMPLE[0]["content"])[2]
        self.opens_thought = opens_thought(self.asked)
        added = tokenizer.added_tokens_decoder
        plain = self._spelled.plain
        tail = plain(self.behind)
        end = next((token for token in tail if token in added and added[token].special), None)
        self.ends_turns = end is not None
        end = tokenizer.eos_token_id if end is None else end
        if end is None:
            raise DataError("the tokenizer has neither an end-of-turn token in its chat template nor an eos token")
        self.end_token = int(end)
        self._end_text = str(added[self.end_token].content) if self.end_token in added else ""
        # What is special, or makes turns: spelled in a user's text it would forge a turn. Words are neither, nor are
        # the runs of spaces and lines that some vocabularies add.
        structure = {*plain(asked), *tail}
        marks = {str(entry.content) for token, entry in added.items() if entry.special or token in structure}
        self._spelled = SpelledTokens(tokenizer, (mark for mark in marks if not mark.strip().isalnum()))
        before, after = ([*self._leading, *plain(text)] for text in (asked, whole))
        self.dropped = len(before) - _n_common(before, after)
        # Of ChatML it may be what begins a turn.
        self.begins = before[0] == tokenizer.bos_token_id and after.count(before[0]) == 1

    def prompt_ids(self, turns: Turns, name: str = "") -> list[int]:
        """Tokens of a conversation up to where the model is asked for a reply.

        Args:
            turns: the conversation, as chat templates take it.
            name: of the example, for messages.

        Raises:
            DataError: the template refuses the conversation.
        """
        return self._ids(self._rendered(turns, name, add_generation_prompt=True))

    def continuations(
        self,
        turns: Turns,
        replies: Sequence[str],
        name: str = "",
        *,
        end_of_turn: bool = True,
        after_header: bool = False,
    ) -> tuple[list[int], list[list[int]]]:
        """Tokens of a conversation before replies, and those of each reply: together the template's own text.

        Args:
            turns: the conversation, as chat templates take it.
            replies: replies to it, each for itself. The text of the end token at their end is that token.
            name: of the example, for messages.
            end_of_turn: with the token that ends the turn.
            after_header: count what the template writes itself before a reply (`header`) with the conversation, not
                with the reply.

        Raises:
            DataError: the template refuses the conversation, or writes it otherwise where there is a reply.
        """
        asked = self._rendered(turns, name, add_generation_prompt=True)
        before = self._ids(asked)
        wholes = [self._whole(turns, reply, name, end_of_turn=end_of_turn) for reply in replies]
        n_before = min(_n_common(before, whole) for whole in wholes)
        if len(before) - n_before > self.dropped + _JOINED:
            raise DataError(
                f"example {name!r}: the chat template writes this conversation otherwise when it ends in a reply than "
                "when it asks for one, so no prompt precedes the reply"
            )
        if after_header and self.header:
            # The header's last character may have joined the reply.
            behind = self._ids(Text(asked.text + self.header, asked.first))
            n_before = max(n_before, min(_n_common(behind, whole) for whole in wholes))
        return wholes[0][:n_before], [whole[n_before:] for whole in wholes]

    def _whole(self, turns: Turns, reply: str, name: str, *, end_of_turn: bool) -> list[int]:
        found = self._rendered([*turns, _assistant(self._without_end(reply))], name)
        text = self._without_behind(found.text)
        if not end_of_turn:
            return self._ids(Text(text, found.first))
        if not self.ends_turns:
            return [*self._ids(Text(text, found.first)), self.end_token]
        end = self.behind.index(self._end_text) + len(self._end_text)
        return self._ids(Text(text + self.behind[:end], found.first))

    def _without_behind(self, text: str) -> str:
        if text.endswith(self.behind):
            return text[: len(text) - len(self.behind)]
        # A template that ends this turn otherwise than the sample's.
        place = text.rfind(self._end_text) if self._end_text else -1
        return text if place < 0 else text[:place]

    def _without_end(self, reply: str) -> str:
        """A reply without the text of the end token at its end, which some data sets spell out."""
        shorter = reply
        while self._end_text and shorter.rstrip().endswith(self._end_text):
            shorter = shorter.rstrip().removesuffix(self._end_text)
        return shorter

    def _rendered(self, turns: Turns, name: str = "", **options: object) -> Text:
        """The text of a conversation, with a stand-in for everything that must stay text in it."""
        first = self._spelled.first_for([turn["content"] for turn in turns])
        turns = [{**turn, "content": self._held(turn, first)} for turn in turns]
        of = f"example {name!r}: " if name else ""
        try:
            text = self.tokenizer.apply_chat_template(list(turns), tokenize=False, **self._options, **options)
        except TemplateSyntaxError as error:
            raise DataError(f"the model's chat template is malformed (line {error.lineno}): {error.message}") from error
        except Exception as error:  # a template is a program of others
            words = " ".join(str(error).split()) or type(error).__name__
            roles = ", ".join(str(turn["role"]) for turn in turns)
            raise DataError(
                f"{of}the model's chat template refuses this conversation (turns: {roles}): {words[:200]}"
            ) from error
        written = "".join(str(text).split())
        for turn in turns:
            # Templates trim what is said, and set reasoning on lines of its own.
            is_earlier_reply = turn["role"] == "assistant" and turn is not turns[-1]
            if not is_earlier_reply and "".join(turn["content"].split()) not in written:
                raise DataError(f"{of}the model's chat template leaves out a part of what the {turn['role']} says")
        return Text(str(text), first)

    def _held(self, turn: Mapping[str, str], first: int) -> str:
        # A reply may hold its reasoning in the marks that its model writes.
        is_reply = turn["role"] == "assistant"
        return self._spelled.held(turn["content"], first, all_but=lambda mark: is_reply and is_reasoning_mark(mark))

    def _ids(self, found: Text) -> list[int]:
        return [*self._leading, *self._spelled.ids(found)]


def template_date(tokenizer: PreTrainedTokenizerBase) -> date:
    """The day that templates which print the date are told; see `with_date`."""
    return date.fromisoformat(getattr(tokenizer.apply_chat_template, "day", TEMPLATE_DATE))


def prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template asks for the date."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


class _Dated:
    """`apply_chat_template` of a tokenizer, on one day."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, day: str) -> None:
        self.tokenizer, self.day = tokenizer, day

    def __call__(self, *args: object, **options: object) -> Any:
        if options.get("chat_template") is None:
            options["chat_template"] = _dated(self.tokenizer, date.fromisoformat(self.day), options.get("tools"))
        return type(self.tokenizer).apply_chat_template(self.tokenizer, *args, **options)


def with_date(tokenizer: PreTrainedTokenizerBase, day: str) -> Any:
    """The tokenizer, whose chat template is told `day` (ISO) whoever applies it, if it prints the date at all."""
    if prints_date(tokenizer):
        tokenizer.apply_chat_template = _Dated(tokenizer, day)
    return tokenizer


def _dated(tokenizer: PreTrainedTokenizerBase, day: date, tools: Any = None) -> str:
    """The chat template with a macro in place of transformers' clock; no function can be handed to a template."""
    noon = datetime.combine(day, time(12))
    values = {f"%{flag}{letter}": noon.strftime(f"%{flag}{letter}") for flag in ("-", "") for letter in _DIRECTIVES}
    replaced = "".join(f" | replace('{directive}', '{value}')" for directive, value in {**values, "%%": "%"}.items())
    macro = "{%- macro strftime_now(format) -%}{{ format" + replaced + " }}{%- endmacro -%}"
    return macro + str(tokenizer.get_chat_template(None, tools))


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def _n_common(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text, as a beginning of sequence."""
    plain, own = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    starts = (i for i in range(len(own) - len(plain) + 1) if own[i : i + len(plain)] == plain)
    return list(own[: next(starts, 0)])
