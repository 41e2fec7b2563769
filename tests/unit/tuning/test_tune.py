"""Training: only the chosen rows move, the base stays as it was, the adapter is a standard one or absent."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_training import CONFIG, SOME, Interrupter, SelectionOf, Tuned, logits
from torch import Tensor

from castune.artifacts import Certificate, TuneResult
from castune.artifacts.tune_result import adapter_hash
from castune.core.heads import HeadLayout
from castune.core.losses import RowBatch, reply_nll
from castune.data.chat import ChatFormat
from castune.data.example import Example, content_hash
from castune.errors import CastuneError, DataError, TrainingError
from castune.tuning.train import tune
from castune.tuning.trainer import ReplyTrainer
from castune.tuning.verify import certify

FAMILIES = ("llama", "phi3", "gpt2", "gpt_neox")


def rows_of(family: str, heads: Sequence[int]) -> list[int]:
    """Query rows of heads of width 8, by hand."""
    stride = 24 if family == "gpt_neox" else 8
    return [stride * head + row for head in heads for row in range(8)]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_chosen_rows_move(
    tiny_model: Callable[..., Any],
    tuned: Tuned,
    selection_of: SelectionOf,
    same_bits: Callable[[Tensor, Tensor], bool],
    tmp_path: Path,
    family: str,
) -> None:
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    selection = selection_of(model, SOME)
    result = tuned(model, tmp_path / "adapter", CONFIG, selection=selection, source="own")

    # The base is as it was, bit for bit, and nothing is wrapped or hooked.
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(same_bits(after[name], before[name]) for name in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert not any("lora" in name for name, _ in model.named_modules())

    # Plain PEFT loads the adapter into a fresh model; merged, exactly the chosen query rows differ.
    merged = PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter").merge_and_unload().state_dict()
    assert merged.keys() == before.keys()
    layout = HeadLayout.of(model)
    projections = {f"{layout.at(layer).query_path}.weight": heads for layer, heads in ((0, (1, 3)), (2, (0,)))}
    for name, tensor in merged.items():
        if name not in projections:
            assert same_bits(tensor, before[name]), name
            continue
        new, old = (t.t() if layout.at(0).transposed else t for t in (tensor, before[name]))
        moved = [row for row in range(len(new)) if not same_bits(new[row], old[row])]
        assert moved == rows_of(family, projections[name])

    # And the certificate says so.
    certificate = result.certificate
    assert certificate == Certificate.load(tmp_path / "adapter")
    rows_per_layer = len(
        merged[next(iter(projections))].t() if layout.at(0).transposed else merged[next(iter(projections))]
    )
    assert (certificate.selected_rows, certificate.changed_rows) == (24, 24)
    assert certificate.checked_rows == 2 * rows_per_layer - 24
    assert certificate.heads == SOME
    assert certificate.adapter_hash == adapter_hash(tmp_path / "adapter")
    largest = max((merged[name] - before[name]).abs().max().item() for name in projections)
    assert certificate.largest_change == pytest.approx(largest, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_adapter_is_the_trained_one(
    tiny_model: Callable[..., Any], tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    trained: list[Tensor] = []
    unload = PeftModel.unload if "unload" in vars(PeftModel) else None
    assert unload is None, "unload is delegated to the tuner; the logits are taken before saving"
    save = PeftModel.save_pretrained

    def save_and_look(self: Any, *args: Any, **kwargs: Any) -> Any:
        trained.append(logits(self))
        return save(self, *args, **kwargs)

    monkeypatch.setattr(PeftModel, "save_pretrained", save_and_look)
    model = tiny_model(family)
    tuned(model, tmp_path / "adapter", CONFIG)
    expected = trained[-1]  # those before it are checkpoints
    reloaded = logits(PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter"))
    assert torch.equal(reloaded, expected)
    assert not torch.allclose(expected, logits(model)), "training changed something"


def test_the_model_is_left_as_it_was(
    tiny_model: Callable[..., Any], tuned: Tuned, state_of: Callable[[Any], dict[str, Any]], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    before = state_of(model)
    tuned(model, tmp_path / "a", CONFIG)
    after = state_of(model)
    for what in ("modules", "hooks", "requires_grad", "gradients", "training", "config", "attributes"):
        assert after[what] == before[what], what


def test_a_model_in_training_mode_stays_in_it(tiny_model: Callable[..., Any], tuned: Tuned, tmp_path: Path) -> None:
    model = tiny_model("llama").train()
    tuned(model, tmp_path / "a", CONFIG)
    assert model.training


def test_a_model_can_be_tuned_again_and_again(tiny_model: Callable[..., Any], tuned: Tuned, tmp_path: Path) -> None:
    model = tiny_model("llama")
    for name in ("one", "two"):
        tuned(model, tmp_path / name, CONFIG)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_seeds_decide_the_adapter(tiny_model: Callable[..., Any], tuned: Tuned, tmp_path: Path) -> None:
    weights = {}
    for name, seed in (("one", 21), ("again", 21), ("other", 42)):
        torch.manual_seed(hash(name) % 1000)  # nothing but the config's seed may count
        model = tiny_model("llama", seed=0)
        torch.manual_seed(len(weights))
        config = CONFIG.changed(seed=seed)
        tuned(model, tmp_path / name, config)
        weights[name] = (tmp_path / name / "adapter_model.safetensors").read_bytes()
    assert weights["one"] == weights["again"]
    assert weights["one"] != weights["other"]


def test_frozen_a_is_saved_as_initialised(tiny_model: Callable[..., Any], tuned: Tuned, tmp_path: Path) -> None:
    saved = {}
    for steps in (1, 3):
        model, config = tiny_model("llama"), CONFIG.changed(freeze_a=True, max_steps=steps)
        result = tuned(model, tmp_path / str(steps), config)
        saved[steps] = load_file(tmp_path / str(steps) / "adapter_model.safetensors")
        assert result.budget["a_matrices"] == 0
    for name, tensor in saved[1].items():
        assert torch.equal(tensor, saved[3][name]) == ("lora_A" in name)


def test_the_record_tells_what_happened(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    aligned: list[Example],
    selection_of: SelectionOf,
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    config = CONFIG.changed(max_steps=None, epochs=2, max_length=60)
    selection = selection_of(model, SOME)
    result = tune(model, tiny_tokenizer, selection, data=aligned, out=tmp_path / "adapter", config=config, source="own")
    assert result == TuneResult.load(tmp_path / "adapter")
    assert result.adapter == "adapter"
    assert result.steps == 4  # 8 examples, 2 x 2 a step, twice
    assert [step for step, _ in result.losses] == [1, 2, 3, 4]
    rows = [ChatFormat(tiny_tokenizer, max_length=60).loss_row(example) for example in aligned]
    assert result.tokens == 2 * sum(len(row.ids) for row in rows)
    cut = sum(row.cut for row in rows)
    assert cut > 0
    assert result.data == {"source": "own", "n": 8, "hash": content_hash(aligned), "cut": cut, "replies_cut": 0}
    assert result.settings == config.record()
    assert result.model["fingerprint"] == selection.model_fingerprint
    assert result.provenance["seed"] == config.seed
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "certificate.json", "tune.json"} <= files
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_first_logged_loss_is_castunes_one_loss(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    aligned: list[Example],
    selection_of: SelectionOf,
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    config = CONFIG.changed(max_steps=1, batch_size=3, accumulation=2)
    data = aligned[:6]
    chat = ChatFormat(tiny_tokenizer, max_length=128)
    with torch.no_grad():
        expected = reply_nll(model, RowBatch.of([chat.loss_row(example) for example in data])).mean().item()
    result = tune(model, tiny_tokenizer, selection_of(model, SOME), data=data, out=tmp_path / "a", config=config)
    # B starts at zero, and one step sees all six examples: their mean, whatever their order and lengths.
    assert result.losses[0][1] == pytest.approx(expected, rel=1e-3)


def test_accumulated_batches_train_like_one_large_batch(
    tiny_model: Callable[..., Any], tuned: Tuned, tmp_path: Path
) -> None:
    found = []
    for name, batch, accumulation in (("one", 8, 1), ("many", 2, 4)):
        model = tiny_model("llama")
        config = CONFIG.changed(max_steps=1, batch_size=batch, accumulation=accumulation)
        tuned(model, tmp_path / name, config)
        found.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    # Adam's first step is close to the sign of the gradient: entries near zero may flip, most must agree.
    for key in found[0]:
        close = torch.isclose(found[0][key], found[1][key], atol=1e-4)
        assert close.float().mean() > 0.97, key


def test_training_lowers_the_loss(
    tiny_model: Callable[..., Any], tuned: Tuned, selection_of: SelectionOf, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    heads = HeadLayout.of(model).heads
    config = CONFIG.changed(max_steps=12, batch_size=8, accumulation=1)
    result = tuned(model, tmp_path / "a", config, selection=selection_of(model, heads))
    losses = [loss for _, loss in result.losses]
    assert losses[-1] < losses[0] - 0.02


def test_an_adapter_that_was_there_is_replaced_whole(
    tiny_model: Callable[..., Any], tuned: Tuned, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    out.mkdir()
    (out / "left-over.txt").write_text("old")
    model = tiny_model("llama")
    tuned(model, out, CONFIG)
    assert not (out / "left-over.txt").exists()
    assert TuneResult.load(out).steps == 3


# -- faults


def assert_nothing_left(folder: Path, model: Any) -> None:
    assert not folder.exists() or list(folder.iterdir()) == []
    assert not any("lora" in name for name, _ in model.named_modules())


def test_weights_with_nan_are_a_training_error_and_leave_nothing(
    tiny_model: Callable[..., Any], tuned: Tuned, selection_of: SelectionOf, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = float("nan")
    # HeadLayout's probe looks at each attention alone, so a selection can be made.
    selection = selection_of(model, SOME)
    with pytest.raises((TrainingError, CastuneError), match="nan") as caught:
        tuned(model, tmp_path / "run" / "adapter", CONFIG, selection=selection)
    assert isinstance(caught.value, TrainingError)
    assert "learning_rate" in str(caught.value)
    assert_nothing_left(tmp_path / "run", model)


@pytest.mark.parametrize("steps", [4])
def test_an_absurd_learning_rate_is_a_training_error(
    tiny_model: Callable[..., Any], tuned: Tuned, tmp_path: Path, steps: int
) -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = CONFIG.changed(learning_rate=1e30, max_steps=steps)
    with pytest.raises(TrainingError, match="learning_rate"):
        tuned(model, tmp_path / "run" / "adapter", config)
    assert_nothing_left(tmp_path / "run", model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_failed_training_keeps_the_adapter_that_was_there(
    tiny_model: Callable[..., Any], tuned: Tuned, selection_of: SelectionOf, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    selection = selection_of(model, SOME)
    tuned(model, tmp_path / "adapter", CONFIG, selection=selection)
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    with pytest.raises(TrainingError):
        config = CONFIG.changed(learning_rate=1e30)
        tuned(model, tmp_path / "adapter", config, selection=selection)
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_bad_data_is_refused_before_the_model_is_touched(
    tiny_model: Callable[..., Any], tuned: Tuned, state_of: Callable[[Any], dict[str, Any]], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    before = state_of(model)["modules"]
    no_reply = Example(id="bare", prompt="a")
    for data, named in (([], "no training examples"), ([no_reply], "'bare' has no reply")):
        with pytest.raises(DataError, match=named):
            tuned(model, tmp_path / "run" / "a", CONFIG, data=data)
    assert state_of(model)["modules"] == before
    assert_nothing_left(tmp_path / "run", model)


def test_an_interrupt_unwraps_the_model_and_leaves_nothing(
    tiny_model: Callable[..., Any], tuned: Tuned, tmp_path: Path, interrupter: Interrupter
) -> None:
    interrupter.countdown = 3
    model = tiny_model("llama")
    with pytest.raises(KeyboardInterrupt):
        tuned(model, tmp_path / "run" / "adapter", CONFIG)
    assert_nothing_left(tmp_path / "run", model)


def test_negative_zeros_of_the_base_are_no_change(
    tiny_model: Callable[..., Any], tuned: Tuned, selection_of: SelectionOf, tmp_path: Path
) -> None:
    # -0.0 + 0.0 is +0.0: merging an exactly zero delta must not make a certificate fail after hours of training.
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = -0.0  # a row of head 0, which is not selected
    result = tuned(model, tmp_path / "a", CONFIG)
    assert result.certificate.changed_rows == 24
    assert certify(model, tmp_path / "a", selection_of(model, SOME)) == result.certificate


def test_bfloat16_models_train_and_certify(
    tiny_model: Callable[..., Any], tuned: Tuned, selection_of: SelectionOf, tmp_path: Path
) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    selection = selection_of(model, SOME)
    result = tuned(model, tmp_path / "a", CONFIG, selection=selection)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert result.certificate.changed_rows == 24
    fresh = tiny_model("llama").to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    merged = PeftModel.from_pretrained(fresh, tmp_path / "a").merge_and_unload().state_dict()
    for name, tensor in merged.items():
        moved = set((tensor != before[name]).reshape(len(tensor), -1).any(1).nonzero().flatten().tolist())
        allowed = set(rows_of("llama", (1, 3) if "layers.0" in name else (0,) if "layers.2" in name else ()))
        assert moved <= (allowed if "q_proj" in name else set()), name
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_weights_that_burst_in_the_last_step_are_a_training_error(
    tiny_model: Callable[..., Any], tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No loss is computed after the last update: the weights must be looked at themselves.
    run = ReplyTrainer.run

    def run_and_burst(self: Any, advance: Any) -> None:
        run(self, advance)
        parameter = next(p for name, p in self.model.named_parameters() if "lora_B" in name)
        with torch.no_grad():
            parameter[8, 0] = float("inf")

    monkeypatch.setattr(ReplyTrainer, "run", run_and_burst)
    model = tiny_model("llama")
    with pytest.raises(TrainingError, match="learning_rate"):
        tuned(model, tmp_path / "run" / "a", CONFIG)
    assert_nothing_left(tmp_path / "run", model)
