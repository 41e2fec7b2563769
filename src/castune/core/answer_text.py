"""What all readers of answers share: how a text is typed, what "the answer is" is called, boxes. Pure."""

from __future__ import annotations

import re
import unicodedata

# Answers longer than this are none: parsing what a model repeats without end could take for ever.
LONGEST = 400
# Full width, spaces and quotation marks of any kind, returns as they are typed; marks without a width are left out.
_SPELLING = str.maketrans(
    {
        **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},
        **dict.fromkeys("\u00a0\u2007\u2009\u202f\u3000", " "),
        **dict.fromkeys("‘’‛′", "'"),
        **dict.fromkeys("“”„‟«»‹›「」『』", '"'),
        **dict.fromkeys([0x00AD, 0xFEFF, 0x2060, *range(0x200B, 0x2010)]),
        "\r": "\n",
    }
)
_RAISED = {ord(raised): plain for raised, plain in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-", strict=True)}
_RAISED_RUN = re.compile(f"[{''.join(map(chr, _RAISED))}]+")
BOX = re.compile(r"\\(?:boxed|fbox)\s*")
# "Answer" and "is" in the languages whose refusals are known.
ANSWER = (
    r"(?:\b(?:answers?|antwort|réponse|respuesta|resposta|risposta|ответ)\b(?:\s+(?:correct[ae]?|finale?|corretta))?"
    r"|答案|答え|回答|الإجابة|الجواب|उत्तर)"
)
IS = r"(?:\b(?:is|are|ist|lautet|est|es|é|è)\b|[:=是为は])"
HEADING = rf"^[# \t*_]*(?:the\s+)?(?:(?:final|correct)\s+)?{ANSWER}[ \t*_:]*\n"


def typed(text: str) -> str:
    """A text in the characters that are looked for."""
    text = _RAISED_RUN.sub(lambda found: f"^{{{found[0].translate(_RAISED)}}}", text.translate(_SPELLING))
    return "".join(_latex_of(character) if ord(character) > 127 else character for character in text)


def squeezed(text: str) -> str:
    """Without long runs of spaces, lines or marks, which say nothing and would take for ever."""
    return re.sub(r"(?:[ \t]{0,2}\n){2,}", "\n\n", re.sub(r"([*_ \t])\1+", r"\1\1", text))


def _latex_of(character: str) -> str:
    """A fraction that is one character as LaTeX, and every other one as it is."""
    above, slash, below = unicodedata.normalize("NFKC", character).partition("\u2044")
    return rf"\frac{{{above}}}{{{below}}}" if slash and above and below else character


def last_boxed(reply: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces close; None where there is none."""
    found = None
    for match in BOX.finditer(reply):
        rest = reply[match.end() :]
        if not rest.startswith("{"):
            # `\boxed 7`: TeX takes one token.
            token = re.match(r"(\\[A-Za-z]+|[^\s{}\\$]+)", rest)
            if token and re.search(r"\s$", match[0]):
                found = token[1]
            continue
        content = _braced(rest)
        if content is not None:
            found = content
    return None if found is None else found.strip()


def _braced(text: str) -> str | None:
    """What stands between the first brace and the one that closes it."""
    depth = 0
    for position, character in enumerate(text):
        # An escaped brace is a character of the answer: \{1, 2\}.
        if position and text[position - 1] == "\\" and character in "{}":
            continue
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[1:position]
    return None
