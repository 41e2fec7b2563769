"""No pickle, no code of others, no secrets in files, no harmful reply where it is read by accident."""

from __future__ import annotations

import ast
import json
import logging
import os
import pickle
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import assert_one_error, castune, refused

import castune as ct
from castune.artifacts import ConflictMap, EvalResult
from castune.config import Recipe
from castune.core.loading import load
from castune.core.provenance import model_record, provenance
from castune.errors import CastuneError
from castune.evaluation.reply_cache import ReplyCache
from castune.evaluation.responses import Completion
from castune.pipeline import run
from castune.secrets import has_secret, redacted

Models = Callable[..., Path]
RecipeOf = Callable[..., Recipe]
SRC = Path(ct.__file__).parent
TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUv"


# -- pickle


def test_nothing_imports_or_calls_what_unpickles() -> None:
    modules = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
    calls = {
        "torch.load",
        "torch.save",
        "np.load",
        "numpy.load",
        "yaml.load",
        "pd.read_pickle",
        "os.system",
        "eval",
        "exec",
    }
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not {name.partition(".")[0] for name in names} & modules, path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in calls, f"{path}:{node.lineno}"
                assert not any(key.arg == "shell" and ast.unparse(key.value) == "True" for key in node.keywords), path


def test_no_file_of_a_run_is_or_holds_a_pickle(finished_run: Callable[..., Path]) -> None:
    folder = finished_run()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        content = path.read_bytes()
        assert not re.match(rb"\x80[\x02-\x05]", content), path
        assert not content.startswith(b"PK\x03\x04"), path  # torch.save's format
        assert path.suffix in (
            ".toml",
            ".json",
            ".jsonl",
            ".parquet",
            ".safetensors",
            ".html",
            ".svg",
            ".png",
            ".pdf",
            ".md",
        ), path


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_pickled_weights_are_refused_and_not_opened(models: Models, tmp_path: Path) -> None:
    model = models()
    (model / "model.safetensors").unlink()
    with (model / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Bomb(tmp_path / "marker"), file)
    with pytest.raises(CastuneError, match="safetensors"):
        load(str(model), dtype="float32", device="cpu")
    torch.save({"weight": torch.zeros(1)}, model / "pytorch_model.bin")
    with pytest.raises(CastuneError, match="Pickled weights can run code"):
        load(str(model), dtype="float32", device="cpu")
    assert not (tmp_path / "marker").exists()


def test_a_pickled_adapter_is_refused_and_not_opened(
    finished_run: Callable[..., Path], models: Models, tmp_path: Path
) -> None:
    folder = finished_run()
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    with (folder / "adapter" / "adapter_model.bin").open("wb") as file:
        pickle.dump(Bomb(tmp_path / "marker"), file)
    assert "missing" in refused("evaluate", folder)
    assert "is never read" in refused("mask", folder / "adapter", "--base", models(), "--out", tmp_path / "out")
    assert not (tmp_path / "marker").exists()


# -- code that comes with a model


@pytest.fixture
def with_code(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model directory with a class of its own, which leaves a mark when it is imported."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = models()
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config["model_type"] = "own-llama"
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'marker')!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own-llama'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return model


def test_code_of_a_model_is_not_run_unasked(with_code: Path, tmp_path: Path) -> None:
    with pytest.raises(CastuneError, match="trust_remote_code = true"):
        load(str(with_code), dtype="float32", device="cpu")
    line = assert_one_error(castune("diagnose", with_code, "--out", tmp_path / "run", cwd=tmp_path))
    assert "--trust-remote-code" in line
    assert not (tmp_path / "marker").exists()


def test_code_of_a_model_that_is_run_is_recorded(with_code: Path, tmp_path: Path, own_data: dict[str, Path]) -> None:
    done = castune(
        "diagnose", with_code, "--trust-remote-code", "--out", tmp_path / "run", "--safety", own_data["safety"],
        "--utility", own_data["utility"], "--measure", "margin", "--max-new-tokens", "2", "--dtype", "float32",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "marker").exists()
    assert ConflictMap.load(tmp_path / "run").metadata["model"]["remote_code"] is True
    assert Recipe.load(tmp_path / "run" / "recipe.toml").trust_remote_code


def test_other_models_have_no_such_mark(models: Models) -> None:
    model, _ = load(str(models()), dtype="float32", device="cpu")
    assert "remote_code" not in model_record(model)


# -- secrets


@pytest.mark.parametrize(
    "text",
    [
        TOKEN, "sk-proj-0123456789abcdefghij", "ghp_0123456789abcdefghijABCDEFGHIJ", "AKIAABCDEFGHIJKLMNOP",
        "https://me:hunter2hunter2@example.org/x.jsonl", "data?api_key=0123456789abcdef", "--password hunter2=x password=hunter2",
    ],
)  # fmt: skip
def test_what_looks_like_a_secret_is_redacted_and_refused_in_recipes(text: str) -> None:
    assert has_secret(text)
    assert "hunter2hunter2" not in redacted(text)
    assert TOKEN not in redacted(text)
    with pytest.raises(CastuneError, match=r"safety\.source holds what looks like a key") as refusal:
        Recipe.of(out="run", safety=text)
    assert text not in str(refusal.value)


@pytest.mark.parametrize(
    "text",
    ["meta-llama/Llama-3.1-8B-Instruct", "runs/secret-study", "mmlu@main", "utility:data/passwords.jsonl", "token-level.jsonl",
     "sk-learn", "wildjailbreak-vanilla-harmful", "openai=gpt-4o-mini", "https://example.org/a:b/c@d.jsonl", "hf_model", "AKIA"],
)  # fmt: skip
def test_innocent_words_are_left_alone(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if re.search("TOKEN|KEY|SECRET|PASS", name)]:
        monkeypatch.delenv(name)
    assert redacted(text) == text
    assert Recipe.of(out="run", safety=text).safety.source == text


def test_values_of_secret_variables_get_into_no_file(
    recipe_of: RecipeOf, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-of-no-known-form-1234")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(sys, "argv", ["castune", "run", "--key", "a-key-of-no-known-form-1234", f"--token={TOKEN}"])
    assert provenance()["command"].count("<secret>") == 2
    folder = run(recipe_of(models())).path
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert b"a-key-of-no-known-form-1234" not in content, path
        assert TOKEN.encode() not in content, path


def test_an_error_does_not_repeat_a_secret(tmp_path: Path) -> None:
    done = castune("diagnose", f"./{TOKEN}", "--out", "run", cwd=tmp_path)
    assert done.returncode == 2
    assert TOKEN not in done.stderr + done.stdout


# -- harmful replies


def test_replies_are_readable_by_their_owner_alone_and_not_logged(
    recipe_of: RecipeOf, models: Models, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.umask(0o000)
    modes: list[int] = []
    from castune.core.journal import Journal

    plain = Journal.append

    def noted(self: Journal, record: dict[str, Any]) -> None:
        plain(self, record)
        assert self.folder is not None
        modes.extend(path.stat().st_mode for path in self.folder.glob("*.jsonl"))

    monkeypatch.setattr(Journal, "append", noted)
    with caplog.at_level(logging.DEBUG):
        folder = run(recipe_of(models(), evaluate__max_new_tokens=8)).path
    assert modes
    assert {stat.S_IMODE(mode) for mode in modes} == {0o600}
    replies = 0
    for arm in ("base", "safe", "risky"):
        assert stat.S_IMODE((folder / "evaluation" / arm / "samples.jsonl").stat().st_mode) == 0o600
        for sample in EvalResult.load(folder / "evaluation" / arm).samples:
            if len(sample.get("reply", "")) > 4:
                replies += 1
                assert sample["reply"] not in caplog.text
                assert sample["prompt"] not in caplog.text
    assert replies
    assert stat.S_IMODE((folder / "report.html").stat().st_mode) == 0o600
    # What holds no reply can be read by whoever may.
    assert stat.S_IMODE((folder / "conflict_map.parquet").stat().st_mode) == 0o666
    os.umask(0o022)


def test_cached_replies_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path)
    cache.put(["prompt"], Completion("reply", finished=True, tokens=1))
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert cache.get(["prompt"]) == Completion("reply", finished=True, tokens=1)
