"""Faults planted in the code by hand, one at a time, where a wrong line would be believed: does `make test` notice?

    python tests/faults/planted.py WORK                  # all of them: a table of which test notices each
    python tests/faults/planted.py WORK --only "rank ties"

Each is planted in a copy of the project, and the tests named beside it are run there as `make test` runs them (without
those marked slow) until one fails. A fault that no longer finds its line ends the script: the table must be mended.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("src", "tests", "recipes", "docs", "pyproject.toml", "README.md")


class Fault(NamedTuple):
    """A line, what it becomes, and the tests that ought to notice."""

    what: str
    file: str
    line: str
    planted: str
    tests: str


FAULTS = [
    Fault(
        "sign of O(h)", "diagnosis/score.py",
        "return (1 - np.clip(cosine_H, -1, 1)) / 2", "return (1 + np.clip(cosine_H, -1, 1)) / 2",
        "unit/diagnosis/test_score.py",
    ),
    Fault(
        "ranks without the average of ties", "stats/ranking.py",
        "(first + last) / 2 / (n - 1)", "first / (n - 1)",
        "unit/stats/test_ranking.py",
    ),
    Fault(
        "S(h) with its ranks exchanged", "diagnosis/score.py",
        "np.exp(percentile_rank(utility_shift) - percentile_rank(safety_shift))",
        "np.exp(percentile_rank(safety_shift) - percentile_rank(utility_shift))",
        "unit/diagnosis/test_score.py",
    ),
    Fault(
        "query rows of a head off by one", "core/attention.py",
        "start = head * self.q_dim\n        return", "start = head * self.q_dim + 1\n        return",
        "unit/core/test_heads.py",
    ),
    Fault(
        "query rows of a KV group's slice in a fused projection", "core/attention.py",
        "(head // group) * (group + 2)", "(head // group) * (group + 1)",
        "unit/core/test_heads.py",
    ),
    Fault(
        "value rows of a KV group are its keys", "core/key_values.py",
        "return self._rows(group, self.v_dim, after_queries=1)", "return self._rows(group, self.v_dim, after_queries=0)",
        "unit/core/test_unit_layout.py",
    ),
    Fault(
        "the ablated head of a row is its neighbour", "core/ablation.py",
        "ablated_BW = owner_W == units.to(z.device)[:, None]", "ablated_BW = owner_W == units.to(z.device)[:, None] + 1",
        "unit/core/test_ablation.py",
    ),
    Fault(
        "resumed one layer too late", "core/ablation.py",
        "handle = layers[layer].register_forward_pre_hook(put_in",
        "handle = layers[min(layer + 1, len(layers) - 1)].register_forward_pre_hook(put_in",
        "unit/core/test_ablation.py",
    ),
    Fault(
        "a prefix shared with another prompt", "data/rows.py",
        "same = takewhile(lambda column: len(set(column)) == 1, zip(*roots, strict=False))",
        "same = zip(*roots, strict=False)",
        "unit/core/test_batching.py",
    ),
    Fault(
        "a row of LoRA's B unmasked", "tuning/row_lora.py",
        "    matrix.__class__ = MaskedLinear",
        "    mask = mask.clone()\n    mask[0] = True\n    matrix.__class__ = MaskedLinear",
        "unit/tuning/test_sparse_lora.py unit/tuning/test_mask.py",
    ),
    Fault(
        "no mask in forward", "tuning/row_lora.py",
        "return weight * self.unit_mask.to(weight.dtype)", "return weight",
        "unit/tuning/test_sparse_lora.py unit/tuning/test_tune.py",
    ),
    Fault(
        "frozen rows that do not start at zero, which weight decay moves", "tuning/row_lora.py",
        "matrix.weight *= matrix.unit_mask.to(matrix.weight.dtype)", "matrix.weight += 1e-3",
        "unit/tuning/test_sparse_lora.py unit/tuning/test_tune.py",
    ),
    Fault(
        "a merge that rounds twice", "tuning/verify.py",
        "return (rows + (b @ a) * scaling).to(rows.dtype).contiguous()",
        "return (rows + ((b @ a) * scaling).to(rows.dtype)).to(rows.dtype).contiguous()",
        "unit/tuning/test_mask.py unit/tuning/test_certify.py",
    ),
    Fault(
        "labels on the prompt", "data/rows.py",
        "row = cls(tuple(ids), tuple(positions), tokens, cut, reply_cut=reply_cut)\n",
        "row = cls(tuple(ids), (0, *positions), (ids[1], *tokens), cut, reply_cut=reply_cut)\n",
        "unit/core/test_losses.py unit/data/test_chat.py",
    ),
    Fault(
        "the end of turn is not trained", "data/template.py",
        "if not end_of_turn:", "if True:",
        "unit/data/test_chat.py",
    ),
    Fault(
        "the end of turn in the loss of a letter", "data/chat.py",
        "return self.row(example, prompt, [letters[example.answer]])",
        "return self.row(example, prompt, [[*letters[example.answer], self.end_token]])",
        "unit/data/test_chat.py",
    ),
    Fault(
        "special tokens of a user's text are tokens", "data/template.py",
        "ids += self.plain(token[0]) + self.plain(token[1:])", "ids += self.plain(token)",
        "unit/data/test_template.py",
    ),
    Fault(
        "a refused problem leaves the rate", "evaluation/reading.py",
        'None if is_missing else found["outcome"]',
        'None if is_missing or found["found"] is None else found["outcome"]',
        "unit/evaluation/test_evaluate.py",
    ),
    Fault(
        "tensors that PEFT leaves out are certified", "tuning/adapter_files.py",
        "if (why := misnamed(key)) is not None:", "if (why := None) is not None:",
        "unit/tuning/test_certify.py",
    ),
    Fault(
        "cells of a table are numbers", "data/tables.py",
        'yield where, _with_lists(dict(zip(columns, cells, strict=True)))',
        'yield where, _with_lists({k: v.lstrip("0") for k, v in zip(columns, cells, strict=True)})',
        "unit/data/test_columns.py",
    ),
    Fault(
        "the safe zone begins one head too early", "selection.py",
        "return ordered[-count:]\n    if zone == \"risky\"", "return ordered[-count - 1 : -1]\n    if zone == \"risky\"",
        "unit/test_selection.py",
    ),
    Fault(
        "a bucket off by one", "selection.py",
        "equal_parts(ordered, buckets)[bucket - 1]", "equal_parts(ordered, buckets)[bucket % buckets]",
        "unit/test_selection.py",
    ),
    Fault(
        "McNemar's test on examples that are not paired", "stats/estimates.py",
        "pairs = zip(before, after, strict=True)", "pairs = zip(sorted(before, key=str), sorted(after, key=str), strict=True)",
        "unit/stats/test_estimates.py",
    ),
    Fault(
        "Wilson's interval with n - 1", "stats/estimates.py",
        "    rate, z2 = successes / n, z**2\n", "    rate, z2 = successes / n, z**2\n    n = max(1, n - 1)\n",
        "unit/stats/test_estimates.py",
    ),
    Fault(
        "a cost ratio without a safety gain is zero", "stats/estimates.py",
        "        return None\n    return max(0.0,", "        return 0.0\n    return max(0.0,",
        "unit/stats/test_estimates.py",
    ),
    Fault(
        "a journal's line is read whatever its checksum", "core/journal.py",
        "if line != f'[\"{_checksum(record)}\", {record}]':", "if not line.endswith(']'):",
        "unit/core/test_journal.py",
    ),
    Fault(
        "an artifact that is written in its place", "artifacts/files.py",
        "        yield Path(temporary)\n        if private:", "        yield path\n        shutil.copyfile(path, temporary)\n        if private:",
        "unit/artifacts/test_artifacts.py",
    ),
    Fault(
        "a judge that reads the prompt", "core/refusals.py",
        "return [refuses(said(reply, in_thought=in_thought)) for reply in replies]",
        "return [refuses(f'{prompt} {reply}') for prompt, reply in zip(prompts, replies, strict=True)]",
        "unit/core/test_refusals.py unit/evaluation/test_judges.py",
    ),
    Fault(
        "a gradient that is projected though it does not conflict", "tuning/surgery.py",
        "return (1.0, -gram.gu / gram.uu) if gram.is_conflict else _UNCHANGED", "return (1.0, -gram.gu / gram.uu)",
        "unit/tuning/test_surgery.py",
    ),
]  # fmt: skip


def noticed_by(fault: Fault, place: Path) -> str | None:
    """The first test of the default tier that fails under the fault."""
    path = place / "src" / "castune" / fault.file
    text = path.read_text(encoding="utf-8")
    if fault.line not in text:
        sys.exit(f"{fault.what}: {fault.file} has no line {fault.line!r} any more")
    path.write_text(text.replace(fault.line, fault.planted, 1), encoding="utf-8")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", *(f"tests/{name}" for name in fault.tests.split())],
            cwd=place, env={**os.environ, "PYTHONPATH": str(place / "src")}, capture_output=True, text=True,
        )  # fmt: skip
    finally:
        path.write_text(text, encoding="utf-8")
    found = re.search(r"^(?:FAILED|ERROR) tests/(\S.*?)(?: - |$)", done.stdout, re.MULTILINE)
    return found[1].replace("|", r"\|") if found else None


def main() -> None:
    """Plant the faults and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    options = parser.parse_args()
    place = options.work.resolve() / "planted"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, place / name)
    unnoticed = 0
    print("| fault | in | noticed by | seconds |\n|---|---|---|---:|")
    for fault in (one for one in FAULTS if options.only in one.what):
        began = time.monotonic()
        test = noticed_by(fault, place)
        unnoticed += test is None
        print(f"| {fault.what} | `{fault.file}` | {f'`{test}`' if test else '**nothing**'} | {time.monotonic() - began:.0f} |", flush=True)  # fmt: skip
    sys.exit(unnoticed > 0)


if __name__ == "__main__":
    main()
