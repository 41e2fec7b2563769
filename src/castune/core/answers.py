"""Final answers of worked replies: found, and compared with the right one. Pure.

A reply without an answer that can be read is not right. Only a reply that is not there is unscored, which is for the
caller to know.
"""

from __future__ import annotations

import re
from fractions import Fraction

from castune.core.answer_equality import is_equal
from castune.core.answer_text import ANSWER, BOX, HEADING, IS, LONGEST, last_boxed, squeezed, typed
from castune.errors import CastuneError

# "The answer to the question is"; what is stated is looked at without being taken, so that a later statement on the
# same line is found too.
_STATED = re.compile(
    rf"(?:{ANSWER}(?:\s+(?:to|for)(?:\s+[\w-]+){{1,8}}?)?(?:\s+\w+){{0,3}}?[\s*_\"']*{IS}|{HEADING})"
    r"(?=(?:[\s*_\"'`:=$(]|\\[(\[])*(?P<value>[^\n]+))",
    re.IGNORECASE | re.MULTILINE,
)
# A heading of Markdown, which GSM8K's mark looks like: "#### Step 3: Conclusion", "#### 3. Conclusion".
_TITLE = re.compile(r"\D*$|\W*(?:[^\W\d]+\s+)?\d+\W*[.):]\s*[^\W\d]")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(
    r"[-+−–]?\s?(?:\\?\$)?\s?"
    rf"(?:(?:{_DIGITS} )?{_DIGITS}(?:\.\d+)?\s?/\s?{_DIGITS}|{_DIGITS}(?:\.\d+)?(?:[eE][-+]?\d{{1,3}}\b)?|\.\d+)"
)
# What makes a number the beginning of something else: "1,2,3", "10:30", "12,34", "3.1.2", "5x", "2(3 + 4)".
_GOES_ON = re.compile(
    r"[,.:]\d|\d|\((?=[\d\\xyz])|[xyz](?![^\W_])|\s*(?:[√π]|\\(?:sqrt|pi|theta|ln|log|sin|cos)(?![A-Za-z]))"
)
_TIMES = re.compile(r"\s*(hundred|thousand|million|billion|trillion|dozen)s?\b|(?-i:(k|K|M|bn|B)\b)", re.IGNORECASE)
_POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "k": 3, "m": 6, "bn": 9, "b": 9}
_AND_A_PART = re.compile(r"\s*(?:[^\W\d_]+\s+)?and\s+(?:a|one)[\s-](half|third|quarter)\b", re.IGNORECASE)
_PARTS = {"half": Fraction(1, 2), "third": Fraction(1, 3), "quarter": Fraction(1, 4)}
# "1.5 × 10^{3}", "10^6".
_SCIENTIFIC = re.compile(
    r"(?:(?P<factor>\d)\s*(?:×|\\times|\\cdot|[*x·])\s*)?(?<![\d.,])10\s*\^\s*(?P<brace>\{)?\s*(?P<sign>[-+−–]?)"
    r"(?P<power>\d{1,3})(?!\d)(?(brace)\s*\})"
)
_FRACTION = re.compile(r"(?P<mixed>\d)?\s*\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_NEGATED = re.compile(r"\s*(?:not|never|neither)\b", re.IGNORECASE)
# A sentence that concludes, where nothing is stated as the answer in so many words.
_CONCLUDES = re.compile(
    r"[\s*_]*(?:thus|therefore|hence|so|consequently|in total|in conclusion|altogether|finally)\b", re.IGNORECASE
)
_LATEX = re.compile(r"\\(?![dt]?frac\s*\{\d+\}\s*\{\d+\})[A-Za-z]")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
# A number, or what one is called, and not the number of a step: "x = 5", but not "1. First".
_BEGINS = re.compile(rf"(?!\d+[.)]\s+[^\W\d])(?:[A-Za-z]\s*=\s*)?(?:\\[dt]?frac|{_NUMBER.pattern})")
# A number alone, or with a unit of up to three words.
_BARE = re.compile(rf"[\s*_$(]*{_NUMBER.pattern}(?:\s*[^\W\d_]+){{0,3}}[\s*_$%°).]*")
# Of a power without the unit: "18 m^2" is an area.
_CALCULATES = re.compile(
    r"\s*(?:\^|(?:[^\W\d_]+\s*)?(?:[+*×÷]|\\times|\\cdot|[-−–/x]\s*(?=[\d$(])"
    r"|(?:plus|minus|times|(?:divided|multiplied)\s+by|(?:more|less|fewer)\s+than)\b))\s*[\d$({\\]",
    re.IGNORECASE,
)
_EQUALS = re.compile(r"=|\b(?:equals|which\s+is|makes)\b", re.IGNORECASE)
# "5 or 7", "5, 7.", "5 feet 3 inches".
_ANOTHER = re.compile(
    r"\s*(?:[^\W\d_]+\s*)?(?:\bor\b|\band\b|\bto\b|[-–—])\s*(?:\\?\$)?\d"
    rf"|\s*,(?:\s*(?:or|and)\b)?{_NUMBER.pattern}\s*(?:[.;)](?!\d)|$)"
    r"|\s*(?:feet|foot|ft|h|hrs?|hours?|min|minutes?|days?|weeks?|months?|years?|pounds?|lbs?|yards?|m|km|kg),?\s+\d+\s*"
    r"[^\W\d_]",
    re.IGNORECASE,
)
_BETWEEN = re.compile(
    r"(?:\b(?:between|either|(?:less|fewer|more|greater|smaller|larger|higher|lower|other)\s+than)|[<>≤≥≠])\s*$",
    re.IGNORECASE,
)


def stated_number(reply: str) -> Fraction | None:
    """The number a reply gives as its answer; None where it gives none, or more than one.

    In this order: boxed, after the last `####`, in the last "the answer is ...", in a conclusion ("Therefore, she has 5
    left.") that ends the reply, or as all that the reply is ("66", "$66", "66 apples").
    """
    reply = squeezed(typed(reply))
    boxed = last_boxed(reply)
    if boxed is not None:
        return _number(boxed)
    marked = _marked(reply)
    if marked is not None:
        return _number(marked)
    values = [match["value"] for match in _STATED.finditer(reply) if _is_value(reply, match)]
    stated = [value for value in values if re.search(r"\d", value) and not _NEGATED.match(value)]
    if stated:
        return _number(stated[-1])
    if BOX.search(reply):
        return None  # it was cut off inside its box
    last = _SENTENCE_END.split(reply.strip())[-1]
    if _CONCLUDES.match(last):
        result = _result(_without_separators(last))
        return _number(result) if len({_value(found[0]) for found in _NUMBER.finditer(result)}) == 1 else None
    return _number(reply) if _BARE.fullmatch(_without_separators(reply)) else None


def _marked(reply: str) -> str | None:
    """The line behind the last `####` that is not the title of text below it; None without."""
    before, marked, after = reply.rpartition("####")
    while marked:
        line, _, below = after.strip().partition("\n")
        is_title = below.strip() and not before.rpartition("\n")[2].strip() and _TITLE.match(line)
        if not is_title:
            return line
        before, marked, after = before.rpartition("####")
    return None


def _is_value(reply: str, match: re.Match[str]) -> bool:
    """Whether what follows "the answer is" states one: in its line anything, below it what begins with a number."""
    value = match["value"]
    is_below = "\n" in match[0] or "\n" in reply[match.end() : match.start("value")]
    return not is_below or bool(_BEGINS.match(value))


def without_cut_sentence(reply: str) -> str:
    """A cut reply without the sentence it was cut in, whose number may lack digits; whole where a box is closed."""
    return reply if last_boxed(reply) is not None else "\n".join(_SENTENCE_END.split(reply)[:-1])


def _without_separators(text: str) -> str:
    """Numbers as they are read: fractions with a slash, thousands together, no emphasis."""
    text = _FRACTION.sub(_with_slash, re.sub(r"\^\s*\{?\s*\\circ\b\s*\}?", "", text))
    text = _SCIENTIFIC.sub(
        lambda found: f"{found['factor'] or 1}e{found['sign'].replace('−', '-').replace('–', '-')}{found['power']}",
        text,
    )
    return re.sub(r"\{,\}|\\[,!;: ]|(?<=\d)[ \u2009\u202f\u00a0](?=\d{3}\b)|[*_](?!\s)|(?<!\s)[*_]", "", text)


def _with_slash(fraction: re.Match[str]) -> str:
    """A fraction of LaTeX, of one digit each without braces, behind the whole number that goes with it."""
    mixed, *parts = fraction.groups()
    return f"{mixed + ' ' if mixed else ' '}{parts[0] or parts[1]}/{parts[2] or parts[3]}"


def _result(text: str) -> str:
    """What a calculation comes to: "12 * 4 = 48" says 48."""
    to_last_digit = re.match(r".*\d", text, re.DOTALL)
    equals = list(_EQUALS.finditer(to_last_digit[0])) if to_last_digit else []
    return text[equals[-1].end() :] if equals else text


def _number(text: str) -> Fraction | None:
    """The number of a text that states one, as it is written for people or in LaTeX.

    The first, behind the last equals sign of its calculation. "5 or 7", "between 5 and 7", "12 * 4" are no number.
    """
    text = _without_separators(text)
    first = _NUMBER.search(text)
    if first is not None and _CALCULATES.match(text, first.end()):
        # To the end of the sentence.
        sentence = _SENTENCE_END.split(text)[0]
        result = _result(sentence)
        text = "" if result is sentence else result
    match = _NUMBER.search(text)
    if match is None or _ANOTHER.match(text, match.end()) or _BETWEEN.search(text[: match.start()]):
        return None
    if _GOES_ON.match(text, match.end()):
        return None
    times = _TIMES.match(text, match.end())
    power = 0 if times is None else _POWERS.get((times[1] or times[2]).lower())
    part = _AND_A_PART.match(text, match.end())
    value = _value(match[0])
    if value is None or power is None:
        return None
    return (value + (_PARTS[part[1].lower()] if part else 0)) * Fraction(10) ** power


def _value(text: str) -> Fraction | None:
    """The value of what `_NUMBER` matches: "-1,234.5", "3/4", "3 1/2", "3.0e2"."""
    text = re.sub(r"[,$\\]", "", text).replace("−", "-").replace("–", "-").strip()
    sign = -1 if text.startswith("-") else 1
    whole, mixed, part = re.sub(r"\s*/\s*", "/", text.lstrip("+-").strip()).rpartition(" ")
    if len(text) > LONGEST:
        return None
    try:
        value = Fraction(*map(Fraction, part.split("/")))
        return sign * (value + int(whole) if mixed else value)
    except (ValueError, ZeroDivisionError):
        return None


def final_answer(reply: str, scoring: str) -> str | None:
    """What a worked reply gives as its answer, as it is compared; None where it gives none.

    Args:
        reply: what the reply says.
        scoring: `boxed` or `number`. Without any box, a problem that asks for one is answered by a plain number that is
            stated.
    """
    if scoring == "boxed" and (BOX.search(reply) or _LATEX.search(reply.strip().rpartition("\n")[2])):
        return last_boxed(reply)
    stated = stated_number(reply)
    return None if stated is None else str(stated)


def is_right(reply: str, target: str, scoring: str) -> bool:
    """Whether a worked reply comes to `target`; not where it comes to nothing that can be read.

    Args:
        reply: what the reply says.
        target: the right answer; for `number` it has digits.
        scoring: `boxed`: the last boxed answer, mathematically equal. `number`: the stated number.
    """
    found = final_answer(reply, scoring)
    if found is None:
        return False
    return bool(is_equal(found, target)) if scoring == "boxed" else stated_number(reply) == _target_number(target)


def require_readable(target: str, scoring: str, where: str) -> None:
    """Refuse the answer to a problem with which no reply could agree.

    Args:
        target: the right answer.
        scoring: `boxed` or `number`.
        where: the example, for the message.
    """
    if scoring == "number" and _target_number(target) is None:
        raise CastuneError(f"{where}: answer is {target[:60]!r}, accepted for scoring by number: one number")
    if scoring == "boxed" and ("####" in target or len(target) > LONGEST):
        raise CastuneError(
            f"{where}: answer is {target[:60]!r}..., accepted: the final answer alone, of at most {LONGEST} characters"
        )


def _target_number(target: str) -> Fraction | None:
    """The number of a right answer, which may be a worked solution with its mark or box."""
    is_worked = "####" in target or BOX.search(target)
    return stated_number(target) if is_worked else _number(typed(target))
