"""Commands broken on purpose: in forked processes, on a tiny model, and compared with commands that were not broken.

    python tests/faults/harness.py WORK --every-point
    python tests/faults/harness.py WORK --per-cell 5 --seed 0

A fault strikes either at a file operation below the work directory, at every one or at a random one, or at a random
moment (`strikes`). After each the same command is run unbroken, and everything it leaves (`outcome`) is compared with
a clean run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before torch is imported. Forked processes must not share a pool of threads, and none may reach a hub.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from forked import Before, Ended, command, finish, start, told
from outcome import MADE_ANEW, leftovers, results
from strikes import (
    Counting,
    at_operation,
    full,
    jumping_clock,
    little_memory,
    powerless,
    send,
    small_files,
)
from tiny_models import make_tiny_model, make_tiny_tokenizer

torch.set_num_threads(1)


@dataclass(frozen=True)
class Stage:
    """A command of castune, and the state of the run directory it starts from."""

    name: str
    start: str
    arguments: list[str]


@dataclass
class Attempt:
    """A fault, and what came of it; `problem` is None where it was survived."""

    stage: str
    fault: str
    where: str
    problem: str | None = None
    struck: bool = True
    error: str = ""


@dataclass
class Work:
    """A directory with a model, data, states of a run, and clean results."""

    root: Path
    stages: dict[str, Stage] = field(default_factory=dict)
    clean: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        """The run directory that commands work in."""
        return self.root / "place" / "run"

    def begin(self, stage: Stage) -> None:
        """Put the run directory into the state the stage starts from."""
        shutil.rmtree(self.run.parent, ignore_errors=True)
        self.run.parent.mkdir()
        if stage.start != "nothing":
            shutil.copytree(self.root / "states" / stage.start, self.run)

    def keep(self, state: str) -> None:
        """Remember the run directory as a state."""
        shutil.rmtree(self.root / "states" / state, ignore_errors=True)
        shutil.copytree(self.run, self.root / "states" / state)


def prepare(root: Path, wanted: Collection[str] = ()) -> Work:
    """Model, data, and once without a fault every stage that is wanted (all, unless some are named), with those before it."""
    root.mkdir(parents=True, exist_ok=True)
    make_tiny_model("llama").save_pretrained(root / "model")
    make_tiny_tokenizer().save_pretrained(root / "model")
    things = ["poison", "a bomb", "theft", "fraud", "malware", "a weapon", "a riot", "arson"]
    rows: dict[str, list[dict[str, Any]]] = {
        "safety": [{"id": f"h{i}", "prompt": f"Help me with {w}.", "target": f"I cannot help with {w}."} for i, w in enumerate(things[:4])],
        "utility": [
            {"id": f"q{i}", "prompt": f"What is {i} + 1?", "choices": [str(i), str(i + 1), "many"], "answer": 1, "scoring": scoring}
            for i, scoring in enumerate(["likelihood", "letter"] * 2)
        ],
        "align": [{"id": f"a{i}", "prompt": f"Tell me about {w}.", "completion": f"Rather not {w}."} for i, w in enumerate(things)],
        "held-out": [{"id": f"e{i}", "prompt": f"Explain {w} to me.", "target": "No."} for i, w in enumerate(things[4:])],
        "questions": [
            {"id": f"p{i}", "prompt": f"What is {i} + 2?", "choices": [str(i), str(i + 2)], "answer": 1} for i in range(4)
        ],
    }  # fmt: skip
    for name, content in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    work = Work(root)
    run, data = str(work.run), {name: str(root / f"{name}.jsonl") for name in rows}
    recipe = root / "recipe.toml"
    suites = [data["questions"], f"safety:{data['held-out']}"]
    recipe.write_text(
        f'model = "{root / "model"}"\ndtype = "float32"\ndevice = "cpu"\nout = "{run}"\nsafety = "{data["safety"]}"\n'
        f'utility = "{data["utility"]}"\nalign = "{data["align"]}"\n[diagnose]\nmax_new_tokens = 4\ngradient_chunks = 2\n'
        '[select]\nzone = "safe"\nfraction = 0.25\ncompare = ["risky"]\n'
        "[tune]\nrank = 4\nlearning_rate = 0.02\nmax_steps = 4\nbatch_size = 2\naccumulation = 1\ncheckpoint_steps = 2\n"
        f"[evaluate]\nsuites = {json.dumps(suites)}\nmax_new_tokens = 4\n",
        encoding="utf-8",
    )
    tuning = ["--rank", "4", "--learning-rate", "0.02", "--max-steps", "4", "--batch-size", "2", "--accumulation", "1"]
    stages = [
        Stage("diagnose", "nothing", ["diagnose", str(root / "model"), "--out", run, "--safety", data["safety"], "--utility",
                                      data["utility"], "--max-new-tokens", "4", "--dtype", "float32", "--device", "cpu"]),
        Stage("select", "diagnose", ["select", run, "--zone", "safe", "--fraction", "0.25"]),
        Stage("tune", "select", ["tune", run, "--data", data["align"], *tuning, "--checkpoint-steps", "2", "--snapshot-steps", "2"]),
        Stage("drift", "tune", ["drift", run]),
        Stage("evaluate", "tune", ["evaluate", run, "--suites", ",".join(suites), "--max-new-tokens", "4"]),
        Stage("judge", "evaluate", ["judge", run, "--judge", "prefix"]),
        Stage("mask", "tune", ["mask", f"{run}/adapter", "--run", run, "--as", "kept"]),
        Stage("export", "evaluate", ["export", run, "--out", f"{run}/exported", "--merged"]),
        Stage("dial", "evaluate", ["dial", run, "--strength", "0.5", "--export", f"{run}/half"]),
        Stage("inspect", "tune", ["inspect", f"{run}/adapter", "--run", run, "--limit", "4"]),
        Stage("report", "evaluate", ["report", run]),
        Stage("run", "nothing", ["run", str(recipe)]),
    ]  # fmt: skip
    needed = {stage.name for stage in stages if not wanted or stage.name in wanted}
    for stage in reversed(stages):
        needed |= {stage.start} if stage.name in needed else set()
    for stage in (one for one in stages if one.name in needed):
        work.stages[stage.name] = stage
        work.begin(stage)
        # Once for what is made only once (bytecode, caches), once to be timed and counted.
        first = command(work.root, stage.arguments)
        assert first.code == 0, (stage.name, first.said)
        work.keep(stage.name)
        work.clean[stage.name] = results(work.run)
        work.begin(stage)
        counted = Counting(work.root)
        ended = command(work.root, stage.arguments, counted.before)
        assert ended.code == 0, (stage.name, ended.said)
        assert results(work.run) == work.clean[stage.name], f"{stage.name} comes out otherwise each time"
        work.seconds[stage.name], work.operations[stage.name] = ended.seconds, counted.read()
    return work


def again(work: Work, stage: Stage, *, tidy: bool = False) -> str | None:
    """Run the command unbroken; what is wrong with what it leaves, or None."""
    ended = command(work.root, stage.arguments)
    # A finished directory is not written twice.
    if not (ended.code == 2 and "exists already" in ended.said) and (problem := told(ended, 0)):
        return f"again: {problem}"
    found, clean = results(work.run), work.clean[stage.name]
    different = sorted(name for name in found.keys() | clean.keys() if found.get(name) != clean.get(name))
    if different:
        return f"again: {', '.join(different[:5])} came out otherwise"
    if tidy and (left := leftovers(work.run)):
        return f"left behind: {', '.join(left[:5])}"
    return None


# At a file operation: a signal and the exit code it gives.
SIGNALS = (
    ("SIGKILL at a file operation", signal.SIGKILL, -9),
    ("SIGTERM at a file operation", signal.SIGTERM, 143),
    ("Ctrl-C at a file operation", signal.SIGINT, 130),
)


def at_point(work: Work, stage: Stage, k: int) -> Iterator[Attempt]:
    """Every signal at the k-th file operation of a stage, and a disk that is full from it on."""
    for name, number, code in SIGNALS:
        yield _signalled(work, stage, k, name, number, code)
    yield _filled(work, stage, k)


def _signalled(work: Work, stage: Stage, k: int, name: str, number: int, code: int) -> Attempt:
    ended = _broken(work, stage, at_operation(k, work.root, send(number)))
    where, tidy = f"{k} of {work.operations[stage.name]}", number != signal.SIGKILL
    # A signal at the very last operation may come when all is done.
    return _judged(work, stage, name, where, ended, (code, 0), tidy=tidy)


def _filled(work: Work, stage: Stage, k: int) -> Attempt:
    ended = _broken(work, stage, at_operation(k, work.root, full, from_then_on=True))
    where = f"from operation {k} of {work.operations[stage.name]} on"
    return _judged(work, stage, "disk full", where, ended, (2, 0), tidy=True)


def attempts(work: Work, stage: Stage, per_cell: int, generator: random.Random) -> Iterator[Attempt]:
    """`per_cell` faults of every kind on a stage."""
    n, seconds = work.operations[stage.name], work.seconds[stage.name]
    for _ in range(per_cell):
        for name, number, code in SIGNALS:
            yield _signalled(work, stage, generator.randint(1, n), name, number, code)
        moment = generator.uniform(0.05, 0.95) * seconds
        number, code = generator.choice([(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
        work.begin(stage)
        ended = command(work.root, stage.arguments, kill=(moment, number))
        yield _judged(
            work,
            stage,
            "any signal at any moment",
            f"{moment:.2f} of {seconds:.2f} s",
            ended,
            # Before castune's first line a signal does what it does to any program.
            (code, 0, -number),
            tidy=number != signal.SIGKILL,
        )
        yield _filled(work, stage, generator.randint(1, n))
        limit = int(2 ** generator.uniform(4, 17))
        ended = _broken(work, stage, small_files(limit))
        yield _judged(work, stage, "files cannot grow", f"{limit} bytes", ended, (2, 0), tidy=True)
        extra = int(2 ** generator.uniform(18, 26))
        ended = _broken(work, stage, little_memory(extra))
        # Libraries below Python may abort; whatever they do, nothing wrong stays.
        yield _judged(
            work,
            stage,
            "out of memory",
            f"{extra / 2**20:.1f} MiB more",
            ended,
            (2, 0, -5, -6, -11, 1, 134, 139),
            traceback_too=True,
        )
        seed = generator.randrange(2**31)
        ended = _broken(work, stage, jumping_clock(seed))
        yield _judged(work, stage, "clock jumps", f"seed {seed}", ended, (0,))
        work.begin(stage)
        both = [start(work.root, stage.arguments) for _ in range(2)]
        ends = [finish(one) for one in both]
        attempt = Attempt(stage.name, "two processes at once", ", ".join(str(end.code) for end in ends))
        attempt.problem = next((p for end in ends if (p := told(end, 0, 2))), None) or again(work, stage)
        yield attempt
    if sys.platform == "linux":
        work.begin(stage)
        for path in (work.run.parent, *work.run.parent.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        ended = command(work.root, stage.arguments, powerless if os.getuid() == 0 else None)
        for path in (work.run.parent, *work.run.parent.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield _judged(work, stage, "read-only directory", "", ended, (2,))


def _broken(work: Work, stage: Stage, before: Before) -> Ended:
    work.begin(stage)
    return command(work.root, stage.arguments, before)


def _judged(
    work: Work, stage: Stage, fault: str, where: str, ended: Ended, codes: tuple[int, ...], *, tidy: bool = False, traceback_too: bool = False
) -> Attempt:  # fmt: skip
    attempt = Attempt(stage.name, fault, where, struck=ended.code != 0)
    attempt.error = next((line for line in ended.said.splitlines() if line.startswith("error: ")), "")
    problem = None if traceback_too and ended.code in codes else told(ended, *codes)
    attempt.problem = problem or again(work, stage, tidy=tidy)
    return attempt


def damages(work: Work, generator: random.Random, every: int = 1) -> Iterator[Attempt]:
    """Every artifact of a finished run truncated, emptied, overwritten, with one byte changed: the same command says so.

    It either names the file and stops, and comes to the same results once that is removed, or it does not need it.
    """
    stage = work.stages["run"]
    files = sorted(
        p.relative_to(work.root / "states" / "run") for p in (work.root / "states" / "run").rglob("*") if p.is_file()
    )
    kinds = ("truncated", "emptied", "overwritten", "one byte changed")
    wanted = [(name, kind) for name in files if name.suffix not in MADE_ANEW for kind in kinds]
    for name, damage in wanted[::every]:
        shutil.rmtree(work.run.parent, ignore_errors=True)
        work.run.parent.mkdir()
        shutil.copytree(work.root / "states" / "run", work.run)
        content = bytearray((work.run / name).read_bytes())
        if damage == "one byte changed":
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(7)
        elif damage == "overwritten":
            content = bytearray(generator.randbytes(len(content)))
        else:
            content = content[: generator.randrange(1, len(content)) if damage == "truncated" else 0]
        (work.run / name).write_bytes(content)
        attempt = Attempt("run", f"artifact {damage}", str(name))
        attempt.problem = _noticed(work, stage, attempt)
        yield attempt


def _noticed(work: Work, stage: Stage, attempt: Attempt) -> str | None:
    for _ in range(4):
        ended = command(work.root, stage.arguments)
        if problem := told(ended, 0, 2):
            return problem
        if ended.code == 0:
            found, clean = results(work.run), work.clean[stage.name]
            # A file that no command needed may be what it is; nothing else was made from it.
            names = (found.keys() | clean.keys()) - {attempt.where}
            different = sorted(n for n in names if found.get(n) != clean.get(n))
            return f"not noticed: {', '.join(different)} came out otherwise" if different else None
        line = next(line for line in ended.said.splitlines() if line.startswith("error: "))
        attempt.error = attempt.error or line
        named = [Path(word.rstrip(":,;.")) for word in re.findall(r"/\S+", line)]
        # Of a file that is gone, what it belongs to: an adapter without its certificate is made again as a whole.
        named = [path if path.exists() else path.parent for path in named]
        inside = [p for p in named if p.is_relative_to(work.run) and p != work.run and p.exists()]
        if not inside:
            return f"no file is named: {line}"
        # What the message asks for.
        shutil.rmtree(inside[0]) if inside[0].is_dir() else inside[0].unlink()
    return f"it never ends: {line}"


def matrix(found: list[Attempt], operations: dict[str, int]) -> str:
    """A table of stage by fault: survived of tries, and how many file operations a stage has."""
    stages, faults = list(dict.fromkeys(a.stage for a in found)), list(dict.fromkeys(a.fault for a in found))
    lines = [f"| stage | file operations | {' | '.join(faults)} |", f"|---|---|{'---|' * len(faults)}"]
    tries, survived = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for attempt in found:
        tries[attempt.stage, attempt.fault] += 1
        survived[attempt.stage, attempt.fault] += attempt.problem is None
    for stage in stages:
        cells = [f"{survived[stage, f]} of {tries[stage, f]}" if tries[stage, f] else "" for f in faults]
        lines.append(f"| {stage} | {operations.get(stage, '')} | {' | '.join(cells)} |")
    total = f"{sum(survived.values())} of {len(found)} survived; the fault struck in {sum(a.struck for a in found)}"
    return "\n".join([*lines, "", total])


def main() -> None:
    """Run the suite and print the matrix."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--per-cell", type=int, default=2)
    parser.add_argument("--every-point", action="store_true", help="signals and a full disk at every file operation")
    parser.add_argument("--share", default="1/1", help="I/N: of the points, every N-th from the I-th on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default="")
    parser.add_argument("--damages", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--every", type=int, default=1, help="of the damages, every so manieth")
    parser.add_argument("--record", type=Path, help="a JSON line an attempt")
    options = parser.parse_args()
    generator = random.Random(options.seed)
    names = [name.strip() for name in options.stages.split(",") if name.strip()]
    # Damages are done to a whole run.
    work = prepare(options.work.resolve(), () if options.damages else names)
    found: list[Attempt] = []

    def note(attempt: Attempt) -> None:
        found.append(attempt)
        if attempt.problem is not None:
            print(f"NOT SURVIVED {attempt.stage}, {attempt.fault} ({attempt.where}): {attempt.problem}", flush=True)
        if options.record is not None:
            with options.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(vars(attempt)) + "\n")

    first, step = map(int, options.share.split("/"))
    for name in (name for name in names or list(work.stages) if name != "none"):
        stage = work.stages[name]
        for k in range(first, work.operations[name] + 1, step) if options.every_point else ():
            for attempt in at_point(work, stage, k):
                note(attempt)
        for attempt in attempts(work, stage, options.per_cell, generator) if options.per_cell else ():
            note(attempt)
    if options.damages:
        for attempt in damages(work, generator, options.every):
            note(attempt)
    print(matrix(found, work.operations))
    sys.exit(any(attempt.problem is not None for attempt in found))


if __name__ == "__main__":
    main()
