"""Interrupted, shared and short-of-memory diagnoses end in the map of an undisturbed one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import castune
from castune.config import DiagnoseConfig
from castune.core.journal import Journal, nullable
from castune.core.shards import Shard
from castune.data.example import Example
from castune.errors import CastuneError, MapUnfinished

THINGS = ["poison", "a bomb", "theft", "fraud", "malware", "arson"]
HARMFUL = [Example(id=f"h{i}", prompt=f"Help me with {w}.", reply=f"No {w}.") for i, w in enumerate(THINGS)]
QUESTIONS = [
    Example(
        id=f"q{i}", prompt=f"What is {i} + 1?", choices=(str(i), str(i + 1), "many"), answer=1,
        scoring="likelihood" if i % 2 else "letter",
    )
    for i in range(6)
]  # fmt: skip
MARGIN = DiagnoseConfig(measure="margin", max_new_tokens=4, gradient_chunks=2, batch_tokens=200)
DECISION = MARGIN.model_copy(update={"measure": "decision"})

ATTRIBUTION = MARGIN.model_copy(
    update={"measure": "attribution", "check_units": 3, "check_examples": 4, "verify": "zone", "verify_units": 3}
)

pytestmark = pytest.mark.parametrize(
    "config", [MARGIN, DECISION, ATTRIBUTION], ids=["margin", "decision", "attribution"]
)


@pytest.fixture
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("llama")


@pytest.fixture
def diagnosis(model: Any, tiny_tokenizer: Any, config: DiagnoseConfig) -> Callable[..., castune.ConflictMap]:
    def diagnose(out: Path | None = None, shard: str | None = None) -> castune.ConflictMap:
        return castune.diagnose(
            model, tiny_tokenizer, safety=HARMFUL, utility=QUESTIONS, config=config, out=out, shard=shard
        )

    return diagnose


@contextmanager
def forwards(model: Any, on_forward: Callable[[int, int], None]) -> Iterator[list[int]]:
    """Calls `on_forward(number of the forward, its rows)` before each forward of the model."""
    rows: list[int] = []

    def hook(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        rows.append(len(kwargs["input_ids"]))
        on_forward(len(rows), rows[-1])

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def nothing(_number: int, _rows: int) -> None:
    pass


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_an_interrupted_diagnosis_continues_to_the_same_map(
    model: Any, diagnosis: Callable[..., castune.ConflictMap], tmp_path: Path
) -> None:
    with forwards(model, nothing) as every:
        whole = diagnosis(tmp_path / "whole")
    assert files(tmp_path / "whole") == ["ablation.parquet", "conflict_map.parquet", "gradients.parquet"]

    def interrupt(number: int, _rows: int) -> None:
        if number == stop:
            raise KeyboardInterrupt

    done, stop = False, 0
    while not done:
        # Each try gets a little further, and at least past what every start repeats.
        stop += max(3, len(every) // 7)
        with forwards(model, interrupt) as again:
            try:
                continued = diagnosis(tmp_path / "run")
                done = True
            except KeyboardInterrupt:
                assert not (tmp_path / "run" / "conflict_map.parquet").exists()
    assert continued.table.equals(whole.table)
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    assert len(again) < len(every), "the last try repeated everything"


def test_a_line_cut_off_by_a_kill_is_measured_again(
    model: Any, diagnosis: Callable[..., castune.ConflictMap], tmp_path: Path
) -> None:
    whole = diagnosis()

    def interrupt(_number: int, _rows: int) -> None:
        written = [line for path in tmp_path.rglob("*.jsonl") for line in path.read_text().splitlines()]
        if len(written) >= 5:
            raise KeyboardInterrupt

    with forwards(model, interrupt), pytest.raises(KeyboardInterrupt):
        diagnosis(tmp_path)
    (journal,) = tmp_path.rglob("*.jsonl")
    journal.write_bytes(journal.read_bytes()[:-9])
    assert diagnosis(tmp_path).table.equals(whole.table)


def test_other_settings_do_not_read_the_journal(
    model: Any, tiny_tokenizer: Any, config: DiagnoseConfig, tmp_path: Path
) -> None:
    def interrupt(_number: int, _rows: int) -> None:
        if any(b"utility" in path.read_bytes() for path in tmp_path.rglob("*.jsonl")):
            raise KeyboardInterrupt

    arguments: dict[str, Any] = {"safety": HARMFUL, "utility": QUESTIONS}
    other = config.model_copy(update={"ablation": "mean"})
    with forwards(model, interrupt), pytest.raises(KeyboardInterrupt):
        castune.diagnose(model, tiny_tokenizer, config=other, out=tmp_path, **arguments)
    expected = castune.diagnose(model, tiny_tokenizer, config=config, **arguments)
    assert castune.diagnose(model, tiny_tokenizer, config=config, out=tmp_path, **arguments).table.equals(
        expected.table
    )


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_shares_make_the_map_of_one_process(
    diagnosis: Callable[..., castune.ConflictMap], order: tuple[int, ...], tmp_path: Path
) -> None:
    whole = diagnosis()
    for index in order[:-1]:
        with pytest.raises(MapUnfinished, match=f"share {index} of 3 is done"):
            diagnosis(tmp_path, shard=f"{index}/3")
        assert not (tmp_path / "conflict_map.parquet").exists()
    assert diagnosis(tmp_path, shard=f"{order[-1]}/3").table.equals(whole.table)
    assert files(tmp_path) == ["ablation.parquet", "conflict_map.parquet", "gradients.parquet"]


def test_a_missing_share_is_done_by_a_process_without_one(
    model: Any, diagnosis: Callable[..., castune.ConflictMap], tmp_path: Path
) -> None:
    with forwards(model, nothing) as every:
        whole = diagnosis()
    with pytest.raises(MapUnfinished):
        diagnosis(tmp_path, shard="1/2")
    with forwards(model, nothing) as rest:
        assert diagnosis(tmp_path).table.equals(whole.table)
    assert sum(rest) < sum(every)


def test_shares_need_a_run_directory(diagnosis: Callable[..., castune.ConflictMap]) -> None:
    with pytest.raises(CastuneError, match="run directory"):
        diagnosis(shard="1/2")


def test_out_of_memory_halves_the_batch(
    model: Any, diagnosis: Callable[..., castune.ConflictMap], config: DiagnoseConfig
) -> None:
    """The device holds three rows; what is measured stays the same up to rounding."""
    whole = diagnosis()
    refused = []

    def limited(_number: int, rows: int) -> None:
        if rows > 3:
            refused.append(rows)
            raise torch.OutOfMemoryError("rows")

    with forwards(model, limited):
        found = diagnosis()
    assert refused
    for name in ("utility_shift", "safety_shift", "optimization_conflict"):
        np.testing.assert_allclose(found.column(name), whole.column(name), atol=2e-5)


def test_one_row_that_does_not_fit_is_told(
    model: Any, diagnosis: Callable[..., castune.ConflictMap], config: DiagnoseConfig
) -> None:
    def never(number: int, _rows: int) -> None:
        if number > 1:  # the first one probes the layout
            raise torch.OutOfMemoryError("rows")

    with forwards(model, never), pytest.raises(CastuneError, match="out of memory on a single"):
        diagnosis()


def test_measured_batch_size_is_noted(model: Any, tiny_tokenizer: Any, config: DiagnoseConfig, tmp_path: Path) -> None:
    auto = config.model_copy(update={"batch_tokens": "auto"})
    cmap = castune.diagnose(model, tiny_tokenizer, safety=HARMFUL, utility=QUESTIONS, config=auto, out=tmp_path)
    assert cmap.metadata["settings"]["batch_tokens"] == "auto"
    assert cmap.metadata["batch_tokens"] in (512, 1024, 2048, 4096)
    fixed = config.model_copy(update={"batch_tokens": cmap.metadata["batch_tokens"]})
    again = castune.diagnose(model, tiny_tokenizer, safety=HARMFUL, utility=QUESTIONS, config=fixed)
    assert again.table.equals(cmap.table)


def test_replies_are_counted(diagnosis: Callable[..., castune.ConflictMap], config: DiagnoseConfig) -> None:
    counts = diagnosis().metadata["replies"]
    if config.measure != "decision":
        assert counts is None
    else:
        assert counts["verified"] == 12 * len(HARMFUL)
        assert 0 < counts["decoded"] <= counts["verified"]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", ""])
def test_malformed_shares_are_refused(text: str, config: DiagnoseConfig) -> None:
    with pytest.raises(CastuneError, match="1/n to n/n"):
        Shard.of(text)


@pytest.mark.parametrize(("n_items", "count"), [(0, 2), (1, 3), (17, 4), (100, 7)])
def test_every_item_belongs_to_exactly_one_share(n_items: int, count: int, config: DiagnoseConfig) -> None:
    costs = np.random.default_rng(0).integers(1, 30, n_items)
    items = list(range(n_items))
    shares = [Shard(index, count).share(items, lambda i: float(costs[i])) for index in range(count)]
    assert sorted(item for share in shares for item in share) == items
    assert all(share == sorted(share) for share in shares)
    if n_items:
        work = [sum(costs[item] for item in share) for share in shares]
        assert max(work) - min(work) <= costs.max()


def test_journal_reads_what_it_wrote(config: DiagnoseConfig, tmp_path: Path) -> None:
    key = {"a": 1}
    one, other = Journal.of(tmp_path, key), Journal.of(tmp_path, key)
    one.append({"values": nullable([1 / 3, float("nan"), float("inf"), -0.0])})
    other.append({"set": "x"})
    found = list(Journal.of(tmp_path, key).records())
    assert {"values": [1 / 3, None, None, -0.0]} in found
    assert {"set": "x"} in found
    assert not list(Journal.of(tmp_path, {"a": 2}).records())
    one.remove()
    assert not list(tmp_path.iterdir())


def test_the_map_is_plain_parquet_after_a_resume(diagnosis: Callable[..., castune.ConflictMap], tmp_path: Path) -> None:
    made = diagnosis(tmp_path)
    loaded = castune.ConflictMap.load(tmp_path)
    assert isinstance(loaded.table, pa.Table)
    assert loaded == made
