"""Peak memory of a diagnosis by number of examples and by batch_tokens: it must not grow with the examples.

    python benchmarks/memory.py --safety SOURCE --utility SOURCE --sizes 100,1000 --batch-tokens 1024,2048

Every figure is the peak of a process of its own (`castune diagnose`). What is not an option here goes to the command;
by default only the last layer's heads are ablated, which needs as much memory as all of them and less time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

SMALL = ["default", "--layers", "29", "--measure", "margin", "--max-new-tokens", "8"]


def peak(command: list[str]) -> tuple[float, float]:
    """Bytes at the peak, and seconds."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"exit status {os.waitstatus_to_exitcode(status)}: {' '.join(command)}")
    return usage.ru_maxrss * 1024, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--safety", required=True)
    parser.add_argument("--utility", required=True)
    parser.add_argument("--sizes", default="100,1000")
    parser.add_argument("--batch-tokens", default="1024,2048")
    arguments, options = parser.parse_known_args()
    options = options or SMALL
    print(" ".join(options))
    print(f"{'batch_tokens':>12}{'examples a side':>17}{'peak GB':>9}{'seconds':>9}")
    for batch_tokens in arguments.batch_tokens.split(","):
        for size in arguments.sizes.split(","):
            with tempfile.TemporaryDirectory() as out:
                sources = ["--safety", arguments.safety, "--utility", arguments.utility]
                limits = ["--safety-limit", size, "--utility-limit", size, "--batch-tokens", batch_tokens]
                command = [sys.executable, "-m", "castune.cli", "diagnose", *options, *sources, *limits, "--out", out]
                n_bytes, seconds = peak(command)
            print(f"{batch_tokens:>12}{size:>17}{n_bytes / 1e9:9.2f}{seconds:9.0f}", flush=True)


if __name__ == "__main__":
    main()
