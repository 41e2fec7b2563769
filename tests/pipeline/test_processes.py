"""Real processes: two ranks of torchrun, separate shares, and kills that nothing can catch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from castune.artifacts import ConflictMap

CASTUNE = str(Path(sys.executable).with_name("castune"))
Models = Callable[..., Path]


def command(model: Path, data: dict[str, Path], out: Path, *more: str) -> list[str]:
    return [
        CASTUNE, "diagnose", str(model), "--out", str(out), "--safety", str(data["safety"]),
        "--utility", str(data["utility"]), "--max-new-tokens", "6", "--dtype", "float32", "--device", "cpu",
        "--batch-tokens", "120", *more,
    ]  # fmt: skip


def finish(arguments: list[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def journal_lines(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.rglob("*.jsonl"))


@pytest.fixture
def expected(models: Models, own_data: dict[str, Path], tmp_path: Path) -> ConflictMap:
    finish(command(models(), own_data, tmp_path / "whole"))
    return ConflictMap.load(tmp_path / "whole")


def has_loopback() -> bool:
    try:
        with socket.create_server(("localhost", 0)) as server, socket.create_connection(server.getsockname()[:2], 5):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not has_loopback(), reason="torchrun's ranks meet on localhost, which this machine cannot reach")
def test_two_ranks_make_the_map_of_one_process(
    expected: ConflictMap, own_data: dict[str, Path], tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    finish([*torchrun, *command(tmp_path / "model", own_data, tmp_path / "ranks")])
    assert ConflictMap.load(tmp_path / "ranks").table.equals(expected.table)
    assert not list(tmp_path.glob("ranks/journal"))


def test_two_shares_make_the_map_of_one_process(
    expected: ConflictMap, own_data: dict[str, Path], tmp_path: Path
) -> None:
    shares = tmp_path / "shares"
    said = finish(command(tmp_path / "model", own_data, shares, "--shard", "2/2"))
    assert "share 2 of 2 is done" in said
    assert not (shares / "conflict_map.parquet").exists()
    finish(command(tmp_path / "model", own_data, shares, "--shard", "1/2"))
    assert ConflictMap.load(shares).table.equals(expected.table)


def test_a_diagnosis_survives_kill_9(expected: ConflictMap, own_data: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "killed"
    arguments = command(tmp_path / "model", own_data, out)
    for n_lines in (1, 4, 7):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while journal_lines(out) < n_lines and process.poll() is None:
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        if (out / "conflict_map.parquet").exists():
            break
        assert not (out / "recipe.toml").exists()
    else:
        assert journal_lines(out) > 0
    finish(arguments)
    assert ConflictMap.load(out).table.equals(expected.table)
