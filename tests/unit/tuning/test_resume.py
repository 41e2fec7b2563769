"""A training that was stopped comes to the adapter it would have come to; one that cannot write says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_training import N_STEPS, SOME, THREE_EPOCHS, Interrupter, SelectionOf, Tuned, weights
from transformers import AutoModelForCausalLM

from castune.artifacts import HeadSelection, TuneResult
from castune.config import TuneConfig
from castune.data.example import Example
from castune.errors import TrainingError
from castune.tuning.train import tune
from castune.tuning.trainer import ByLength
from castune.tuning.workspace import Workspace

CONFIG = THREE_EPOCHS.changed(checkpoint_steps=1)


# At which micro-batch: in the first epoch, at its end, in the second, in the last step.
@pytest.mark.parametrize(
    ("surgery", "stops"),
    [
        ("none", (4, 3)),
        pytest.param("none", (5,), marks=pytest.mark.slow),
        pytest.param("none", (7, 1, 4), marks=pytest.mark.slow),
        ("pcgrad", (6,)),
        pytest.param("gradvac", (8,), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_stopped_training_comes_to_the_same_adapter(
    tiny_model: Callable[..., Any],
    tuned: Tuned,
    harmful: list[Example],
    selection_of: SelectionOf,
    interrupter: Interrupter,
    tmp_path: Path,
    family: str,
    surgery: str,
    stops: tuple[int, ...],
) -> None:
    if surgery == "gradvac":
        pytest.importorskip("torchjd")
    config = CONFIG.changed(surgery=surgery, surgery_batch_size=None if surgery == "none" else 4)

    def train(name: str) -> TuneResult:
        model = tiny_model(family)  # gpt2 has dropout: the random state must come back too
        selection = selection_of(model, SOME)
        out = tmp_path / name
        return tuned(model, out, config, selection=selection, utility=harmful)

    whole = train("whole")
    assert whole.steps == N_STEPS
    for stop in stops:
        interrupter.countdown = stop
        with pytest.raises(KeyboardInterrupt):
            train("stopped")
        assert not (tmp_path / "stopped").exists()
    last = Workspace.beside(tmp_path / "stopped").last_checkpoint()
    assert last is not None
    steps_before = int(last[0].name.removeprefix("checkpoint-"))
    assert steps_before == sum(stop - 1 for stop in stops) // 2
    stopped = train("stopped")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    assert stopped.losses == whole.losses
    assert (stopped.steps, stopped.tokens, stopped.surgery) == (whole.steps, whole.tokens, whole.surgery)
    assert not Workspace.beside(tmp_path / "stopped").folder.exists()


def test_checkpoints_hold_the_adapter_alone(
    tiny_model: Callable[..., Any], tuned: Tuned, interrupter: Interrupter, tmp_path: Path
) -> None:
    """PEFT adds the embeddings of a model whose vocabulary was resized, and the Trainer its arguments in a pickle."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.resize_token_embeddings(model.config.vocab_size + 8)
    interrupter.countdown = 4
    with pytest.raises(KeyboardInterrupt):
        tuned(model, tmp_path / "a", CONFIG)
    last = Workspace.beside(tmp_path / "a").last_checkpoint()
    assert last is not None
    saved = load_file(last[0] / "adapter_model.safetensors")
    assert saved
    assert all(".lora_" in name for name in saved)
    assert not (last[0] / "training_args.bin").exists()


def test_another_training_starts_anew(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    aligned: list[Example],
    selection_of: SelectionOf,
    interrupter: Interrupter,
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    selection = selection_of(model, SOME)

    def stopped_then(config: TuneConfig, data: list[Example], heads: HeadSelection) -> bytes:
        interrupter.countdown = 5
        with pytest.raises(KeyboardInterrupt):
            tune(model, tiny_tokenizer, selection, data=aligned, out=tmp_path / "one", config=CONFIG)
        tune(model, tiny_tokenizer, heads, data=data, out=tmp_path / "one", config=config)
        tune(model, tiny_tokenizer, heads, data=data, out=tmp_path / "other", config=config)
        assert weights(tmp_path / "one") == weights(tmp_path / "other")
        return weights(tmp_path / "one")

    found = {
        stopped_then(CONFIG.changed(learning_rate=0.01), aligned, selection),
        stopped_then(CONFIG, aligned[:7], selection),
        stopped_then(CONFIG, aligned, selection_of(model, ((1, 1),))),
    }
    assert len(found) == 3


def test_checkpoints_that_are_not_whole_are_not_used(tmp_path: Path) -> None:
    workspace = Workspace.beside(tmp_path / "adapter")
    workspace.open({"seed": 1})
    assert workspace.last_checkpoint() is None
    for step in (9, 10, 100):
        (workspace.folder / f"checkpoint-{step}").mkdir()
        workspace.mark(step, {"step": step})
    (workspace.folder / "checkpoint-200").mkdir()  # killed while it was written
    (workspace.folder / "checkpoint-100" / "castune.json").write_text('{"step": 1')
    found = workspace.last_checkpoint()
    assert found == (workspace.folder / "checkpoint-10", {"step": 10})
    workspace.open({"seed": 1})
    assert sorted(path.name for path in workspace.folder.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-9"]
    workspace.open({"seed": 2})
    assert workspace.last_checkpoint() is None
    workspace.leave()
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_diverges_keeps_no_checkpoints(
    tiny_model: Callable[..., Any], tuned: Tuned, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    config = CONFIG.changed(learning_rate=1e30)
    with pytest.raises(TrainingError):
        tuned(model, tmp_path / "a", config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_below_the_lowest_chosen_layer_is_kept_for_backward(
    tiny_model: Callable[..., Any], tuned: Tuned, selection_of: SelectionOf, tmp_path: Path, checkpointing: bool
) -> None:
    model = tiny_model("llama")
    seen: dict[int, set[bool]] = {0: set(), 1: set(), 2: set()}
    for layer, block in enumerate(model.model.layers):
        block.register_forward_hook(
            lambda _module, _args, output, layer=layer: (
                seen[layer].add(output.requires_grad) if model.training else None
            )
        )
    config = CONFIG.changed(gradient_checkpointing=checkpointing)
    tuned(model, tmp_path / "a", config, selection=selection_of(model, ((1, 2),)))
    assert seen == {0: {False}, 1: {True}, 2: {True}}


def test_gradient_checkpointing_trains_the_same(
    tiny_model: Callable[..., Any], tuned: Tuned, state_of: Callable[[Any], dict[str, Any]], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    before = state_of(model)
    losses = []
    for name, checkpointing in (("with", True), ("without", False)):
        config = CONFIG.changed(gradient_checkpointing=checkpointing)
        out = tmp_path / name
        losses.append(tuned(model, out, config))
        after = state_of(model)
        for what in ("modules", "hooks", "requires_grad", "training", "config", "attributes"):
            assert after[what] == before[what], what
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert weights(tmp_path / "with") == weights(tmp_path / "without")
    assert [loss for _, loss in losses[0].losses] == pytest.approx([loss for _, loss in losses[1].losses], abs=1e-5)
    assert json.loads((tmp_path / "with" / "tune.json").read_text())["settings"]["gradient_checkpointing"]


# -- order


@pytest.mark.parametrize(("n", "size"), [(1, 4), (4, 4), (7, 4), (64, 8), (67, 8), (8, 3)])
def test_steps_by_length_see_every_example_once_an_epoch(n: int, size: int) -> None:
    lengths = [(37 * i) % 23 + 1 for i in range(n)]
    sampler = ByLength(size, lengths, seed=3)
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert orders[-1] == list(sampler), "an epoch that is begun again is the same"
        assert sorted(orders[-1]) == list(range(n))
        assert lengths[orders[-1][0]] == max(lengths), "what needs most memory comes first"
    if n > 2 * size:
        assert orders[0] != orders[1]


def test_steps_by_length_pad_less_and_come_in_random_order() -> None:
    lengths = [(7919 * i) % 200 + 1 for i in range(512)]
    order = list(ByLength(8, lengths, seed=0))

    def padded(indices: list[int]) -> int:
        return sum(8 * max(lengths[i] for i in indices[k : k + 8]) for k in range(0, len(indices), 8))

    assert padded(order) < 1.1 * sum(lengths) < 0.7 * padded(list(range(512)))
    longest = [max(lengths[i] for i in order[k : k + 8]) for k in range(8, 504, 8)]
    rises = sum(later > earlier for earlier, later in zip(longest, longest[1:], strict=False))
    assert 0.3 < rises / len(longest) < 0.7, "no course from long to short"
