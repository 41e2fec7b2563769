"""Whether two answers in LaTeX are mathematically equal. Pure."""

from __future__ import annotations

import importlib.util
import re
import threading
from typing import Any

from castune.core.answer_text import LONGEST, typed
from castune.errors import CastuneError

_UNICODE = {"−": "-", "–": "-", "∞": r"\infty ", "π": r"\pi ", "√": r"\sqrt ", "×": r"\times ", "·": r"\cdot "}
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{?(\d+)\}?")
_EXPONENT = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d{1,3})")
_IN_BASE = re.compile(r"([0-9A-Za-z]+)\s*_\s*\{?\s*(?:\\text\s*\{)?\s*(\d+)\s*\}*")


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

    if len(answer) > LONGEST:
        return None
    answer, target = _plain(answer), _plain(target)
    if not answer or len(answer) > LONGEST:
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
    answer = typed(answer)
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
