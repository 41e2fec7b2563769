"""Final answers in free text: found, and compared with the right one. Pure.

A reply without an answer that can be read is not right. Only a reply that is not there is unscored, which is for the
caller to know.
"""

from __future__ import annotations

import importlib.util
import re
import threading
import unicodedata
from fractions import Fraction
from typing import Any

from castune.data.example import LETTERS
from castune.errors import CastuneError

# Answers longer than this are none: parsing what a model repeats without end could take for ever.
_LONGEST = 400

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
_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
# "Answer" and "is" in the languages whose refusals are known.
_ANSWER = (
    r"(?:\b(?:answers?|antwort|réponse|respuesta|resposta|risposta|ответ)\b(?:\s+(?:correct[ae]?|finale?|corretta))?"
    r"|答案|答え|回答|الإجابة|الجواب|उत्तर)"
)
_IS = r"(?:\b(?:is|are|ist|lautet|est|es|é|è)\b|[:=是为は])"
_HEADING = rf"^[# \t*_]*(?:the\s+)?(?:(?:final|correct)\s+)?{_ANSWER}[ \t*_:]*\n"
# "The answer to the question is"; what is stated is looked at without being taken, so that a later statement on the
# same line is found too.
_STATED = re.compile(
    rf"(?:{_ANSWER}(?:\s+(?:to|for)(?:\s+[\w-]+){{1,8}}?)?(?:\s+\w+){{0,3}}?[\s*_\"']*{_IS}|{_HEADING})"
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
    rf"(?:(?:{_ANSWER}|\b(?:(?:correct|right|best|final)\s+(?:option|choice|one|letter)|option|choice)\b)"
    r"(?:\s+(?:to|for)(?:\s+[\w-]+){1,8}?)?(?:\s+here|,\s+then,)?[*_\"']*\s*"
    rf"(?:(?:(?:would|should|must|will)\s+be)\b|{_IS}|[>–—-])[*_]*\s*[:=]?"
    rf"|{_HEADING}"
    r"|\b(?:choose|pick|select|go(?:ing)?\s+with|opt\s+for)\b)"
    r"\s*(?:(?:therefore|thus|clearly|definitely|likely|probably|simply)\s+)?(?:is\s+)?"
    r"(?P<several>(?:either|both|all\s+of)\s+)?" + _OPTION + _LETTER,
    re.IGNORECASE | re.MULTILINE,
)
# "The answer is Paris (C).", "The answer is Paris, which is option C."
_STATED_WITH_TEXT = re.compile(
    rf"{_ANSWER}\s+is\b(?!\s+(?:not|never|neither|either)\b)(?:[^.?\n()]|\.(?=\S)){{1,300}}\.?\s?"
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
_UNICODE = {"−": "-", "–": "-", "∞": r"\infty ", "π": r"\pi ", "√": r"\sqrt ", "×": r"\times ", "·": r"\cdot "}
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{?(\d+)\}?")
_EXPONENT = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d{1,3})")
_IN_BASE = re.compile(r"([0-9A-Za-z]+)\s*_\s*\{?\s*(?:\\text\s*\{)?\s*(\d+)\s*\}*")


def _typed(text: str) -> str:
    """A text in the characters that are looked for."""
    text = _RAISED_RUN.sub(lambda found: f"^{{{found[0].translate(_RAISED)}}}", text.translate(_SPELLING))
    return "".join(_latex_of(character) if ord(character) > 127 else character for character in text)


def _squeezed(text: str) -> str:
    """Without long runs of spaces, lines or marks, which say nothing and would take for ever."""
    return re.sub(r"(?:[ \t]{0,2}\n){2,}", "\n\n", re.sub(r"([*_ \t])\1+", r"\1\1", text))


def _latex_of(character: str) -> str:
    """A fraction that is one character as LaTeX, and every other one as it is."""
    above, slash, below = unicodedata.normalize("NFKC", character).partition("\u2044")
    return rf"\frac{{{above}}}{{{below}}}" if slash and above and below else character


def last_boxed(reply: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces close; None where there is none."""
    found = None
    for match in _BOX.finditer(reply):
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


def require_math_verify() -> None:
    """Refuse to compare answers in LaTeX where the library for it is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise CastuneError("answers of this kind need math-verify: python -m pip install 'castune[eval]'")


def is_equal(answer: str, target: str) -> bool | None:
    """Whether two answers in LaTeX are mathematically equal (math-verify); None where `answer` cannot be read.

    Raises:
        CastuneError: math-verify is not installed.
    """
    require_math_verify()
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout as limited

    if len(answer) > _LONGEST:
        return None
    answer, target = _plain(answer), _plain(target)
    if not answer or len(answer) > _LONGEST:
        return None
    if answer == target:
        return True
    # Its time limits are signals, which only the main thread can take.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    how = [LatexExtractionConfig(boxed_match_priority=-1), ExprExtractionConfig()]
    parsed = [parse(f"${text}$", extraction_config=how, parsing_timeout=limit) for text in (target, answer)]
    if not all(parsed):
        return None if not parsed[1] else False
    # By default it rounds to 6 digits, where 0.142857 is 1/7.
    compared = {"float_rounding": 12, "allow_set_relation_comp": True, "timeout_seconds": limit}
    if verify(*parsed, **compared):
        return True
    try:
        complex_numbers = [limited(limit)(_complex)(one) for one in parsed]
    except TimeoutException:
        return False
    return bool(verify(*complex_numbers, **compared))


def _complex(parsed: list[Any]) -> list[Any]:
    """With the symbol i as the imaginary unit, which the parser does not take it for."""
    from sympy import Expr, I

    def of(part: Any) -> Any:
        units = {symbol: I for symbol in part.free_symbols if symbol.name == "i"}
        return part.subs(units).expand() if units else part

    return [of(part) if isinstance(part, Expr) else part for part in parsed]


def _plain(answer: str) -> str:
    """Without what does not belong to the value."""
    answer = _typed(answer)
    for character, latex in _UNICODE.items():
        answer = answer.replace(character, latex)
    answer = answer.strip().strip("$").strip().replace("{,}", "")
    # Not the second of two backslashes, which ends a row of a matrix.
    answer = re.sub(r"(?<!\\)\\(?:[,!;: ]|(?:left|right|displaystyle|[bB]igg?[lr]?)(?![A-Za-z]))", "", answer)
    answer = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", answer)
    scientific = _EXPONENT.fullmatch(answer.strip())
    if scientific:
        return rf"{scientific[1]} \times 10^{{{scientific[2]}}}"
    answer = _REPEATING.sub(lambda found: _fraction(*found.groups()), answer)
    in_base = _IN_BASE.fullmatch(answer.strip())
    if in_base and 2 <= int(in_base[2]) <= 36:
        try:
            return str(int(in_base[1], int(in_base[2])))
        except ValueError:
            pass
    return re.sub(r"\s+", " ", answer).strip().rstrip(".").strip()


def _fraction(whole: str, digits: str, repeated: str) -> str:
    """A repeating decimal as a fraction."""
    nines, tens = 10 ** len(repeated) - 1, 10 ** len(digits)
    numerator = int((whole + digits + repeated) or 0) - int((whole + digits) or 0)
    return rf"\frac{{{numerator}}}{{{nines * tens}}}"


def stated_number(reply: str) -> Fraction | None:
    """The number a reply gives as its answer; None where it gives none, or more than one.

    In this order: boxed, after the last `####`, in the last "the answer is ...", in a conclusion ("Therefore, she has 5
    left.") that ends the reply, or as all that the reply is ("66", "$66", "66 apples").
    """
    reply = _squeezed(_typed(reply))
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
    if _BOX.search(reply):
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
    if len(text) > _LONGEST:
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
    if scoring == "boxed" and (_BOX.search(reply) or _LATEX.search(reply.strip().rpartition("\n")[2])):
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
    if scoring == "boxed" and ("####" in target or len(target) > _LONGEST):
        raise CastuneError(
            f"{where}: answer is {target[:60]!r}..., accepted: the final answer alone, of at most {_LONGEST} characters"
        )


def _target_number(target: str) -> Fraction | None:
    """The number of a right answer, which may be a worked solution with its mark or box."""
    is_worked = "####" in target or _BOX.search(target)
    return stated_number(target) if is_worked else _number(_typed(target))


def stated_letter(reply: str, n_choices: int) -> str | None:
    """The letter a reply to a multiple-choice question chooses; None where it chooses none, or more than one.

    In this order: the last that is boxed or stated as the answer, the last that is called correct, what the reply
    begins with. Other letters that are spoken of do not count.
    """
    reply = _squeezed(_typed(reply))
    stated = [
        (match.start("letter"), _chosen(reply, match))
        for pattern in (_STATED_LETTER, _STATED_WITH_TEXT, _CONCLUDED_LETTER)
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
