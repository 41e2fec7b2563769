"""castune's safe-zone SFT against plain LoRA on q_proj under HF Trainer and under TRL; prints one table.

    make bench-training
    make bench-training BENCH_TRAINING='--examples 400 --dtype bfloat16'

Every contestant trains in a process of its own, one after the other, on the same token ids with the same batch size,
rank and number of examples, once over the data, and is timed on the training alone. Plain LoRA adapts q_proj of every
layer, as one would write it; castune a quarter of the heads, drawn at random so that no map is needed (they lie in
almost all layers, as a safe zone's do). Tokens are those of the examples, without padding.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import castune as ct
from castune.artifacts import HeadSelection
from castune.core.heads import HeadLayout
from castune.core.provenance import fingerprint
from castune.data.chat import ChatFormat

SEED = 21
RANK = 32
BATCH_SIZE, ACCUMULATION = 4, 2
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Result:
    """What a contestant reports: seconds of the training, bytes at the peak of its process, its last loss."""

    seconds: float
    peak: int
    loss: float


@dataclass(frozen=True)
class Data:
    """The examples as conversations, and as token ids with labels."""

    examples: list[Any]
    rows: list[dict[str, list[int]]]

    @property
    def n_tokens(self) -> int:
        return sum(len(row["input_ids"]) for row in self.rows)


def the_data(tokenizer: Any, n: int) -> Data:
    chat = ChatFormat(tokenizer)
    examples = ct.examples("starter-align", limit=n, seed=SEED)
    rows = []
    for example in examples:
        prompt, [reply] = chat.continuations(example, [str(example.reply)])
        rows.append({"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply})
    return Data(examples, rows)


def a_quarter_of_the_heads(model: Any) -> HeadSelection:
    heads = HeadLayout.of(model).heads
    chosen = random.Random(SEED).sample([(head.layer, head.head) for head in heads], round(len(heads) / 4))
    return HeadSelection.custom(chosen, n_total=len(heads), model_fingerprint=fingerprint(model))


def with_castune(model: Any, tokenizer: Any, data: Data, out: Path) -> tuple[float, float]:
    from castune.config import TuneConfig
    from castune.tuning.train import tune

    config = TuneConfig(
        rank=RANK,
        alpha=RANK,
        learning_rate=LEARNING_RATE,
        batch_size=BATCH_SIZE,
        accumulation=ACCUMULATION,
        checkpoint_steps=10**6,
        seed=SEED,
    )
    result = tune(model, tokenizer, a_quarter_of_the_heads(model), data=data.examples, out=out / "a", config=config)
    return result.seconds, result.losses[-1][1]


def plain_lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=["q_proj"], task_type="CAUSAL_LM")


def plain_arguments(out: Path) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "per_device_train_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": LEARNING_RATE,
        "num_train_epochs": 1,
        "seed": SEED,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
    }


def timed(trainer: Any) -> tuple[float, float]:
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    return seconds, [log["loss"] for log in trainer.state.log_history if "loss" in log][-1]


def with_trainer(model: Any, tokenizer: Any, data: Data, out: Path, sampling: str = "random") -> tuple[float, float]:
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    arguments = TrainingArguments(**plain_arguments(out), train_sampling_strategy=sampling)
    rows = [{**row, "length": len(row["input_ids"])} for row in data.rows]
    trainer = Trainer(
        model=get_peft_model(model, plain_lora()),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    return timed(trainer)


def with_trainer_by_length(model: Any, tokenizer: Any, data: Data, out: Path) -> tuple[float, float]:
    return with_trainer(model, tokenizer, data, out, "group_by_length")


def with_trl(model: Any, tokenizer: Any, data: Data, out: Path) -> tuple[float, float]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"prompt": example.messages(), "completion": [{"role": "assistant", "content": example.reply}]}
        for example in data.examples
    ]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**plain_arguments(out), max_length=1024, packing=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=plain_lora(),
    )
    return timed(trainer)


CONTESTANTS: dict[str, Callable[[Any, Any, Data, Path], tuple[float, float]]] = {
    "castune, a quarter of the heads": with_castune,
    "plain LoRA, HF Trainer": with_trainer,
    "plain LoRA, HF Trainer, by length": with_trainer_by_length,
    "plain LoRA, TRL": with_trl,
}


def compete(name: str, n_examples: int, dtype: str, result_file: Path) -> None:
    """One contestant, in this process."""
    model, tokenizer = ct.load("default", dtype=dtype)
    data = the_data(tokenizer, n_examples)
    with tempfile.TemporaryDirectory() as out:
        seconds, loss = CONTESTANTS[name](model, tokenizer, data, Path(out))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result_file.write_text(json.dumps(asdict(Result(seconds, peak, loss))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--contestant", choices=CONTESTANTS, help="run this one alone, into --result")
    parser.add_argument("--result", type=Path)
    options = parser.parse_args()
    if options.contestant:
        compete(options.contestant, options.examples, options.dtype, options.result)
        return
    n_tokens = the_data(ct.load("default", dtype=options.dtype)[1], options.examples).n_tokens
    print(
        f"SmolLM2-135M-Instruct, {options.dtype}, {options.examples} examples, {n_tokens:,} tokens, "
        f"{BATCH_SIZE} x {ACCUMULATION} a step, rank {RANK}, {os.cpu_count()} CPUs"
    )
    print(f"{'':36}{'seconds':>9}{'tokens/s':>10}{'castune is':>12}{'peak GB':>9}{'last loss':>11}", flush=True)
    castune: Result | None = None
    for name in CONTESTANTS:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "result.json"
            arguments = ["--examples", str(options.examples), "--dtype", options.dtype]
            command = [sys.executable, __file__, *arguments, "--contestant", name, "--result", str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{name:36}  not run: {(done.stderr.strip().splitlines() or ['?'])[-1]}", flush=True)
                continue
            result = Result(**json.loads(file.read_text()))
        castune = castune or result
        ratio = f"{result.seconds / castune.seconds:.2f} x"
        speed, peak = n_tokens / result.seconds, result.peak / 1e9
        print(f"{name:36}{result.seconds:9.1f}{speed:10.0f}{ratio:>12}{peak:9.2f}{result.loss:11.3f}", flush=True)


if __name__ == "__main__":
    main()
