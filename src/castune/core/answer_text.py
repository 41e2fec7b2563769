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
_TOKEN = re.compile(r"(\\[A-Za-z]+|[^\s{}\\$]+)")
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
    found, closing = None, _closing(reply)
    for match in BOX.finditer(reply):
        at = match.end()
        if not reply.startswith("{", at):
            # `\boxed 7`: TeX takes one token.
            token = _TOKEN.match(reply, at)
            if token and match[0][-1].isspace():
                found = token[1]
        elif at in closing:
            found = reply[at + 1 : closing[at]]
    return None if found is None else found.strip()


def _closing(text: str) -> dict[int, int]:
    """Where each brace that is closed is closed."""
    found, open_at = {}, []
    for position, character in enumerate(text):
        # An escaped brace is a character of the answer: \{1, 2\}.
        if character not in "{}" or (position and text[position - 1] == "\\"):
            continue
        if character == "{":
            open_at.append(position)
        elif open_at:
            found[open_at.pop()] = position
    return found
