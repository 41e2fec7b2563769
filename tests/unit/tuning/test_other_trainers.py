"""The model of `sparse_lora` in the trainers of others, unchanged: TRL's SFTTrainer, HF Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny_training import IDS, SOME, SelectionOf
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import castune as ct
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.tuning.verify import certify


def arguments(tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "trainer"), "max_steps": 3, "per_device_train_batch_size": 2, "use_cpu": True,
        "learning_rate": 0.05, "weight_decay": 0.1, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "bf16": False, "logging_steps": 1,
    }  # fmt: skip


def with_trl(peft_model: Any, tokenizer: Any, data: Sequence[Example], tmp_path: Path) -> Any:
    trl = pytest.importorskip("trl")
    rows = [
        {"prompt": example.messages(), "completion": [{"role": "assistant", "content": example.reply}]}
        for example in data
    ]
    return trl.SFTTrainer(
        model=peft_model,
        args=trl.SFTConfig(**arguments(tmp_path), max_length=64),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def with_trainer(peft_model: Any, tokenizer: Any, data: Sequence[Example], tmp_path: Path) -> Any:
    chat = ChatFormat(tokenizer)
    rows = [
        {"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply}
        for prompt, [reply] in (chat.continuations(e, [str(e.reply)]) for e in data)
    ]
    return Trainer(
        model=peft_model,
        args=TrainingArguments(**arguments(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("trainer_of", [with_trl, with_trainer])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_the_certificate_holds(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    selection_of: SelectionOf,
    aligned: list[Example],
    tmp_path: Path,
    family: str,
    trainer_of: Callable[..., Any],
) -> None:
    base = tiny_model(family)
    base.save_pretrained(tmp_path / "base")
    selection = selection_of(base, SOME)
    torch.manual_seed(1)
    peft_model = ct.sparse_lora(tiny_model(family), selection, r=4)
    trainer = trainer_of(peft_model, tiny_tokenizer, aligned, tmp_path)
    trainer.train()
    assert trainer.state.global_step == 3
    trainer.save_model(str(tmp_path / "adapter"))

    certificate = certify(base, tmp_path / "adapter", selection)
    assert certificate.changed_rows == certificate.selected_rows == 3 * 8
    # Read back by plain PEFT, and by transformers after the merge.
    with torch.no_grad():
        trained = peft_model.eval()(input_ids=IDS).logits
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert torch.equal(loaded(input_ids=IDS).logits, trained)
        loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=IDS).logits
    # The same sums in another order: float32 on logits of order one.
    torch.testing.assert_close(merged, trained, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(
        trained, AutoModelForCausalLM.from_pretrained(tmp_path / "base")(input_ids=IDS).logits, atol=1e-2
    )
