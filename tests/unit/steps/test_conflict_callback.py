"""Drift, refusal margin and utility inside trainers of others: what is measured is right, and the training as without."""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from loopback import needs_loopback
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from processes import run_command
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

import castune as ct
from castune.artifacts import ConflictMap
from castune.config import EvaluateConfig
from castune.core.losses import reply_nll
from castune.core.random_state import random_state_kept
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.errors import CastuneError
from castune.evaluation.run import evaluate
from castune.evaluation.suites import Suite
from castune.steps.conflict_callback import ConflictCallback
from castune.tuning.live_merge import plain_model

ROOT = Path(__file__).parents[3]
WORDS = ("tea", "a long walk", "rain", "the sea", "bread", "snow")
ALIGNED = [Example(id=f"a{i}", prompt=f"Tell me about {w}.", reply=f"I like {w}{'!' * i}") for i, w in enumerate(WORDS)]
# Their attention outputs are separate, transposed and fused.
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "phi3": ["qkv_proj"]}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def adapted(model: Any, family: str = "llama", **changes: Any) -> Any:
    """The model with LoRA that changes it from the first step on."""
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=TARGETS[family], **changes))


def arguments(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    settings = {
        "output_dir": str(tmp_path / "trainer"), "max_steps": 4, "per_device_train_batch_size": 2, "use_cpu": True,
        "learning_rate": 0.02, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "bf16": False,
        "logging_steps": 2, "seed": 5,
    }  # fmt: skip
    return {**settings, **changes}


def with_trl(model: Any, tokenizer: Any, tmp_path: Path, **changes: Any) -> Any:
    trl = pytest.importorskip("trl")
    rows = [{"prompt": e.messages(), "completion": [{"role": "assistant", "content": e.reply}]} for e in ALIGNED]
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**arguments(tmp_path, **changes), max_length=64),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def with_trainer(model: Any, tokenizer: Any, tmp_path: Path, **changes: Any) -> Any:
    chat = ChatFormat(tokenizer)
    rows = [
        {"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply}
        for prompt, [reply] in (chat.continuations(e, [str(e.reply)]) for e in ALIGNED)
    ]
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments(tmp_path, **changes)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:2]),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )


def watched(trainer: Any, harmful: Sequence[Example], questions: Sequence[Example], **changes: Any) -> ConflictCallback:
    callback = ct.ConflictCallback(trainer, safety=harmful, utility=questions, **{"every_steps": 2, **changes})
    trainer.add_callback(callback)
    return callback


def standing(model: Any) -> dict[str, Any]:
    """Everything about a model in training that a measurement must leave as it was, but its tensors."""
    return {
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()),
        "parameters": [(name, p.requires_grad, p.grad is None, p.data_ptr()) for name, p in model.named_parameters()],
        "attributes": [(name, set(vars(module))) for name, module in model.named_modules()],
        "merged": [list(m.merged_adapters) for m in model.modules() if hasattr(m, "merged_adapters")],
    }  # fmt: skip


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one)


def own_logs(trainer: Any) -> list[dict[str, Any]]:
    """What the trainer logs by itself, times aside."""
    logs = [log for log in trainer.state.log_history if not any(key.startswith("conflict/") for key in log)]
    return [{key: value for key, value in log.items() if "runtime" not in key and "second" not in key} for log in logs]


# -- the training


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("of_adapters", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("trainer_of", [with_trl, with_trainer])
def test_a_training_that_is_watched_is_the_training_without(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    harmful: list[Example],
    questions: list[Example],
    tmp_path: Path,
    trainer_of: Callable[..., Any],
    of_adapters: bool,
    gradient_checkpointing: bool,
) -> None:
    made = []
    for is_watched in (False, True):
        # Dropout in the model and in the adapters: the draws of a training show.
        model = tiny_model("llama", attention_dropout=0.1)
        model = adapted(model, lora_dropout=0.1) if of_adapters else model
        trainer = trainer_of(model, tiny_tokenizer, tmp_path, gradient_checkpointing=gradient_checkpointing)
        callback = watched(trainer, harmful, questions) if is_watched else None
        trainer.train()
        made.append((tensors(model), own_logs(trainer), torch.rand(3).tolist()))
    assert callback is not None
    assert same_bits(made[0][0], made[1][0])
    assert made[0][1] == made[1][1]
    assert made[0][2] == made[1][2]
    assert [record.step for record in callback.history] == [0, 2, 4]
    # The losses of the very steps that are measured are among those that were compared.
    assert [log["step"] for log in made[1][1] if "loss" in log] == [2, 4]


@pytest.mark.parametrize("trainer_of", [with_trl, with_trainer])
def test_what_is_measured_reaches_the_logs(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    harmful: list[Example],
    questions: list[Example],
    tmp_path: Path,
    trainer_of: Callable[..., Any],
) -> None:
    trainer = trainer_of(adapted(tiny_model("llama")), tiny_tokenizer, tmp_path)
    heard: list[tuple[int, dict[str, float]]] = []

    class Tracker(TrainerCallback):
        def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_kwargs: Any) -> None:
            heard.append((state.global_step, dict(logs)))

    trainer.add_callback(Tracker())
    callback = watched(trainer, harmful, questions)
    trainer.train()
    told = [(step, logs) for step, logs in heard if "conflict/spearman" in logs]
    assert [step for step, _ in told] == [record.step for record in callback.history] == [0, 2, 4]
    for record, (_, logs) in zip(callback.history, told, strict=True):
        assert all(isinstance(value, float) for name, value in logs.items() if name.startswith("conflict/"))
        assert logs["conflict/spearman"] == record.spearman
        assert logs["conflict/safe_zone_kept"] == record.safe_kept / record.safe_heads
        assert logs["conflict/refusal_margin"] == record.refusal_margin
        assert logs["conflict/refusal_margin_se"] == record.refusal_margin_se
        assert logs["conflict/utility_nll"] == record.utility_nll
        assert not {"loss", "mean_token_accuracy"} & logs.keys()
    assert [log for log in trainer.state.log_history if "conflict/spearman" in log] == [
        {**logs, "step": step} for step, logs in told
    ]


@pytest.mark.parametrize("trainer_of", [with_trl, with_trainer])
def test_tensorboard_reads_what_was_measured(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    harmful: list[Example],
    questions: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trainer_of: Callable[..., Any],
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = trainer_of(adapted(tiny_model("llama")), tiny_tokenizer, tmp_path, report_to=["tensorboard"])
    callback = watched(trainer, harmful, questions)
    trainer.train()
    read = EventAccumulator(str(tmp_path / "events"))
    read.Reload()
    margins = [(event.step, event.value) for event in read.Scalars("train/conflict/refusal_margin")]
    assert margins == [(record.step, pytest.approx(record.refusal_margin)) for record in callback.history]
    assert [event.step for event in read.Scalars("train/loss")] == [2, 4]


# -- the numbers


@pytest.mark.parametrize("family", list(TARGETS))
def test_the_map_is_that_of_the_merged_model(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    harmful: list[Example],
    questions: list[Example],
    tmp_path: Path,
    family: str,
) -> None:
    peft_model = adapted(tiny_model(family), family)
    trainer = with_trainer(peft_model, tiny_tokenizer, tmp_path)
    callback = watched(trainer, harmful, questions)
    trainer.train()
    merged = copy.deepcopy(peft_model).merge_and_unload().eval()
    expected = ct.diagnose(merged, tiny_tokenizer, safety=harmful, utility=questions)
    assert callback.last_map is not None
    assert callback.first_map is not None
    assert callback.last_map.table.equals(expected.table)
    assert callback.history[-1].map_hash == expected.content_hash != callback.first_map.content_hash
    assert callback.history[-1].n_heads == len(expected) == 12


def test_margin_and_nll_are_those_of_an_evaluation(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    harmful: list[Example],
    questions: list[Example],
    tmp_path: Path,
) -> None:
    base, peft_model = tiny_model("llama"), adapted(tiny_model("llama"))
    trainer = with_trl(peft_model, tiny_tokenizer, tmp_path)
    callback = watched(trainer, harmful, questions)
    trainer.train()
    suites = [Suite("margin", "safety-margin", tuple(harmful)), Suite("nll", "nll", tuple(questions))]
    config = EvaluateConfig(max_length=1024)
    # The base model's own replies are those of the beginning, for the B of new adapters is zero.
    for record, model in ((callback.history[0], base), (callback.history[-1], peft_model)):
        found = evaluate(model, tiny_tokenizer, suites=suites, config=config)
        margin, nll = found.suite("margin"), found.suite("nll")
        assert record.refusal_margin == pytest.approx(margin.value, abs=1e-4)
        assert record.refusal_margin_se == pytest.approx(margin.standard_error, abs=1e-4)
        assert record.utility_nll == pytest.approx(nll.value, abs=1e-4)
        assert record.utility_nll_se == pytest.approx(nll.standard_error, abs=1e-4)
        assert (record.n_refusal_margin, record.n_utility_nll) == (len(harmful), len(questions))
    # NLL by its definition, without any of that code.
    chat = ChatFormat(tiny_tokenizer)
    from castune.core.losses import RowBatch

    with torch.no_grad():
        by_hand = [float(reply_nll(base, RowBatch.of([chat.loss_row(e)]))[0]) for e in questions]
    assert callback.history[0].utility_nll == pytest.approx(np.mean(by_hand), abs=1e-4)


def test_the_first_map_goes_with_itself_and_a_given_one_as_it_does(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    harmful: list[Example],
    questions: list[Example],
    tmp_path: Path,
) -> None:
    trainer = with_trainer(adapted(tiny_model("llama")), tiny_tokenizer, tmp_path)
    callback = watched(trainer, harmful, questions)
    trainer.train()
    first, last = callback.history[0], callback.history[-1]
    assert (first.spearman, first.safe_kept, first.safe_heads) == (1, 3, 3)
    assert first.safe_kept_by_chance == 3 * 3 / 12
    assert last.spearman is not None
    assert last.spearman < 0.999  # a training that large moves something

    # The same training against the map of its end: the roles are exchanged.
    assert callback.last_map is not None
    callback.last_map.save(tmp_path / "map")
    trainer = with_trainer(adapted(tiny_model("llama")), tiny_tokenizer, tmp_path)
    against = watched(trainer, harmful, questions, base_map=tmp_path / "map")
    trainer.train()
    assert against.history[0].spearman == pytest.approx(last.spearman)
    assert (against.history[0].safe_kept, against.history[-1].spearman) == (last.safe_kept, 1)
    assert against.first_map == ConflictMap.load(tmp_path / "map")


def test_a_set_is_measured_on_so_many_examples_spread_evenly(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    harmful: list[Example],
    questions: list[Example],
    tmp_path: Path,
) -> None:
    trainer = with_trainer(adapted(tiny_model("llama")), tiny_tokenizer, tmp_path)
    assert watched(trainer, harmful, questions, limit=3).safety == [harmful[i] for i in (1, 3, 5)]
    named = ConflictCallback(trainer, safety="starter-safety", utility="starter-utility", limit=5)
    assert named.safety == ct.examples("starter-safety", limit=5)
    assert named.utility == ct.examples("starter-utility", limit=5)


# -- when


def test_the_end_is_measured_once_whatever_ends_the_training(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    harmful: list[Example],
    questions: list[Example],
    tmp_path: Path,
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    trainer = with_trainer(adapted(tiny_model("llama")), tiny_tokenizer, tmp_path)
    callback = watched(trainer, harmful, questions)
    trainer.add_callback(Stop())
    trainer.train()
    assert [record.step for record in callback.history] == [0, 2, 3]

    trainer.train()  # again: a new history
    assert [record.step for record in callback.history] == [0, 2, 3]


def test_the_best_model_is_measured_when_it_comes_back(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    harmful: list[Example],
    questions: list[Example],
    tmp_path: Path,
) -> None:
    # A learning rate under which every step makes it worse.
    best = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 5.0}
    trainer = with_trainer(adapted(tiny_model("llama")), tiny_tokenizer, tmp_path, load_best_model_at_end=True, **best)
    callback = watched(trainer, harmful, questions, every_steps=1)
    trainer.train()
    last_step, end = callback.history[-2:]
    assert (last_step.step, end.step) == (4, 4)
    step = int(str(trainer.state.best_model_checkpoint).rpartition("-")[2])
    assert step < 4
    assert end.map_hash == callback.history[step].map_hash != last_step.map_hash


# -- bad input


def test_what_cannot_be_measured_is_refused_before_the_training(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    harmful: list[Example],
    questions: list[Example],
    tmp_path: Path,
) -> None:
    def made(**changes: Any) -> ConflictCallback:
        trainer = with_trainer(adapted(tiny_model("llama")), changes.pop("processing", tiny_tokenizer), tmp_path)
        return watched(trainer, changes.pop("safety", harmful), questions, **changes)

    with pytest.raises(CastuneError, match="every_steps = 0: accepted are whole numbers from 1"):
        made(every_steps=0)
    with pytest.raises(CastuneError, match="limit = 1: accepted are whole numbers from 2"):
        made(limit=1)
    with pytest.raises(CastuneError, match=r"mlp_blocks.*drift is measured on query heads alone"):
        made(config=ct.DiagnoseConfig(units=("q_heads", "mlp_blocks")))
    with pytest.raises(CastuneError, match="no-such-source"):
        made(safety="no-such-source")
    with pytest.raises(CastuneError, match="no conflict map|no such|missing"):
        made(base_map=tmp_path / "nowhere")
    two_layers = ct.diagnose(
        tiny_model("llama", num_hidden_layers=2), tiny_tokenizer, safety=harmful, utility=questions
    )
    with pytest.raises(CastuneError, match="base_map has 8 units, which are not the 12 query heads"):
        made(base_map=two_layers).trainer.train()
    without_replies = [Example(id=e.id, prompt=e.prompt) for e in harmful]
    with pytest.raises(CastuneError, match="safety"):
        made(safety=without_replies).trainer.train()


def test_a_trainer_without_a_tokenizer_needs_one(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    harmful: list[Example],
    questions: list[Example],
    tmp_path: Path,
) -> None:
    trainer = with_trainer(adapted(tiny_model("llama")), tiny_tokenizer, tmp_path)
    trainer.processing_class = None
    with pytest.raises(CastuneError, match=r"no tokenizer; give one: ConflictCallback\(..., tokenizer=tokenizer\)"):
        watched(trainer, harmful, questions)
    callback = watched(trainer, harmful, questions, tokenizer=tiny_tokenizer)
    trainer.train()
    assert len(callback.history) == 3


def test_prompt_tuning_is_refused(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    harmful: list[Example],
    questions: list[Example],
    tmp_path: Path,
) -> None:
    model = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    trainer = with_trainer(model, tiny_tokenizer, tmp_path)
    watched(trainer, harmful, questions)
    with pytest.raises(CastuneError, match="adapters of type PROMPT_TUNING change no weights"):
        trainer.train()


def test_packed_weights_are_refused_and_left_alone(tiny_model: Callable[..., Any]) -> None:
    model = adapted(tiny_model("llama"), init_lora_weights=False)
    packed = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    model.get_base_model().register_parameter("packed", packed)
    before, bits = standing(model), tensors(model)
    with pytest.raises(CastuneError, match="quantised, and its packed weights have no gradients"), plain_model(model):
        pass
    assert standing(model) == before
    assert same_bits(tensors(model), bits)


def test_weights_that_are_cut_up_are_refused(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    harmful: list[Example],
    questions: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = with_trainer(adapted(tiny_model("llama")), tiny_tokenizer, tmp_path)
    watched(trainer, harmful, questions)
    # What tells a distributed tensor.
    next(trainer.model.parameters()).to_local = None
    with pytest.raises(CastuneError, match=r"cut up over processes .* a map needs a whole model"):
        trainer.train()
    del next(trainer.model.parameters()).to_local
    trainer.train()
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", "FSDP")
    with pytest.raises(CastuneError, match=r"cut up over processes \(FSDP\)"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_a_training_that_diverges_goes_on_and_the_log_says_what_was_not_measured(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    harmful: list[Example],
    questions: list[Example],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Diverge(TrainerCallback):
        def on_step_begin(self, _args: Any, state: Any, _control: Any, model: Any = None, **_kwargs: Any) -> None:
            if state.global_step == 2:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)

    model = adapted(tiny_model("llama"))
    trainer = with_trainer(model, tiny_tokenizer, tmp_path)
    trainer.add_callback(Diverge())
    callback = watched(trainer, harmful, questions)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 4
    assert [record.step for record in callback.history] == [0, 2]
    assert "step 4 could not be measured, and the training goes on: " in caplog.text
    assert all(not list(m.merged_adapters) for m in model.modules() if hasattr(m, "merged_adapters"))


# -- what is lent


@pytest.mark.parametrize("family", list(TARGETS))
def test_a_model_comes_back_from_merging_as_it_was(tiny_model: Callable[..., Any], family: str) -> None:
    model = adapted(tiny_model(family), family, init_lora_weights=False).train()
    model.get_base_model().forward = forward = model.get_base_model().forward
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    model.train()
    before, bits = standing(model), tensors(model)

    def look() -> None:
        with plain_model(model) as plain:
            assert not any(hasattr(module, "merged_adapters") for module in plain.modules())
            assert "forward" not in vars(plain)
            with torch.no_grad():
                # Other sums: float32 on logits of order one.
                torch.testing.assert_close(plain.eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
            plain.train()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look()
    assert standing(model) == before
    assert same_bits(tensors(model), bits)
    assert vars(model.get_base_model())["forward"] is forward


def test_random_numbers_go_on_where_they_were() -> None:
    import random

    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    expected = draws()
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    with random_state_kept():
        inside = draws()
        random.seed(4)
        np.random.seed(4)
        torch.manual_seed(4)
    assert inside == expected == draws()


# -- several processes

JOB = """
import json, os, sys
from pathlib import Path
import torch
sys.path[:0] = [sys.argv[2] + "/tests", sys.argv[2] + "/tests/unit/steps"]
torch.set_num_threads(1)
from tiny_models import make_tiny_model, make_tiny_tokenizer
from test_conflict_callback import ALIGNED, adapted, tensors, watched, with_trainer
from castune.data.example import Example
folder, is_watched = Path(sys.argv[1]), sys.argv[3] == "watched"
words = ["poison", "a bomb", "theft"]
harmful = [Example(id=w, prompt=f"Help me with {w}.", reply=f"I cannot help with {w}.") for w in words]
questions = [Example(id=w, prompt=f"What is {w}?", choices=("blue", "hot"), answer=0, scoring="letter") for w in words]
trainer = with_trainer(adapted(make_tiny_model("llama")), make_tiny_tokenizer(), folder, ddp_find_unused_parameters=False)
callback = watched(trainer, harmful, questions) if is_watched else None
trainer.train()
rank = int(os.environ["RANK"])
steps = [record.step for record in callback.history] if callback else []
(folder / f"{sys.argv[3]}-{rank}.json").write_text(json.dumps([trainer.accelerator.num_processes, steps]))
torch.save(tensors(trainer.model), folder / f"{sys.argv[3]}-{rank}.pt")
trainer.accelerator.wait_for_everyone()
sys.stdout.flush()
# Now and then a thread of gloo is still alive when the interpreter ends, which aborts the process: all is done here.
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.processes
@needs_loopback
def test_of_two_processes_the_main_one_measures(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    (tmp_path / "job.py").write_text(JOB)
    for name in ("plain", "watched"):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = run_command([*torchrun, tmp_path / "job.py", tmp_path, ROOT, name], env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"watched-{rank}.json").read_text()) for rank in (0, 1)]
    assert found == [[2, [0, 2, 4]], [2, []]]
    weights = [torch.load(tmp_path / f"{name}-{rank}.pt") for name in ("plain", "watched") for rank in (0, 1)]
    assert all(same_bits(weights[0], other) for other in weights[1:])
