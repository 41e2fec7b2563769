"""The public data sets that castune knows by name: where they are, and what a row of each is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from castune.data.example import Example
from castune.data.tables import Row
from castune.errors import DataError

_ANNOTATION = re.compile(r"<<[^<>]*>>")


# WildJailbreak's files are tables of text, in which NA is two letters and an unused cell an empty text; so its card.
_TEXT_CELLS = {"delimiter": "\t", "keep_default_na": False}


def _identifier(value: object) -> str:
    """An id as text; none where there is none."""
    return "" if value is None else str(value)


@dataclass(frozen=True)
class NamedSource:
    """A public data set and how its rows become examples (`None`: the row is not part of the set)."""

    purpose: str  # what it measures: utility | safety | over-refusal; training sets: alignment
    hub_id: str
    config: str | None
    split: str
    licence: str
    convert: Callable[[Row], Example | None]
    gated: bool = False
    size: int | None = None  # examples it is known to have; None where nobody here has counted
    options: Mapping[str, Any] = field(default_factory=dict)  # what its card says to read its files with


def _mmlu(row: Row) -> Example:
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list):
        raise DataError(f"choices is {str(choices)[:60]!r}, accepted: a list of texts")
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise DataError(f"answer is {answer!r}, accepted: the 0-based index of the right choice")
    return Example(
        id="",
        prompt=row["question"],
        choices=tuple(choices),
        answer=answer,
        scoring="letter",
        group=row.get("subject"),
    )


def _commonsense_qa(row: Row) -> Example:
    choices, key = row["choices"], row["answerKey"]
    if not isinstance(choices, dict) or not all(isinstance(choices.get(name), list) for name in ("label", "text")):
        raise DataError(f"choices is {str(choices)[:60]!r}, accepted: lists of texts under label and text")
    if key not in choices["label"]:
        raise DataError(
            f"answerKey is {key!r}, accepted: one of {', '.join(map(str, choices['label']))}; the test split has none"
        )
    return Example(
        id=_identifier(row["id"]),
        prompt=row["question"],
        choices=tuple(choices["text"]),
        answer=choices["label"].index(key),
        scoring="letter",
        group=row.get("question_concept"),
    )


def _gsm8k(row: Row) -> Example:
    if not isinstance(row["answer"], str):
        raise DataError(f"answer is {row['answer']!r}, accepted: a worked solution with its number after '####'")
    solution, marked, target = row["answer"].rpartition("####")
    if not marked:
        raise DataError("column answer has no final number after '####'")
    # Solutions are annotated for a calculator (48/2 = <<48/2=24>>24), which no model is asked to write; what the prompt
    # asks for is a box.
    worked = _ANNOTATION.sub("", solution).strip()
    reply = f"{worked}\nThe final answer is \\boxed{{{target.strip()}}}." if worked else None
    return Example(id="", prompt=row["question"], reply=reply, target=target.strip(), scoring="number")


def _math(row: Row) -> Example:
    if not isinstance(row["answer"], str):
        raise DataError(f"answer is {row['answer']!r}, accepted: the final answer as text")
    return Example(
        id=_identifier(row.get("unique_id")),
        prompt=row["problem"],
        reply=row["solution"],
        target=row["answer"],
        scoring="boxed",
        group=row.get("subject"),
    )


def _prompt_and_category(row: Row) -> Example:
    return Example(id="", prompt=row["prompt"], group=row.get("category"))


def _strong_reject(row: Row) -> Example:
    return Example(id="", prompt=row.get("prompt") or row["forbidden_prompt"], group=row.get("category"))


def _advbench(row: Row) -> Example:
    # The hub's copy has prompt, target; the original csv goal, target. The target is the harmful opening, no reply.
    return Example(id="", prompt=row.get("prompt") or row["goal"])


def _harmbench(row: Row) -> Example:
    context = row.get("ContextString") or row.get("context") or ""
    behaviour = row.get("prompt") or row["Behavior"]
    return Example(
        id=_identifier(row.get("BehaviorID")),
        prompt=f"{context}\n\n{behaviour}" if context else behaviour,
        group=row.get("SemanticCategory") or row.get("category"),
    )


def _jailbreakbench(row: Row) -> Example:
    return Example(id=_identifier(row.get("Index")), prompt=row["Goal"], group=row.get("Category"))


def _xstest(label: str) -> Callable[[Row], Example | None]:
    def convert(row: Row) -> Example | None:
        if row["label"] != label:
            return None
        return Example(id=_identifier(row["id"]), prompt=row["prompt"], group=row.get("type"))

    return convert


def _wildjailbreak(row: Row) -> Example:
    prompt = row["vanilla"] if str(row["data_type"]).startswith("vanilla") else row["adversarial"]
    return Example(id="", prompt=prompt, reply=row["completion"], group=row["data_type"])


def _wildjailbreak_vanilla_harmful(row: Row) -> Example | None:
    return _wildjailbreak(row) if row["data_type"] == "vanilla_harmful" else None


def _wildjailbreak_eval(row: Row) -> Example | None:
    if row["data_type"] != "adversarial_harmful":
        return None
    return Example(id="", prompt=row["adversarial"], group=row["data_type"])


def _wildguard(row: Row) -> Example | None:
    if row["prompt_harm_label"] != "harmful":
        return None
    return Example(id="", prompt=row["prompt"], group=row.get("subcategory"))


def _in_the_wild(row: Row) -> Example:
    return Example(id="", prompt=row["prompt"], group=row.get("community"))


NAMED_SOURCES: dict[str, NamedSource] = {
    "mmlu": NamedSource("utility", "cais/mmlu", "all", "test", "MIT", _mmlu, size=14042),
    "csqa": NamedSource("utility", "tau/commonsense_qa", None, "validation", "MIT", _commonsense_qa, size=1221),
    "gsm8k": NamedSource("utility", "openai/gsm8k", "main", "test", "MIT", _gsm8k, size=1319),
    "math": NamedSource("utility", "HuggingFaceH4/MATH-500", None, "test", "MIT", _math, size=500),
    "advbench": NamedSource("safety", "walledai/AdvBench", None, "train", "MIT", _advbench, gated=True, size=520),
    "harmbench": NamedSource(
        "safety", "walledai/HarmBench", "standard", "train", "MIT", _harmbench, gated=True, size=200
    ),
    "strongreject": NamedSource(
        "safety", "walledai/StrongREJECT", None, "train", "MIT", _strong_reject, gated=True, size=313
    ),
    "or-bench": NamedSource(
        "over-refusal", "bench-llm/or-bench", "or-bench-hard-1k", "train", "CC BY 4.0", _prompt_and_category, size=1319
    ),
    "jailbreakbench": NamedSource(
        "safety", "JailbreakBench/JBB-Behaviors", "behaviors", "harmful", "MIT", _jailbreakbench, size=100
    ),
    "jailbreakbench-benign": NamedSource(
        "over-refusal", "JailbreakBench/JBB-Behaviors", "behaviors", "benign", "MIT", _jailbreakbench, size=100
    ),
    "xstest": NamedSource("over-refusal", "Paul/XSTest", None, "train", "CC BY 4.0", _xstest("safe"), size=250),
    "xstest-unsafe": NamedSource("safety", "Paul/XSTest", None, "train", "CC BY 4.0", _xstest("unsafe"), size=200),
    "dan": NamedSource(
        "safety",
        "TrustAIRLab/in-the-wild-jailbreak-prompts",
        "jailbreak_2023_12_25",
        "train",
        "MIT",
        _in_the_wild,
        size=1405,
    ),
    "wildjailbreak-train": NamedSource(
        "alignment",
        "allenai/wildjailbreak",
        "train",
        "train",
        "ODC-BY",
        _wildjailbreak,
        gated=True,
        size=261_559,
        options=_TEXT_CELLS,
    ),
    "wildjailbreak-vanilla-harmful": NamedSource(
        "safety",
        "allenai/wildjailbreak",
        "train",
        "train",
        "ODC-BY",
        _wildjailbreak_vanilla_harmful,
        gated=True,
        size=50_050,
        options=_TEXT_CELLS,
    ),
    "wildjailbreak": NamedSource(
        "safety",
        "allenai/wildjailbreak",
        "eval",
        "train",
        "ODC-BY",
        _wildjailbreak_eval,
        gated=True,
        size=2000,
        options=_TEXT_CELLS,
    ),
    "wildguard": NamedSource(
        "safety", "allenai/wildguardmix", "wildguardtest", "test", "ODC-BY", _wildguard, gated=True, size=754
    ),
}
