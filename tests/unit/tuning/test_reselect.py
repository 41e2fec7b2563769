"""Selecting again while training: frozen products, one schedule, new optimisers, one plain adapter in the end."""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import query_rows_mask
from tiny_training import IDS, N_STEPS, THREE_EPOCHS, Interrupter, SelectionOf
from torch import Tensor

from castune.artifacts import Certificate, HeadSelection, TuneResult
from castune.artifacts.tune_result import snapshots_of
from castune.artifacts.unit import joined
from castune.core.heads import HeadLayout
from castune.core.losses import reply_nll
from castune.data.example import Example
from castune.errors import CastuneError
from castune.tuning.merge import merged_into, write_merged
from castune.tuning.stacking import frozen_updates, stack
from castune.tuning.train import tune
from castune.tuning.trainer import ReplyTrainer
from castune.tuning.verify import certify, lora_pairs
from castune.tuning.workspace import Workspace

Train = Callable[..., TuneResult]
# Layer 1 comes, layer 2 goes and comes back, a head of layer 0 stays.
HEADS = {0: ((0, 1), (0, 3), (2, 0)), 2: ((0, 1), (1, 2), (1, 3)), 4: ((0, 0), (0, 1), (2, 0))}
EVERY = tuple(sorted({head for heads in HEADS.values() for head in heads}))
CONFIG = THREE_EPOCHS.changed(reselect_steps=2)
RANK = CONFIG.rank


@dataclass
class Scripted:
    """Selects the heads of a script, and keeps what it was called with."""

    first: HeadSelection
    heads: dict[int, tuple[tuple[int, int], ...]]
    folder: Path
    asked: list[int] = field(default_factory=list)
    stop_at: int | None = None

    def __call__(self, adapter: Path, selection: HeadSelection, step: int, out: Path) -> HeadSelection:
        assert set(selection.heads) == {head for start in self.heads if start < step for head in self.heads[start]}
        if self.stop_at == step:
            self.stop_at = None
            raise KeyboardInterrupt
        self.asked.append(step)
        out.mkdir(parents=True, exist_ok=True)
        (out / "conflict_map.parquet").write_text(f"map {step}")
        shutil.copytree(adapter, self.folder / str(step), dirs_exist_ok=True)
        return replace(self.first, units=joined(self.heads[step]), conflict_map_hash=f"map {step}")


class Trained:
    """Trains tiny models, each its own and the same."""

    def __init__(self, model_of: Callable[..., Any], rest: tuple[Any, ...], selection_of: SelectionOf, tmp: Path):
        self.model_of, self.selection_of, self.tmp = model_of, selection_of, tmp
        self.tokenizer, self.data, self.utility = rest
        self.stop_at: int | None = None

    def __call__(
        self, name: str, heads: dict[int, Any] = HEADS, *, family: str = "llama", **changes: Any
    ) -> TuneResult:
        self.model = self.model_of(family)
        selection = self.selection_of(self.model, heads[0], conflict_map_hash="map 0")
        self.scripted = Scripted(selection, heads, self.tmp / f"{name}-frozen", stop_at=self.stop_at)
        self.stop_at = None
        return tune(
            self.model, self.tokenizer, selection, data=self.data, out=self.tmp / name, config=CONFIG.changed(**changes),
            utility=self.utility, reselect=self.scripted,
        )  # fmt: skip


@pytest.fixture
def train(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    aligned: list[Example],
    harmful: list[Example],
    selection_of: SelectionOf,
    tmp_path: Path,
) -> Trained:
    return Trained(tiny_model, (tiny_tokenizer, aligned, harmful), selection_of, tmp_path)


def pairs(adapter: Path) -> dict[str, tuple[Tensor, Tensor]]:
    return {path: (a, b) for path, a, b in lora_pairs(adapter / "adapter_model.safetensors")}


def files(adapter: Path) -> dict[str, bytes]:
    """All of an adapter that has no time in it."""
    names = ("adapter_model.safetensors", "adapter_config.json", "certificate.json")
    return {str(path.relative_to(adapter)): path.read_bytes() for path in adapter.rglob("*") if path.name in names}


# -- the adapter


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "gpt2", "phi3"])
def test_one_plain_certified_adapter_of_all_that_was_selected(train: Trained, tmp_path: Path, family: str) -> None:
    result = train("one", family=family)
    out = tmp_path / "one"
    assert train.scripted.asked == [2, 4]
    assert result.steps == N_STEPS
    assert [record["step"] for record in result.selections] == [0, 2, 4]
    assert [[(layer, head) for _, layer, head in one["units"]] for one in result.selections] == list(
        map(list, HEADS.values())
    )
    assert [record["map_hash"] for record in result.selections] == ["map 0", "map 2", "map 4"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3 * RANK, 3 * 8)
    assert config["layers_to_transform"] == [0, 1, 2]
    assert not config["rank_pattern"]
    assert not config["use_rslora"]
    union = train.selection_of(train.model, EVERY)
    assert result.certificate == certify(train.model, out, union)
    assert result.certificate.changed_rows == result.certificate.selected_rows == 6 * 8
    assert result.trained(train.selection_of(train.model, HEADS[0])).heads == EVERY
    assert (out / "reselections" / "4" / "conflict_map.parquet").read_text() == "map 4"
    assert not Workspace.beside(out).folder.exists()


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_nothing_of_a_phase_moves_after_its_end(
    train: Trained, tmp_path: Path, same_bits: Callable[[Tensor, Tensor], bool], family: str
) -> None:
    train("one", family=family)
    layout = HeadLayout.of(train.model)
    final = pairs(tmp_path / "one")
    assert len(final) == 3
    for number, (start, heads) in enumerate(HEADS.items()):
        selection = train.selection_of(train.model, heads)
        own = slice(number * RANK, (number + 1) * RANK)
        for layer in range(3):
            path = layout.at(layer).query_path
            a, b = final[path][0][own], final[path][1][:, own]
            mask = query_rows_mask(layout, selection, layer, len(b))
            assert torch.equal(b.abs().sum(1) > 0, mask)
            if not mask.any():
                assert not a.any()
            # What it came to at its end, from then on to the last step, under weight decay.
            for later in [step for step in HEADS if step > start]:
                frozen = pairs(tmp_path / "one-frozen" / str(later))
                if path in frozen:
                    assert same_bits(frozen[path][0][own], a)
                    assert same_bits(frozen[path][1][:, own], b)
                else:
                    assert not mask.any()


def test_merged_rows_outside_the_current_selection_stay(train: Trained, tmp_path: Path) -> None:
    """W + delta of every unselected row, as the model of a phase has it, at the phase's begin and at its end."""
    train("one")
    layout = HeadLayout.of(train.model)

    def merged(adapter: Path, until: int) -> dict[int, Tensor]:
        rows = {}
        for layer in range(3):
            path = layout.at(layer).query_path
            rows[layer] = train.model.get_submodule(path).weight.detach().clone()
            for number in range(until):
                a, b = (pair for pair in pairs(adapter).get(path, (None, None)))
                if a is not None and b is not None:
                    own = slice(number * RANK, (number + 1) * RANK)
                    rows[layer] += 2 * b[:, own] @ a[own]
        return rows

    stages = {2: tmp_path / "one-frozen" / "2", 4: tmp_path / "one-frozen" / "4", 6: tmp_path / "one"}
    for begin, end in ((2, 4), (4, 6)):
        before, after = merged(stages[begin], begin // 2), merged(stages[end], end // 2)
        selection = train.selection_of(train.model, HEADS[begin])
        for layer in range(3):
            mask = query_rows_mask(layout, selection, layer, len(before[layer]))
            assert torch.equal(before[layer][~mask].view(torch.int32), after[layer][~mask].view(torch.int32))
            assert (before[layer][mask] != after[layer][mask]).any(1).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trained_and_saved_model_differ_by_rounding_only(
    train: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Any], family: str
) -> None:
    module = importlib.import_module("castune.tuning.run")
    logits = []

    @contextlib.contextmanager
    def watched(model: Any, adapter: Path | None) -> Iterator[None]:
        with frozen_updates(model, adapter):
            yield
            model.eval()
            with torch.no_grad():
                logits.append(model(input_ids=IDS).logits)

    monkeypatch.setattr(module, "frozen_updates", watched)
    train("one", family=family)
    with torch.no_grad():
        base = train.model.eval()(input_ids=IDS).logits
        for trained, adapter in zip(
            logits, (tmp_path / "one-frozen" / "2", tmp_path / "one-frozen" / "4", tmp_path / "one"), strict=True
        ):
            saved = PeftModel.from_pretrained(tiny_model(family), adapter).eval()(input_ids=IDS).logits
            torch.testing.assert_close(saved, trained, atol=1e-5, rtol=1e-5)
            assert (saved - base).abs().max() > 1e-3


def test_the_merged_model_is_that_of_the_adapter(train: Trained, tmp_path: Path, tiny_tokenizer: Any) -> None:
    result = train("one")
    (tmp_path / "merged").mkdir()
    union = result.trained(train.scripted.first)
    done = write_merged(train.model, tiny_tokenizer, tmp_path / "one", union, tmp_path / "merged")
    assert done.changed_rows == 6 * 8
    with pytest.raises(CastuneError):
        write_merged(train.model, tiny_tokenizer, tmp_path / "one", train.scripted.first, tmp_path / "merged")
    with torch.no_grad(), merged_into(train.model, tmp_path / "one", union):
        merged = train.model(input_ids=IDS).logits
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(train.model_of("llama"), tmp_path / "one").eval()(input_ids=IDS).logits
    torch.testing.assert_close(merged, loaded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [N_STEPS, N_STEPS + 1])
def test_with_as_many_steps_as_the_training_it_is_plain_training(train: Trained, tmp_path: Path, steps: int) -> None:
    result = train("one", reselect_steps=steps)
    plain = train("plain", reselect_steps=None)
    assert train.scripted.asked == []
    assert files(tmp_path / "one") == files(tmp_path / "plain")
    assert result.losses == plain.losses
    assert [record["step"] for record in result.selections] == [0]
    assert plain.selections == ()
    assert "selections" not in json.loads((tmp_path / "plain" / "tune.json").read_text())


def test_the_first_phase_is_plain_training(train: Trained, tmp_path: Path) -> None:
    train("one", scheduler="constant")
    train("short", reselect_steps=None, max_steps=2, scheduler="constant")
    first, short = pairs(tmp_path / "one-frozen" / "2"), pairs(tmp_path / "short")
    assert first.keys() == short.keys()
    assert all(torch.equal(one, other) for path in first for one, other in zip(first[path], short[path], strict=True))


# -- the training


@pytest.mark.slow
def test_one_schedule_and_a_new_optimiser_each_time(train: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    ages: list[set[float]] = []
    log, step = ReplyTrainer.log, torch.optim.AdamW.step

    def logged(self: Any, logs: dict[str, float], *args: Any) -> None:
        rates.extend([logs["learning_rate"]] if "learning_rate" in logs else [])
        log(self, logs, *args)

    def stepped(self: Any, *args: Any) -> Any:
        found = step(self, *args)
        ages.append({float(state["step"]) for state in self.state.values()})
        return found

    monkeypatch.setattr(ReplyTrainer, "log", logged)
    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    for scheduler in ("linear", "cosine"):
        rates.clear()
        train("plain", reselect_steps=None, scheduler=scheduler, warmup_ratio=0.2)
        plain = list(rates)
        rates.clear()
        ages.clear()
        train("one", scheduler=scheduler, warmup_ratio=0.2)
        assert rates == plain
        assert len(set(rates)) > 4
        assert ages == [{1.0}, {2.0}] * 3


def test_the_rate_of_a_step_is_that_of_the_schedule(train: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the optimiser uses, not what is logged."""
    used: list[float] = []
    step = torch.optim.AdamW.step

    def stepped(self: Any, *args: Any) -> Any:
        used.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    train("one")
    assert used == pytest.approx([0.02 * (1 - number / N_STEPS) for number in range(N_STEPS)])


@pytest.mark.parametrize("every", [2, pytest.param(3, marks=pytest.mark.slow)])  # four steps an epoch
def test_order_of_the_data_and_random_state_go_on(train: Trained, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    seen: list[tuple[bytes, bytes]] = []

    def watched(model: Any, batch: Any, **arguments: Any) -> Any:
        seen.append((batch.ids_BS.numpy().tobytes(), torch.get_rng_state().numpy().tobytes()))
        return reply_nll(model, batch, **arguments)

    monkeypatch.setattr(importlib.import_module("castune.tuning.trainer"), "reply_nll", watched)
    heads = dict.fromkeys(range(0, 12, every), HEADS[2]) | {0: HEADS[0]}
    changes: dict[str, Any] = {"family": "gpt2", "accumulation": 1}  # gpt2's dropout draws numbers
    train("plain", reselect_steps=None, **changes)
    plain = list(seen)
    seen.clear()
    train("one", heads, reselect_steps=every, **changes)
    assert len(plain) == 12
    assert [batch for batch, _ in seen] == [batch for batch, _ in plain]
    assert [state for _, state in seen] == [state for _, state in plain]


def test_the_same_heads_again_and_again_train_on(train: Trained, tmp_path: Path) -> None:
    same = dict.fromkeys(range(0, 24, 4), HEADS[0])
    changes = {"reselect_steps": 4, "epochs": 12, "scheduler": "constant", "weight_decay": 0.0}
    result = train("one", same, **changes)
    assert result.certificate.heads == HEADS[0]
    assert len(result.selections) == 6
    losses = [loss for _, loss in result.losses]
    assert [step for step, _ in result.losses] == list(range(1, 25))
    phases = [sum(losses[start : start + 4]) / 4 for start in range(0, 24, 4)]
    assert phases[-1] < phases[len(phases) // 2] < phases[0]
    assert phases == sorted(phases, reverse=True)


def test_the_model_is_left_as_it_was(
    train: Trained, state_of: Callable[[Any], dict[str, Any]], same_bits: Callable[[Tensor, Tensor], bool]
) -> None:
    for family in ("llama", "gpt2"):
        before = state_of(train.model_of(family))
        train("one", family=family)
        after = state_of(train.model)
        tensors = before.pop("tensors"), after.pop("tensors")
        assert before == after
        assert tensors[0].keys() == tensors[1].keys()
        assert all(same_bits(tensors[0][name], tensors[1][name]) for name in tensors[0])
        assert not [name for name, _ in train.model.named_buffers() if "frozen" in name]


def test_frozen_updates_are_neither_parameters_nor_part_of_a_checkpoint(train: Trained, tmp_path: Path) -> None:
    train("one")
    model = train.model
    with torch.no_grad():
        before = model.eval()(input_ids=IDS).logits
        names = list(model.state_dict()), [name for name, _ in model.named_parameters()]
        with pytest.raises(KeyboardInterrupt), frozen_updates(model, tmp_path / "one"):
            within = model(input_ids=IDS).logits
            assert (list(model.state_dict()), [name for name, _ in model.named_parameters()]) == names
            raise KeyboardInterrupt
        assert torch.equal(model(input_ids=IDS).logits, before)
    loaded = PeftModel.from_pretrained(train.model_of("llama"), tmp_path / "one").eval()
    with torch.no_grad():
        torch.testing.assert_close(within, loaded(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)


def test_bfloat16(train: Trained, tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    train.model_of = lambda family: tiny_model(family).to(torch.bfloat16)
    result = train("one")
    assert result.model["dtype"] == "bfloat16"
    assert result.certificate.heads == EVERY
    assert {tensor.dtype for tensor in load_file(tmp_path / "one/adapter_model.safetensors").values()} == {
        torch.float32
    }


# -- interruptions


# Micro-batches, two a step, and steps at whose selection it stops. Phases end after micro-batches 4 and 8.
@pytest.mark.parametrize(
    ("family", "changes", "stops"),
    [
        ("gpt2", {"checkpoint_steps": 1}, ("2", 6, 3)),  # gpt2 has dropout: the random state must come back too
        pytest.param("gpt2", {"checkpoint_steps": 1}, ("2", "4", 4), marks=pytest.mark.slow),
        pytest.param("gpt2", {}, (6, 4, 2), marks=pytest.mark.slow),
        pytest.param("llama", {}, (5, 6), marks=pytest.mark.slow),
        pytest.param("llama", {"checkpoint_steps": 3, "reselect_steps": 2}, (8, "4", 1), marks=pytest.mark.slow),
        ("llama", {"surgery": "pcgrad", "surgery_batch_size": 4, "replay": 0.2, "max_steps": 6}, (7, "4")),
        pytest.param(
            "llama", {"surgery": "gradvac", "surgery_granularity": "tensor"}, (7, "4"), marks=pytest.mark.slow
        ),
        pytest.param("llama", {"snapshot_steps": 1, "gradient_checkpointing": True}, ("2", 3), marks=pytest.mark.slow),
    ],
)
def test_a_stopped_training_comes_to_the_same_adapter(
    train: Trained,
    tmp_path: Path,
    interrupter: Interrupter,
    family: str,
    changes: dict[str, Any],
    stops: tuple[int | str, ...],
) -> None:
    if changes.get("surgery") == "gradvac":
        pytest.importorskip("torchjd")
    whole = train("whole", family=family, **changes)
    for stop in stops:
        if isinstance(stop, int):
            interrupter.countdown = stop
        else:
            train.stop_at = int(stop)
        with pytest.raises(KeyboardInterrupt):
            train("stopped", family=family, **changes)
        interrupter.countdown = None
        assert not (tmp_path / "stopped").exists()
    stopped = train("stopped", family=family, **changes)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    assert stopped.losses == whole.losses
    assert (stopped.steps, stopped.tokens, stopped.surgery) == (whole.steps, whole.tokens, whole.surgery)
    assert (stopped.selections, stopped.budget) == (whole.selections, whole.budget)
    assert not Workspace.beside(tmp_path / "stopped").folder.exists()


def test_a_selection_that_was_written_is_not_made_again(
    train: Trained, tmp_path: Path, interrupter: Interrupter
) -> None:
    interrupter.countdown = 5  # the first micro-batch of the second phase
    with pytest.raises(KeyboardInterrupt):
        train("one")
    assert train.scripted.asked == [2]
    train("one")
    assert train.scripted.asked == [4]
    # With other settings everything begins anew.
    interrupter.countdown = 5
    with pytest.raises(KeyboardInterrupt):
        train("two")
    train("two", learning_rate=0.01)
    assert train.scripted.asked == [2, 4]


# -- snapshots


def test_snapshots_are_whole_adapters_of_the_model_at_their_step(train: Trained, tmp_path: Path) -> None:
    train("one", snapshot_steps=1)
    found = snapshots_of(tmp_path / "one")
    assert list(found) == [1, 2, 3, 4, 5]
    union = train.selection_of(train.model, EVERY)
    for folder in found.values():
        assert Certificate.load(folder) == certify(train.model, folder, union)
    # At the end of a phase it is what was frozen.
    for step in (2, 4):
        frozen, kept = pairs(tmp_path / "one-frozen" / str(step)), pairs(found[step])
        for path, (a, b) in kept.items():
            if path in frozen:
                assert torch.equal(frozen[path][0], a)
                assert torch.equal(frozen[path][1], b)
            else:
                assert not b.any()
    assert json.loads((found[3] / "adapter_config.json").read_text())["r"] == 2 * RANK
    # They change nothing.
    train("plain")
    assert pairs(tmp_path / "one").keys() == pairs(tmp_path / "plain").keys()
    assert (tmp_path / "one/adapter_model.safetensors").read_bytes() == (
        tmp_path / "plain/adapter_model.safetensors"
    ).read_bytes()


def test_stacking_adds_up(train: Trained, tmp_path: Path) -> None:
    for number, name in enumerate(("one", "other")):
        train(name, {0: HEADS[2 * number]}, reselect_steps=None)
    (tmp_path / "sum").mkdir()
    stack([tmp_path / "one", tmp_path / "other"], tmp_path / "sum")
    one, other, both = (pairs(tmp_path / name) for name in ("one", "other", "sum"))
    assert both.keys() == one.keys() | other.keys()
    for path, (a, b) in both.items():
        parts = [found[path][1] @ found[path][0] for found in (one, other) if path in found]
        torch.testing.assert_close(b @ a, sum(parts[1:], parts[0]))
    # The same arithmetic, and another name of it.
    certify(train.model, tmp_path / "sum", train.selection_of(train.model, sorted({*HEADS[0], *HEADS[2]})))


# -- what is refused


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "dpo"}, 'method = "dpo"'),
        ({"quantization": "nf4"}, 'quantization = "nf4"'),
        ({"freeze_a": True}, "freeze_a"),
        ({"surgery": "pcgrad", "surgery_granularity": "head"}, 'surgery_granularity = "head"'),
    ],
)
def test_settings_that_do_not_go_with_it(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CastuneError, match=r"tune.reselect_steps does not go with") as error:
        CONFIG.changed(**changes)
    assert named in str(error.value)
    CONFIG.changed(reselect_steps=None, **changes)


def test_what_cannot_be_selected_again(
    train: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any, aligned: list[Example]
) -> None:
    model = train.model_of("llama")
    selection = train.selection_of(model, HEADS[0])

    def refused(selection: HeadSelection, **arguments: Any) -> str:
        with pytest.raises(CastuneError) as error:
            tune(model, tiny_tokenizer, selection, data=aligned, out=tmp_path / "a", config=CONFIG, **arguments)
        assert not list(tmp_path.iterdir())
        return str(error.value)

    assert "give `reselect`" in refused(selection)
    others = train.selection_of(model, [], [("o_head", 0, 1)])
    assert "is for query heads" in refused(others, reselect=lambda *_: others)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "works in one process, and there are 2" in refused(selection, reselect=lambda *_: selection)
