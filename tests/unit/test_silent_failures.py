"""What would go wrong without a word elsewhere is an error here, or is told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from castune.artifacts import HeadSelection
from castune.config import DiagnoseConfig, EvaluateConfig, TuneConfig
from castune.core.checksum import checksums, unchanged
from castune.core.loading import load
from castune.core.provenance import fingerprint
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.data.overlap import shared_examples
from castune.diagnosis.run import diagnose
from castune.errors import AdapterNotApplied, CastuneError, DataError, TrainingError, WeightsChanged
from castune.evaluation.applied import require_applied
from castune.evaluation.backend import TransformersHost
from castune.evaluation.suites import Suite
from castune.steps.held_out import require_held_out
from castune.tuning.train import tune

Tiny = Callable[..., Any]
QUICK = DiagnoseConfig(measure="margin", max_new_tokens=2, gradient_chunks=2)
ALIGN = [Example(id=f"a{i}", prompt=f"Tell me about {w}.", reply=f"Rather not {w}.") for i, w in enumerate("abcd")]


# -- weights changed


@given(st.integers(0, 15), st.integers(0, 31), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=50, deadline=None)
def test_one_changed_bit_changes_the_checksum(place: int, bit: int, dtype: torch.dtype) -> None:
    model = nn.Linear(4, 4).to(dtype)
    before = checksums(model)
    view = model.weight.data.view(torch.int32 if dtype is torch.float32 else torch.int16).flatten()
    view[place] ^= 1 << (bit % (8 * dtype.itemsize - 1))
    assert checksums(model)["weight"] != before["weight"]
    assert checksums(model)["bias"] == before["bias"]


def test_swapped_values_change_the_checksum_and_copies_do_not() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3000, 2000, bias=False)  # more than one chunk
    before = checksums(model)
    assert checksums(model.to(torch.float64).to(torch.float32)) == before
    with torch.no_grad():
        model.weight[[0, 1999]] = model.weight[[1999, 0]]
    assert checksums(model) != before


def test_a_diagnosis_of_a_model_that_changes_meanwhile_is_refused(
    tiny_model: Tiny, tiny_tokenizer: Any, questions: list[Example], harmful: list[Example], tmp_path: Path
) -> None:
    model = tiny_model("llama")

    def nudge(module: nn.Module, *_: Any) -> None:
        # What a hook of another library, or an ablation that is not undone, does; autograd does not see it.
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3

    handle = model.lm_head.register_forward_hook(nudge)
    with pytest.raises(WeightsChanged, match=r"diagnosing: model\.layers\.1\.mlp\.up_proj\.weight"):
        diagnose(model, tiny_tokenizer, safety=harmful, utility=questions, config=QUICK, out=tmp_path)
    assert not (tmp_path / "conflict_map.parquet").exists()
    handle.remove()
    diagnose(model, tiny_tokenizer, safety=harmful, utility=questions, config=QUICK, out=tmp_path)


def test_a_training_that_changes_the_base_is_refused(tiny_model: Tiny, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    selection = HeadSelection.custom([(0, 1)], n_total=12, model_fingerprint=fingerprint(model))
    original = model.model.norm.weight

    def nudge(*_: Any) -> None:
        if model.training:
            original.data[0] += 0.5

    handle = model.lm_head.register_forward_hook(nudge)
    with pytest.raises(WeightsChanged, match=r"training: model\.norm\.weight"):
        tune(
            model,
            tiny_tokenizer,
            selection,
            data=ALIGN,
            out=tmp_path / "adapter",
            config=TuneConfig(rank=2, max_steps=1),
        )
    handle.remove()
    assert not (tmp_path / "adapter").exists()


def test_a_block_that_reads_changes_nothing_and_one_that_fails_keeps_its_error(tiny_model: Tiny) -> None:
    model = tiny_model("gpt2")
    with unchanged(model, "reading"):
        model(torch.tensor([[1, 2, 3]]))
    with pytest.raises(KeyError), unchanged(model, "failing"):
        model.transformer.wte.weight.data[0] = 0
        raise KeyError


# -- adapters that are not applied


@pytest.fixture
def adapter(tiny_model: Tiny, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    peft_model = get_peft_model(
        tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    peft_model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def renamed(adapter: Path, change: Callable[[str], str]) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)


def test_an_adapter_that_is_applied_is_taken(adapter: Path, tiny_model: Tiny, tiny_tokenizer: Any) -> None:
    host = TransformersHost(tiny_model("llama"), tiny_tokenizer)
    with host.backend("safe", adapter):
        pass


def test_weights_without_a_place_are_refused(adapter: Path, tiny_model: Tiny, tiny_tokenizer: Any) -> None:
    renamed(adapter, lambda name: name.replace("layers.2", "blocks.2"))
    host = TransformersHost(tiny_model("llama"), tiny_tokenizer)
    # PEFT itself only warns.
    with (
        pytest.warns(UserWarning, match="missing adapter keys"),
        pytest.raises(AdapterNotApplied, match=r"would not take effect: no place for .*blocks"),
        host.backend("safe", adapter),
    ):
        raise AssertionError("nothing may be measured")
    # The model is as it was, and can be used for another arm.
    assert not any("lora" in name for name, _ in host.model.named_modules())


def test_an_adapter_that_holds_less_than_its_configuration_says_is_refused(adapter: Path, tiny_model: Tiny) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "layers.1" not in name}, file)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        peft_model = PeftModel.from_pretrained(tiny_model("llama"), adapter)
    with pytest.raises(AdapterNotApplied, match=r"asks for .*layers\.1"):
        require_applied(peft_model, adapter)


def test_an_adapter_that_is_switched_off_or_merged_is_refused(adapter: Path, tiny_model: Tiny) -> None:
    peft_model = PeftModel.from_pretrained(tiny_model("llama"), adapter)
    require_applied(peft_model, adapter)
    with peft_model.disable_adapter(), pytest.raises(AdapterNotApplied, match="switched off"):
        require_applied(peft_model, adapter)
    peft_model.merge_adapter()
    with pytest.raises(AdapterNotApplied, match="merged already"):
        require_applied(peft_model, adapter)


def test_other_weights_than_those_of_the_file_are_refused(adapter: Path, tiny_model: Tiny) -> None:
    peft_model = PeftModel.from_pretrained(tiny_model("llama"), adapter)
    module = peft_model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        module.lora_B["default"].weight[0, 0] += 1
    with pytest.raises(AdapterNotApplied, match=r"lora_B\.weight was not loaded"):
        require_applied(peft_model, adapter)


# -- selections, losses, labels


@pytest.mark.parametrize("heads", [[(0, 4)], [(3, 0)], [(0, 0), (7, 7)], [(-1, 0)]])
def test_a_selection_of_heads_that_are_not_there_is_refused(
    heads: list[tuple[int, int]], tiny_model: Tiny, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model("llama")  # 3 layers of 4 heads
    selection = HeadSelection.custom(heads, n_total=12, model_fingerprint=fingerprint(model))
    with pytest.raises(CastuneError, match="head"):
        tune(
            model,
            tiny_tokenizer,
            selection,
            data=ALIGN,
            out=tmp_path / "adapter",
            config=TuneConfig(rank=2, max_steps=1),
        )
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_diagnosed_nor_trained(
    value: float,
    tiny_model: Tiny,
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5, 5] = value
    with pytest.raises(CastuneError, match=r"the loss of a calibration batch is (nan|inf)"):
        diagnose(model, tiny_tokenizer, safety=harmful, utility=questions, config=QUICK, out=tmp_path / "run")
    assert not (tmp_path / "run" / "conflict_map.parquet").exists()
    selection = HeadSelection.custom([(0, 1)], n_total=12, model_fingerprint=fingerprint(model))
    with pytest.raises(TrainingError, match="the loss is nan at step 1"):
        tune(
            model,
            tiny_tokenizer,
            selection,
            data=ALIGN,
            out=tmp_path / "adapter",
            config=TuneConfig(rank=2, max_steps=1),
        )
    assert not (tmp_path / "adapter").exists()


def test_a_reply_without_tokens_or_that_does_not_fit_is_refused(tiny_tokenizer: Any) -> None:
    chat = ChatFormat(tiny_tokenizer, max_length=24)
    with pytest.raises(DataError, match="no tokens"):
        chat.row(Example(id="x", prompt="p"), [1, 2], [[]])
    # What is scored is never cut: another reply would be scored.
    with pytest.raises(DataError, match=r"'x': its reply has 41 tokens, the limit .* is 24"):
        chat.row(Example(id="x", prompt="p"), [1, 2], [[3] * 41])


# -- chat templates


def with_template(tokenizer: Any, template: str, folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", True),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}", True),  # no token of its own
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}", False),
    ],
)
def test_a_template_that_never_ends_a_turn_is_told(
    template: str, told: bool, tiny_model: Tiny, tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = with_template(tiny_tokenizer, template, tmp_path / "model", tiny_model("llama"))
    with caplog.at_level(logging.WARNING):
        load(str(path), dtype="float32", device="cpu")
    assert ("no special token" in caplog.text) == told


def test_a_template_that_leaves_replies_out_is_refused(tiny_model: Tiny, tiny_tokenizer: Any, tmp_path: Path) -> None:
    template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}<|im_end|>{% endfor %}"
    path = with_template(tiny_tokenizer, template, tmp_path / "model", tiny_model("llama"))
    with pytest.raises(CastuneError, match="leaves out a part of what the assistant says"):
        load(str(path), dtype="float32", device="cpu")


# -- training and evaluation overlap


def suite(*prompts: str, name: str = "held-out") -> Suite:
    return Suite(name, "safety", tuple(Example(id=f"s{i}", prompt=p, reply="No.") for i, p in enumerate(prompts)))


def held_out(suites: Sequence[Suite], *, overlap: str = "refuse", calibration: Sequence[Example] = ()) -> None:
    config = EvaluateConfig(overlap=overlap)
    require_held_out(config, suites, trained_on={"training": ALIGN}, calibration={"safety": calibration})


@pytest.mark.parametrize(
    "prompt", ["Tell me about a.", "  tell me ABOUT a", "Tell  me about\n“a”?", "Tell me about ａ."]
)
def test_a_suite_with_a_training_prompt_is_refused(prompt: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        DataError, match=r"held-out: 1 of 2 prompts are also in the training data \(the first is 's1'\)"
    ):
        held_out([suite("Something else", prompt)])
    with caplog.at_level(logging.WARNING):
        held_out([suite("Something else", prompt)], overlap="allow")
    assert "memorisation" in caplog.text


def test_calibration_prompts_in_a_suite_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        held_out([suite("Tell me more.")], calibration=[Example(id="c", prompt="tell me more")])
    assert "1 of 1 prompts are also in the safety data" in caplog.text


@given(st.lists(st.text(min_size=1), max_size=6), st.lists(st.text(min_size=1), max_size=6))
def test_overlap_finds_every_equal_prompt_and_is_symmetric(ones: list[str], others: list[str]) -> None:
    left = [Example(id=str(i), prompt=text) for i, text in enumerate(ones)]
    right = [Example(id=str(i), prompt=text) for i, text in enumerate(others)]
    found = shared_examples(left, right)
    assert {str(i) for i, text in enumerate(others) if text in ones} <= set(found)
    assert bool(found) == bool(shared_examples(right, left))
    assert shared_examples(left, left) == [one.id for one in left]
