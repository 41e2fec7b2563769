"""Real processes: two ranks of torchrun, separate shares, and kills that nothing can catch."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from loopback import needs_loopback
from processes import run_command

from castune.artifacts import ConflictMap
from castune.artifacts.files import alone_at
from castune.artifacts.tune_result import TuneResult

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
    done = run_command(arguments, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def journal_lines(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.rglob("*.jsonl"))


@pytest.fixture
def expected(models: Models, own_data: dict[str, Path], made: Callable[..., Path], tmp_path: Path) -> ConflictMap:
    model = models()
    whole = made(tmp_path / "whole", "whole", lambda: finish(command(model, own_data, tmp_path / "whole")))
    return ConflictMap.load(whole)


@needs_loopback
def test_two_ranks_make_the_map_of_one_process(
    expected: ConflictMap, own_data: dict[str, Path], tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    finish([*torchrun, *command(tmp_path / "model", own_data, tmp_path / "ranks")])
    assert ConflictMap.load(tmp_path / "ranks").table.equals(expected.table)
    assert not list(tmp_path.glob("ranks/journal"))


@pytest.mark.slow
def test_two_shares_make_the_map_of_one_process(
    expected: ConflictMap, own_data: dict[str, Path], tmp_path: Path
) -> None:
    shares = tmp_path / "shares"
    said = finish(command(tmp_path / "model", own_data, shares, "--shard", "2/2"))
    assert "share 2 of 2 is done" in said
    assert not (shares / "conflict_map.parquet").exists()
    finish(command(tmp_path / "model", own_data, shares, "--shard", "1/2"))
    assert ConflictMap.load(shares).table.equals(expected.table)


@pytest.mark.parametrize("kills", [(3,), pytest.param((1, 4, 7), marks=pytest.mark.slow)], ids=str)
def test_a_diagnosis_survives_kill_9(
    kills: tuple[int, ...], expected: ConflictMap, own_data: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    arguments = command(tmp_path / "model", own_data, out)
    for n_lines in kills:
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


# -- training


@pytest.fixture
def finished(finished_run: Callable[..., Path]) -> Path:
    """A run whose main arm can be trained again."""
    return finished_run(select__compare=[])


def training(finished: Path, data: dict[str, Path], name: str, *more: str) -> list[str]:
    return [
        CASTUNE, "tune", str(finished), "--data", str(data["align"]), "--arm", name, "--max-steps", "40", "--rank", "4",
        "--batch-size", "2", "--accumulation", "1", "--checkpoint-steps", "2", *more,
    ]  # fmt: skip


def wait_for_checkpoints(folder: Path, n: int, process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    while len(list(folder.glob("checkpoint-*/castune.json"))) < n:
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.002)


def weights(finished: Path, arm: str) -> bytes:
    return (finished / "arms" / arm / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("kills", [(2,), pytest.param((1, 2), marks=pytest.mark.slow)], ids=str)
def test_a_training_survives_kill_9(kills: tuple[int, ...], finished: Path, own_data: dict[str, Path]) -> None:
    # The same heads by two names.
    finish(training(finished, own_data, "risky-50"))
    arguments = training(finished, own_data, "bucket-1-of-2")
    unfinished = finished / "arms" / "bucket-1-of-2" / ".adapter.unfinished"
    for n in kills:
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_checkpoints(unfinished, n, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "continues from checkpoint-" in finish(arguments)
    assert weights(finished, "bucket-1-of-2") == weights(finished, "risky-50")
    assert not unfinished.exists()
    found = [TuneResult.load(finished / "arms" / arm / "adapter") for arm in ("risky-50", "bucket-1-of-2")]
    assert (found[0].losses, found[0].tokens) == (found[1].losses, found[1].tokens)


@pytest.mark.slow
def test_a_full_disk_at_a_checkpoint_keeps_the_last_good_one(finished: Path, own_data: dict[str, Path]) -> None:
    finish(training(finished, own_data, "risky-50"))
    arguments = training(finished, own_data, "bucket-1-of-2")
    unfinished = finished / "arms" / "bucket-1-of-2" / ".adapter.unfinished"
    # Coverage, where it is measured, could not write its own file either.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    wait_for_checkpoints(unfinished, 1, process)
    # From now on no file can grow beyond this.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "could not be written" in last
    assert "is kept, and the same command continues" in last
    assert "Traceback" not in errors
    assert not (finished / "arms" / "bucket-1-of-2" / "adapter").exists()
    assert list(unfinished.glob("checkpoint-*/castune.json"))
    assert "continues from checkpoint-" in finish(arguments)
    assert weights(finished, "bucket-1-of-2") == weights(finished, "risky-50")


@pytest.mark.slow
@needs_loopback
def test_two_ranks_train_one_adapter(finished: Path, own_data: dict[str, Path]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    said = finish([*torchrun, *training(finished, own_data, "risky-50", "--max-steps", "3")])
    # How many layers the heads are in, and so how many A are trained, is the map's business.
    n_trained = TuneResult.load(finished / "arms" / "risky-50" / "adapter").budget["trainable_parameters"]
    assert said.count(f"risky-50: 6 heads, {n_trained:,} trainable") == 1, "the first rank speaks for both"
    one = training(finished, own_data, "bucket-1-of-2", "--max-steps", "3", "--batch-size", "4")
    finish(one)
    found = [TuneResult.load(finished / "arms" / arm / "adapter") for arm in ("risky-50", "bucket-1-of-2")]
    assert found[0].tokens == found[1].tokens, "both ranks' tokens count"
    assert found[0].steps == found[1].steps == 3
    assert [path.name for path in (finished / "arms" / "risky-50").iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
@needs_loopback
def test_ranks_do_not_wait_for_another_command_that_trains_the_arm(finished: Path, own_data: dict[str, Path]) -> None:
    """The first rank would wait for it alone: the others find no adapter, begin, and wait for the first one."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    arguments = [*torchrun, *training(finished, own_data, "risky-50", "--max-steps", "2")]
    with alone_at(finished / "arms" / "risky-50" / ".adapter.lock"):
        done = run_command(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    assert "another castune is running there; run the command again when it has finished" in done.stderr
    assert not (finished / "arms" / "risky-50" / "adapter").exists()
    finish(arguments)
    assert TuneResult.load(finished / "arms" / "risky-50" / "adapter").steps == 2
