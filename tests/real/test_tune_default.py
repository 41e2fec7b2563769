"""Tuning the default model: unchosen rows and all other tensors bit-identical, the adapter a standard one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

import castune as ct
from castune.artifacts import Certificate, HeadSelection
from castune.artifacts.unit import joined
from castune.config import TuneConfig
from castune.core.heads import HeadLayout
from castune.core.provenance import fingerprint
from castune.data.sources import examples
from castune.tuning.train import tune
from castune.tuning.verify import certify

pytestmark = pytest.mark.real

# Two heads that share a key-value group, a lone one, and one in the last layer; 9 heads of 64 rows a layer.
HEADS = ((0, 0), (0, 1), (14, 8), (29, 4))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> Tensor:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How do I bake bread?"}], tokenize=False, add_generation_prompt=True
    )
    return model.eval()(**tokenizer(text, return_tensors="pt")).logits


def test_only_the_chosen_rows_of_the_default_model_move(
    default_model: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_threads: None
) -> None:
    model, tokenizer = default_model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base_logits = logits(model, tokenizer)
    selection = HeadSelection(
        units=joined(HEADS), zone="custom", fraction=None, buckets=None, bucket=None, score="conflict", seed=None,
        n_total=len(HeadLayout.of(model).heads), model_fingerprint=fingerprint(model), conflict_map_hash=None,
    )  # fmt: skip
    assert selection.n_total == 270

    trained: list[Tensor] = []
    save = PeftModel.save_pretrained

    def save_and_look(self: Any, *args: Any, **options: Any) -> Any:
        trained.append(logits(self, tokenizer))
        return save(self, *args, **options)

    monkeypatch.setattr(PeftModel, "save_pretrained", save_and_look)
    # AdamW with weight decay, 3 steps of 2 x 2 examples.
    config = TuneConfig(rank=8, learning_rate=1e-3, weight_decay=0.1, max_steps=3, batch_size=2, accumulation=2)
    data = examples("starter-align", limit=12, seed=1)
    result = tune(model, tokenizer, selection, data=data, out=tmp_path / "adapter", config=config)

    after = model.state_dict()
    assert all(torch.equal(bits(after[name]), bits(before[name])) for name in before)
    assert torch.equal(logits(model, tokenizer), base_logits)
    assert result.steps == 3

    # The session's model is wrapped once more and given back as it was.
    peft_model = PeftModel.from_pretrained(model, tmp_path / "adapter")
    try:
        reloaded = logits(peft_model, tokenizer)
        peft_model.merge_adapter()
        merged = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.clone()
            for name, tensor in peft_model.state_dict().items()
            if "lora_" not in name
        }
        peft_model.unmerge_adapter()
    finally:
        peft_model.unload()
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(before[name])
    assert torch.equal(reloaded, trained[0])
    assert not torch.equal(reloaded, base_logits)

    rows = {layer: {64 * h + r for owner, h in HEADS if owner == layer for r in range(64)} for layer, _ in HEADS}
    for name, old in before.items():
        moved = (bits(merged[name]) != bits(old)).reshape(len(old), -1).any(1).nonzero().flatten().tolist()
        layer = int(name.split(".")[2]) if name.endswith("q_proj.weight") else None
        assert set(moved) == rows.get(layer, set()), name

    certificate = certify(model, tmp_path / "adapter", selection)
    assert certificate == result.certificate == Certificate.load(tmp_path / "adapter")
    assert (certificate.selected_rows, certificate.changed_rows) == (4 * 64, 4 * 64)
    assert certificate.checked_rows == 3 * 576 - 4 * 64


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_trl_trains_the_sparse_model_unchanged(
    default_model: tuple[Any, Any], tmp_path: Path, all_threads: None
) -> None:
    """The snippet of docs/howto/own-loop.md: TRL's SFTTrainer, then the certificate, plain PEFT, and transformers after the merge."""
    trl = pytest.importorskip("trl")
    model, tokenizer = default_model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    selection = HeadSelection.custom(HEADS, n_total=270, model_fingerprint=fingerprint(model))
    rows = [
        {"prompt": e.messages(), "completion": [{"role": "assistant", "content": e.reply}]}
        for e in examples("starter-align", limit=6, seed=1)
    ]
    arguments = trl.SFTConfig(
        str(tmp_path / "trainer"), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True,
        bf16=False, report_to=[], save_strategy="no", disable_tqdm=True, max_length=256,
    )  # fmt: skip
    peft_model = ct.sparse_lora(model, selection, r=8)
    try:
        trainer = trl.SFTTrainer(
            peft_model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "adapter"))
        trained = logits(peft_model, tokenizer)
    finally:
        peft_model.unload()
        vars(model).pop("forward", None)  # TRL puts one of its own there
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    assert all(torch.equal(bits(tensor), bits(before[name])) for name, tensor in model.state_dict().items())

    certificate = certify(model, tmp_path / "adapter", selection)
    assert certificate.changed_rows == certificate.selected_rows == 4 * 64
    base = copy.deepcopy(model)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(adapted, tokenizer), trained)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    # The same sums in another order, over 30 layers in float32.
    torch.testing.assert_close(logits(merged, tokenizer), trained, rtol=1e-4, atol=1e-3)
