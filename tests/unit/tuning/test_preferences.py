"""DPO through TRL: its loss on castune's tokens, on the chosen rows alone, leaving the model as it was."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_training import SOME, SelectionOf
from torch import Tensor
from torch.nn import functional

from castune.artifacts import TuneResult
from castune.config import TuneConfig
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.errors import CastuneError, DataError
from castune.tuning.preferences import preference_pairs
from castune.tuning.row_lora import sparse_lora
from castune.tuning.train import tune
from castune.tuning.trainer import SparseTraining
from castune.tuning.verify import certify
from castune.tuning.workspace import Workspace

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

CONFIG = TuneConfig(
    method="dpo", beta=0.3, rank=4, alpha=8, learning_rate=0.02, max_steps=3, batch_size=2, accumulation=2,
    max_length=128, checkpoint_steps=1,
)  # fmt: skip


@pytest.fixture
def pairs() -> list[Example]:
    """Pairs of replies of different lengths."""
    words = ["tea", "a long walk", "rain", "the sea", "bread", "snow"]
    return [
        Example(id=f"p{i}", prompt=f"Tell me of {w}.", reply=f"I like {w}{'!' * i}", rejected=f"No{'.' * (7 - i)}")
        for i, w in enumerate(words)
    ]


def log_prob(model: Any, prompt: list[int], reply: list[int]) -> Tensor:
    """Of a whole reply with its end of turn, from a plain forward of one sequence."""
    logits = model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(reply)), reply].sum()


def test_gradients_are_those_of_the_dpo_loss(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    pairs: list[Example],
    selection_of: SelectionOf,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    found: list[list[Tensor]] = []
    step = SparseTraining.training_step

    def look(self: Any, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = step(self, model, *args, **kwargs)
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        return loss

    monkeypatch.setattr(SparseTraining, "training_step", look)
    config = CONFIG.changed(batch_size=6, accumulation=1, max_steps=1)
    model = tiny_model("llama")
    selection = selection_of(model, SOME)
    result = tune(model, tiny_tokenizer, selection, data=pairs, out=tmp_path / "a", config=config)
    # Policy and reference are the same model at first.
    assert result.losses[0][1] == pytest.approx(math.log(2), abs=1e-5)

    torch.manual_seed(config.seed)
    by_hand = sparse_lora(tiny_model("llama"), selection, r=4, alpha=8)
    for name, tensor in load_file(tmp_path / "a" / "adapter_model.safetensors").items():
        if "lora_A" in name:  # B is zero, so A's gradient is zero and A is what it was
            by_hand.get_parameter(name.replace(".weight", ".default.weight")).data.copy_(tensor)
    chat = ChatFormat(tiny_tokenizer, max_length=128)
    loss = torch.zeros(())
    for pair in preference_pairs(chat, pairs):
        ids = [pair[key] for key in ("chosen_ids", "rejected_ids")]
        assert all(reply[-1] == chat.end_token for reply in ids)
        chosen, rejected = (log_prob(by_hand, pair["prompt_ids"], reply) for reply in ids)
        ratio = (chosen - chosen.detach()) - (rejected - rejected.detach())
        loss = loss - functional.logsigmoid(config.beta * ratio) / len(pairs)
    expected = torch.autograd.grad(loss, [p for p in by_hand.parameters() if p.requires_grad])
    for mine, reference in zip(found[0], expected, strict=True):
        assert torch.allclose(mine, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("surgery", ["none", "pcgrad"])
def test_only_chosen_rows_move_and_the_model_is_left_as_it_was(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    pairs: list[Example],
    aligned: list[Example],
    selection_of: SelectionOf,
    state_of: Callable[[Any], dict[str, Any]],
    tmp_path: Path,
    surgery: str,
) -> None:
    model = tiny_model("llama")
    before, pad_token = state_of(model), tiny_tokenizer.pad_token
    selection = selection_of(model, SOME)
    config = CONFIG.changed(surgery=surgery)
    result = tune(model, tiny_tokenizer, selection, data=pairs, out=tmp_path / "a", config=config, utility=aligned)
    after = state_of(model)
    assert all(torch.equal(after["tensors"][name], tensor) for name, tensor in before.pop("tensors").items())
    for what in before:
        assert after[what] == before[what], what
    assert tiny_tokenizer.pad_token == pad_token
    assert result == TuneResult.load(tmp_path / "a")
    assert result.certificate == certify(model, tmp_path / "a", selection)
    assert result.certificate.changed_rows == result.certificate.selected_rows == 24
    assert (result.surgery is None) == (surgery == "none")
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
    assert not (tmp_path / "a" / "ref").exists()
    PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "a")


def test_dpo_prefers_the_chosen_replies(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    pairs: list[Example],
    selection_of: SelectionOf,
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    heads = [(layer, head) for layer in range(3) for head in range(4)]
    config = CONFIG.changed(max_steps=10, batch_size=6, accumulation=1)
    tune(model, tiny_tokenizer, selection_of(model, heads), data=pairs, out=tmp_path / "a", config=config)

    @torch.no_grad()
    def preference(one: Any) -> float:
        found = preference_pairs(ChatFormat(tiny_tokenizer), pairs)
        return sum(
            float(log_prob(one, p["prompt_ids"], p["chosen_ids"]) - log_prob(one, p["prompt_ids"], p["rejected_ids"]))
            for p in found
        )

    assert preference(PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "a")) > preference(model) + 1


def test_a_stopped_training_comes_to_the_same_adapter(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    pairs: list[Example],
    selection_of: SelectionOf,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def train(name: str) -> TuneResult:
        model = tiny_model("llama")
        return tune(model, tiny_tokenizer, selection_of(model, SOME), data=pairs, out=tmp_path / name, config=CONFIG)

    whole = train("whole")
    calls = []
    finite = SparseTraining.finite

    def interrupted(self: Any, loss: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return finite(self, loss)

    monkeypatch.setattr(SparseTraining, "finite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train("stopped")
    assert Workspace.beside(tmp_path / "stopped").last_checkpoint() is not None
    stopped = train("stopped")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]
    assert (stopped.losses, stopped.tokens) == (whole.losses, whole.tokens)


def test_refusals(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    pairs: list[Example],
    aligned: list[Example],
    selection_of: SelectionOf,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    selection = selection_of(model, SOME)
    same = Example(id="same", prompt="a", reply="b", rejected="b")
    for data, said in (
        (aligned, "'a0' has no pair.*chosen, rejected"),
        ([*pairs, same], "'same': chosen and rejected"),
    ):
        with pytest.raises(DataError, match=said):
            tune(model, tiny_tokenizer, selection, data=data, out=tmp_path / "a", config=CONFIG)
    with pytest.raises(CastuneError, match="replay"):
        CONFIG.changed(replay=0.1)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(CastuneError, match="pip install"):
        tune(model, tiny_tokenizer, selection, data=pairs, out=tmp_path / "a", config=CONFIG)
    assert list(tmp_path.iterdir()) == []
