"""The letter that a reply to a multiple-choice question chooses. Pure."""

from __future__ import annotations

import re

from castune.core.answer_text import ANSWER, HEADING, IS, last_boxed, squeezed, typed
from castune.data.example import LETTERS

# A letter with what may stand around it, and the letters that go with it: "B", "**(b)**", "A or C", "A/B".
_MARKS = r"""(?:[*_"'`({\[$]|\\[(\[]|\\[a-z]+\s*\{|<[a-z]+>)*"""
_END_MARKS = r"""(?:[*_"'`)}\]$]|\\[)\]]|</[a-z]+>)*"""
_LETTER = rf"""{_MARKS}\s*(?P<letter>[A-Ja-j])(?![A-Za-z0-9+#]|'[A-Za-z]|-[A-Za-z0-9]){_END_MARKS}"""
_MORE_LETTERS = re.compile(
    # "C, D is a distractor" speaks of another option.
    r"(?!\s*,\s*[*_\"'`]*\(?[A-J]\)?[*_\"'`]*\s+(?:is|isn['’]t|was|are|does|would|can|cannot|could)\b)"
    r"[.:]?\s*(?:,|/|&|\+|\band\b|\bor\b)+\s*(?:(?:either|option|choice|also)\s+)*"
    r"[*_\"'`]*\(?(?:[A-J](?![A-Za-z0-9'’])|[b-h](?:\W*$|\)|[.,;]\s))"
)
_OPTION = r"(?:(?:the\s+)?(?:option|choice|letter|answer)\s*:?\s+)?"
# "The correct answer to the question is (B)", "**Answer:** B", "I would choose option C".
_STATED_LETTER = re.compile(
    rf"(?:(?:{ANSWER}|\b(?:(?:correct|right|best|final)\s+(?:option|choice|one|letter)|option|choice)\b)"
    r"(?:\s+(?:to|for)(?:\s+[\w-]+){1,8}?)?(?:\s+here|,\s+then,)?[*_\"']*\s*"
    rf"(?:(?:(?:would|should|must|will)\s+be)\b|{IS}|[>–—-])[*_]*\s*[:=]?"
    rf"|{HEADING}"
    r"|\b(?:choose|pick|select|go(?:ing)?\s+with|opt\s+for)\b)"
    r"\s*(?:(?:therefore|thus|clearly|definitely|likely|probably|simply)\s+)?(?:is\s+)?"
    r"(?P<several>(?:either|both|all\s+of)\s+)?" + _OPTION + _LETTER,
    re.IGNORECASE | re.MULTILINE,
)
# "The answer is Paris (C).", "The answer is Paris, which is option C."
_STATED_WITH_TEXT = re.compile(
    rf"{ANSWER}\s+is\b(?!\s+(?:not|never|neither|either)\b)(?:[^.?\n()]|\.(?=\S)){{1,300}}\.?\s?"
    r"(?:\((?:(?:option|choice)\s+)?|,\s*(?:which\s+is\s+)?(?:option|choice)\s+)(?P<letter>[A-J])(?=[).,;*\s]|$)"
    r"(?![^.\n]*\([A-J]\))",
    re.IGNORECASE,
)
# A sentence that says nothing but the letter: "Therefore, C.", "I think it's (C)", "Solution: C".
_SAYS = (
    r"(?:(?:it|that)(?:'s|\s+is)\b|i(?:'d|\s+would)?\s+(?:say|think|guess|believe)(?:\s+(?:it|that)(?:'s|\s+is))?\b"
    r"|(?:final|correct|solution)\s*:)[*_]*\s*"
)
_CONCLUDED_LETTER = re.compile(
    rf"(?:^|[.!?]\s)[*_ \t]*(?:(?:so|thus|therefore|hence|then|finally)\b[,:]?\s*(?:{_SAYS})?|{_SAYS})"
    + _OPTION
    + _LETTER
    + r"\s*(?:[.!;]|$|because\b|since\b)",
    re.IGNORECASE | re.MULTILINE,
)
# "The answer is not A, it is C", "not B but D".
_CORRECTED_LETTER = re.compile(
    rf"(?:\bnot|n't)\s+{_OPTION}{_MARKS}\s*[A-J](?![A-Za-z0-9'’]){_END_MARKS}\s*[,;:.–—-]?\s*"
    r"(?:but(?:\s+rather|\s+instead)?\s+(?:it(?:'s|\s+is)\s+)?|(?:rather|instead),?\s+(?:it(?:'s|\s+is)\s+)?"
    r"|(?:it|that)(?:'s|\s+is)\s+)" + _OPTION + _LETTER + r"\s*(?:[.!;,(]|$|because\b|since\b)",
    re.IGNORECASE | re.MULTILINE,
)
# "Option B is correct", "C is the answer", where nothing is stated as the answer in so many words.
_CALLED_CORRECT = re.compile(
    _OPTION + r"(?<![A-Za-z])[*_]*\(?(?P<letter>[A-J])\)?[*_]*\s+(?:is|must\s+be)\s+(?:\w+ly\s+)?(?:the\s+answer"
    r"|(?:the\s+)?(?:(?:(?:only|most)\s+)?(?:correct|right|best)|most\s+(?:accurate|appropriate|suitable|likely)))"
    r"(?![-\w])(?:\s+(?:answer|option|choice|one))?(?!\s*\?)"
)
_OPENING_OPTION = re.compile(r"^[\s*_]*(?:option|choice|answer)\s+" + _LETTER + r"(?:\s*[.:,;)]|\s*$)", re.IGNORECASE)
_OPENING_LETTER = re.compile(
    rf"^\s*{_MARKS}(?P<letter>[A-Ja-j])(?:{_END_MARKS}[ \t]*(?:\n|$)|{_END_MARKS}[.:][*_\"'`]*(?=\s|$)"
    r"|[*_\"'`]*[)\]][*_\"'`]*(?=\s|$)|[*_\"'`]+\s|(?=,\s)|[ \t]+[-–—][ \t])"
)
# The options once more, from the first one on, are no choice.
_LISTED_AGAIN = re.compile(r"[\s*_(]*A[).:].*?[\s*_(]B[).:]\s", re.DOTALL)
# A letter in a box, and the option's text behind it.
_BOXED_LETTER = re.compile(r"(?:\\[a-z]+\s*\{?\s*)*\(?([A-Za-z])(?:\)?[.:]?[\s}]*|[).:]+[\s}\\].*)", re.DOTALL)
_NAMED_LETTER = re.compile(r"\(([A-J])\)")
# "The answer is a dog": an article. "The answer is I cannot tell": a pronoun.
_ARTICLE = re.compile(r"\s+[a-z]")
_PRONOUN = re.compile(r"\s+(?!(?:because|since|as|which|and|is|but|for)\b)[a-z]")


def stated_letter(reply: str, n_choices: int) -> str | None:
    """The letter a reply to a multiple-choice question chooses; None where it chooses none, or more than one.

    In this order: the last that is boxed or stated as the answer, the last that is called correct, what the reply
    begins with. Other letters that are spoken of do not count.
    """
    reply = squeezed(typed(reply))
    stated = [
        (match.start("letter"), _chosen(reply, match))
        for pattern in (_STATED_LETTER, _STATED_WITH_TEXT, _CONCLUDED_LETTER, _CORRECTED_LETTER)
        for match in pattern.finditer(reply)
        if _is_letter(reply, match)
    ]
    boxed = last_boxed(reply)
    if boxed is not None:
        letter = _BOXED_LETTER.fullmatch(boxed)
        stated += [] if letter is None else [(reply.rfind(boxed), letter[1])]
    called = [match["letter"] for match in _CALLED_CORRECT.finditer(reply)]
    if stated:
        chosen = max(stated, key=lambda one: one[0])[1]
    elif called:
        chosen = called[-1] if len(set(called)) == 1 else None
    elif opening := _OPENING_OPTION.match(reply) or _OPENING_LETTER.match(reply):
        chosen = _chosen(reply, opening)
        if chosen is not None and set(_NAMED_LETTER.findall(reply)) - {chosen.upper()}:
            return None  # one after the other is spoken of
        if _LISTED_AGAIN.match(reply) or (chosen in ("I", "i") and reply.startswith(",", opening.end())):
            return None
    else:
        return None
    return chosen.upper() if chosen is not None and chosen.upper() in LETTERS[:n_choices] else None


def _is_letter(reply: str, match: re.Match[str]) -> bool:
    """Whether the statement is one: neither "is a dog" nor "is I cannot" nor "is A?"."""
    word = _ARTICLE if match["letter"] in "ai" else _PRONOUN if match["letter"] == "I" else None
    is_word = word is not None and word.match(reply, match.end("letter"))
    return not is_word and not re.match(r"\s*\?", reply[match.end() :])


def _chosen(reply: str, match: re.Match[str]) -> str | None:
    """The letter of a statement; None where it is one of several ("A or C")."""
    several = match.groupdict().get("several") or _MORE_LETTERS.match(reply, match.end())
    return None if several else match["letter"]
