"""How numbers are written for people: on the command line, in logs, in a study's sentences, on the page. Pure.

Minus signs are true ones, and a number that rounds to zero has no sign. JSON and CSV hold plain numbers instead.
"""

from __future__ import annotations

UNDEFINED = "undefined"


def number(value: float | None, pattern: str = ".2f") -> str:
    """A number by a format specification, such as `+.1f` or `,.0f`; None is undefined."""
    if value is None:
        return UNDEFINED
    text = format(value, pattern)
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def span(low: float, high: float, pattern: str = ".2f") -> str:
    """Both ends of an interval."""
    return f"{number(low, pattern)} to {number(high, pattern)}"


def with_error(value: float, standard_error: float | None, pattern: str = ".3f") -> str:
    """A value with its standard error, where that is known."""
    error = "" if standard_error is None else f" ± {number(standard_error, pattern.lstrip('+'))}"
    return number(value, pattern) + error


def percent(share: float, digits: int = 1) -> str:
    """A share in per cent."""
    return f"{number(100 * share, f'.{digits}f')} %"


def p_value(p: float) -> str:
    """A p-value with its sign of comparison, `= 0.012` or `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def counted(n: int, noun: str) -> str:
    """How many of something: `1 seed`, `1,200 examples`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def duration(seconds: float) -> str:
    """Wall time in a unit that fits."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def gigabytes(n_bytes: float) -> str:
    """Memory, in units of 10^9 bytes."""
    return f"{n_bytes / 1e9:,.2f} GB"
