"""Final answers: a hand-made truth, written by someone who had not seen the code, and properties."""

from __future__ import annotations

import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castune.core.answer_equality import is_equal
from castune.core.answer_letters import stated_letter
from castune.core.answer_text import last_boxed
from castune.core.answers import final_answer, is_right
from castune.data.example import LETTERS
from castune.errors import CastuneError

CASES = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "data" / "answers.jsonl").read_text(encoding="utf-8").split("\n")
    if line
]
SCORING = {"math": "boxed", "gsm8k": "number"}
# math-verify warns of what it cannot parse by raising inside and logging; antlr's runtime of its own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")


def outcome(case: dict[str, str]) -> bool | None:
    if case["kind"] == "letter":
        letter = stated_letter(case["reply"], 5 if case["target"] == "E" else 4)
        return None if letter is None else letter == case["target"]
    scoring = SCORING[case["kind"]]
    right = is_right(case["reply"], case["target"], scoring)
    # Not an answer is not right either.
    return None if final_answer(case["reply"], scoring) is None and not right else right


def test_there_are_enough_cases_of_every_kind_and_outcome() -> None:
    assert len(CASES) >= 200
    counts = {(case["kind"], case["outcome"]) for case in CASES}
    assert counts == {(kind, found) for kind in ("math", "gsm8k", "letter") for found in (True, False, None)}


@pytest.mark.parametrize("kind", ["math", "gsm8k", "letter"])
def test_the_truth(kind: str) -> None:
    wrong = [
        (case["id"], case["reply"], case["target"], found, case["why"])
        for case in CASES
        if case["kind"] == kind and (found := outcome(case)) is not case["outcome"]
    ]
    assert not wrong


@given(st.text(alphabet="{}\\boxed 12,-./$fracx", max_size=60))
def test_no_text_is_too_strange(text: str) -> None:
    found = last_boxed(text)
    if found is not None:
        assert found in text
    final_answer(text, "number")
    stated_letter(text, 4)


@given(st.integers(-(10**6), 10**6), st.integers(1, 400))
def test_equal_fractions_are_equal(numerator: int, denominator: int) -> None:
    assert is_right(rf"So \boxed{{{numerator}}}.", str(numerator), "boxed")
    twice = rf"\frac{{{2 * numerator}}}{{{2 * denominator}}}"
    assert is_equal(twice, rf"\frac{{{numerator}}}{{{denominator}}}")
    assert is_right(f"#### {numerator}/{denominator}", f"{numerator}/{denominator}", "number")
    assert is_equal(rf"\frac{{{numerator + 1}}}{{{denominator}}}", rf"\frac{{{numerator}}}{{{denominator}}}") is False


@pytest.mark.parametrize(
    "reply",
    [
        r"\boxed{0.\overline{" + "3" * 5000 + "}}",
        r"\boxed{x_{" + "9" * 5000 + "}}",
        "#### " + "9" * 5000,
        "#### 0." + "3" * 4300,
        r"\boxed{" + "1" * 5000 + "}",
    ],
)
def test_answers_of_thousands_of_digits_are_wrong(reply: str) -> None:
    assert is_right(reply, "5", "boxed" if "boxed" in reply else "number") is False
    final_answer(reply, "number")


@pytest.mark.slow  # they wait for the limit, 10 seconds
@pytest.mark.parametrize("answer", [r"i + 9^{9^{9^{9}}} i", "(3+2i)^{1000000007}"])
def test_an_answer_that_takes_for_ever_to_expand_is_not_waited_for(answer: str) -> None:
    started = time.monotonic()
    assert is_equal(answer, "5") is False
    assert time.monotonic() - started < 60


def test_endless_answers_are_wrong() -> None:
    assert is_right(r"\boxed{" + "9^" * 2000 + "9}", "9", "boxed") is False


def test_answers_of_400_characters_are_read_and_longer_ones_are_not() -> None:
    for length, expected in ((400, True), (401, False)):
        answer = "7" * length
        assert is_right(rf"\boxed{{{answer}}}", answer, "boxed") is expected
        assert is_right(f"#### {answer}", answer, "number") is expected
    # Not in what it is compared as either, where every π is `\pi `.
    assert is_equal("π+" * 150 + "1", "5") is None


@pytest.mark.parametrize(
    ("answer", "target"),
    [
        ("X", "X"), ("$101_2$", "5"), ("z_{36}", "35"), (r"\Big(1,2\Big)", "(1,2)"), (r"\bigl[1,2\bigr]", "[1,2]"),
        (r"1{,}000", "1000"), ("5 .", "5"), (".5", "0.5"), ("2π", r"\pi+\pi"),
    ],
)  # fmt: skip
def test_what_does_not_belong_to_a_value_does_not_count(answer: str, target: str) -> None:
    assert is_equal(answer, target)


@pytest.mark.parametrize(
    ("decimal", "fraction"),
    [
        (r"0.\overline{3}", "1/3"), (r".\overline{3}", "1/3"), (r"1.\overline{9}", "2"), (r"0.1\overline{6}", "1/6"),
        (r"2.0\overline{45}", "45/22"), (r"12.34\overline{567}", "45679/3700"),
    ],
)  # fmt: skip
def test_repeating_decimals_are_fractions(decimal: str, fraction: str) -> None:
    assert is_equal(decimal, fraction)


def test_what_has_no_value_cannot_be_read_and_equals_no_target() -> None:
    assert is_equal(r"\text{}", "5") is None
    assert is_equal("5", r"\text{}") is False


def test_decimals_are_compared_in_twelve_digits() -> None:
    assert is_equal("0.142857142857", "1/7")
    assert is_equal("0.14285714286", "1/7") is False
    assert is_equal("0.142857i", r"\frac{i}{7}") is False


def test_the_imaginary_unit_is_no_unknown() -> None:
    assert is_equal("(1+i)^2", "2i")
    assert is_equal("i^2", "-1")
    assert is_equal("x^2", "-1") is False


def test_answers_are_compared_outside_the_main_thread_too() -> None:
    """There a time limit by signals would be an error."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(is_equal, r"\frac{2}{4}", "0.5").result()
        assert pool.submit(is_equal, "(1+i)^2", "2i").result()


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(CastuneError) as error:
        is_equal("1", "1")
    assert str(error.value) == "answers of this kind need math-verify: python -m pip install 'castune[eval]'"


# -- what a reply gives


@pytest.mark.parametrize(
    ("reply", "content"),
    [
        (r"\boxed{a{b{c}}d}", "a{b{c}}d"),
        (r"\boxed{f = \left\{ 1, 2 \right.}", r"f = \left\{ 1, 2 \right."),  # an escaped brace opens nothing
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed 7, no: \boxed{8}", "8"),
        (r"\boxed{8}, no: \boxed 7", "7"),
        (r"\boxed \pi", r"\pi"),
        (r"\boxed \Delta x", r"\Delta"),
        (r"\boxed $x$", None),
        (r"\boxedby 7", None),  # a macro of another name
    ],
)
def test_the_box_of_a_reply(reply: str, content: str | None) -> None:
    assert last_boxed(reply) == content


@given(st.text(alphabet=r"\{}1 ", max_size=12).map(lambda text: rf"{text}\boxed{text[::-1]}\boxed{{{text}}}"))
def test_the_box_is_the_last_whose_braces_close_counted_one_by_one(reply: str) -> None:
    found = None
    for match in re.finditer(r"\\boxed\s*(?=\{)", reply):
        depth, rest = 0, reply[match.end() :]
        for at, character in enumerate(rest):
            if character in "{}" and not (at and rest[at - 1] == "\\"):
                depth += 1 if character == "{" else -1
            if depth == 0:
                found = (match.start(), rest[1:at].strip())
                break
    tokens = list(re.finditer(r"\\boxed\s+(\\[A-Za-z]+|[^\s{}\\$]+)", reply))
    if tokens and (found is None or tokens[-1].start() > found[0]):
        found = (tokens[-1].start(), tokens[-1][1])
    assert last_boxed(reply) == (None if found is None else found[1])


STATEMENTS = (
    "The answer is {} because it fits.", "the answer is {}.", "Option {}", "{}) as it fits", "({}) It fits.", r"\boxed{{{}}}",
    "I wavered between B and C, but the answer is {}", r"{0} is tempting. The answer is C? No: \boxed{{{0}}}",
    r"Half of 84 is \boxed{{42}}, so the answer is {}.",
)  # fmt: skip


@given(st.sampled_from(STATEMENTS), st.sampled_from(LETTERS[:10]), st.integers(2, 10))
def test_a_letter_is_found_however_it_is_stated_and_only_among_the_choices(
    statement: str, letter: str, n_choices: int
) -> None:
    reply = statement.format(letter)
    assert stated_letter(reply, n_choices) == (letter if letter in LETTERS[:n_choices] else None)


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        # Options that are spoken of after the answer, or before it.
        ("The correct answer is C. Option A is wrong because it is too early. Option D is too late.", "C"),
        ("The answer is B. Note that option A is a common distractor.", "B"),
        ("Option B is correct. Option A describes another thing.", "B"),
        ("Correct answer: C. Option B is what many pick; the answer A would need more heat.", "C"),
        ("Final answer: B\n\nWhy not the others? Answer A ignores friction. Answer C doubles it.", "B"),
        ("My answer is B, since option B fits best and option D does not.", "B"),
        ("A is wrong. B is wrong. C is correct.", "C"),
        ("Option A is correct? No. Option C is correct.", "C"),
        ("C. Because the answer choice A is for cats.", "C"),
        # Marks around the words.
        ("**Answer:** B", "B"),
        ("**Correct Answer:** B", "B"),
        ("**Answer**: B", "B"),
        ("Answer - B", "B"),
        ("I would choose option C.", "C"),
        ("Answer: D, not B", "D"),
        ("The answer is C, i.e. the heart.", "C"),
        # More than one, none, or the opposite: no answer, and never a lucky one.
        ("Answer: B or C", None),
        ("The answer is either A or D.", None),
        ("The answer is A and C.", None),
        ("Answer: A/B", None),
        ("The answer is b or c.", None),
        ("A is correct. B is correct.", None),
        ("Option A is incorrect.", None),
        ("The answer isn't A.", None),
        ("Answer: None of the above", None),
        ("Is the answer A?", None),
        # Quotation marks, brackets, LaTeX and tags around the letter, whatever the keyboard.
        ("The answer is 'C'.", "C"),
        ("The answer is “C”.", "C"),
        ("The answer is 「C」", "C"),
        (r"The answer is \(C\).", "C"),
        (r"The answer is $\text{C}$.", "C"),
        ("The answer is <b>C</b>", "C"),
        ("Two are odd.\n<answer> C </answer>", "C"),
        ('{"answer": "C"}', "C"),
        ("The answer is （Ｃ）", "C"),
        ("Answer：C", "C"),
        ("The answer is\u200b C.", "C"),
        ("\ufeffC", "C"),
        ("C\r\n", "C"),
        ("“B”", "B"),
        ("$B$", "B"),
        ("B – Paris", "B"),
        # The option's text before or behind the letter.
        ("The answer is Paris (C).", "C"),
        ("The answer is **Paris**, option C.", "C"),
        ("The answer is Paris (C) or Rome (D).", None),
        (r"\boxed{C. Paris}", "C"),
        (r"\boxed{\textbf{(C)}\ Paris}", "C"),
        # Other words for it.
        ("It's C.", "C"),
        ("Both fit at first. I think it's (C)", "C"),
        ("Therefore, C.", "C"),
        ("C is the answer.", "C"),
        ("Option C is the most accurate answer.", "C"),
        ("The answer to this multiple-choice question is C", "C"),
        ("The answer is the letter C", "C"),
        ("**Final Answer**\n\nC", "C"),
        ("### Answer\nC", "C"),
        ("Die Antwort ist C.", "C"),
        ("La respuesta correcta es C.", "C"),
        ("Réponse : C", "C"),
        ("Ответ: C", "C"),
        ("答案是C。", "C"),
        # The options once more, or several: no choice. A name that begins with a letter.
        ("A. dog\nB. cat\nC. cow\nD. pig", None),
        ("A) dog B) cat C) cow", None),
        ("A) dog\nB) cat\nAnswer: B", "B"),
        ("C, D", None),
        ("A, B, C", None),
        ("The answer is B-52", None),
        # One that is corrected, and one that is only spoken of.
        ("The answer is not A, it is C.", "C"),
        ("The answer isn't (A) but (C)", "C"),
        ("It is not option B; rather D.", "D"),
        ("The answer is not A.", None),
        ("The answer is not A, B or C.", None),
        ("The answer is A, not B, but C was close.", "A"),
        ("The answer is C. It is not A but it is close.", "C"),
    ],
)
def test_the_letter_is_the_one_that_is_stated_as_the_answer(reply: str, letter: str | None) -> None:
    assert stated_letter(reply, 4) == letter


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("I", "I"),
        ("The answer is I.", "I"),
        ("The answer is I because it is odd.", "I"),
        ("Answer: I don't know", None),
        ("Answer: I cannot answer that.", None),
        ("I, as a model, cannot tell.", None),
    ],
)
def test_the_pronoun_is_no_option(reply: str, letter: str | None) -> None:
    assert stated_letter(reply, 9) == letter


def test_a_number_is_looked_for_in_the_box_then_after_the_mark_then_in_what_is_stated() -> None:
    assert final_answer(r"The answer is 6. \boxed{7} #### 8", "number") == "7"
    assert final_answer("The answer is 6. #### 7 #### 8\n9", "number") == "8"
    assert final_answer("The answer is 6. The answer is 7, of 8.", "number") == "7"
    # What is marked is the answer, even where it is no number.
    assert final_answer("The answer is 6. #### none\n9", "number") is None
    assert final_answer("It takes 6 days.", "number") is None


@pytest.mark.parametrize(
    ("reply", "target", "right"),
    [
        # The paper's Tables 5 and 6, and answers without reasoning.
        ("Thus, the total number of frogs is 81.", "81", True),
        ("Therefore, Chris was charged for 80 GB over.", "80", True),
        ("66", "66", True),
        ("$66", "66", True),
        ("66 apples.", "66", True),
        ("Thus, she has 12 - 7 = 5 apples left.", "5", True),
        # All of the expression that is stated, not the first number in it.
        ("The answer is 12 * 4 = 48.", "48", True),
        ("The answer is 5 x 3 = 15", "15", True),
        ("So, the answer is $5 + $3 = $8.", "8", True),
        ("The answer is 18 dollars because 9 * 2 = 18.", "18", True),
        ("The answer is 12 * 4.", "12", False),
        ("The answer is 5 or 7.", "5", False),
        ("The answer is between 5 and 7.", "5", False),
        ("The answer is 5 to 7 days", "5", False),
        ("#### 5 or 6", "5", False),
        ("Answer: 5-7", "5", False),
        ("Therefore, 5 of the 12 are left.", "5", False),
        (r"So the amount is \boxed{18", "18", False),
        ("I apologize, but I cannot answer this question.", "5", False),
        # Emphasis, headings and LaTeX between the words and the number.
        ("**Answer**: 42", "42", True),
        ("**Final Answer**\n\n42", "42", True),
        ("The final answer is:\n\n$42$", "42", True),
        ("The final answer is:\n$$\n42\n$$", "42", True),
        ("Answer:\n1. She has 3 apples.\nSo she has 12.", "1", False),
        ("Die Antwort ist 42.", "42", True),
        ("答案：42", "42", True),
        # A heading of Markdown is not GSM8K's mark.
        ("#### Step 3: Conclusion\nThe answer is 18", "18", True),
        ("#### 3. Conclusion\nThe answer is 18", "18", True),
        ("#### Answer\n18", "18", True),
        # All of the number that is stated, and not its first digits.
        ("The answer is 1.5 × 10^3", "1500", True),
        ("The answer is 10^6", "1000000", True),
        ("Therefore, 5 million people live there.", "5000000", True),
        ("The answer is $5k", "5000", True),
        ("The answer is 6 and a half", "6.5", True),
        ("The answer is 6 and a half", "6", False),
        ("The answer is ４２", "42", True),
        ("The answer is 1½", "1.5", True),
        ("The answer is 18 m^2.", "18", True),
        ("The answer is 18 m².", "18", True),
        # Several numbers, bounds, or a calculation in words.
        ("The answer is 6, or 7", "6", False),
        ("The answer is 6, 7", "6", False),
        ("The answer is less than 42", "42", False),
        ("The answer is 10 plus 4", "10", False),
        ("The answer is 10 plus 4, which is 14", "14", True),
        ("The answer is 5 more than 42", "5", False),
        ("The answer is 5 feet 3 inches", "5", False),
        ("Therefore, 5 + 5 are left.", "5", False),
    ],
)
def test_the_number_is_the_one_that_is_stated_as_the_answer(reply: str, target: str, right: bool) -> None:
    assert is_right(reply, target, "number") is right
    if "\\" not in reply:
        # A problem that asks for a box, without one.
        assert is_right(reply, target, "boxed") is right


@pytest.mark.parametrize(
    ("box", "target", "right"),
    [
        (r"1.5 \times 10^{3}", "1500", True),
        (r"3\frac{1}{2}", "3.5", True),
        (r"\frac12", "0.5", True),
        (r"18^\circ", "18", True),
        (r"18\text{ cm}^2", "18", True),
        ("5²", "5", False),
        (r"2\sqrt{3}", "2", False),
        (r"2\pi", "2", False),
        ("5x", "5", False),
        ("2^{10}", "2", False),
    ],
)
def test_a_box_is_read_as_a_whole_where_a_number_is_asked_for(box: str, target: str, right: bool) -> None:
    assert is_right(rf"So it is \boxed{{{box}}}.", target, "number") is right


@pytest.mark.parametrize(
    ("typed", "target"), [("½", r"\frac12"), ("5²", "25"), ("x²", "x^2"), ("５", "5"), ("1.5e3", "1500")]
)
def test_answers_are_equal_however_they_are_typed(typed: str, target: str) -> None:
    assert is_equal(typed, target)


@pytest.mark.parametrize(
    "piece", ["answer is ", "answer: *", " \n", "\t", "A, ", "so it's ", "= 1 ", r"\frac", "10^", "#### Step 1: a\n"]
)
def test_no_reply_takes_for_ever(piece: str) -> None:
    started = time.process_time()
    for reply in (piece * (8_000 // len(piece)), "answer is" + piece * 500 + " \n" * 2_000):
        stated_letter(reply, 4)
        final_answer(reply, "number")
    assert time.process_time() - started < 5


def test_small_letters_are_letters_and_articles_are_none() -> None:
    assert stated_letter("the answer is a.", 4) == "A"
    assert stated_letter("the answer is a dog", 4) is None
    assert stated_letter("the answer is b because of the dog", 4) == "B"


@pytest.mark.parametrize("minus", ["-", "−", "–"])
@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("5", "5"), ("1.5/2", "3/4"), (r"\frac{3}{4}", "3/4"), (r"\dfrac{3}{4} cups", "3/4"), (".5", "1/2"), ("$3.50", "7/2"),
        ("12 000", "12000"), ("12,000", "12000"), ("1{,}000", "1000"), (r"1\,000", "1000"), ("**7**", "7"),
    ],
)  # fmt: skip
def test_numbers_are_read_however_they_are_written(minus: str, written: str, number: str) -> None:
    for reply in (f"12 - 9 = 3\n#### {minus}{written}\nor 4", f"#### 9\n#### {minus}{written}"):
        assert final_answer(reply, "number") == str(-Fraction(number))
    assert final_answer(f"The answer is {written}. Then the answer is unknown.", "number") == number
    assert is_right(f"#### {number}", f"It comes to {written} in all.", "number")
