"""lm-eval's protocol on tiny models: every number against plain forwards, and nothing of the caller's is changed."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import logging
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from castune.artifacts.formats import SCHEMA_VERSION
from castune.artifacts.lm_eval_result import LmEvalResult, LmEvalScore
from castune.errors import ArtifactError, CastuneError
from castune.evaluation.lm_eval import lm_eval_results

pytest.importorskip("lm_eval")

import lm_eval.evaluator
import lm_eval.tasks
from lm_eval.models.huggingface import HFLM

LETTERS = ("A", "B", "C", "D")
N_TOKENS = 24
Row = dict[str, Any]


# -- tasks in the shape of MMLU and GSM8K


def subject_rows(subject: str, n: int) -> list[Row]:
    return [
        {"question": f" {subject} {i}? ", "choices": [f"{subject[j % len(subject)]}{i * j}" for j in range(4)],
         "answer": (3 * i + len(subject)) % 4}
        for i in range(n)
    ]  # fmt: skip


SUBJECTS = {"law": subject_rows("law", 11), "art": subject_rows("art", 5)}
EXAMPLES = subject_rows("dev", 3)
PROBLEMS = [{"question": f"{a} and {b} make?", "answer": f"{a}+{b}\n#### {a + b}"} for a, b in ((1, 2), (3, 4), (5, 6))]

MULTIPLE_CHOICE: dict[str, Any] = {
    "dataset_path": "json",
    "test_split": "test",
    "fewshot_split": "dev",
    "fewshot_config": {"sampler": "first_n"},
    "output_type": "multiple_choice",
    "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
    "doc_to_choice": list(LETTERS),
    "doc_to_target": "answer",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        # Not a count but a smooth function of all log-likelihoods.
        {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False},
    ],
    "metadata": {"version": 1.5},
}
GENERATION: dict[str, Any] = {
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "generation_kwargs": {"until": ["Question:", "e"], "do_sample": False, "max_gen_toks": N_TOKENS},
    "filter_list": [
        {"name": "strict-match", "filter": [{"function": "regex", "regex_pattern": "#### (\\-?[0-9]+)"}, {"function": "take_first"}]},
        # Letters, for random models write few digits.
        {"name": "last-letter", "filter": [{"function": "regex", "group_select": -1, "regex_pattern": "([a-zA-Z])"}, {"function": "take_first"}]},
    ],
    "metadata": {"version": 3.0},
}  # fmt: skip


class TaskFolder:
    """A directory of task files with their data, which `include_path` takes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cache = path / "cache"

    def add(self, name: str, config: dict[str, Any], **splits: Sequence[Row]) -> None:
        files = {}
        for split, rows in splits.items():
            files[split] = str(self.path / f"{name}-{split}.jsonl")
            Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"dataset_kwargs": {"data_files": files, "cache_dir": str(self.cache)}} if files else {}
        self.write(name, {**({} if "group" in config else {"task": name}), **data, **config})

    def write(self, name: str, config: dict[str, Any]) -> None:
        (self.path / f"{name}.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture
def folder(tmp_path: Path) -> TaskFolder:
    """Two subjects, their group, and problems."""
    folder = TaskFolder(tmp_path)
    for subject, rows in SUBJECTS.items():
        config = {**MULTIPLE_CHOICE, "description": f"Questions about {subject}.\n\n"}
        folder.add(f"own_{subject}", config, test=rows, dev=EXAMPLES)
    folder.write("own", {
        "group": "own", "task": ["own_law", "own_art"], "metadata": {"version": 2},
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    })  # fmt: skip
    folder.add("own_problems", GENERATION, test=PROBLEMS)
    return folder


@pytest.fixture(autouse=True)
def only_own_tasks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lm-eval's 14 000 task files, which take seconds to read, save where they are the subject."""
    if "every_task" not in request.fixturenames:
        manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)


@pytest.fixture(scope="module")
def lm_eval_tasks() -> Any:
    return lm_eval.tasks.TaskManager()


@pytest.fixture
def every_task(lm_eval_tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path: lm_eval_tasks)


# -- by hand


@torch.no_grad()
def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """One plain forward, no batch, no padding."""
    start = tokenizer(context, add_special_tokens=False)["input_ids"]
    ids = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    assert ids[: len(start)] == start
    log_probs = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(log_probs[t - 1, ids[t]].item() for t in range(len(start), len(ids)))


def question_text(row: Row) -> str:
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question'].strip()}{options}\nAnswer:"


def prompt_text(row: Row, subject: str, shots: int) -> str:
    shown = "".join(f"{question_text(example)} {LETTERS[example['answer']]}\n\n" for example in EXAMPLES[:shots])
    return f"Questions about {subject}.\n\n{shown}{question_text(row)}"


def chat_text(tokenizer: Any, row: Row, subject: str, shots: int) -> str:
    turns = [{"role": "system", "content": f"Questions about {subject}.\n\n"}]
    for example in EXAMPLES[:shots]:
        turns.append({"role": "user", "content": question_text(example)})
        turns.append({"role": "assistant", "content": LETTERS[example["answer"]]})
    turns.append({"role": "user", "content": question_text(row)})
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def expected(scores: Sequence[Sequence[float]], rows: Sequence[Row]) -> dict[str, float]:
    """Accuracy, its standard error and the Brier score."""
    right = np.array([np.argmax(found) == row["answer"] for found, row in zip(scores, rows, strict=True)], dtype=float)
    shares = torch.tensor(scores, dtype=torch.float64).softmax(-1).numpy()
    targets = np.eye(4)[[row["answer"] for row in rows]]
    return {
        "acc": right.mean(),
        "acc_standard_error": right.std(ddof=1) / np.sqrt(len(right)),
        "brier_score": ((shares - targets) ** 2).sum(1).mean(),
    }


def by_hand(model: Any, tokenizer: Any, subject: str, *, n: int | None = None, shots: int = 0) -> dict[str, float]:
    rows = SUBJECTS[subject][:n]
    scores = [
        [log_likelihood(model, tokenizer, prompt_text(row, subject, shots), f" {letter}") for letter in LETTERS]
        for row in rows
    ]
    return expected(scores, rows)


@torch.no_grad()
def reply_by_hand(model: Any, tokenizer: Any, question: str) -> str:
    """Greedy text after the problem, by plain forwards, up to the first stop string."""
    ids = tokenizer(f"Question: {question}\nAnswer:", add_special_tokens=False)["input_ids"]
    tokens: list[int] = []
    while len(tokens) < N_TOKENS and (not tokens or tokens[-1] != tokenizer.eos_token_id):
        tokens.append(int(model(input_ids=torch.tensor([ids + tokens])).logits[0, -1].argmax()))
    return re.split("Question:|e", tokenizer.decode(tokens, skip_special_tokens=True))[0]


def results(model: Any, tokenizer: Any, folder: TaskFolder, *tasks: str, **settings: Any) -> LmEvalResult:
    return lm_eval_results(model, tokenizer, tasks=tasks, include_path=folder.path, **settings)


def assert_scores(found: LmEvalResult, task: str, wanted: dict[str, float]) -> None:
    accuracy, brier = found.score(task, "acc,none"), found.score(task, "brier_score,none")
    assert accuracy.value == pytest.approx(wanted["acc"])
    assert accuracy.standard_error == pytest.approx(wanted["acc_standard_error"])
    assert brier.value == pytest.approx(wanted["brier_score"], abs=1e-5)
    assert (accuracy.higher_is_better, brier.higher_is_better) == (True, False)
    # lm-eval has no standard error for it.
    assert brier.standard_error is None


# -- values


@pytest.mark.parametrize(("family", "batch_size"), [("llama", 1), ("llama", 8), ("gpt2", 3)])
def test_choices_are_scored_as_by_hand(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: TaskFolder, family: str, batch_size: int
) -> None:
    model = tiny_model(family)
    found = results(model, tiny_tokenizer, folder, "own", batch_size=batch_size)
    wanted = {subject: by_hand(model, tiny_tokenizer, subject) for subject in SUBJECTS}
    assert 0 < wanted["law"]["acc"] < 1
    for subject, values in wanted.items():
        assert_scores(found, f"own_{subject}", values)
        score = found.score(f"own_{subject}", "acc,none")
        assert (score.n, score.version, score.num_fewshot) == (len(SUBJECTS[subject]), "1.5", 0)

    [group] = found.groups
    assert (group.task, group.metric, group.n, group.version, group.num_fewshot) == ("own", "acc,none", 16, "2", 0)
    assert group.value == pytest.approx((11 * wanted["law"]["acc"] + 5 * wanted["art"]["acc"]) / 16)
    assert group.standard_error is not None
    assert group.higher_is_better is True
    assert found.members == {"own": ["own_law", "own_art"]}
    assert found.score("own") == group


def test_one_document_has_no_standard_error(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: TaskFolder
) -> None:
    found = results(tiny_model("llama"), tiny_tokenizer, folder, "own", limit=1)
    assert found.score("own_law", "acc,none").value in (0, 1)
    assert {score.standard_error for score in (*found.tasks, *found.groups)} == {None}


def test_the_limit_is_documents_a_task(tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: TaskFolder) -> None:
    model = tiny_model("llama")
    found = results(model, tiny_tokenizer, folder, "own", limit=4)
    assert [score.n for score in (*found.tasks, *found.groups)] == [4, 4, 4, 4, 8]
    assert_scores(found, "own_law", by_hand(model, tiny_tokenizer, "law", n=4))
    assert found.settings["limit"] == 4


def test_examples_are_shown_before_the_question(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: TaskFolder
) -> None:
    model = tiny_model("llama")
    found = results(model, tiny_tokenizer, folder, "own_law", num_fewshot=2)
    assert_scores(found, "own_law", by_hand(model, tiny_tokenizer, "law", shots=2))
    assert found.score("own_law", "acc,none").num_fewshot == 2


@pytest.mark.parametrize("shots", [0, 2])
def test_chat_templates_make_turns(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: TaskFolder, shots: int
) -> None:
    model = tiny_model("llama")
    rows = SUBJECTS["law"]
    scores = []
    for row in rows:
        text = chat_text(tiny_tokenizer, row, "law", shots)
        # The newline that ends the generation prompt is scored with every choice; no space stands before the letter.
        start = text.rstrip()
        scores.append([log_likelihood(model, tiny_tokenizer, start, text[len(start) :] + x) for x in LETTERS])
    found = results(model, tiny_tokenizer, folder, "own_law", num_fewshot=shots, apply_chat_template=True)
    assert_scores(found, "own_law", expected(scores, rows))
    assert found.settings["apply_chat_template"] is True


def test_replies_are_greedy_and_cut_at_stop_strings(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: TaskFolder
) -> None:
    model = tiny_model("llama")
    replies = [reply_by_hand(model, tiny_tokenizer, row["question"]) for row in PROBLEMS]
    letters = [(re.findall("[a-zA-Z]", reply) or ["[invalid]"])[-1] for reply in replies]
    assert len(set(letters)) > 1
    # Right answers to all but the last, read off what the model says.
    rows = [{"question": row["question"], "answer": letter} for row, letter in zip(PROBLEMS, letters, strict=True)]
    rows[-1]["answer"] = "7"
    folder.add("own_replies", GENERATION, test=rows)
    found = results(model, tiny_tokenizer, folder, "own_replies", batch_size=2)
    score = found.score("own_replies", "exact_match,last-letter")
    assert (score.value, score.n, score.version) == (pytest.approx(2 / 3), 3, "3.0")
    assert found.score("own_replies", "exact_match,strict-match").value == 0


def test_adapters_are_measured_and_not_their_base(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: TaskFolder
) -> None:
    model = tiny_model("llama")
    base = results(model, tiny_tokenizer, folder, "own_law", "own_problems")
    torch.manual_seed(1)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.mul_(20)
    found = results(adapted, tiny_tokenizer, folder, "own_law", "own_problems", name="safe")
    assert_scores(found, "own_law", by_hand(adapted, tiny_tokenizer, "law"))
    assert found.score("own_law", "brier_score,none").value != pytest.approx(
        base.score("own_law", "brier_score,none").value, abs=1e-3
    )
    assert found.name == "safe"
    assert found.model["fingerprint"] != base.model["fingerprint"]
    with adapted.disable_adapter():
        off = results(adapted, tiny_tokenizer, folder, "own_law")
    assert off.tasks == tuple(score for score in base.tasks if score.task == "own_law")


def test_numbers_are_those_of_simple_evaluate(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: TaskFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn examples too: sampled from many, with the seed of lm-eval's own entry point."""
    config = {**MULTIPLE_CHOICE, "fewshot_config": {"sampler": "default"}, "num_fewshot": 3}
    folder.add("own_drawn", config, test=SUBJECTS["law"], dev=subject_rows("many", 40))
    model = tiny_model("llama")
    tasks = ["own", "own_drawn", "own_problems"]
    # It would run a dozen commands to describe the machine.
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    theirs = {}
    for seed in (0, 5):
        theirs[seed] = lm_eval.evaluator.simple_evaluate(
            HFLM(pretrained=model, tokenizer=copy.deepcopy(tiny_tokenizer), batch_size=8), tasks=list(tasks),
            task_manager=lm_eval.tasks.TaskManager(include_path=folder.path), limit=6, random_seed=seed,
            numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
        )["results"]  # fmt: skip
        ours = results(model, tiny_tokenizer, folder, *tasks, limit=6, seed=seed)
        assert len(ours.tasks) == 8
        for score in (*ours.tasks, *ours.groups):
            facts = theirs[seed][score.task]
            assert score.value == float(facts[score.metric])
            error = facts[score.metric.replace(",", "_stderr,")]
            assert score.standard_error == (None if error == "N/A" else error)
        assert ours.score("own_drawn", "acc,none").num_fewshot == 3
    assert theirs[0]["own_drawn"] != theirs[5]["own_drawn"]


def test_a_task_without_examples_stays_without(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: TaskFolder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.add("own_fixed", {**MULTIPLE_CHOICE, "num_fewshot": 0}, test=SUBJECTS["art"], dev=EXAMPLES)
    found = results(tiny_model("llama"), tiny_tokenizer, folder, "own_fixed", "own_art", num_fewshot=2)
    shots = {score.task: score.num_fewshot for score in found.tasks}
    assert shots == {"own_fixed": 0, "own_art": 2}
    assert "num_fewshot 2 is not for own_fixed" in caplog.text


# -- what is left behind


def test_nothing_of_the_caller_is_changed(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: TaskFolder
) -> None:
    model = get_peft_model(
        tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).train()
    model.base_model.model.model.layers[1].eval()
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = None
    tokenizer.padding_side = "right"
    base = model.get_base_model()
    base.generation_config.repetition_penalty = 1.3
    config, content = base.generation_config, base.generation_config.to_dict()
    modes = [module.training for module in model.modules()]
    parameters = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    log = logging.getLogger("lm_eval")
    handlers, bar = list(log.handlers), lm_eval.api.task.tqdm
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()

    results(model, tokenizer, folder, "own", "own_problems")

    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert base.generation_config is config
    assert config.to_dict() == content
    assert "generation_config" not in vars(model), "the adapter must go on showing its base's"
    assert [module.training for module in model.modules()] == modes
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is one and torch.equal(one, old) for name, (one, old) in parameters.items())
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "right")
    assert (log.handlers, log.propagate, lm_eval.api.task.tqdm) == (handlers, True, bar)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_base_keeps_its_generation_config_under_an_adapter_with_another(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: TaskFolder
) -> None:
    base = tiny_model("llama")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    shipped, own = base.generation_config, copy.deepcopy(base.generation_config)
    model.generation_config = own
    results(model, tiny_tokenizer, folder, "own_problems")
    assert base.generation_config is shipped
    assert model.generation_config is own


def test_the_random_state_is_restored_after_an_error(folder: TaskFolder) -> None:
    random.seed(3), torch.manual_seed(3)
    states = random.getstate(), torch.get_rng_state()
    with pytest.raises(CastuneError):
        results(None, None, folder, "nothing_such")
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert logging.getLogger("lm_eval").propagate


def test_sampled_replies_come_again(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: TaskFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = {
        **GENERATION,
        "generation_kwargs": {"until": ["e"], "do_sample": True, "temperature": 1.0, "max_gen_toks": 8},
    }
    folder.add("own_sampled", sampled, test=PROBLEMS)
    model = tiny_model("llama")
    generate, said = HFLM.generate_until, []

    def generate_and_keep(*args: Any, **settings: Any) -> Any:
        said.append(generate(*args, **settings))
        return said[-1]

    monkeypatch.setattr(HFLM, "generate_until", generate_and_keep)
    for _ in range(2):
        torch.rand(7)
        results(model, tiny_tokenizer, folder, "own_sampled")
    assert said[0] == said[1]
    assert any(said[0])


def test_prompts_are_neither_logged_nor_printed(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    folder: TaskFolder,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # lm-eval logs the whole document where its answer is none of the choices.
    config = {**MULTIPLE_CHOICE, "metric_list": MULTIPLE_CHOICE["metric_list"][:1], "fewshot_split": None}
    folder.add("own_wrong", config, test=[{**row, "answer": i * 9} for i, row in enumerate(SUBJECTS["law"][:2])])
    caplog.set_level(logging.DEBUG)
    results(tiny_model("llama"), tiny_tokenizer, folder, "own_wrong", "own_problems", "own")
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]
    assert not any(text in caplog.text for text in ("Answer:", "law 1?", "make?"))


@pytest.mark.parametrize("task", ["own_law", "own_problems"])
def test_cut_prompts_are_said_once(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    folder: TaskFolder,
    caplog: pytest.LogCaptureFixture,
    task: str,
) -> None:
    found = results(tiny_model("llama", max_position_embeddings=40), tiny_tokenizer, folder, task)
    assert found.tasks[0].n in (11, 3)
    assert [r.getMessage() for r in caplog.records if r.name.startswith("castune")] == [
        "prompts longer than the model takes were cut on the left by lm-eval"
    ]


# -- errors, before anything is computed: there is no model


def fails(folder: TaskFolder | None, *tasks: str, **settings: Any) -> str:
    path = None if folder is None else folder.path
    with pytest.raises(CastuneError) as caught:
        lm_eval_results(None, None, tasks=tasks, **{"include_path": path, **settings})
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.slow
def test_unknown_tasks(every_task: None, folder: TaskFolder) -> None:
    message = fails(None, "gsm8k", "mmlu_anatomi")
    assert "no task 'mmlu_anatomi'" in message
    assert "mmlu_anatomy" in message
    assert "`lm-eval ls tasks`" in fails(None, "zzzzzzzzzzzzzzzzzzzzz")


def test_unknown_tasks_name_those_of_the_folder(folder: TaskFolder) -> None:
    (folder.path / "broken.yaml").write_text("task: [")
    message = fails(folder, "own_low")
    assert "close: own_law" in message
    assert message.endswith(f"readable in {folder.path}: own, own_art, own_law, own_problems")


@pytest.mark.parametrize("task", ["mmlu_anatomy", "mmlu", "gsm8k"])
def test_data_sets_out_of_reach(every_task: None, task: str) -> None:
    message = fails(None, task)
    assert message.startswith(f"task {task}: its data set cannot be reached (")
    assert {"mmlu": "cais/mmlu", "gsm8k": "openai/gsm8k"}[task.partition("_")[0]] in message


@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
def test_tasks_that_execute_code_are_refused(every_task: None, task: str) -> None:
    assert f"task {task}: it executes code that the model writes (unsafe_code)" in fails(None, task)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unsafe_code": True}, "executes code that the model writes"),
        ({"dataset_kwargs": {"trust_remote_code": True}}, "executes code of its data set"),
        ({"metric_list": [{"metric": "f1", "hf_evaluate": True}]}, "metric is code from the hub"),
    ],
)
@pytest.mark.parametrize("where", ["task", "group", "tag", "inline", "override", "changed"])
def test_refused_tasks_are_found_wherever_they_are(
    folder: TaskFolder, change: dict[str, Any], said: str, where: str
) -> None:
    bad = {**MULTIPLE_CHOICE, **change}
    if where == "inline":
        folder.write("outer", {"group": "outer", "task": [{"group": "inner", "task": [{**bad, "task": "own_bad"}]}]})
    elif where == "override":
        folder.write("outer", {"group": "outer", "task": [{"task": "own_law", **change}]})
    else:
        folder.write("own_bad", {**bad, "task": "own_bad", "tag": ["bad_tag"]})
        member = {"task": "own_bad", "num_fewshot": 1} if where == "changed" else "own_bad"
        folder.write("outer", {"group": "outer", "task": ["own_law", member]})
    assert said in fails(folder, {"task": "own_bad", "tag": "bad_tag"}.get(where, "outer"))


def test_bad_task_files(folder: TaskFolder) -> None:
    folder.add("own_bad", {**MULTIPLE_CHOICE, "test_split": "nothing"}, test=SUBJECTS["law"], dev=EXAMPLES)
    assert "task own_bad: cannot be set up: KeyError: 'nothing'" in fails(folder, "own_bad")
    (folder.path / "own_law-test.jsonl").unlink()
    message = fails(folder, "own_law")
    assert message.startswith("task own_law: its data set cannot be reached (")
    assert "own_law-test.jsonl" in message


def test_tasks_that_overlap(folder: TaskFolder) -> None:
    assert "own_law holds own_law, which another one asked for holds too" in fails(folder, "own", "own_law")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"limit": 0}, "limit: 0; accepted: a whole number from 1"),
        ({"limit": 0.5}, "limit: 0.5"),
        ({"num_fewshot": -1}, "num_fewshot: -1"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"batch_size": "auto"}, "batch_size: 'auto'"),
        ({"num_fewshot": 4}, "task own_law: num_fewshot is 4, it has 3 examples to show"),
        ({"apply_chat_template": True}, "no chat template"),
        ({"include_path": "nowhere"}, "include_path: nowhere is no directory"),
    ],
)
def test_bad_settings(folder: TaskFolder, settings: dict[str, Any], said: str) -> None:
    assert said in fails(folder, "own_law", **settings)


def test_no_tasks(folder: TaskFolder) -> None:
    assert "tasks: none given" in fails(folder)


def test_the_package_may_be_missing(folder: TaskFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    assert fails(folder, "own").endswith("need the package lm_eval: python -m pip install 'castune[lm-eval]'")


# -- the artifact


@pytest.fixture
def result(tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: TaskFolder) -> LmEvalResult:
    return results(tiny_model("llama"), tiny_tokenizer, folder, "own", limit=2, seed=4)


def test_save_and_load_is_equality(result: LmEvalResult, tmp_path: Path) -> None:
    path = result.save(tmp_path / "new" / "evaluation")
    assert path == tmp_path / "new" / "evaluation" / "lm_eval.json"
    assert LmEvalResult.load(path) == LmEvalResult.load(path.parent) == result
    LmEvalResult.load(path).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    record = json.loads(path.read_text())
    assert (record["kind"], record["schema_version"]) == ("lm-eval result", SCHEMA_VERSION)
    assert record["settings"] == {
        "tasks": ["own"], "limit": 2, "num_fewshot": None, "batch_size": 8, "apply_chat_template": False,
        "fewshot_as_multiturn": False, "include_path": str(tmp_path), "seed": 4,
    }  # fmt: skip
    assert record["provenance"]["versions"]["lm_eval"] == lm_eval.__version__
    assert record["provenance"]["seed"] == 4
    assert record["seconds"] > 0
    assert "law 0?" not in path.read_text(), "no prompts"


def test_a_given_identity_is_kept(tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: TaskFolder) -> None:
    info = {"name": "mine", "fingerprint": "0123456789abcdef"}
    found = results(tiny_model("llama"), tiny_tokenizer, folder, "own_art", limit=1, model_info=info)
    assert found.model == info


def test_scores_are_found_by_name(result: LmEvalResult) -> None:
    with pytest.raises(KeyError, match="2 scores of 'own_law'.*own_law acc,none, own_law brier_score,none"):
        result.score("own_law")
    with pytest.raises(KeyError, match="0 scores of 'own_law' with metric 'acc'"):
        result.score("own_law", "acc")


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "evaluation"},
        {"schema_version": SCHEMA_VERSION + 1},
        {"tasks": None},
        {"tasks": ["own_law"]},
        {"groups": [{"task": "own"}]},
        {"settings": "none"},
        {"members": []},
        {"seconds": ...},
        {"value": "high"},
        {"value": True},
        {"value": float("nan")},
        {"standard_error": float("inf")},
    ],
    ids=str,
)
def test_damaged_records_are_refused(result: LmEvalResult, tmp_path: Path, change: dict[str, Any]) -> None:
    path = result.save(tmp_path / "damaged.json")
    record = json.loads(path.read_text())
    # Damage that came with a new digest: every field is looked at.
    del record["digest"]
    [(key, value)] = change.items()
    if value is ...:
        del record[key]
    elif key in LmEvalScore.__dataclass_fields__:
        record["tasks"][0][key] = value
    else:
        record[key] = value
    path.write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=re.escape(str(path))):
        LmEvalResult.load(path)


def test_truncated_and_missing_files_are_refused(result: LmEvalResult, tmp_path: Path) -> None:
    path = result.save(tmp_path / "cut.json")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ArtifactError, match=r"cut\.json: damaged lm-eval result"):
        LmEvalResult.load(path)
    with pytest.raises(ArtifactError, match="no such lm-eval result; make it with: castune"):
        LmEvalResult.load(tmp_path / "nowhere")


def test_values_that_are_no_numbers_are_none(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, folder: TaskFolder, tmp_path: Path
) -> None:
    (folder.path / "own_metrics.py").write_text(
        "def results(doc, found):\n    return {'lost': float('nan'), 'kept': 0.5}\n"
    )
    config = {**GENERATION, "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("lost", "kept")
    ]}  # fmt: skip
    folder.add("own_lost", config, test=PROBLEMS)
    file = folder.path / "own_lost.yaml"
    file.write_text(file.read_text() + "process_results: !function own_metrics.results\n")
    found = results(tiny_model("llama"), tiny_tokenizer, folder, "own_lost")
    values = {score.metric: (score.value, score.standard_error) for score in found.tasks}
    assert values["lost,strict-match"] == (None, None)
    assert values["kept,last-letter"] == (0.5, 0.0)
    assert LmEvalResult.load(found.save(tmp_path / "lost.json")) == found
