"""Kill a diagnosis (SIGKILL) at random moments, continue it, and compare the map with an uninterrupted one.

    python benchmarks/kills.py OUT --tries 20 --seed 0

Real processes of the command line on the default model; every try begins in an empty directory. What is not an option
here goes to `castune diagnose`.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

from castune.artifacts import ConflictMap

CASTUNE = [sys.executable, "-m", "castune.cli", "diagnose"]
SMALL = ["default", "--safety-limit", "4", "--utility-limit", "4", "--layers", "10,20,29", "--batch-tokens", "256"]


def finish(out: Path, options: list[str]) -> float:
    """Run to the end; returns seconds."""
    started = time.perf_counter()
    subprocess.run([*CASTUNE, *options, "--out", str(out)], check=True, capture_output=True)
    return time.perf_counter() - started


def kill_after(seconds: float, out: Path, options: list[str]) -> bool:
    """Start, and kill after so many seconds; returns whether it was still running."""
    process = subprocess.Popen(
        [*CASTUNE, *options, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def known_units(out: Path) -> int:
    """Lines that the journal holds."""
    return sum(len(path.read_text(errors="replace").splitlines()) for path in out.glob("journal/*/*.jsonl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments, options = parser.parse_known_args()
    options = options or SMALL
    shutil.rmtree(arguments.out, ignore_errors=True)
    whole = arguments.out / "whole"
    seconds = finish(whole, options)
    expected, outcomes = ConflictMap.load(whole), pq.read_table(whole / "ablation.parquet")
    print(f"uninterrupted: {seconds:.1f} s; castune diagnose {' '.join(options)}", flush=True)
    moments = random.Random(arguments.seed)
    identical = 0
    for number in range(1, arguments.tries + 1):
        out = arguments.out / f"try-{number}"
        moment = moments.uniform(0, seconds)
        was_running = kill_after(moment, out, options)
        known = known_units(out)
        rest = finish(out, options)
        same = ConflictMap.load(out).table.equals(expected.table)
        same = same and pq.read_table(out / "ablation.parquet").equals(outcomes)
        identical += same
        print(
            f"{number:3}  killed after {moment:5.1f} s{'' if was_running else ' (had ended)'}, "
            f"{known:3} results known, continued in {rest:5.1f} s: {'identical' if same else 'DIFFERENT'}",
            flush=True,
        )
        shutil.rmtree(out)
    print(f"{identical} of {arguments.tries} identical")
    sys.exit(identical != arguments.tries)


if __name__ == "__main__":
    main()
