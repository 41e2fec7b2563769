"""Commands broken on purpose: in forked processes, on a tiny model, and compared with commands that were not broken.

    python tests/faults/harness.py WORK --per-cell 5 --seed 0 --table matrix.md

One process imports everything and forks for every attempt, so an attempt costs what its work costs. A fault strikes
either at a file operation below the work directory, counted by Python's audit events, or at a random moment. After each
the same command is run unbroken, and everything it leaves is compared with a clean run.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import hashlib
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# Before torch is imported. Forked processes must not share a pool of threads, and none may reach a hub.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow.parquet as pq
import torch
from tiny_models import make_tiny_model, make_tiny_tokenizer

import castune.cli
import castune.drifts
import castune.evaluations
import castune.export
import castune.pipeline
import castune.report.page
import castune.tune.mask

torch.set_num_threads(1)
# What says when and how fast something was made, not what it is.
_VOLATILE = {"provenance", "seconds", "digest", "samples_hash", "date", "started", "updated"}
_MADE_ANEW = (".html", ".svg", ".pdf", ".png", ".md")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "shutil.rmtree",
    "shutil.copyfile",
)

Before = Callable[[], None]


class Ended(NamedTuple):
    """How a command ended: its exit code, negative for a signal, and what it said."""

    code: int
    said: str
    seconds: float


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


def prepare(root: Path) -> Work:
    """Model, data, every stage once without a fault."""
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
        Stage("report", "evaluate", ["report", run]),
        Stage("run", "nothing", ["run", str(recipe)]),
    ]  # fmt: skip
    for stage in stages:
        work.stages[stage.name] = stage
        work.begin(stage)
        # Once for what is made only once (bytecode, caches), once to be timed and counted.
        first = command(work, stage.arguments)
        assert first.code == 0, (stage.name, first.said)
        work.keep(stage.name)
        work.clean[stage.name] = results(work.run)
        work.begin(stage)
        counted = Counting(work.root)
        ended = command(work, stage.arguments, counted.before)
        assert ended.code == 0, (stage.name, ended.said)
        assert results(work.run) == work.clean[stage.name], f"{stage.name} comes out otherwise each time"
        work.seconds[stage.name], work.operations[stage.name] = ended.seconds, counted.read()
    return work


def command(
    work: Work, arguments: list[str], before: Before | None = None, kill: tuple[float, int] | None = None
) -> Ended:
    """Run a command in a forked process; `before` is called in it first, `kill` is a moment and a signal."""
    return finish(start(work, arguments, before), kill)


class Started(NamedTuple):
    """A process that runs a command, and where what it says comes out."""

    pid: int
    output: int
    began: float


def start(work: Work, arguments: list[str], before: Before | None = None) -> Started:
    """Fork a process that runs a command."""
    reading, writing = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Started(pid, reading, began)
    code = 70
    try:
        os.setsid()
        os.close(reading)
        for descriptor in (1, 2):
            os.dup2(writing, descriptor)
        os.close(writing)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))
        os.chdir(work.root)
        sys.argv = ["castune", *arguments]
        if before is not None:
            before()
        castune.cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)


def finish(started: Started, kill: tuple[float, int] | None = None) -> Ended:
    """Wait for a command, two minutes at most; stop it at a moment."""
    said = bytearray()
    end = started.began + 120
    while True:
        now = time.monotonic()
        if kill is not None and now >= started.began + kill[0]:
            with suppress(ProcessLookupError):
                os.kill(started.pid, kill[1])
            kill = None
        if now > end:
            # With its children, which hold the pipe open.
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
        until = end if kill is None else started.began + kill[0]
        readable, _, _ = select.select([started.output], [], [], max(0.001, min(until - now, 0.5)))
        if readable:
            part = os.read(started.output, 65536)
            if not part:
                break
            said += part
    os.close(started.output)
    _, status = os.waitpid(started.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return Ended(
        -99 if time.monotonic() > end else code, said.decode(errors="replace"), time.monotonic() - started.began
    )


# -- what strikes


def _touched(event: str, arguments: tuple[Any, ...], root: str) -> bool:
    """Whether an audit event is a change of a file below a directory."""
    if event == "open":
        path, mode, flags = arguments
        if not (isinstance(mode, str) and set(mode) & set("wax+")) and not (isinstance(flags, int) and flags & _WRITES):
            return False
    elif event in _CHANGES:
        path = arguments[0]
    else:
        return False
    return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(root)


class Counting:
    """Counts the file operations of a forked process in memory that it shares with this one."""

    def __init__(self, root: Path) -> None:
        import mmap

        self._memory, self._root = mmap.mmap(-1, 8), str(root / "place")
        self._count = ctypes.c_int64.from_buffer(self._memory)

    def before(self) -> None:
        """Count from now on."""

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if _touched(event, arguments, self._root):
                self._count.value += 1

        sys.addaudithook(hook)

    def read(self) -> int:
        """How many there were."""
        return int(self._count.value)


def at_operation(number: int, root: Path, strike: Callable[[str], None], *, from_then_on: bool = False) -> Before:
    """Strike at the file operation of that number."""
    place, seen = str(root / "place"), [0]

    def before() -> None:
        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if not _touched(event, arguments, place):
                return
            seen[0] += 1
            if seen[0] == number or (from_then_on and seen[0] > number):
                strike(event)

        sys.addaudithook(hook)

    return before


def send(number: int) -> Callable[[str], None]:
    """A signal to this process."""
    return lambda event: os.kill(os.getpid(), number)


def full(event: str) -> None:
    """The disk is full: nothing can be made, things can be removed."""
    if event in ("open", "os.mkdir", "os.link", "shutil.copyfile"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")


def small_files(limit: int) -> Before:
    """No file can grow beyond so many bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def little_memory(extra: int) -> Before:
    """So many bytes of address space more than are in use."""

    def before() -> None:
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (in_use + extra, in_use + extra))

    return before


def powerless() -> None:
    """Give up root's right to write where permissions say no (and every other capability)."""

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    nothing = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(ctypes.byref(Header(0x20080522, 0)), ctypes.byref(nothing)):
        raise OSError(ctypes.get_errno(), "capset")


def jumping_clock(seed: int) -> Before:
    """The wall clock jumps to and fro by up to a day at every tenth look."""

    def before() -> None:
        generator, offset, looks = random.Random(seed), [0.0], [0]
        now, now_ns = time.time, time.time_ns

        def jumped() -> float:
            looks[0] += 1
            if looks[0] % 10 == 0:
                offset[0] = generator.uniform(-86400, 86400)
            return offset[0]

        time.time = lambda: now() + jumped()
        time.time_ns = lambda: now_ns() + int(jumped() * 1e9)

    return before


# -- what came out


def results(run: Path) -> dict[str, str]:
    """A digest of everything a run directory holds, but for when and how fast it was made."""
    return {
        str(path.relative_to(run)): _digest(path)
        for path in sorted(run.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(run).parts)
        # A log of steps: a step that was begun twice stands there twice.
        and path.name != "provenance.json"
    }


def leftovers(run: Path) -> list[str]:
    """What was put aside to be moved into place, and is still there."""
    return [
        str(p.relative_to(run.parent)) for p in run.parent.rglob("*") if p.name.startswith(".") and p.suffix != ".next"
    ]


def _digest(path: Path) -> str:
    if path.suffix in _MADE_ANEW:
        return "there"
    content: Any = path.read_bytes()
    with suppress(ValueError, OSError):  # damaged on purpose: its bytes are what it is
        content = _content(path, content)
    return hashlib.sha256(content).hexdigest()[:16]


def _content(path: Path, content: Any) -> Any:
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        header = json.loads((table.schema.metadata or {}).get(b"castune", b"{}"))
        content = json.dumps(
            [table.replace_schema_metadata(None).to_pydict(), _stable(header)], sort_keys=True
        ).encode()
    elif path.suffix == ".json":
        content = json.dumps(_stable(json.loads(content)), sort_keys=True).encode()
    return content


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(inner) for key, inner in value.items() if key not in _VOLATILE}
    return [_stable(inner) for inner in value] if isinstance(value, list) else value


def told(ended: Ended, *codes: int) -> str | None:
    """What is wrong with how a command ended; None where it is one of these codes, and said without a traceback."""
    if "Traceback" in ended.said:
        return f"traceback: {ended.said[-400:]}"
    if ended.code not in codes:
        return f"exit code {ended.code}, accepted: {codes}: {ended.said[-300:]}"
    if ended.code == 2 and not re.search(r"^error: ", ended.said, re.MULTILINE):
        return f"no error is told: {ended.said[-300:]}"
    return None


def again(work: Work, stage: Stage, *, tidy: bool = False) -> str | None:
    """Run the command unbroken; what is wrong with what it leaves, or None."""
    ended = command(work, stage.arguments)
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


# -- attempts


def attempts(work: Work, stage: Stage, per_cell: int, generator: random.Random) -> Iterator[Attempt]:
    """`per_cell` faults of every kind on a stage."""
    n, seconds = work.operations[stage.name], work.seconds[stage.name]
    for _ in range(per_cell):
        for name, number, code in (
            ("SIGKILL", signal.SIGKILL, -9),
            ("SIGTERM", signal.SIGTERM, 143),
            ("Ctrl-C", signal.SIGINT, 130),
        ):
            k = generator.randint(1, n)
            ended = _broken(work, stage, at_operation(k, work.root, send(number)))
            # A signal at the very last operation may come when all is done.
            yield _judged(
                work,
                stage,
                f"{name} at a file operation",
                f"{k} of {n}",
                ended,
                (code, 0),
                tidy=number != signal.SIGKILL,
            )
        moment = generator.uniform(0.05, 0.95) * seconds
        number, code = generator.choice([(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
        work.begin(stage)
        ended = command(work, stage.arguments, kill=(moment, number))
        yield _judged(
            work,
            stage,
            "any signal at any moment",
            f"{moment:.2f} of {seconds:.2f} s",
            ended,
            (code, 0),
            tidy=number != signal.SIGKILL,
        )
        k = generator.randint(1, n)
        ended = _broken(work, stage, at_operation(k, work.root, full, from_then_on=True))
        yield _judged(work, stage, "disk full", f"from operation {k} of {n} on", ended, (2, 0), tidy=True)
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
            (2, 0, -6, -11, 1, 134, 139),
            traceback_too=True,
        )
        seed = generator.randrange(2**31)
        ended = _broken(work, stage, jumping_clock(seed))
        yield _judged(work, stage, "clock jumps", f"seed {seed}", ended, (0,))
        work.begin(stage)
        both = [start(work, stage.arguments) for _ in range(2)]
        ends = [finish(one) for one in both]
        attempt = Attempt(stage.name, "two processes at once", ", ".join(str(end.code) for end in ends))
        attempt.problem = next((p for end in ends if (p := told(end, 0, 2))), None) or again(work, stage)
        yield attempt
    if sys.platform == "linux":
        work.begin(stage)
        for path in (work.run.parent, *work.run.parent.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        ended = command(work, stage.arguments, powerless if os.getuid() == 0 else None)
        for path in (work.run.parent, *work.run.parent.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield _judged(work, stage, "read-only directory", "", ended, (2,))


def _broken(work: Work, stage: Stage, before: Before) -> Ended:
    work.begin(stage)
    return command(work, stage.arguments, before)


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
    # Drawings and pages are made anew each time.
    wanted = [(name, kind) for name in files if name.suffix not in _MADE_ANEW for kind in kinds]
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
        ended = command(work, stage.arguments)
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


def matrix(found: list[Attempt]) -> str:
    """A table of stage by fault: survived of tries."""
    stages, faults = list(dict.fromkeys(a.stage for a in found)), list(dict.fromkeys(a.fault for a in found))
    lines = [f"| stage | {' | '.join(faults)} |", f"|---|{'---|' * len(faults)}"]
    tries, survived = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for attempt in found:
        tries[attempt.stage, attempt.fault] += 1
        survived[attempt.stage, attempt.fault] += attempt.problem is None
    for stage in stages:
        cells = [f"{survived[stage, f]} of {tries[stage, f]}" if tries[stage, f] else "" for f in faults]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    total = f"{sum(survived.values())} of {len(found)} survived; the fault struck in {sum(a.struck for a in found)}"
    return "\n".join([*lines, "", total])


def main() -> None:
    """Run the suite and print the matrix."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--per-cell", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default="")
    parser.add_argument("--damages", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--every", type=int, default=1, help="of the damages, every so manieth")
    parser.add_argument("--record", type=Path, help="a JSON line an attempt")
    options = parser.parse_args()
    generator = random.Random(options.seed)
    work = prepare(options.work.resolve())
    found: list[Attempt] = []

    def note(attempt: Attempt) -> None:
        found.append(attempt)
        if attempt.problem is not None:
            print(f"NOT SURVIVED {attempt.stage}, {attempt.fault} ({attempt.where}): {attempt.problem}", flush=True)
        if options.record is not None:
            with options.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(vars(attempt)) + "\n")

    wanted = [name.strip() for name in options.stages.split(",") if name.strip()] or list(work.stages)
    for name in (name for name in wanted if name != "none"):
        for attempt in attempts(work, work.stages[name], options.per_cell, generator):
            note(attempt)
    if options.damages:
        for attempt in damages(work, generator, options.every):
            note(attempt)
    print(matrix(found))
    sys.exit(any(attempt.problem is not None for attempt in found))


if __name__ == "__main__":
    main()
