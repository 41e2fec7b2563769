"""How numbers are written."""

from __future__ import annotations

import pytest

from castune.core.numbers import counted, duration, gigabytes, number, p_value, percent, span, with_error


def test_minus_is_a_minus_and_a_rounded_zero_has_no_sign() -> None:
    assert number(-0.125, ".1f") == "−0.1"
    assert number(-0.04, "+.1f") == number(0.04, "+.1f") == "0.0"
    assert number(-1234.5, ",.0f") == "−1,234"
    assert number(1e-5, ".2g") == "1e−05"
    assert number(None) == "undefined"
    assert span(-1, 0.001) == "−1.00 to 0.00"


def test_values_with_their_errors() -> None:
    assert with_error(-0.5, 0.0125) == "−0.500 ± 0.013"
    assert with_error(2.0, 0.25, "+.1f") == "+2.0 ± 0.2"
    assert with_error(2.0, None, ".1f") == "2.0"
    assert percent(0.0313) == "3.1 %"
    assert percent(0.995, 0) == "100 %"


def test_p_values() -> None:
    assert (p_value(0.0009), p_value(0.001), p_value(0.0495), p_value(1)) == (
        "< 0.001",
        "= 0.001",
        "= 0.050",
        "= 1.000",
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (55, "55 s"), (90, "1.5 min"), (812, "13.5 min"), (5400, "1.5 h"), (1e6, "277.8 h")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_counts_and_memory() -> None:
    assert (counted(1, "seed"), counted(0, "seed"), counted(1200, "example")) == ("1 seed", "0 seeds", "1,200 examples")
    assert gigabytes(1.5e12) == "1,500.00 GB"
